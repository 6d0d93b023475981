"""Contrastive decoding with another, smaller model, which runs inside vLLM's logits processor.

    llm = make_llm("large", amateur="small")
    llm.generate(prompts, SamplingParams(temperature=0, extra_args={"contrast_method": "cd", "contrast_beta": 0.5}))

Each completion is one request, so that nothing has to be kept in step. The cost is one forward pass of the amateur per step by
transformers, outside of vLLM's optimisations: its weights and its cache lie beside vLLM's memory. `PairedContrast` is faster for
branches that are prompts or adapters of one model.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contralto.common.hub import from_pretrained, locate
from contralto.common.placement import input_device
from contralto.decoding.branches.context import check_longest
from contralto.decoding.methods import METHODS
from contralto.decoding.validity import check_logits
from contralto.decoding.vllm.members import Members
from contralto.decoding.vllm.sampling import Warp, draw, seeds_of
from contralto.decoding.vllm.sequences import SequenceReader, token_bytes, weight_bytes
from contralto.decoding.vllm.settings import PREFIX, Row, Rule, check_penalties, supported
from contralto.decoding.vocabulary import check_sizes, same_tokenizer, vocabulary_size

__all__ = ["AmateurContrast"]

LOGGER: Any = import_module("vllm.logger").init_logger("vllm.contralto")
"""A logger of vLLM's, so that its messages stand among those of the engine."""
KEY = "contrast_amateur"
CACHE_GIB = 4.0
"""The memory of the amateur's cache in GiB; also vLLM's own on a CPU."""
TIED = ("id", "branch", "marker", "start")
"""Arguments of requests that are one of several branches."""


class _AmateurRequest(NamedTuple):
    """A request that is decoded by contrast with the amateur."""

    row: Row
    prompt: Sequence[int]
    output: Sequence[int]
    """V1 runner: vLLM's own list, which grows."""


