"""Where a contrast distribution comes from: a model that follows the same rows of tokens, with a cache of its own.

A logits processor is given nothing but `input_ids` at every step. So a branch finds out by itself what they mean: rows
that go on from the last call (feed the new tokens), rows that a beam search reordered (gather the cache first), rows that
share a beginning with the last call (crop the cache), or another text (start afresh). Every decision compares the tokens
themselves, and another text also compares the state of the model (its weights and adapters), so a cache is never silently stale.

This module and `prompts` are the ones of the decoding part that lean on private methods of transformers. Read from 5.23.0:
`_update_model_kwargs_for_generation`, `_supports_logits_to_keep`. With them a branch prepares a forward just as `generate()`
would, so every model that generates can be a branch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.generation.utils import ALL_CACHE_NAMES

from contralto.decoding.branches.context import check_source, check_tokens, context_length
from contralto.decoding.branches.head import find_head, read_layers
from contralto.decoding.branches.padding import KnownTokens, check_mask, fit_mask, padding_of, source_padding
from contralto.decoding.branches.prompts import (
    TOKEN_TYPES,
    Prompts,
    check_images,
    is_multimodal,
    linear_layers,
    prepare_images,
    prepare_positions,
    takes_positions,
)
from contralto.decoding.placement import input_device

__all__ = ["AdaptersOff", "Branch", "InputBranch", "LayerBranch", "ModelBranch", "Reader"]


class AdaptersOff:
    """A PEFT model seen without its adapters: its base model as a branch, with no second model in memory.

    Args:
        peft_model: a `peft.PeftModel`. While the branch runs, its adapters are disabled; then they are enabled again.

    Raises:
        TypeError: the model has no adapters to turn off.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> tuned = get_peft_model(testbed.load("expert"), LoraConfig(task_type="CAUSAL_LM"))
        >>> processor = ContrastiveDecodingLogitsProcessor(AdaptersOff(tuned))
        >>> prompt = testbed.tokenizer()("Ben went out to the", return_tensors="pt")
        >>> text = tuned.generate(**prompt, logits_processor=[processor], max_new_tokens=4)
    """

    def __init__(self, peft_model: Any) -> None:
        if not (hasattr(peft_model, "disable_adapter") and hasattr(peft_model, "get_base_model")):
            raise TypeError(
                f"AdaptersOff needs a peft.PeftModel, whose adapters it can turn off, not {type(peft_model).__name__}"
            )
        self.peft_model = peft_model


class _Continuation(NamedTuple):
    """How the rows of a call go on from those of the last call."""

    kept: int
    """How many of the cached tokens still hold."""
    rows: Tensor | None = None
    """Which cached row each row goes on from; None if the rows are in order."""


class _Given(NamedTuple):
    """Prompts whose padding is known."""

    ids: Tensor
    """`(B, T)`."""
    mask: Tensor
    """`(B, T)`, 0 for padding."""

    def begins(self, ids: Tensor) -> bool:
        """Whether rows begin with these prompts."""
        return torch.equal(ids[:, : self.ids.shape[1]], self.ids.to(ids.device))


class Branch(Protocol):
    """Where a contrast distribution comes from."""

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits `(B, V)` for the token after each row of the main model, `(B, T)`."""

    def score(self, input_ids: Tensor, count: int, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `(B, count, V)` for the last `count` tokens of each row, in one forward."""

    def reset(self) -> None:
        """Forget the last call."""


class Reader:
    """A model with a cache of its own, fed prompts first and then token by token.

    Args:
        model: a transformers model that can generate, a PEFT model, or `AdaptersOff`.

    Raises:
        TypeError: `model` cannot generate.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._context = _unwrap(model)
        self._name = type(self._model).__name__
        self._is_encoder_decoder = bool(self._model.config.is_encoder_decoder)
        self.compiled: Any = None
        """What to call for one more token in place of the model, if it was compiled."""
        self.context: int | None = None
        """How many tokens a row may have; None if there is no limit, or for a main model, which `generate()` warns about."""
        self.unlimited = 0
        """How many of the first rows are a main model's, and may have more."""
        self._fills: tuple[int, ...] = ()
        self.reset()

    def reset(self) -> None:
        """Forget the last call and its cache."""
        self._seen: Tensor | None = None  # the rows of the last call
        self._unread: Tensor | int = 0  # tokens at the end of each row that are padding, or only predicted
        self._hidden = 0  # how many of their first tokens the model does not see
        self.kwargs: dict[str, Any] = {}
        """What `generate()` calls model_kwargs, the cache among them."""

    @property
    def model(self) -> Any:
        """The transformers model inside."""
        return self._model

    @property
    def is_adapted(self) -> bool:
        """Whether the model runs as it is, its adapters not turned off."""
        return self._context is nullcontext

    @torch.no_grad()
    def start(self, prompts: Prompts, *, cache: Any = None) -> Tensor:
        """Read prompts that are ready, with a cache of one's own choice if any. Logits `(R, V)`."""
        self.reset()
        self.kwargs = {**self._common(), **prompts.kwargs}
        mask = self.kwargs.get("attention_mask")
        if not self._is_encoder_decoder and mask is not None and mask.all():
            self.kwargs["attention_mask"] = None
        if cache is not None:
            self.kwargs["past_key_values"] = cache
        return self._forward(prompts.ids, new=None)[:, -1]

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Read one more token `(R,)` per row. Logits `(R, V)`."""
        assert self._seen is not None
        return self._forward(torch.cat([self._seen, tokens.to(self._seen)[:, None]], dim=1), new=1)[:, -1]

    def _common(self, keep: int = 1) -> dict[str, Any]:
        """What every forward is given."""
        return {"use_cache": True} | ({"logits_to_keep": keep} if self._model._supports_logits_to_keep() else {})

    def _forward(self, ids: Tensor, *, new: int | None) -> Tensor:
        """Feed the last `new` tokens (None: all of them, for the first time) and keep the cache. Logits `(B, ..., V)`."""
        if self.context is not None and ids.shape[1] - self._hidden > self.context:
            check_tokens(self._name, self.context, self._lengths(ids, new)[self.unlimited :])
        inputs = self._model.prepare_inputs_for_generation(
            self._known(ids, new)[:, self._hidden :],
            next_sequence_length=new,
            is_first_iteration=new is None,
            **self.kwargs,
        )
        call = self._model if new is None or self.compiled is None else self.compiled
        try:
            with self._context():
                outputs = call(**inputs, return_dict=True)
        except torch.OutOfMemoryError as error:
            self.reset()
            raise torch.OutOfMemoryError(
                f"no memory is left for {self._name} ({self._model.num_parameters():,} parameters) beside the main model: "
                "load it quantized or on another device, use AdaptersOff, or lower the batch size"
            ) from error
        self.kwargs = self._model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self._is_encoder_decoder
        )
        self._seen = ids
        return self._read(outputs)

    def _lengths(self, ids: Tensor, new: int | None) -> Tensor:
        """How many tokens of each row the model sees; none of rows that have ended."""
        mask = self.kwargs.get("decoder_attention_mask" if self._is_encoder_decoder else "attention_mask")
        mask = torch.ones_like(ids[:, self._hidden :]) if mask is None else mask
        lengths = fit_mask(mask, ids.shape[1] - self._hidden).sum(-1)
        if new is None:
            return lengths - self._unread
        fills = torch.tensor(self._ended_with(), dtype=ids.dtype, device=ids.device)
        return lengths.masked_fill(torch.isin(ids[:, -1], fills), 0)

    def _ended_with(self) -> tuple[int, ...]:
        """The tokens that a row which has ended may end with."""
        return self._fills

    def _known(self, ids: Tensor, new: int | None) -> Tensor:
        """The rows in tokens that the model knows."""
        return ids

    def _read(self, outputs: Any) -> Tensor:
        """The distribution that this branch is about."""
        logits: Tensor = outputs.logits
        return logits


class ModelBranch(Reader):
    """The next-token logits of a model for rows of tokens that another model is writing.

    The rows may come from greedy search, sampling or beam search, from several calls in turn, and from texts that extend
    or share a beginning with the last one. Whatever comes, the logits are those of the model on the whole row.

    Args:
        model: a transformers model that can generate, a PEFT model, or `AdaptersOff`.
        attention_mask: `(prompts, T)`, 1 for tokens and 0 for padding, of the prompts before they are expanded to beams
            or several sequences each. Without it the padding is found in the prompts, see `padding.padding_of`.
        window: how many of a prompt's last tokens the model sees; None for all. Generated tokens are always seen. What
            goes on from the last call by one token counts as generated, anything else as a new prompt.
        encoder_inputs: for an encoder-decoder model, what its encoder reads: `input_ids`, `attention_mask`, ...
        vision_inputs: for an image-text model, what it reads with the prompts: `pixel_values`, `image_grid_thw`,
            `mm_token_type_ids`, ... Its rows must be the prompts', in the same order.

    Raises:
        TypeError: `model` cannot generate.
        ValueError: `window` below 1, right padding, encoder or vision inputs missing or not wanted; when called, a row longer
            than the model's context.
    """

    def __init__(
        self,
        model: Any,
        *,
        attention_mask: Tensor | None = None,
        window: int | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model)
        self._takes_positions = takes_positions(self._model)
        if window is not None and window < 1:
            raise ValueError(
                f"window must be at least 1 (the prompt's last token), or None for all of it, not {window}"
            )
        if self._is_encoder_decoder and not encoder_inputs:
            raise ValueError(f"{self._name} is an encoder-decoder: pass encoder_inputs=, what its encoder is to read")
        if attention_mask is not None:
            check_mask(attention_mask)
        if encoder_inputs and not self._is_encoder_decoder:
            raise ValueError(f"{self._name} has no encoder, so it cannot use encoder_inputs")
        if vision_inputs and (self._is_encoder_decoder or not is_multimodal(self._model) or window is not None):
            raise ValueError(f"{self._name} reads text alone here, so it cannot use {', '.join(vision_inputs)}")
        self._window = window
        self._tokens = KnownTokens.of(self._model)
        self.context = context_length(self._model)
        self._vision_inputs = vision_inputs
        self._given: _Given | None = None
        self._lone: _Given | None = None
        self._prompt_mask = attention_mask
        self._prompt_ids: Tensor | None = None
        self._encoder_inputs = encoder_inputs
        self._encoder_outputs: Any = None
        self._state: list[Any] = []

    def begin(self, ids: Tensor, mask: Tensor, fills: Sequence[int] = ()) -> None:
        """Take the mask of the prompts that come next, where it is known, until `end`.

        Args:
            ids: `(B, T)` the prompts.
            mask: `(B, T)`, 0 for padding.
            fills: tokens that ended rows are padded with.

        Raises:
            ValueError: right padding, or another mask than that of the branch.
        """
        check_mask(mask)
        if self._prompt_mask is not None and not self._agrees(mask):
            raise ValueError(
                "attention_mask= of the branch is not the mask that generate() is given: leave it out, since the loop hands "
                "the mask on"
            )
        device = input_device(self._model)
        self._given, self._fills = _Given(ids.to(device, copy=True), mask.to(device)), tuple(fills)
        if self._mask is not None:
            length = min(self._mask.shape[1], mask.shape[1])
            if not torch.equal(self._mask[:, :length], self._given.mask[:, :length].to(self._mask)):
                self.reset()

    def _agrees(self, mask: Tensor) -> bool:
        """Whether a mask of rows is that of the branch's prompts."""
        own = self._prompt_mask
        assert own is not None
        repeats, rest = divmod(len(mask), len(own))
        return not rest and torch.equal(own.repeat_interleave(repeats, 0).to(mask) != 0, mask != 0)

    def end(self) -> None:
        """Let go of the mask that `begin` was given."""
        self._given, self._fills = None, ()

    def reset(self) -> None:
        """Forget the last call and its cache: the next one is a new prompt."""
        super().reset()
        self._mask: Tensor | None = None  # of the first columns; what came later is all text
        self._prompt_length = 0

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """The model's logits for the token after each row.

        Args:
            input_ids: `(B, T)` int64, on any device.

        Returns:
            `(B, V)` in the model's dtype, on the model's device. They may be a view; do not change them in place.
        """
        ids = input_ids.to(input_device(self._model) if self._seen is None else self._seen.device, copy=True)
        if self._seen is None or ids.shape[1] != self._seen.shape[1] + 1:
            self._forget_if_changed()
        found = self._find(ids)
        if found is None or not self._rewind(ids, found):
            return self._start(ids)[:, -1]
        return self._forward(ids, new=ids.shape[1] - found.kept)[:, -1]

    @torch.no_grad()
    def score(self, input_ids: Tensor, count: int, attention_mask: Tensor | None = None) -> Tensor:
        """The model's logits for the last `count` tokens of each row, in one forward and without a cache.

        Args:
            input_ids: `(B, T)` int64, prompts and continuations; what pads the continuations on the right is of no matter.
            count: how many of the last tokens to predict, below `T`.
            attention_mask: `(B, T)`, 0 for the padding before the prompts, and for that after the continuations, which does
                not count towards the model's context.

        Returns:
            `(B, count, V)`.
        """
        self._forget_if_changed()
        ids = input_ids.to(input_device(self._model))
        mask: Tensor | None = None
        unread: Tensor | int = 1  # the last token is predicted, not read
        if attention_mask is not None:  # no token sees what comes after it, so that padding at the end needs no mask
            unread = (attention_mask[:, -count:] == 0).sum(-1).to(ids.device) + 1
            mask = fit_mask(attention_mask[:, :-count].to(ids), ids.shape[1])
        logits = self._start(ids, scored=count, mask=mask, unread=unread)[:, -count - 1 : -1]
        self.reset()
        return logits

    def prompts(self, ids: Tensor) -> Prompts:
        """The prompts `ids` as this branch reads them, ready for a first forward beside other rows."""
        self._forget_if_changed()
        ids = ids.to(input_device(self._model))
        if self._encoder_inputs is not None:
            return Prompts(ids, self._encode(self._encoder_inputs, rows=len(ids)))
        hidden = 0 if self._window is None else max(0, ids.shape[1] - self._window)
        mask = self._find_mask(ids)
        ids = self._tokens.replace(ids, mask)
        check_images(self._model, ids[:, hidden:], self._vision_inputs or {})
        if self._vision_inputs:
            return self._see(ids, self._vision_inputs, mask)
        return prepare_images(self._model, ids[:, hidden:], {"attention_mask": mask[:, hidden:]}, len(ids))

    def _forget_if_changed(self) -> None:
        """Forget what was computed with other weights or adapters than the model has now."""
        if (state := _state(self._model)) != self._state:
            self.reset()
            self._encoder_outputs, self._state = None, state

    def _find(self, ids: Tensor) -> _Continuation | None:
        """Compare with the last call. A row's last token is always fed again, for its logits."""
        seen = self._seen
        if seen is None or self._cache is None or len(seen) != len(ids):
            return None
        length = min(seen.shape[1], ids.shape[1] - 1)
        if torch.equal(seen[:, :length], ids[:, :length]):
            return _Continuation(length)
        if length == seen.shape[1] and (rows := self._match_rows(seen, ids)) is not None:
            return _Continuation(length, rows)
        shared = (seen[:, :length] == ids[:, :length]).all(0).cumprod(0).sum()
        return _Continuation(int(shared)) if shared else None

    def _match_rows(self, seen: Tensor, ids: Tensor) -> Tensor | None:
        """For each row the cached row of the same prompt that it goes on from, if every row has one."""
        per_prompt = len(ids) // self._prompts
        cached = {(i // per_prompt, row.tobytes()): i for i, row in enumerate(seen.cpu().numpy())}
        starts = ids[:, : seen.shape[1]].cpu().numpy()
        rows = [cached.get((i // per_prompt, row.tobytes()), -1) for i, row in enumerate(starts)]
        return None if -1 in rows else torch.tensor(rows, device=ids.device)

    @property
    def _prompts(self) -> int:
        """How many prompts the rows are known to belong to; 1 where rows of equal tokens are interchangeable."""
        if self._encoder_inputs is not None:
            return len(next(iter(self._encoder_inputs.values())))
        return 1 if self._prompt_mask is None else len(self._prompt_mask)

    @property
    def _cache(self) -> Any:
        return next((self.kwargs[name] for name in ALL_CACHE_NAMES if self.kwargs.get(name) is not None), None)

    def _rewind(self, ids: Tensor, found: _Continuation) -> bool:
        """Bring the cache to the state after the kept tokens of `ids`; False if it cannot be brought there."""
        assert self._seen is not None
        assert self._mask is not None
        dropped, new = self._seen.shape[1] - found.kept, ids.shape[1] - found.kept
        if not dropped and new == 1 and found.rows is None:
            return True
        if self._window is not None and (dropped or new > 1):
            if found.kept >= self._prompt_length and dropped:
                raise ValueError(
                    "with a window, a branch cannot follow a text whose end was taken back, as assisted decoding does, "
                    "or tell it from a new prompt: decode without the window or without an assistant, or call reset()"
                )
            return False
        if not dropped and new == 1:
            assert found.rows is not None
            self._reorder(found.rows)
            return True
        if self._vision_inputs:
            return False  # its positions and token types are not a matter of the mask alone
        mask = fit_mask(self._mask, found.kept)
        if found.rows is not None:
            mask = mask[found.rows]
        same_padding = torch.equal(self._find_mask(ids)[:, : found.kept], mask)
        if not (same_padding and _crop(self._cache, dropped, new)):
            return False
        if found.rows is not None:
            self._cache.reorder_cache(found.rows)
        self._set_mask(ids, fit_mask(mask, ids.shape[1]))
        return True

    def _reorder(self, rows: Tensor) -> None:
        """Bring cache, mask, positions and token types into the order of the rows that are to go on."""
        assert self._mask is not None
        self._cache.reorder_cache(rows)
        self._mask = self._mask[rows]
        for name in ("attention_mask", "decoder_attention_mask", "position_ids", *TOKEN_TYPES):
            value = self.kwargs.get(name)
            if value is not None and value.shape[-2] == len(rows):
                self.kwargs[name] = value.index_select(-2, rows)

    def _start(self, ids: Tensor, *, scored: int = 0, mask: Tensor | None = None, unread: Tensor | int = 0) -> Tensor:
        """Read whole prompts, and the continuations after them that are to be scored. Logits `(B, ..., V)`."""
        self.reset()
        self._unread = unread
        self._prompt_length = ids.shape[1] - scored
        self._hidden = 0 if self._window is None else max(0, self._prompt_length - self._window)
        check_images(self._model, ids[:, self._hidden :], self._vision_inputs or {})
        self.kwargs = self._common(keep=scored + 1)
        if self._encoder_inputs is not None:
            self.kwargs |= self._encode(self._encoder_inputs, rows=len(ids))
        if self._vision_inputs:
            self._mask = self._find_mask(ids) if mask is None else mask
            self.kwargs |= self._see(ids, self._vision_inputs, self._mask).kwargs
        else:
            self._set_mask(ids, self._find_mask(ids) if mask is None else mask)
        logits = self._forward(ids, new=None)
        if self.kwargs.get("logits_to_keep"):
            self.kwargs["logits_to_keep"] = 1
        return logits

    def _see(self, ids: Tensor, vision_inputs: Mapping[str, Any], mask: Tensor) -> Prompts:
        """Rows with their images, encoded once per prompt for all rows of the prompt."""
        prompts = self._prompts if self._prompt_mask is not None else len(ids)
        repeats = len(ids) // prompts
        inputs = {**vision_inputs, "attention_mask": mask[::repeats]}
        for name in TOKEN_TYPES:
            if inputs.get(name) is not None:  # a continuation is text
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, ids.shape[1] - inputs[name].shape[1]))
        with self._context():
            return prepare_images(self._model, ids[::repeats], inputs, len(ids))

    def _set_mask(self, ids: Tensor, mask: Tensor) -> None:
        """Attention mask and position ids for all of `ids`, made as `generate()` makes them."""
        self._mask = mask
        visible = mask[:, self._hidden :]
        if self._is_encoder_decoder:
            self.kwargs["decoder_attention_mask"] = visible if self._prompt_mask is not None else None
            return
        if self._takes_positions:
            self.kwargs["position_ids"] = prepare_positions(
                self._model, ids[:, self._hidden :], {**self.kwargs, "attention_mask": visible}
            )
        self.kwargs["attention_mask"] = None if visible.all() else visible

    def _find_mask(self, ids: Tensor) -> Tensor:
        """`(B, T)`, 0 for the padding before the prompts."""
        if self._prompt_mask is not None:
            return self._extend(self._prompt_mask, ids)
        for known in (self._given, self._lone):
            if known is not None and known.begins(ids):
                return fit_mask(known.mask.to(ids), ids.shape[1])
        if self._is_encoder_decoder:  # its rows begin with a start token, which may well be the pad token
            return torch.ones_like(ids)
        mask = padding_of(self._model, ids)
        if len(ids) > 1 and torch.equal(ids, ids[:1].expand_as(ids)):
            self._lone = _Given(ids, mask)  # beams of one prompt, which will differ
        return mask

    def _ended_with(self) -> tuple[int, ...]:
        return (*self._fills, *self._tokens.ends, self._tokens.pad)

    def _known(self, ids: Tensor, new: int | None) -> Tensor:
        """The rows with a token that the model knows in place of padding."""
        if self._mask is None:
            return ids  # `start` was given rows of the model itself
        if new is not None and int(ids[:, -new:].max()) < self._tokens.size:
            return ids
        mask = fit_mask(self._mask, ids.shape[1])
        return self._tokens.replace(ids, mask, {*self._fills, *ids[mask == 0].tolist()})

    def _extend(self, prompt_mask: Tensor, ids: Tensor) -> Tensor:
        """The given mask for every row of its prompts, with ones for what comes after the prompts."""
        prompts, length = prompt_mask.shape
        repeats, rest = divmod(len(ids), prompts)
        prompt_ids = ids[:: repeats or 1, :length]
        if self._prompt_ids is None and ids.shape[1] == length:
            self._prompt_ids = prompt_ids
        if rest or self._prompt_ids is None or not torch.equal(prompt_ids, self._prompt_ids):
            raise ValueError(
                f"attention_mask is of shape {tuple(prompt_mask.shape)} and was given for other prompts than these, of "
                f"shape {tuple(ids.shape)}: a mask belongs to one batch of prompts, so make a new processor for each"
            )
        return fit_mask(prompt_mask.to(ids).repeat_interleave(repeats, dim=0), ids.shape[1])

    def _encode(self, inputs: Mapping[str, Tensor], *, rows: int) -> dict[str, Any]:
        """The encoder's output, computed once, and its mask, both repeated for every row of each prompt."""
        repeats, rest = divmod(rows, self._prompts)
        if rest:
            raise ValueError(f"the encoder inputs hold {self._prompts} prompts, which cannot make {rows} rows")
        inputs = {name: value.to(input_device(self._model)) for name, value in inputs.items()}
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if mask is None and ids is not None:
            mask = inputs["attention_mask"] = source_padding(self._model, ids)
        if self._encoder_outputs is None:
            if mask is not None:
                check_source(self._model, mask)
            if ids is not None and mask is not None:
                inputs["input_ids"] = ids.masked_fill(mask == 0, self._tokens.pad)
            with self._context():
                self._encoder_outputs = self._model.get_encoder()(**inputs, return_dict=True)
        hidden = self._encoder_outputs.last_hidden_state.repeat_interleave(repeats, dim=0)
        return {
            "encoder_outputs": type(self._encoder_outputs)(last_hidden_state=hidden),
            "attention_mask": None if mask is None else mask.repeat_interleave(repeats, dim=0),
        }


class InputBranch:
    """The logits of a model that reads other prompts, or other images, and then the same generated tokens.

    The contrast prompts belong to one batch of main prompts. The first call must be at the end of the main prompts; what
    comes after them from then on is put after the contrast prompts.

    Args:
        model: a transformers model that can generate, a PEFT model, or `AdaptersOff`.
        inputs: what the model reads: `input_ids` `(prompts, T')` padded on the left, `attention_mask`, and for images
            `pixel_values` and what goes with them, as a processor returns them. One prompt may serve all rows.

    Raises:
        TypeError: `model` cannot generate.
        ValueError: no `input_ids`, right padding, another batch of main prompts.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        if inputs.get("input_ids") is None:
            raise ValueError(f"the contrast inputs need input_ids, and hold only {', '.join(inputs) or 'nothing'}")
        self._ids: Tensor = inputs["input_ids"]
        given = inputs.get("attention_mask")
        transformer = _unwrap(model)[0]
        if transformer.config.is_encoder_decoder:
            raise ValueError(
                f"{type(transformer).__name__} is an encoder-decoder: its other view is another source text, "
                "ModelBranch(model, encoder_inputs=...)"
            )
        mask = padding_of(transformer, self._ids) if given is None else given
        vision = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask") and v is not None}
        check_images(transformer, self._ids, vision)
        self._branch = ModelBranch(
            model, attention_mask=mask, vision_inputs=vision if is_multimodal(transformer) else None
        )
        self._inputs = vision
        self._prompt: Tensor | None = None  # the main rows at the first call

    @property
    def model(self) -> Any:
        """The transformers model inside."""
        return self._branch.model

    @property
    def is_adapted(self) -> bool:
        """Whether the model runs as it is, its adapters not turned off."""
        return self._branch.is_adapted

    def begin(self, ids: Tensor, mask: Tensor, fills: Sequence[int] = ()) -> None:
        """Take the tokens that ended rows are padded with, until `end`; the contrast prompts have a mask of their own."""
        self._branch._fills = tuple(fills)

    def end(self) -> None:
        """Let go of them."""
        self._branch.end()

    def reset(self) -> None:
        """Forget the last call and its cache, but not which main prompts the contrast prompts belong to."""
        self._branch.reset()

    def generated(self, input_ids: Tensor) -> int:
        """How many tokens of the rows were generated, that is, follow the main prompts."""
        if self._prompt is None:
            self._prompt = input_ids.clone()
        length = self._prompt.shape[1]
        prompt = input_ids[:, :length]
        if len(prompt) != len(self._prompt):  # another number of beams
            prompt, expected = torch.unique(prompt, dim=0), torch.unique(self._prompt, dim=0)
        else:
            expected = self._prompt
        if not torch.equal(prompt, expected):
            raise ValueError(
                "these rows do not begin with the prompts that the contrast inputs were first used with: contrast inputs "
                "belong to one batch of prompts, so make a new processor for each"
            )
        return int(input_ids.shape[1]) - length

    def __call__(self, input_ids: Tensor) -> Tensor:
        """The logits `(B, V)` for the token after each row, had it begun with the contrast prompt."""
        return self._branch(self._rows(input_ids, self.generated(input_ids)))

    def score(self, input_ids: Tensor, count: int, attention_mask: Tensor | None = None) -> Tensor:
        """The logits `(B, count, V)` for the last `count` tokens of each row, had it begun with the contrast prompt."""
        rows = self._rows(input_ids, count)
        prompts = self._branch._prompt_mask
        assert prompts is not None
        mask = fit_mask(prompts.repeat_interleave(len(rows) // len(prompts), 0), rows.shape[1])
        if attention_mask is not None:
            mask[:, -count:] = attention_mask[:, -count:].to(mask)
        return self._branch.score(rows, count, mask)

    def prompts(self, ids: Tensor) -> Prompts:
        """The contrast prompts for main prompts `ids`, ready for a first forward beside them."""
        self.generated(ids)
        contrast, mask = self._ids.to(input_device(self.model)), self._branch._prompt_mask
        self._rows(ids, 0)
        return prepare_images(self.model, contrast, {**self._inputs, "attention_mask": mask}, len(ids))

    def _rows(self, input_ids: Tensor, generated: int) -> Tensor:
        """The contrast prompts, each with what was generated after its rows' prompts."""
        repeats, rest = divmod(len(input_ids), len(self._ids))
        if rest:
            raise ValueError(
                f"the contrast inputs hold {len(self._ids)} prompts, which cannot make {len(input_ids)} rows"
            )
        prompts = self._ids.to(input_ids.device).repeat_interleave(repeats, dim=0)
        return torch.cat([prompts, input_ids[:, input_ids.shape[1] - generated :]], dim=1)


class LayerBranch(ModelBranch):
    """The logits of earlier layers of the model, read by its own head, as DoLa does.

    An early layer passes what the model's last layer passes on its way to the logits: the final norm, the head, and the
    scale or soft cap that some families put after it. See `head`, which measures it.

    Args:
        model: a decoder-only transformers model.
        layers: which layers: 0 for the embeddings, 1 for the first layer, ...
        final_norm: whether early layers pass the final norm. Without it they go into the head as they are.
        attention_mask: see `ModelBranch`.
        vision_inputs: see `ModelBranch`.

    Raises:
        TypeError: `model` cannot generate.
        ValueError: an encoder-decoder, no layers, a layer that the model does not have or that is its last, or a model
            whose layers do not lead to its logits (see `head.find_head`).
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        *,
        final_norm: bool = True,
        attention_mask: Tensor | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder, and layers are read from decoder-only models"
            )
        super().__init__(model, attention_mask=attention_mask, vision_inputs=vision_inputs)
        depth = self._model.config.get_text_config(decoder=True).num_hidden_layers
        first = find_head(self._model).first
        if not layers or not all(first <= layer < depth for layer in layers):
            raise ValueError(
                f"layers must be some of {first} to {depth - 1} of this model's {depth} layers, not {list(layers)}"
            )
        self._layers, self._final_norm = list(layers), final_norm
        self.final: Tensor | None = None
        """Logits `(B, ..., V)` of the last layer, from the same forward."""

    def _common(self, keep: int = 1) -> dict[str, Any]:
        self._keep = keep
        return super()._common(keep) | {"output_hidden_states": True}

    def _forward(self, ids: Tensor, *, new: int | None) -> Tensor:
        keep = self._keep if new is None else new
        with read_layers(self._model, self._layers, keep=keep, final_norm=self._final_norm):
            return super()._forward(ids, new=new)

    def _read(self, outputs: Any) -> Tensor:
        """`(B, T, L, V)`"""
        logits: Tensor = outputs.logits.unflatten(0, (1 + len(self._layers), -1))
        self.final = logits[0]
        return logits[1:].movedim(0, 2)


def _unwrap(model: Any) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """The transformers model inside, and the context to run it in."""
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    if isinstance(model, AdaptersOff):
        model, context = model.peft_model.get_base_model(), model.peft_model.disable_adapter
    elif hasattr(model, "get_base_model"):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise TypeError(
                "a PEFT model with learned prompts cannot be a branch: its prompts are not in its base model"
            )
        model = model.get_base_model()
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise TypeError(f"a branch needs a transformers model that can generate, not {type(model).__name__}")
    return model, context


def _state(model: Any) -> list[Any]:
    """Return what changes when a model is trained, loaded anew, or given other adapters.

    PyTorch counts the changes of a tensor in place, other than through `.data`; PEFT's layers name the adapters that act.
    """
    versions = [0 if p.is_inference() else p._version for p in model.parameters()]
    layers = (module for module in model.modules() if hasattr(module, "merged_adapters"))
    return [versions, [(list(layer.active_adapters), list(layer.merged_adapters)) for layer in layers]]


def _crop(cache: Any, dropped: int, new: int) -> bool:
    """Take the last tokens off a cache that is to be fed `new` ones; False if the cache cannot do that."""
    if any(linear_layers(cache)):
        return not dropped and new == 1  # a recurrent state cannot go back, and Mamba drops it when fed several tokens
    try:
        if dropped:
            cache.crop(-dropped)
    except RuntimeError:  # a sliding window that has already moved on
        return False
    return True
