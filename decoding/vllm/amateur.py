"""Experimental: contrastive decoding with another, smaller model, which runs inside vLLM's logits processor.

    llm = LLM("large", logits_processors=["contralto.decoding.vllm:AmateurContrast"],
              additional_config={"contrast_amateur": {"model": "small"}})
    llm.generate(prompts, SamplingParams(temperature=0, extra_args={"contrast_method": "cd", "contrast_beta": 0.5}))

One request per text, so nothing has to be kept in step. The price is one forward of the amateur per step by transformers, outside
of vLLM's optimisations: its weights and its cache lie beside vLLM's memory. Branches that are prompts, images or adapters of one
model are better served by `PairedContrast`.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from contralto.common.hub import from_pretrained, locate
from contralto.decoding.branches.context import check_longest
from contralto.decoding.branches.padding import KnownTokens
from contralto.decoding.methods import METHODS
from contralto.decoding.validity import check_logits
from contralto.decoding.vllm.members import Members
from contralto.decoding.vllm.sampling import Warp, draw, seeds_of
from contralto.decoding.vllm.settings import PREFIX, Row, Rule, check_penalties, supported
from contralto.decoding.vocabulary import check_sizes, same_tokenizer, vocabulary_size

__all__ = ["AmateurContrast"]

KEY = "contrast_amateur"
TIED = ("id", "branch", "marker", "start")
"""What only requests of several branches have."""


class _Member(NamedTuple):
    """A request that is decoded by contrast."""

    row: Row
    prompt: Sequence[int]
    output: Sequence[int]
    """V1 runner: vLLM's own list, which grows."""