class AmateurContrast(Members):
    """Contrasts vLLM's model with an amateur of the same tokenizer; requests without `contrast_...` arguments are unchanged.

        scores = rule(log p_expert, log p_amateur),    token = argmax scores, or a draw from softmax(scores)

    with `contrast_method` `cd`, its forms and parameters, and sampling by `contrast_temperature`, ..., `contrast_seed`.

    `additional_config={"contrast_amateur": {...}}` has

    - `model`: a folder or a hub id;
    - `dtype`: `auto` (default), `float32`, `bfloat16`, ...;
    - `device`: by default vLLM's;
    - `cache_gib`: the most memory of its cache, 4 GiB by default.

    Memory: the amateur's weights, and a cache of `2 * layers * key-value heads * head size` numbers for every token of every
    running request, padded to the longest, but never more than `cache_gib`: requests beyond it are read from their beginning in
    every step, which is slow, and a warning says so. Both are logged at the start. Both are taken before vLLM measures how much memory is left
    for its own cache, so that vLLM leaves room for them, unless `kv_cache_memory_bytes` sets the size of that cache. While requests
    join and leave, a part of the cache exists twice for a moment.
    """

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        """Take vLLM's arguments: `(vllm_config, device, is_pin_memory)` from V1, `(vllm_config, req_states)` from V2."""
        super().__init__(vllm_config, *rest)
        options = (vllm_config.additional_config or {}).get(KEY)
        if not isinstance(options, dict) or not isinstance(options.get("model"), str):
            raise ValueError(  # noqa: TRY004  a setting, whatever is wrong with it
                f'AmateurContrast needs additional_config={{"{KEY}": {{"model": NAME}}}}, not {options!r}'
            )
        if vllm_config.speculative_config is not None:
            raise ValueError("AmateurContrast processes one token at a time: leave speculative_config out")
        model = _load(options, self._device, vllm_config)
        most = _cached_tokens(options, model, vllm_config)
        self._reader = SequenceReader(model, most=most, warn=LOGGER.warning)
        self._reserved = _reserve(most * token_bytes(model), model, vllm_config)
        """Memory of the cache, until the first request needs it."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Validate a request.

        Args:
            sampling_params: vLLM's `SamplingParams`.

        Raises:
            ValueError: arguments of several branches, a method without an amateur, or sampling or penalties by vLLM.
        """
        row = _row(sampling_params.extra_args)
        if row is not None and (sampling_params.n or 1) != 1:
            raise ValueError(
                f"n must be 1 with {PREFIX}method, not {sampling_params.n}: the completions would all be drawn from one seed; "
                f"send {sampling_params.n} requests, each with its own {PREFIX}seed"
            )
        if row is not None and sampling_params.temperature:
            raise ValueError(
                f"temperature must be 0 with {PREFIX}method, not {sampling_params.temperature}: set {PREFIX}temperature"
            )
        if row is not None:
            check_penalties(sampling_params, f"with {PREFIX}method", "might choose a token that the contrast excludes")

    def _member(self, params: Any, prompt: Sequence[int], output: Sequence[int]) -> _AmateurRequest | None:
        row = _row(params.extra_args)
        return None if row is None else _AmateurRequest(row, prompt, output)

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Replace the logits of contrasted requests by scores, in place, and return all logits."""
        places, texts, starts = self._sequences_v1() if ctx is None else self._sequences_v2(ctx)
        if not texts:
            return logits
        self._reserved = None
        amateur = self._reader(texts, logits.shape[-1]).to(logits.device)
        members = [self._members[index] for index in starts]
        steps = torch.tensor([len(text) - start for text, start in zip(texts, starts.values(), strict=True)])
        by_rule: dict[Rule, list[int]] = {}
        for i, member in enumerate(members):
            by_rule.setdefault(member.row.rule, []).append(i)
        for rule, some in by_rule.items():
            at, rows = torch.tensor([places[i] for i in some], device=logits.device), [members[i].row for i in some]
            branches = [logits[at].float(), amateur[some].float()]
            _check(branches)
            scores = rule(branches, steps[some])
            if any(row.sampling.temperature for row in rows):
                warp = Warp.of([row.sampling for row in rows], logits.device)
                seeds = seeds_of([row.seed for row in rows]).to(logits.device)
                scores = draw(scores, warp, seeds, steps[some].to(logits.device))
            logits[at] = scores.to(logits.dtype)
        return logits

    def _sequences_v1(self) -> tuple[list[int], list[list[int]], dict[int, int]]:
        """Return the rows of the logits, the sequences so far, and the length of each prompt by request."""
        places = list(self._members)
        texts = [[*self._members[i].prompt, *self._members[i].output] for i in places]
        return places, texts, {i: len(self._members[i].prompt) for i in places}

    def _sequences_v2(self, ctx: Any) -> tuple[list[int], list[list[int]], dict[int, int]]:
        """Return the same as `_sequences_v1`, for requests whose prompts were read."""
        slots, seen = ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np
        done = np.asarray(seen) >= self._states.prefill_len.np[slots]
        places = [i for i, slot in enumerate(slots.tolist()) if slot in self._members and done[i]]
        tokens = self._states.all_token_ids.gpu
        texts = [tokens[int(slots[i]), : int(seen[i])].tolist() for i in places]
        return places, texts, {int(slots[i]): int(self._states.prompt_len.np[slots[i]]) for i in places}


def _check(branches: Sequence[Tensor]) -> None:
    """Raise ValueError for logits that cannot be contrasted, except where vLLM itself has excluded every token."""
    possible = branches[0].amax(-1) != -torch.inf
    names = ["logits of the expert (vLLM)", f"logits of the amateur ({KEY})"]
    check_logits([each[possible] for each in branches], lambda: names, lambda row: f"in request {row} of the step")


def _row(arguments: Any) -> Row | None:
    """Return the contrast arguments of a request; None if it has none."""
    values = {name: value for name, value in (arguments or {}).items() if name.startswith(PREFIX)}
    if not values:
        return None
    if tied := [f"{PREFIX}{name}" for name in TIED if f"{PREFIX}{name}" in values]:
        raise ValueError(
            f"{tied[0]} is for completions with several requests (PairedContrast): leave it out, or use PairedContrast"
        )
    own = [name for name in supported() if list(METHODS[name].models) == ["amateur"]]
    method = values.get(f"{PREFIX}method", own[0])
    if method not in own:
        raise ValueError(f"{PREFIX}method must be {' or '.join(own)} with an amateur, not {method!r}")
    return Row.of({**values, f"{PREFIX}method": method, f"{PREFIX}id": "", f"{PREFIX}branch": 0, f"{PREFIX}marker": 0})


def _load(options: Mapping[str, Any], device: Any, vllm_config: Any) -> Any:
    """Return the amateur, on its device.

    Raises:
        ValueError: another tokenizer than the expert's, or a shorter context than vLLM's `max_model_len`.
    """
    from transformers import AutoModelForCausalLM

    name, device = options["model"], torch.device(options.get("device") or device)
    trusted = bool(vllm_config.model_config.trust_remote_code)
    dtype = options.get("dtype", "auto")
    model = from_pretrained(AutoModelForCausalLM, name, dtype=dtype, trust_remote_code=trusted)
    shared = same_tokenizer(str(vllm_config.model_config.tokenizer), locate(name))
    check_sizes(vllm_config.model_config.get_vocab_size(), vocabulary_size(model), share_tokenizer=shared)
    check_longest(name, model, int(vllm_config.model_config.max_model_len))
    return model.to(device).eval()


def _cached_tokens(options: Mapping[str, Any], model: Any, vllm_config: Any) -> int:
    """Return the number of tokens that the amateur's cache may hold, and log the memory that it and the weights take.

    Raises:
        ValueError: `cache_gib` is not a positive number, or has no room for one request of `max_model_len` tokens.
    """
    gib = options.get("cache_gib", CACHE_GIB)
    if isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 < gib < float("inf"):
        raise ValueError(f"cache_gib of {KEY} must be a number of GiB above 0, not {gib!r}")
    longest, each = int(vllm_config.model_config.max_model_len), token_bytes(model)
    if gib * 2**30 < longest * each:
        raise ValueError(
            f"a request of max_model_len {longest} tokens takes {longest * each / 2**30:.2g} GiB of the amateur's cache, which has "
            f"{gib:g}: raise cache_gib of {KEY}, or lower max_model_len"
        )
    most = min(int(gib * 2**30 / each), longest * vllm_config.scheduler_config.max_num_seqs)
    LOGGER.info(
        "The amateur %s takes %.2f GiB for its weights and at most %.2f GiB for its cache of %d tokens.",
        options["model"],
        weight_bytes(model) / 2**30,
        most * each / 2**30,
        most,
    )
    return int(most)


def _reserve(size: int, model: Any, vllm_config: Any) -> Tensor | None:
    """Return a tensor as large as the amateur's cache, so that vLLM finds this memory used when it measures what is left.

    Raises:
        MemoryError: the device has less free memory.
    """
    if vllm_config.cache_config.kv_cache_memory_bytes is not None:
        return None  # vLLM measures nothing
    device = input_device(model)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else size
    if size > free:
        raise MemoryError(
            f"the amateur's cache may take {size / 2**30:.2g} GiB, and its device has {free / 2**30:.2g} GiB left: lower cache_gib of "
            f"{KEY}, max_num_seqs or max_model_len"
        )
    return torch.ones(
        size, dtype=torch.uint8, device=device
    )  # not empty: memory counts as used on a CPU once it is written
