"""Contrastive search: of a model's k likeliest tokens, the one that is likely and yet unlike all that was said.

Su et al. 2022 (arXiv 2202.06417), Su & Collier 2023 (arXiv 2210.14140). A step must know the hidden state that each of
the k candidates would have. Two ways to find out give the same tokens:

- the **tree**: one forward of k query positions that share one place in the text and one cache. A mask lets each
  candidate see the text and itself. The chosen candidate's keys and values stay in the cache, the others leave it, and
  its logits begin the next step: one forward per token, and a cache of k more tokens.
- **replicas**: one forward of one position for k copies of every row and of its cache. Slower and larger, but every
  model with a cache can do it.

A model's first tree is compared with a plain forward, so that a model that cannot be read so is never decoded wrongly.

Read from transformers 5.23.0: what `generate()` hands to a callable, `_attn_implementation` of a configuration, and the
layers of a cache (`keys`, `values`, `cumulative_length`, `is_sliding`, `record_past`).
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    EncoderDecoderCache,
    LogitsProcessor,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.generation.utils import ALL_CACHE_NAMES, MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from contralto.decoding.branches.cache import linear_layers
from contralto.decoding.branches.padding import check_mask, padding_of, source_padding
from contralto.decoding.executors.generation import CustomGenerate, Generation
from contralto.decoding.placement import input_device
from contralto.decoding.rules import check_penalty_weight, contrastive_search, largest_cosine, unit_vectors
from contralto.decoding.validity import check_logits

__all__ = ["ContrastiveSearch", "ContrastiveSearchLogitsProcessor"]

Way = Literal["auto", "tree", "replicate"]


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1 (how many of the likeliest tokens are candidates), not {k}")


# ------------------------------------------------------------------------------------------------------- the executors


class ContrastiveSearch(CustomGenerate):
    """Contrastive search as the decoding loop of `generate()`, one forward per token.

        model.generate(**inputs, custom_generate=ContrastiveSearch(alpha=0.6, k=4))

    Su et al. 2022 (arXiv 2202.06417), equation 5, see `contrastive_search`. `h` is `hidden_states[-1]`, the decoder's
    in an encoder-decoder. The prompt counts as text, with the images in it; padding does not.

    All processors of `generate()` (repetition penalty, minimum length, suppressed tokens, your own) act on the model's
    logits before the k candidates are chosen, a watermark on the contrastive scores, see `order`. Batches of left-padded prompts, encoder-decoders, images,
    stopping criteria and `return_dict_in_generate` work as in greedy search; `output_scores` gives the contrastive
    scores, `output_logits` the model's logits. A returned cache holds all tokens but the last, as `generate()` leaves it.

    A static cache needs room for the candidates: pass `max_cache_len` to `generate()`. `stop_strings` need a tokenizer,
    which transformers does not hand to callables: pass a `StopStringCriteria` as a stopping criterion.

    Args:
        alpha: weight of the degeneration penalty, in [0, 1]. The paper uses 0.6; 0 is greedy search.
        k: number of candidates, at least 1. The papers use 3 to 10; 1 is greedy search.
        path: how candidates are read: "tree", "replicate", or "auto" (the tree where the model passes its test). Use
            "tree" to learn why a model does not pass.
        streamer: as for `generate()`, which does not hand its own to callables.

    Raises:
        ValueError: at construction, a parameter outside its range; when called, `do_sample`, beams, `use_cache=False`,
            `prefill_chunk_size`, attentions or hidden states as outputs, a cache that already holds tokens, is
            quantized, or is static and too small or with a sliding window, a model without a cache, or `path="tree"`
            for a model that cannot be read so.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> inputs = tokenizer("Ben went out to the barn door. He", return_tensors="pt")
        >>> output = model.generate(**inputs, custom_generate=ContrastiveSearch(alpha=0.4), max_new_tokens=16)
        >>> text = tokenizer.decode(output[0])
    """

    name = "contrastive search"
    alternative = "its scores cannot be summed over steps, so pass num_beams=1 to generate()"

    def __init__(self, *, alpha: float = 0.6, k: int = 4, path: Way = "auto", streamer: Any = None) -> None:
        super().__init__(streamer=streamer)
        check_penalty_weight(alpha)
        _check_k(k)
        if path not in ("auto", "tree", "replicate"):
            raise ValueError(f"path must be 'auto', 'tree' or 'replicate', not {path!r}")
        self.alpha, self.k, self.path = alpha, k, path

    def _generate(self, model: Any, generation: Generation, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        search = _Search(model, generation.ids, model_kwargs, alpha=self.alpha, k=self.k, path=self.path)
        returns_cache = generation.config.return_dict_in_generate

        def advance() -> None:
            tokens = generation.step(search.logits, search.score)
            # Finished rows continue with their candidate, which the tree holds already, unless the cache is returned:
            # then it must hold the padding.
            if returns_cache:
                tokens = generation.ids[:, -1]
            search.go_on(tokens, ends=not generation.unfinished.any())

        generation.run(advance)
        return {"past_key_values": search.rows.cache}

    def _check(self, model: Any, config: Any, model_kwargs: Mapping[str, Any], processors: Any) -> None:
        super()._check(model, config, model_kwargs, processors)
        _check_search(config, model_kwargs, self.k)


class ContrastiveSearchLogitsProcessor(LogitsProcessor):
    """Contrastive search in an unmodified greedy `generate()`, for a second cache and one more forward per token.

        model.generate(**inputs, logits_processor=[ContrastiveSearchLogitsProcessor(model)], do_sample=False)

    The tokens are those of `ContrastiveSearch`, which is faster. Use this where the loop itself cannot be replaced. The
    processors that `generate()` puts before it act on the model's logits before the candidates are chosen.

    Rows that go on from the last call by one token, whichever, reuse the cache; any other rows are read afresh. One
    object may serve many calls, also in turn.

    Args:
        model: the model that generates.
        alpha: weight of the degeneration penalty, in [0, 1].
        k: number of candidates, at least 1.
        attention_mask: `(prompts, T)` of the prompts, as given to `generate()`. Needed where padding cannot be seen from
            leading pad tokens, that is for several prompts of a model without a pad token. It belongs to one batch of prompts.
        encoder_inputs: for an encoder-decoder, what its encoder reads, the inputs of `generate()`.
        vision_inputs: for an image-text model, what it reads with the prompts, the other inputs of `generate()`:
            `pixel_values`, `image_grid_thw`, `mm_token_type_ids`, ...

    Raises:
        TypeError: `model` cannot generate.
        ValueError: a parameter outside its range, encoder inputs missing or not wanted; when called, rows that a beam
            search reordered, prompts that hold images without `vision_inputs` or are padded on the right, a mask that
            belongs to other prompts.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> inputs = tokenizer("Ben went out to the barn door. He", return_tensors="pt")
        >>> processor = ContrastiveSearchLogitsProcessor(model, alpha=0.4)
        >>> output = model.generate(**inputs, logits_processor=[processor], do_sample=False, max_new_tokens=16)
        >>> search = ContrastiveSearch(alpha=0.4)
        >>> torch.equal(output, model.generate(**inputs, custom_generate=search, max_new_tokens=16))
        True
    """

    supports_continuous_batching = False

    def __init__(
        self,
        model: Any,
        *,
        alpha: float = 0.6,
        k: int = 4,
        attention_mask: Tensor | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        check_penalty_weight(alpha)
        _check_k(k)
        if not hasattr(model, "generate"):
            raise TypeError(
                f"contrastive search needs a transformers model that can generate, not {type(model).__name__}"
            )
        if bool(model.config.is_encoder_decoder) != bool(encoder_inputs):
            wanted = "pass encoder_inputs=, what its encoder is to read" if not encoder_inputs else "it has no encoder"
            raise ValueError(f"encoder_inputs do not fit {type(model).__name__}: {wanted}")
        if attention_mask is not None:
            check_mask(attention_mask)
        self._model, self._alpha, self._k = model, alpha, k
        self._prompt_mask = attention_mask
        self._prompt_ids: Tensor | None = None
        self._encoder_inputs, self._vision_inputs = encoder_inputs, vision_inputs
        self.reset()

    def reset(self) -> None:
        """Forget the last call, and free the cache."""
        self._seen: Tensor | None = None
        self._search: _Search | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Contrastive scores `(B, V)` from the model's `scores` `(B, V)`, for the rows `(B, T)`."""
        search = self._follow(input_ids)
        self._search, self._seen = search, input_ids.clone()
        return search.score(scores)

    def _follow(self, ids: Tensor) -> "_Search":
        """The search that has read these rows."""
        search, seen = self._search, self._seen
        if search is None or seen is None or seen.shape != (len(ids), ids.shape[1] - 1):
            return self._start(ids)
        if not torch.equal(seen, ids[:, :-1]):
            self._refuse_beams(seen, ids)
            return self._start(ids)
        search.go_on(ids[:, -1])
        return search

    @staticmethod
    def _refuse_beams(seen: Tensor, ids: Tensor) -> None:
        rows = {row.tobytes() for row in seen.cpu().numpy()}
        if all(row.tobytes() in rows for row in ids[:, :-1].contiguous().cpu().numpy()):
            raise ValueError(
                "the rows came back in another order, as in beam search, but contrastive search is greedy and its "
                "scores cannot be summed over steps: pass num_beams=1"
            )

    def _start(self, ids: Tensor) -> "_Search":
        """Read whole rows, which `generate()` itself prepares for the model."""
        how = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 1, "use_cache": True}
        inputs = self._encoder_rows(ids) if self._encoder_inputs else self._text_rows(ids)
        search: _Search = self._model.generate(**inputs, **how, custom_generate=self._begin)
        return search

    def _encoder_rows(self, ids: Tensor) -> dict[str, Any]:
        assert self._encoder_inputs is not None
        given = dict(self._encoder_inputs)
        if given.get("attention_mask") is None and "input_ids" in given:
            given["attention_mask"] = source_padding(self._model, given["input_ids"])
        repeats = len(ids) // len(next(iter(given.values())))
        inputs = {name: value.repeat_interleave(repeats, 0) for name, value in given.items()}
        return {"decoder_input_ids": ids, **inputs}

    def _text_rows(self, ids: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids, "attention_mask": self._find_mask(ids)}
        if self._vision_inputs is None:
            _refuse_images(self._model, ids)
            return inputs
        for name, value in self._vision_inputs.items():  # what was generated is text, type 0
            inputs[name] = pad(value, (0, ids.shape[1] - value.shape[1])) if "token_type" in name else value
        return inputs

    def _begin(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> "_Search":
        """What `generate()` calls in place of a decoding loop."""
        _check_search(generation_config, model_kwargs, self._k)
        return _Search(model, input_ids, model_kwargs, alpha=self._alpha, k=self._k, path="auto")

    def _find_mask(self, ids: Tensor) -> Tensor:
        """`(B, T)`, 0 for the padding before the prompts."""
        if self._prompt_mask is None:
            return padding_of(self._model, ids)
        prompts, length = self._prompt_mask.shape
        repeats, rest = divmod(len(ids), prompts)
        prompt_ids = ids[:: repeats or 1, :length]
        if self._prompt_ids is None and ids.shape[1] == length:
            self._prompt_ids = prompt_ids.clone()
        if rest or self._prompt_ids is None or not torch.equal(prompt_ids, self._prompt_ids):
            raise ValueError(
                f"attention_mask is of shape {tuple(self._prompt_mask.shape)} and was given for other prompts than "
                f"these, of shape {tuple(ids.shape)}: a mask belongs to one batch of prompts, so make a new processor "
                "for each"
            )
        mask = self._prompt_mask.to(ids).repeat_interleave(repeats, dim=0)
        return pad(mask, (0, ids.shape[1] - length), value=1)


def _check_search(config: Any, model_kwargs: Mapping[str, Any], k: int) -> None:
    """Raise ValueError for options that contrastive search does not support, before the first forward pass."""
    if config.do_sample:
        raise ValueError("contrastive search is deterministic and does not sample: pass do_sample=False to generate()")
    if not model_kwargs.get("use_cache"):
        raise ValueError("contrastive search needs the cache: pass use_cache=True to generate()")
    if config.prefill_chunk_size is not None:
        raise ValueError("contrastive search needs all hidden states of the prompt: leave prefill_chunk_size out")
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(
            "contrastive search reads k candidates at a time, whose attentions and hidden states it does not return: "
            "leave output_attentions and output_hidden_states out"
        )
    if model_kwargs.get("encoder_outputs") is None and model_kwargs.get("attention_mask") is not None:
        check_mask(model_kwargs["attention_mask"])
    if model_kwargs.get("past_key_values") is not None:
        _check_cache(model_kwargs["past_key_values"], room=(config.max_length or 0) - 1 + k)


def _check_cache(cache: Any, *, room: int) -> None:
    """Refuse a cache whose contents are unknown, or that could not take candidates and give them back."""
    if not any(linear_layers(cache)) and (length := int(cache.get_seq_length())):
        raise ValueError(
            f"the cache already holds {length} tokens, whose hidden states contrastive search needs and a cache has "
            "not: pass the whole prompt without past_key_values"
        )
    layers = _parts(cache)[0].layers
    static = [layer for layer in layers if isinstance(layer, StaticLayer)]
    kinds = (kind for layer in layers for kind in type(layer).__mro__)
    if any("Quantized" in kind.__name__ for kind in kinds):  # the base's name has changed in transformers 5.20
        kind = "a quantized cache"
    elif any(layer.is_sliding for layer in static):
        kind = "a static cache with a sliding window"
    elif static and (found := cache.get_max_length()) < room:
        raise ValueError(
            f"a static cache holds the candidates of contrastive search besides the text, so it needs room for {room} "
            f"tokens, not {found}: pass max_cache_len={room}"
        )
    else:
        return
    raise ValueError(f"contrastive search cannot take candidates back out of {kind}: use the dynamic cache")


def _refuse_images(model: Any, ids: Tensor) -> None:
    """A logits processor is given no images, so it cannot read prompts that hold some."""
    names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
    held = [found for name in names if (found := getattr(model.config, name, None)) is not None]
    if held and torch.isin(ids, torch.tensor(held, device=ids.device)).any():
        raise ValueError(
            "the prompt holds images, which a logits processor is not given: pass vision_inputs=, what the model reads "
            "besides the text"
        )


# ------------------------------------------------------------------------------------------------------------ the text


class _Search:
    """Contrastive search over rows: the scores of the candidates, and the state that goes on with one of each."""

    def __init__(
        self, model: Any, input_ids: Tensor, model_kwargs: dict[str, Any], *, alpha: float, k: int, path: Way
    ) -> None:
        self.alpha, self.k, self.path = alpha, k, path
        self.rows, self.logits, hidden = _Rows.read_prompt(model, input_ids, model_kwargs)
        self._context = _Context(hidden)
        self._reader: _Tree | _Replicas | None = None
        self._candidates: Tensor | None = None

    def score(self, logits: Tensor) -> Tensor:
        """Contrastive scores `(B, V)` for processed logits `(B, V)`. The candidates are held ready."""
        if self._candidates is not None:
            self._drop()
        self._check(logits, "logits of the main branch")
        candidates = logits.topk(min(self.k, logits.shape[-1])).indices
        if self._reader is None:
            self._reader = _choose_reader(self.rows, candidates, self.path)
        self._candidates = candidates
        self._read = self._reader.read(candidates)
        self._units = unit_vectors(self._read.hidden)
        penalty = largest_cosine(self._units, self._context.units, self.rows.mask).to(logits.device)
        self._check(penalty, "cosines of the candidates' hidden states")
        return contrastive_search(logits, candidates, penalty, alpha=self.alpha)

    def _check(self, values: Tensor, name: str) -> None:
        """Raise ValueError if some values `(B, ...)` are NaN, `+inf`, or all `-inf`."""
        check_logits([values], lambda: [name], lambda row: f"in row {row}, after {self.rows.length} tokens")

    def go_on(self, tokens: Tensor, *, ends: bool = False) -> None:
        """Read these tokens `(B,)`; where the text ends with them, let go of the candidates instead."""
        if ends:
            self._drop()
        elif not self.take(tokens):
            self.read(tokens[:, None])

    def take(self, tokens: Tensor) -> bool:
        """Go on with these tokens `(B,)`, which must be candidates; False if some are not, and then nothing is held."""
        assert self._candidates is not None
        assert self._reader is not None
        hits = self._candidates == tokens[:, None]
        if not hits.any(-1).all():
            self._drop()
            return False
        choice = hits.int().argmax(-1)
        self._reader.keep(choice)
        self._grow(_pick(self._read.logits, choice), _pick(self._units, choice))
        return True

    def read(self, tokens: Tensor) -> None:
        """Go on with any tokens `(B, 1)`, by a forward of their own."""
        read = self.rows.read(tokens)
        self._grow(read.logits[:, -1], unit_vectors(read.hidden[:, -1]))

    def _grow(self, logits: Tensor, units: Tensor) -> None:
        self.logits, self._candidates = logits, None
        self._context.append(units)
        self.rows.grow()

    def _drop(self) -> None:
        assert self._reader is not None
        self._reader.drop()
        self._candidates = None


def _pick(values: Tensor, choice: Tensor) -> Tensor:
    """`(B, ...)` of `(B, k, ...)`."""
    return values[torch.arange(len(choice), device=values.device), choice.to(values.device)]


class _Context:
    """Unit vectors of the hidden states of a text, in a buffer that grows by a quarter when it is full."""

    def __init__(self, hidden: Tensor) -> None:
        self._buffer = unit_vectors(hidden)
        self._length = hidden.shape[1]

    @property
    def units(self) -> Tensor:
        """`(B, T, d)`."""
        return self._buffer[:, : self._length]

    def append(self, units: Tensor) -> None:
        """Add `(B, d)`."""
        if self._length == self._buffer.shape[1]:
            self._buffer = pad(self._buffer, (0, 0, 0, 64 + self._length // 4))
        self._buffer[:, self._length] = units
        self._length += 1


class _Read(NamedTuple):
    """What a forward says at its last positions."""

    logits: Tensor
    """`(rows, positions, V)`."""
    hidden: Tensor
    """`(rows, positions, d)`, of the last layer."""


class _Rows:
    """Rows of tokens that a model has read: their cache, and what a forward of the next token needs besides."""

    def __init__(self, model: Any, cache_name: str, kwargs: Mapping[str, Any], shape: torch.Size) -> None:
        self.model, self.cache_name = model, cache_name
        self.count, self.length = shape[:2]
        prefix = "decoder_" if model.config.is_encoder_decoder else ""
        self.mask_name, self.positions_name = f"{prefix}attention_mask", f"{prefix}position_ids"
        self.cache: Any = kwargs[cache_name]
        self.mask: Tensor | None = kwargs.get(self.mask_name)  # of the rows' tokens; None if none is padding
        positions: Tensor | None = kwargs.get(self.positions_name)
        self.positions = None if positions is None else positions[..., -1:] + 1  # of the next token
        spent = {self.mask_name, self.positions_name, cache_name, "logits_to_keep", "input_ids", "inputs_embeds"}
        spent |= set(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)
        self.others = {name: value for name, value in kwargs.items() if name not in spent}
        for name, kept in (("token_type_ids", 1), ("mm_token_type_ids", 0)):  # as in generate(): the last type, text
            if self.others.get(name) is not None:
                self.others[name] = self.others[name][:, -1:] * kept
        self._encoded: dict[int, tuple[dict[str, Any], Any]] = {}  # other inputs and cross-attention, by copies

    @classmethod
    def read_prompt(cls, model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> tuple["_Rows", Tensor, Tensor]:
        """Rows that have read their prompts, the logits `(B, V)` of the next token, all hidden states `(B, T, d)`."""
        kwargs = kwargs | {"output_hidden_states": True}
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        outputs = model(**inputs, return_dict=True)
        cache_name = next((name for name in ALL_CACHE_NAMES if hasattr(outputs.get(name), "reorder_cache")), None)
        if cache_name is None:
            raise ValueError(f"{type(model).__name__} returns no cache that contrastive search could go on with")
        hidden = _last_hidden(outputs)
        rows = cls(model, cache_name, kwargs | {cache_name: outputs[cache_name]}, hidden.shape)
        return rows, outputs.logits[:, -1].clone(), hidden  # a view would keep the logits of the whole prompt

    def read(self, ids: Tensor) -> _Read:
        """A plain forward of the next token `(B, 1)`, as `generate()` does it."""
        return self.forward(ids, None if self.mask is None else pad(self.mask, (0, 1), value=1))

    def forward(self, ids: Tensor, mask: Tensor | None, tree_mask: Any = None) -> _Read:
        """A forward of `(rows, n)` tokens that all come next. A tree mask takes the mask's place."""
        wide = {name: value.expand(-1, ids.shape[1]) for name, value in self.others.items() if "token_type" in name}
        if self.positions is not None:
            wide[self.positions_name] = self.positions.expand(*self.positions.shape[:-1], ids.shape[1])
        given = self.others | wide | {self.cache_name: self.cache, self.mask_name: mask}
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=ids.shape[1], **given)
        if tree_mask is not None:
            inputs[self.mask_name] = tree_mask
        outputs = self.model(**inputs, return_dict=True)
        return _Read(outputs.logits[:, -ids.shape[1] :], _last_hidden(outputs)[:, -ids.shape[1] :])

    def grow(self) -> None:
        """Count the next token as read."""
        self.length += 1
        self.mask = None if self.mask is None else pad(self.mask, (0, 1), value=1)
        self.positions = None if self.positions is None else self.positions + 1

    def fork(self) -> "_Rows":
        """The same rows with a cache of their own. Nothing is copied that need not be."""
        fork = copy.copy(self)
        fork.cache = _fork(self.cache)
        return fork

    def replicate(self, copies: int) -> "_Rows":
        """So many copies of each row, one after the other."""
        fork, count = self.fork(), self.count
        fork.mask = _repeat(self.mask, count, copies)
        fork.positions = _repeat(self.positions, count, copies, dim=-2)
        index = torch.arange(count, device=input_device(self.model)).repeat_interleave(copies)
        own, encoded = _parts(fork.cache)
        _repeat_cache(own, copies, index)
        if copies not in self._encoded:  # what is said of the encoder's text does not change from step to step
            if encoded is not None:
                _repeat_cache(encoded, copies, index)
            self._encoded[copies] = _repeat(self.others, count, copies), encoded
        fork.others, encoded = self._encoded[copies]
        if encoded is not None:
            fork.cache.cross_attention_cache = encoded
        return fork

    def take(self, copies: "_Rows", index: Tensor) -> None:
        """Go on with those rows of the copies."""
        own, encoded = _parts(copies.cache)
        own.reorder_cache(index)
        if encoded is not None:
            copies.cache.cross_attention_cache = self.cache.cross_attention_cache
        self.cache = copies.cache


def _last_hidden(outputs: Any) -> Tensor:
    """The hidden states of the last layer, the decoder's if there are two."""
    states = outputs.get("decoder_hidden_states") or outputs.get("hidden_states")
    hidden: Tensor = states[-1]
    return hidden


def _repeat(value: Any, rows: int, copies: int, *, dim: int = 0) -> Any:
    """A model input with every row of the batch repeated; what has no rows stays."""
    if isinstance(value, Tensor):
        return value.repeat_interleave(copies, dim) if value.ndim and value.shape[dim] == rows else value
    if isinstance(value, Mapping):
        return type(value)(**{name: _repeat(each, rows, copies) for name, each in value.items()})
    return value


def _parts(cache: Any) -> tuple[Any, Any]:
    """The cache of the text itself, and of an encoder's text if there is one."""
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None


def _repeat_cache(cache: Any, copies: int, index: Tensor) -> None:
    """Every row so many times. Both calls do that; the first is faster, and not every layer has it."""
    for layer in cache.layers:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layer.batch_repeat_interleave(copies)
        else:
            layer.reorder_cache(index)


def _fork(cache: Any) -> Any:
    """A cache of its own that shares the tensors of another. Dynamic layers never change a tensor that they share."""
    fork = copy.copy(cache)
    own, encoded = _parts(cache)
    if encoded is not None:
        fork.self_attention_cache, fork.cross_attention_cache = _fork(own), _fork(encoded)
        fork.is_updated = dict(cache.is_updated)
        return fork
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in fork.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict):  # the states of linear attention
                setattr(layer, name, dict(value))
        if isinstance(layer, StaticLayer):
            layer.cumulative_length = layer.cumulative_length.clone()
    return fork


# ---------------------------------------------------------------------------------------------------- two ways to read


class _Replicas:
    """Every candidate as a row of its own, with a copy of the cache."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def read(self, candidates: Tensor) -> _Read:
        """What the model says after each of the candidates `(B, k)`."""
        self._k = candidates.shape[1]
        self._copies = self._rows.replicate(self._k)
        found = self._copies.read(candidates.reshape(-1, 1))
        return _Read(*(each.reshape(*candidates.shape, -1) for each in found))

    def keep(self, choice: Tensor) -> None:
        """Go on with the cache of one candidate `(B,)` per row."""
        rows = torch.arange(len(choice), device=choice.device)
        self._rows.take(self._copies, rows * self._k + choice)
        self.drop()

    def drop(self) -> None:
        """Forget the candidates."""
        del self._copies


class _Tree:
    """All candidates of a row as query positions of one forward, over one cache."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        rows.cache.activate_past_recording()

    def read(self, candidates: Tensor, visible: Tensor | None = None) -> _Read:
        """What the model says after each of the candidates `(B, k)`, of a text of which it sees what is `visible`."""
        rows, self._k = self._rows, candidates.shape[1]
        visible = rows.mask if visible is None else visible
        masks = {kind: self._mask(layer, visible) for kind, layer in _kinds(rows).items()}
        return rows.forward(candidates, None, tree_mask=masks.get(None, masks))

    def _mask(self, layer: int, visible: Tensor | None) -> Tensor:
        """The text and itself for each candidate: `(B or 1, 1, k, width)`, 0 or the least number, as eager needs it."""
        rows, k = self._rows, self._k
        width, start = rows.cache.get_mask_sizes(k, layer)
        dtype, end = rows.cache.layers[layer].keys.dtype, rows.length - start
        low, count = torch.finfo(dtype).min, 1 if visible is None else len(visible)
        mask = torch.full((count, 1, k, width), low, dtype=dtype, device=input_device(rows.model))
        mask[..., :end] = 0
        if visible is not None:
            mask[..., :end].masked_fill_(visible[:, None, None, start:].to(mask.device) == 0, low)
        mask[..., end : end + k].diagonal(dim1=-2, dim2=-1).fill_(0)
        return mask

    def keep(self, choice: Tensor) -> None:
        """Leave one candidate `(B,)` per row in the cache."""
        for layer in self._rows.cache.layers:
            first = self._rows.length if isinstance(layer, StaticLayer) else layer.keys.shape[-2] - self._k
            for states in (layer.keys, layer.values):
                held = states[:, :, first : first + self._k]
                index = choice.to(held.device)[:, None, None, None].expand(-1, held.shape[1], 1, held.shape[3])
                held[:, :, :1] = held.gather(2, index)
        self._crop(self._k - 1)

    def drop(self) -> None:
        """Take all candidates out of the cache."""
        self._crop(self._k)

    def _crop(self, count: int) -> None:
        cache = self._rows.cache
        if cache.is_compileable:
            for layer in cache.layers:
                layer.cumulative_length.sub_(count)
        else:
            cache.crop(-count)


def _kinds(rows: _Rows) -> dict[str | None, int]:
    """The first layer of each kind of mask that the model wants, by its name; by None if it wants but one mask."""
    types = getattr(rows.model.config.get_text_config(decoder=True), "layer_types", None)
    return {None: 0} if types is None else {kind: types.index(kind) for kind in types}


def _windows(config: Any, layers: int) -> list[bool]:
    """Which layers have a sliding window, as the model makes its masks."""
    types = getattr(config, "layer_types", None)
    if types is None:
        return [getattr(config, "sliding_window", None) is not None] * layers
    return [kind == "sliding_attention" for kind in types]


def _choose_reader(rows: _Rows, candidates: Tensor, path: Way) -> _Tree | _Replicas:
    """The tree if it is asked for or can be had; in doubt the model's first candidates decide."""
    reason = None if path == "replicate" else _why_no_tree(rows, candidates)
    if path == "tree" and reason is not None:
        raise ValueError(
            f"{type(rows.model).__name__} cannot read candidates as a tree: {reason}; "
            "use path='auto' or path='replicate'"
        )
    return _Replicas(rows) if path == "replicate" or reason is not None else _Tree(rows)


def _why_no_tree(rows: _Rows, candidates: Tensor) -> str | None:
    """Why the model cannot read candidates as a tree; None if it can."""
    model, config = rows.model, rows.model.config.get_text_config(decoder=True)
    if rows.positions is None or model.config.is_encoder_decoder:
        return "it counts positions by itself and takes no position_ids"
    if (attention := config._attn_implementation) not in ("eager", "sdpa"):
        return f"its attention is {attention!r}, and only 'eager' and 'sdpa' take a mask of one's own"
    if strange := {type(layer) for layer in rows.cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer}:
        return f"its cache has a layer of type {strange.pop().__name__}, which cannot take candidates back"
    if strange_kinds := {kind for kind in _kinds(rows) if kind not in (None, "full_attention", "sliding_attention")}:
        return f"it has layers of kind {strange_kinds.pop()!r}, whose mask is not known here"
    if _windows(config, len(rows.cache.layers)) != [layer.is_sliding for layer in rows.cache.layers]:
        return "its cache does not know which of its layers have a sliding window"
    if own := [name for name in OWN_WINDOWS if getattr(config, name, None) is not None]:
        return f"it has a window of its own, {own[0]}, which counts places in the cache"
    return _test(rows, candidates)


# ------------------------------------------------------------------------------------------------------------- the test

OWN_WINDOWS = ("window_size", "keep_window_size", "local_attention_window_len")
"""Where configurations speak of windows that no cache layer knows: GPT-Neo, Doge, BLT."""
VISIBLE = 8
"""The test is done twice, once with so much of the text visible, so that what must not be seen would weigh."""
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""How far a tree may differ from a plain forward, relative to the spread of the values."""
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What models raise at a mask that they do not know."""
_VERDICTS: WeakKeyDictionary[Any, dict[Any, str | None]] = WeakKeyDictionary()
"""For each model and kind of use the reason why it cannot read a tree, or None if it can."""


def _test(rows: _Rows, candidates: Tensor) -> str | None:
    """Compare the model's reading of a tree with its plain reading; once for each kind of use."""
    config, dtype = rows.model.config.get_text_config(decoder=True), rows.cache.layers[0].keys.dtype
    length = rows.length.bit_length()  # 9 to 16 tokens are much the same, 5000 are not
    kind = (config._attn_implementation, dtype, rows.mask is None, rows.cache.is_compileable, length)
    verdicts = _VERDICTS.setdefault(rows.model, {})
    if kind not in verdicts:
        whole = candidates.new_ones(rows.count, rows.length) if rows.mask is None else rows.mask
        recent = whole.clone()
        recent[:, :-VISIBLE] = 0
        found = (_compare(rows, candidates, visible, TOLERANCE[dtype]) for visible in (recent, whole))
        verdicts[kind] = next((reason for reason in found if reason is not None), None)
    return verdicts[kind]


def _compare(rows: _Rows, candidates: Tensor, visible: Tensor, tolerance: float) -> str | None:
    """Read the last candidate plainly and in a tree, where it stands furthest from its place, and after all others."""
    plain = rows.fork().forward(candidates[:, -1:], pad(visible, (0, 1), value=1))
    try:
        tree = _Tree(rows.fork()).read(candidates, visible)
    except _REFUSALS as error:
        return f"a forward of several candidates fails with {type(error).__name__}: {error}"
    for name, one, other in zip(_Read._fields, plain, tree, strict=True):
        one, other = one[:, -1].float(), other[:, -1].float()
        difference = float(((one - other).square().mean(-1).sqrt() / one.std(-1)).max())
        if not difference < tolerance:
            return f"its {name} differ from those of a plain forward by {difference:.2g} of their spread"
    return None
