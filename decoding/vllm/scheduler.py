"""Schedulers that keep the branches of a completion in step: they start together, and none of them is preempted.

vLLM's scheduler starts requests as they arrive, processes long prompts in pieces and preempts running requests; each of these
puts two branches out of step. Here a completion waits outside vLLM's queues until all its branches have arrived, and is handed
over when the next step can process all its prompts whole, images included, and the cache has room for all tokens that it may generate.

vLLM does not call its scheduler a public interface. What is overridden here is `add_request`, `schedule`, `update_from_output`,
`finish_requests` and `get_num_unfinished_requests`; `tests/with_vllm/test_guard.py` reports what a new version of vLLM has moved. Read from
0.32 and 0.30.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from contralto.decoding.vllm.checks import check_config, timeout_of
from contralto.decoding.vllm.settings import PREFIX, Row, check_group

__all__ = ["AsyncPairScheduler", "PairScheduler", "pair_scheduler"]

SCHEDULER: Any = import_module("vllm.v1.core.sched.scheduler").Scheduler
ASYNC_SCHEDULER: Any = import_module("vllm.v1.core.sched.async_scheduler").AsyncScheduler
ENGINE: Any = import_module("vllm.v1.engine")
PAUSE: Any = import_module("vllm.v1.core.sched.interface").PauseState
PLATFORM: Any = import_module("vllm.platforms").current_platform
NAP = 0.001
"""Seconds between two checks of the timeout while nothing runs and a request waits for its partners."""
WATCHED = ("max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "stop")
"""Options of `SamplingParams` that branches must share to end together."""


class _WaitingCompletion:
    """A completion that has not started, with the branches that have arrived."""

    def __init__(self, now: float) -> None:
        self.since = now
        self.branches: dict[int, tuple[Row, Any]] = {}

    @property
    def requests(self) -> list[Any]:
        """Return the requests in the order of the branches."""
        return [self.branches[branch][1] for branch in sorted(self.branches)]


class _Queued(NamedTuple):
    """The requests of a completion, or a single request that arrived after one."""

    group: str | int | None
    requests: list[Any]


class _Pairing:
    """The mixin of both schedulers. Requests without branches pass at once, unless completions wait."""

    vllm_config: Any
    scheduler_config: Any
    kv_cache_config: Any
    lora_config: Any
    running: Any
    requests: Any
    encoder_cache_manager: Any
    max_num_encoder_input_tokens: int
    max_num_running_reqs: int
    max_num_scheduled_tokens: int
    max_model_len: int
    _pause_state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_config(self.vllm_config)
        self._timeout = timeout_of(self.vllm_config)
        self._incomplete: dict[str | int, _WaitingCompletion] = {}
        self._queue: deque[_Queued] = deque()
        self._live: dict[str, str | int] = {}
        """Completions that have started, by the id of each unfinished request."""
        self._in_flight: set[str | int] = set()
        """Completions whose requests have all arrived and that are not finished."""
        self._refused: list[tuple[Any, str]] = []
        self._loaded: set[int] = set()
        """Adapters used so far. On a CPU they stay in their slots, and the last slot must stay empty."""

    # ------------------------------------------------------------------------------------------------ requests come

    def add_request(self, request: Any) -> None:
        """Add a request.

        Args:
            request: of vLLM; its `contrast_...` arguments make it a branch.
        """
        row = Row.of(request.sampling_params.extra_args) if request.sampling_params is not None else None
        if row is not None:
            self._add_branch(row, request)
        elif self._queue or self._live:  # it must not use what is reserved for completions
            self._queue.append(_Queued(None, [request]))
        else:
            super().add_request(request)  # type: ignore[misc]

    def _add_branch(self, row: Row, request: Any) -> None:
        if row.group in self._in_flight:
            self._refuse([request], f"{PREFIX}id {row.group!r} belongs to a running completion: use another one")
            return
        text = self._incomplete.setdefault(row.group, _WaitingCompletion(time.monotonic()))
        others = [(other, _options(one)) for other, one in text.branches.values()]
        try:
            check_group([*others, (row, _options(request))])
        except ValueError as error:
            self._refuse([*text.requests, request], str(error))
            del self._incomplete[row.group]
            return
        text.branches[row.branch] = row, request
        if len(text.branches) == len(row.rule.branches):
            del self._incomplete[row.group]
            problem = self._never_fits(text.requests)
            if problem:
                self._refuse(text.requests, f"{PREFIX}id {row.group!r}: {problem}")
            else:
                self._queue.append(_Queued(row.group, text.requests))
                self._in_flight.add(row.group)

    def _refuse(self, requests: Iterable[Any], why: str) -> None:
        """End requests with a reason, in the next outputs."""
        self._refused += [(request, why) for request in requests]

    def _never_fits(self, requests: Sequence[Any]) -> str | None:
        """Return the reason why a completion cannot start even on an idle engine; None if it can."""
        tokens = sum(request.num_prompt_tokens for request in requests)
        if len(requests) > self._slots():
            return f"max_num_seqs {self._slots()} has no room for {len(requests)} branches"
        if tokens > self.max_num_scheduled_tokens:
            return (
                f"its prompts have {tokens} tokens, but a step processes at most {self.max_num_scheduled_tokens}: "
                "raise max_num_batched_tokens, or shorten them"
            )
        longest = max(request.num_prompt_tokens + request.max_tokens for request in requests)
        if longest > self.max_model_len:
            return f"a prompt and max_tokens have {longest} tokens together, but max_model_len is {self.max_model_len}"
        blocks = sum(map(self._blocks, requests))
        if blocks > self._all_blocks():
            return (
                f"prompts and max_tokens need {blocks} blocks of the KV cache, which has {self._all_blocks()}: "
                "increase its memory, or lower max_tokens"
            )
        if self.vllm_config.model_config.is_encoder_decoder:
            return "encoder-decoders cannot be contrasted in vLLM: use contralto.decoding with transformers"
        if (embeddings := _embeddings(requests)) > self._most_embeddings():
            return (
                f"its images have {embeddings} embeddings, but a step encodes at most {self._most_embeddings()}: raise "
                "max_num_batched_tokens, or use fewer or smaller images"
            )
        used = self._adapters(requests) | (self._loaded if PLATFORM.is_cpu() else set())
        if len(used) > self._most_adapters():
            return f"{len(used)} adapters are more than max_loras {self._most_adapters()}: raise it"
        self._loaded |= used
        return None

    # --------------------------------------------------------------------------------------------------- steps

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Reject expired requests, hand over the completions that can start now, and schedule as vLLM does."""
        self._expire()
        if self._pause_state == PAUSE.UNPAUSED:
            self._hand_over()
        elif self._incomplete and not self.running:
            time.sleep(NAP)
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if not output.total_num_scheduled_tokens and self._incomplete:
            time.sleep(NAP)
        return output

    def _expire(self) -> None:
        now = time.monotonic()
        for group, text in [*self._incomplete.items()]:
            if now - text.since > self._timeout:
                del self._incomplete[group]
                (row, _), *_ = text.branches.values()
                missing = [str(branch) for branch in range(len(row.rule.branches)) if branch not in text.branches]
                self._refuse(
                    text.requests,
                    f"{PREFIX}id {group!r}: branch {' and '.join(missing)} did not arrive within {self._timeout:g} "
                    "seconds: send all branches of a completion together",
                )

    def _hand_over(self) -> None:
        """Give vLLM the completions at the head of the queue that fit this step."""
        if ended := [name for name in self._live if name not in self.requests]:
            for name in ended:
                del self._live[name]
            self._in_flight = {
                *self._live.values(),
                *(queued.group for queued in self._queue if queued.group is not None),
            }
        while self._queue and self._fits(self._queue[0].requests):
            group, requests = self._queue.popleft()
            for request in requests:
                super().add_request(request)  # type: ignore[misc]
                if group is not None:
                    self._live[request.request_id] = group

    def _fits(self, requests: Sequence[Any]) -> bool:
        """Return whether a completion can start in this step with all its branches, and run to its end."""
        known = [request for request in self.requests.values() if not request.is_finished()]
        if not known and len(requests) == 1:
            return True
        if len(known) + len(requests) > self._slots():
            return False
        if not all(map(_has_grammar, requests)):
            return False
        new = [*known, *requests]
        due = sum(
            max(request.num_tokens + request.num_output_placeholders - request.num_computed_tokens, 1)
            for request in new
        )
        is_text = len(requests) > 1
        if is_text and due > self.max_num_scheduled_tokens:
            return False
        if is_text and not self._images_fit(new):
            return False
        if is_text and len(self._adapters(new)) > self._most_adapters():
            return False
        return bool(sum(map(self._blocks, new)) <= self._all_blocks())

    def _images_fit(self, requests: Sequence[Any]) -> bool:
        """Return whether this step can encode all images that are not encoded yet; otherwise vLLM would cut prompts before them."""
        unread = _embeddings(
            [request for request in requests if request.num_computed_tokens < request.num_prompt_tokens]
        )
        return bool(unread <= min(self._most_embeddings(), self.encoder_cache_manager.num_freeable_slots))

    def _most_embeddings(self) -> int:
        """Return the largest number of image embeddings that one step computes and keeps."""
        return int(min(self.max_num_encoder_input_tokens, self.encoder_cache_manager.cache_size))

    def _slots(self) -> int:
        most: int = getattr(self, "max_num_active_reqs", self.max_num_running_reqs)
        return most

    def _blocks(self, request: Any) -> int:
        """Return the number of cache blocks for a request of its largest length."""
        length = min(request.num_prompt_tokens + request.max_tokens + 1, self.max_model_len)
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        return sum(math.ceil(min(length, self._most_kept(spec)) / spec.block_size) for spec in specs)

    def _most_kept(self, spec: Any) -> int:
        """Return the largest number of tokens of a request that layers of a kind keep."""
        if type(spec).__name__ != "SlidingWindowSpec":
            return self.max_model_len
        return int(spec.sliding_window + self.max_num_scheduled_tokens)

    def _all_blocks(self) -> int:
        """Return the number of cache blocks, without vLLM's null block."""
        return int(self.kv_cache_config.num_blocks) - 1

    @staticmethod
    def _adapters(requests: Iterable[Any]) -> set[int]:
        return {request.lora_request.lora_int_id for request in requests if request.lora_request}

    def _most_adapters(self) -> int:
        """Return the number of adapters that a step may use; on CPUs the last slot stays empty, see `engine.cpu_options`."""
        spare = 1 if PLATFORM.is_cpu() else 0
        return self.lora_config.max_loras - spare if self.lora_config else 0

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
        """Return vLLM's outputs and those of rejected requests, with `finish_reason` abort and the message as `stop_reason`."""
        outputs: dict[int, Any] = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        refused, self._refused = self._refused, []
        for request, why in refused:
            output = ENGINE.EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=ENGINE.FinishReason.ABORT,
                stop_reason=f"contralto: {why}",
            )
            if request.client_index not in outputs:
                outputs[request.client_index] = ENGINE.EngineCoreOutputs(outputs=[])
            outputs[request.client_index].outputs.append(output)
        return outputs

    # ------------------------------------------------------------------------------------------------ requests go

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """Abort requests; the partners of one that has not started end with a reason."""
        wanted = None if request_ids is None else {request_ids} if isinstance(request_ids, str) else set(request_ids)
        gone = self._drop(wanted)
        return [*gone, *(super().finish_requests(wanted, finished_status) or [])]  # type: ignore[misc]

    def _drop(self, wanted: set[str] | None) -> list[Any]:
        """Remove waiting requests and return them."""
        gone: list[Any] = []
        waiting = [*(_Queued(group, text.requests) for group, text in self._incomplete.items()), *self._queue]
        for group, requests in waiting:
            left = [r for r in requests if wanted is not None and r.request_id not in wanted]
            if len(left) == len(requests):
                continue
            gone += [request for request in requests if request not in left]
            self._queue = deque(queued for queued in self._queue if queued.requests[0] is not requests[0])
            self._incomplete.pop(group or "", None)
            self._in_flight.discard(group or "")
            self._refuse(left, f"{PREFIX}id {group!r}: its other branch was aborted")
        return gone

    def get_num_unfinished_requests(self) -> int:
        """Return the number of vLLM's requests and of those that wait here, so that the engine keeps checking timeouts."""
        unfinished: int = super().get_num_unfinished_requests()  # type: ignore[misc]
        if self._pause_state == PAUSE.PAUSED_ALL:
            return unfinished
        refused, held = len(self._refused), sum(len(text.branches) for text in self._incomplete.values())
        queued = sum(len(queued.requests) for queued in self._queue) if self._pause_state == PAUSE.UNPAUSED else 0
        return unfinished + refused + (held if self._pause_state == PAUSE.UNPAUSED else 0) + queued


