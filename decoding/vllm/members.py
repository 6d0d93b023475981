"""Track the requests of vLLM's batch that are decoded by contrast, for both of vLLM's model runners.

vLLM has two interfaces of one name: `update_state(...)` and `apply(logits)` where the V1 runner runs (CPUs; all of vLLM 0.30),
`add_request(...)` and `apply(logits, ctx)` on Model Runner V2 (GPUs since 0.31). Read from vLLM 0.32 and 0.30; of private
names what follows from here uses `req_states.prompt_len` and `prefill_len` of V2, which its interface documents.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

V1: Any = import_module("vllm.v1.sample.logits_processor")
try:
    V2: Any = import_module("vllm.v1.worker.gpu.sample.logits_processor").LogitsProcessor
except ImportError:  # vLLM 0.30 has one interface
    V2 = object


class Members(V1.LogitsProcessor, V2):  # type: ignore[misc]
    """A logits processor that tracks its requests. A subclass implements `_member`, which selects them, and `apply`."""

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        """Take vLLM's arguments: `(vllm_config, device, is_pin_memory)` from V1, `(vllm_config, req_states)` from V2."""
        self._states: Any = rest[0] if len(rest) == 1 else None
        self._device = rest[0] if self._states is None else self._states.device
        self._members: dict[int, Any] = {}
        """States of requests by row of the batch (V1), or by slot (V2)."""

    def _member(self, params: Any, prompt: Sequence[int], output: Sequence[int]) -> Any:
        """Return the state to keep for a request, None to ignore it; `output` is the V1 runner's own list, which grows."""
        raise NotImplementedError

    def _changed(self) -> None:
        """Update the state after a change of the batch."""

    def is_argmax_invariant(self) -> bool:
        """Return False: the processor may change the argmax."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Update the requests that left, joined or moved, in this order (V1)."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._members.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self._put(index, params, prompt or (), output)
        for one, two, direction in batch_update.moved:
            moved = {two: self._members.pop(one, None)}
            if direction == V1.MoveDirectionality.SWAP:
                moved[one] = self._members.get(two)
            for index, member in moved.items():
                self._members.pop(index, None)
                if member is not None:
                    self._members[index] = member
        self._changed()

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Assign a request to a slot, replacing an earlier one (V2), and return whether it is tracked."""
        self._put(req_idx, sampling_params, (), ())
        self._changed()
        return req_idx in self._members

    def _put(self, index: int, params: Any, prompt: Sequence[int], output: Sequence[int]) -> None:
        self._members.pop(index, None)
        member = self._member(params, prompt, output)
        if member is not None:
            self._members[index] = member