class AmateurContrast(Members):
    """Weighs vLLM's model against an amateur of the same tokenizer; requests without `contrast_method` are left alone.

        scores = rule(log p_expert, log p_amateur),    token = argmax scores, or a draw from softmax(scores)

    with `contrast_method` `cd`, its forms and parameters, and sampling by `contrast_temperature`, ..., `contrast_seed`.

    `additional_config={"contrast_amateur": {...}}` has

    - `model`: a folder or a hub id;
    - `dtype`: `auto` (default), `float32`, `bfloat16`, ...;
    - `device`: by default vLLM's.

    Memory: the amateur's weights, and a cache of `2 * layers * key-value heads * head size` numbers for every token of every
    running request, padded to the longest. vLLM does not know of it: lower `gpu_memory_utilization` by that share, or set
    `kv_cache_memory_bytes`. `bytes_needed` estimates it; it is refused at the start if the device has not so much free.
    """

    def __init__(self, vllm_config: Any, *more: Any) -> None:
        """V1: `(vllm_config, device, is_pin_memory)`. V2: `(vllm_config, req_states)`."""
        super().__init__(vllm_config, *more)
        how = (vllm_config.additional_config or {}).get(KEY)
        if not isinstance(how, dict) or not isinstance(how.get("model"), str):
            raise ValueError(  # noqa: TRY004  a setting, whatever is wrong with it
                f'AmateurContrast needs additional_config={{"{KEY}": {{"model": NAME}}}}, not {how!r}'
            )
        if vllm_config.speculative_config is not None:
            raise ValueError("AmateurContrast sees one token at a time: leave speculative_config out")
        self._reader = _Reader(how, self._device, vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: values of several branches, another method than `cd`, sampling or penalties by vLLM beside ours.
        """
        row = _row(sampling_params.extra_args)
        if row is not None and sampling_params.temperature:
            raise ValueError(
                f"temperature must be 0 with {PREFIX}method, not {sampling_params.temperature}: give {PREFIX}temperature"
            )
        if row is not None:
            check_penalties(sampling_params, f"with {PREFIX}method", "might choose a token that the contrast rules out")

    def _member(self, params: Any, prompt: Sequence[int], output: Sequence[int]) -> _Member | None:
        row = _row(params.extra_args)
        return None if row is None else _Member(row, prompt, output)

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Weigh and draw, in place."""
        places, texts, starts = self._seen_v1() if ctx is None else self._seen_v2(ctx)
        if not texts:
            return logits
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

    def _seen_v1(self) -> tuple[list[int], list[list[int]], dict[int, int]]:
        """Rows of the logits, the texts so far, and by member where each text begins to be its own."""
        places = list(self._members)
        texts = [[*self._members[i].prompt, *self._members[i].output] for i in places]
        return places, texts, {i: len(self._members[i].prompt) for i in places}

    def _seen_v2(self, ctx: Any) -> tuple[list[int], list[list[int]], dict[int, int]]:
        """The same, of requests that have read their prompts."""
        slots, seen = ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np
        done = np.asarray(seen) >= self._states.prefill_len.np[slots]
        places = [i for i, slot in enumerate(slots.tolist()) if slot in self._members and done[i]]
        tokens = self._states.all_token_ids.gpu
        texts = [tokens[int(slots[i]), : int(seen[i])].tolist() for i in places]
        return places, texts, {int(slots[i]): int(self._states.prompt_len.np[slots[i]]) for i in places}


def _check(branches: Sequence[Tensor]) -> None:
    """Raise ValueError for logits that cannot be contrasted; a request that excludes every token is vLLM's to answer."""
    possible = branches[0].amax(-1) != -torch.inf
    names = ["logits of the expert (vLLM)", f"logits of the amateur ({KEY})"]
    check_logits([each[possible] for each in branches], lambda: names, lambda row: f"in request {row} of the step")


def _row(given: Any) -> Row | None:
    """What a request says, if it is to be decoded by contrast."""
    values = {name: value for name, value in (given or {}).items() if name.startswith(PREFIX)}
    if not values:
        return None
    if tied := [f"{PREFIX}{name}" for name in TIED if f"{PREFIX}{name}" in values]:
        raise ValueError(
            f"{tied[0]} is of texts with several requests (PairedContrast): leave it out, or leave AmateurContrast"
        )
    own = [name for name in supported() if list(METHODS[name].models) == ["amateur"]]
    method = values.get(f"{PREFIX}method", own[0])
    if method not in own:
        raise ValueError(f"{PREFIX}method must be {' or '.join(own)} with an amateur, not {method!r}")
    return Row.of({**values, f"{PREFIX}method": method, f"{PREFIX}id": "", f"{PREFIX}branch": 0, f"{PREFIX}marker": 0})


class _Reader:
    """The amateur, with a cache for the texts of the last step: batches padded on the left, joined as they go on."""

    def __init__(self, how: Any, device: Any, vllm_config: Any) -> None:
        from transformers import AutoModelForCausalLM

        where = torch.device(how.get("device") or device)
        name = how["model"]
        trusted = bool(vllm_config.model_config.trust_remote_code)
        dtype = how.get("dtype", "auto")
        self._model = from_pretrained(AutoModelForCausalLM, name, dtype=dtype, trust_remote_code=trusted)
        size, limit = vllm_config.model_config.get_vocab_size(), vllm_config.scheduler_config.max_num_seqs
        shared = same_tokenizer(str(vllm_config.model_config.tokenizer), locate(name))
        check_sizes(size, vocabulary_size(self._model), share_tokenizer=shared)
        longest = int(vllm_config.model_config.max_model_len)
        check_longest(name, self._model, longest)
        needed = bytes_needed(self._model, longest * limit)
        if where.type == "cuda" and needed > torch.cuda.mem_get_info(where)[0]:
            raise MemoryError(
                f"{name} and its cache may need {needed / 2**30:.1f} GiB beside vLLM: lower max_num_seqs, max_model_len or "
                "gpu_memory_utilization"
            )
        self._model, self._device = self._model.to(where).eval(), where
        self._tokens = KnownTokens.of(self._model)
        self._batches: list[_Batch] = []

    @torch.no_grad()
    def __call__(self, texts: list[list[int]], size: int) -> Tensor:
        """The logits `(B, size)` after each text."""
        still, grown = self._known(texts)
        new = [text for text in texts if not any(text in batch.texts for batch in [*still, *grown])]
        batches = [*still, *([self._grow(grown)] if grown else []), *([self._read(new)] if new else [])]
        self._batches = batches
        found = {tuple(text): (batch, row) for batch in batches for row, text in enumerate(batch.texts)}
        logits = torch.stack([batch.logits[row] for batch, row in (found[tuple(text)] for text in texts)])
        extra = size - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, extra), value=-torch.inf) if extra > 0 else logits[:, :size]

    def _known(self, texts: list[list[int]]) -> tuple[list["_Batch"], list["_Batch"]]:
        """What was read before: texts that are as they were, and texts that have one token more, which they are given."""
        still, grown, wanted = [], [], {tuple(text) for text in texts}
        ends: dict[tuple[int, ...], list[int]] = {}
        for text in texts:
            ends.setdefault(tuple(text[:-1]), []).append(text[-1])
        for batch in self._batches:
            same = [row for row, text in enumerate(batch.texts) if tuple(text) in wanted]
            more = [row for row, text in enumerate(batch.texts) if tuple(text) in ends and tuple(text) not in wanted]
            if same:
                still.append(batch.only(same, copied=bool(more)))
            if more:
                rows = [row for row in more for _ in ends[tuple(batch.texts[row])]]
                tokens = [token for row in more for token in ends[tuple(batch.texts[row])]]
                kept = batch.only(rows, copied=False)
                grown.append(
                    kept._replace(texts=[[*text, token] for text, token in zip(kept.texts, tokens, strict=True)])
                )
        return still, grown

    def _read(self, texts: list[list[int]]) -> "_Batch":
        """Read new texts from their beginnings."""
        texts = [list(text) for text in dict.fromkeys(map(tuple, texts))]
        width = max(map(len, texts))
        padding = [width - len(text) for text in texts]
        ids = torch.tensor([[0] * pad + text for pad, text in zip(padding, texts, strict=True)])
        return self._forward(_Batch(texts, padding, None, torch.empty(0)), ids)

    def _grow(self, batches: list["_Batch"]) -> "_Batch":
        """Read the last tokens of texts whose beginnings are cached, in one batch."""
        batch = _joined(batches)
        if batch is None:  # a sliding window or a state, which cannot be padded
            return self._read([text for some in batches for text in some.texts])
        return self._forward(batch, torch.tensor([[text[-1]] for text in batch.texts]))

    def _forward(self, batch: "_Batch", ids: Tensor) -> "_Batch":
        length = max(map(len, batch.texts)) if batch.cache is None else batch.cache.get_seq_length() + 1
        at = torch.arange(length)[None] - torch.tensor(batch.padding)[:, None]
        ids = self._tokens.replace(ids, (at >= 0).long()[:, -ids.shape[1] :])
        output = self._model(
            input_ids=ids.to(self._device),
            attention_mask=(at >= 0).long().to(self._device),
            position_ids=at.clamp(min=0)[:, -ids.shape[1] :].to(self._device),
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return batch._replace(cache=output.past_key_values, logits=output.logits[:, -1])


class _Batch(NamedTuple):
    """Texts that were read together."""

    texts: list[list[int]]
    padding: list[int]
    """How many columns of the cache stand before each."""
    cache: Any
    logits: Tensor
    """`(B, V)` after each."""

    def only(self, rows: list[int], *, copied: bool) -> "_Batch":
        """Some of them; the cache is cut in place, unless it is needed further."""
        cache = copy.deepcopy(self.cache) if copied else self.cache
        if rows != list(range(len(self.texts))):
            cache.batch_select_indices(torch.tensor(rows, device=self.logits.device))
        return _Batch([self.texts[row] for row in rows], [self.padding[row] for row in rows], cache, self.logits[rows])


def _joined(batches: list[_Batch]) -> _Batch | None:
    """Batches as one, their caches padded on the left; None if their layers cannot be."""
    first, *others = batches
    if not others:
        return first
    if any(type(layer) is not DynamicLayer for batch in batches for layer in batch.cache.layers):
        return None
    width = max(batch.cache.get_seq_length() for batch in batches)
    pads = [width - batch.cache.get_seq_length() for batch in batches]
    for layers in zip(*(batch.cache.layers for batch in batches), strict=True):
        for name in ("keys", "values"):
            some = [
                torch.nn.functional.pad(getattr(layer, name), (0, 0, pad, 0))
                for layer, pad in zip(layers, pads, strict=True)
            ]
            setattr(layers[0], name, torch.cat(some))
    padding = [own + pad for batch, pad in zip(batches, pads, strict=True) for own in batch.padding]
    return _Batch([text for batch in batches for text in batch.texts], padding, first.cache, first.logits)


def bytes_needed(model: Any, tokens: int) -> int:
    """What a model takes beside vLLM: its weights, and the keys and values of so many tokens.

    Args:
        model: a transformers model.
        tokens: of all running requests, padding included.

    Examples:
        >>> from contralto import testbed
        >>> bytes_needed(testbed.load("amateur"), 0) == 4 * testbed.load("amateur").num_parameters()
        True
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = next(model.parameters()).element_size()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return int(weights + 2 * config.num_hidden_layers * heads * size * tokens * each)