class PairScheduler(_Pairing, SCHEDULER):  # type: ignore[misc]
    """vLLM's scheduler for completions whose branches are requests: `LLM(scheduler_cls=PairScheduler)`.

    For engines without asynchronous scheduling, which are those on CPUs; `pair_scheduler` chooses.

    - A completion starts when all its branches have arrived, a step can process all their prompts whole, and the KV cache has
      room for all tokens that they and all others may generate. So a running branch is never preempted, and branches stay in step.
    - A completion that can never start is rejected at once, and so are branches whose options differ. A request whose partners
      do not arrive is rejected after `additional_config={"contrast_timeout": 10}` seconds. Rejected requests end with
      `finish_reason` abort and the message as `stop_reason`.
    - While completions are running, other requests wait in the same queue, first come first served.

    Raises:
        ValueError: settings that schedule branches apart, see `checks.check_config`; asynchronous scheduling.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.scheduler_config.async_scheduling:
            raise ValueError(
                "async_scheduling needs scheduler_cls contralto.decoding.vllm.AsyncPairScheduler, or pair_scheduler, "
                "which selects the right one"
            )


class AsyncPairScheduler(_Pairing, ASYNC_SCHEDULER):  # type: ignore[misc]
    """`PairScheduler` on vLLM's asynchronous scheduler, the default on GPUs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.scheduler_config.async_scheduling:
            raise ValueError(
                "this engine schedules synchronously: use scheduler_cls contralto.decoding.vllm.PairScheduler, or "
                "pair_scheduler, which selects the right one"
            )


def pair_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the scheduler that matches vLLM's own choice: `scheduler_cls="contralto.decoding.vllm.pair_scheduler"`.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        args: further arguments of a scheduler class.
        kwargs: further keyword arguments of a scheduler class.
    """
    kind = AsyncPairScheduler if vllm_config.scheduler_config.async_scheduling else PairScheduler
    return kind(vllm_config, *args, **kwargs)


def _embeddings(requests: Iterable[Any]) -> int:
    """Return the number of embeddings of the images of requests; an image that several of them show counts once."""
    images = [image for request in requests for image in request.mm_features or ()]
    return sum({image.identifier: image.mm_position.get_num_embeds() for image in images}.values())


def _options(request: Any) -> dict[str, Any]:
    """Return the options that branches must share."""
    return {name: getattr(request.sampling_params, name, None) for name in WATCHED}


def _has_grammar(request: Any) -> bool:
    """Return whether a request is ready: it needs no grammar, or its grammar is compiled."""
    output = request.structured_output_request
    return output is None or output.grammar is not None
