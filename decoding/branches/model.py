"""Provide the branch of another model, which reads the tokens that the main model generates.

A logits processor is given nothing but `input_ids` at every step. So a branch finds out by itself what they mean: rows that
continue those of the last call (feed the new tokens), rows that a beam search reordered (reorder the cache first), rows that
share a beginning with those of the last call (crop the cache), or other rows (start afresh). Every decision compares the
tokens themselves, and other rows also compare the state of the model (its weights and adapters), so a cache is never
silently stale.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from contralto.common.placement import input_device
from contralto.decoding.branches.base import Branch, model_state, unwrap
from contralto.decoding.branches.context import ContextLimit, check_source, context_length
from contralto.decoding.branches.padding import (
    KnownTokens,
    PromptMask,
    check_mask,
    fit_mask,
    padding_of,
    source_padding,
)
from contralto.decoding.branches.prompts import (
    TOKEN_TYPES,
    Prompts,
    check_images,
    check_inputs,
    is_multimodal,
    prepare_images,
)
from contralto.decoding.branches.reader import CachedReader
from contralto.decoding.branches.static import StaticSteps

__all__ = ["ModelBranch"]


class _Continuation(NamedTuple):
    """The cached rows and length that the rows of a call continue."""

    kept: int
    """Number of cached tokens that still hold."""
    rows: Tensor | None = None
    """`(B,)` the cached row that each row continues; None if the rows are in order."""


class _MaskedPrompts(NamedTuple):
    """Prompts whose padding is known."""

    ids: Tensor
    """`(B, T)`."""
    mask: Tensor
    """`(B, T)`, 0 for padding."""

    def begin(self, ids: Tensor) -> bool:
        """Return whether rows `(B, T')` begin with these prompts."""
        return torch.equal(ids[:, : self.ids.shape[1]], self.ids.to(ids.device))


class ModelBranch(Branch):
    """The next-token logits of a model for rows of tokens that another model generates.

    The rows may come from greedy search, sampling or beam search, from several calls in turn, and from texts that extend
    or share a beginning with the last one. In every case the logits are those of the model on the whole row.

    Args:
        model: a transformers model that can generate, a PEFT model, or `AdaptersOff`.
        attention_mask: `(prompts, T)`, 1 for tokens and 0 for padding, of the prompts before they are expanded to beams
            or several sequences each. Without it the padding is found in the prompts, see `padding.padding_of`.
        window: number of last prompt tokens that the model sees; None for all. Generated tokens are always seen. Rows that
            continue the last call by one token count as generated, all others as a new prompt; see also `catch_up`.
        encoder_inputs: for an encoder-decoder, the inputs of its encoder: `input_ids`, `attention_mask`, ...
        vision_inputs: for an image-text model, the inputs besides the tokens: `pixel_values`, `image_grid_thw`,
            `mm_token_type_ids`, ... Their rows must be those of the prompts, in the same order.
        is_main: whether the model is the main model itself, whose rows may exceed its context with the warning of
            `generate()` alone.

    Raises:
        TypeError: `model` cannot generate, or `encoder_inputs` are not what a tokenizer returns.
        ValueError: `window` below 1, right padding, encoder or vision inputs that are missing or that the model does not
            have; when called, a row longer than the model's context.
    """

    def __init__(
        self,
        model: Any,
        *,
        attention_mask: Tensor | None = None,
        window: int | None = None,
        encoder_inputs: Mapping[str, Tensor] | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
        is_main: bool = False,
    ) -> None:
        self._model, context = self._unwrapped = unwrap(model)
        name = type(self._model).__name__
        self._is_encoder_decoder = bool(self._model.config.is_encoder_decoder)
        if window is not None and (window < 1 or window != int(window)):
            raise ValueError(
                f"window must be at least 1 (the prompt's last token), or None for the whole prompt, not {window}"
            )
        if self._is_encoder_decoder and not encoder_inputs:
            raise ValueError(f"{name} is an encoder-decoder: pass encoder_inputs=, the inputs of its encoder")
        if encoder_inputs and (not isinstance(encoder_inputs, Mapping) or "input_ids" in encoder_inputs):
            check_inputs("the source texts", encoder_inputs)
        if encoder_inputs and not self._is_encoder_decoder:
            raise ValueError(f"{name} has no encoder, so it cannot use encoder_inputs")
        if vision_inputs and (self._is_encoder_decoder or not is_multimodal(self._model) or window is not None):
            raise ValueError(f"{name} is used as a text model here, so it cannot use {', '.join(vision_inputs)}")
        self._window = window
        self._tokens = KnownTokens.of(self._model)
        self._below: int | None = None  # generated tokens are below this number
        length = None if is_main else context_length(self._model)
        self._limit = None if length is None else ContextLimit(name, length)
        self._reader = self._make_reader(context)
        self._encoder_inputs, self._vision_inputs = encoder_inputs, vision_inputs
        self._begun: _MaskedPrompts | None = None
        self._single: _MaskedPrompts | None = None  # one prompt for all rows, whose beams will differ
        self._prompt_mask = None if attention_mask is None else PromptMask(attention_mask)
        self._encoder_outputs: Any = None
        self._state: list[Any] = []
        self._static: StaticSteps | None = None
        self.set_fills(())
        self.reset()

    def _make_reader(self, context: Any) -> CachedReader:
        return CachedReader(self._model, context=context)

    @property
    def model(self) -> Any:
        """Return the transformers model inside."""
        return self._model

    @property
    def attention_mask(self) -> Tensor | None:
        """Return the mask of the prompts `(prompts, T)` that the branch was made with; None without one."""
        return None if self._prompt_mask is None else self._prompt_mask.mask

    def begin(self, ids: Tensor, mask: Tensor, fills: Sequence[int] = ()) -> None:
        """Set the mask of the prompts of the next generation, until `end`.

        Args:
            ids: `(B, T)` the prompts.
            mask: `(B, T)`, 0 for padding.
            fills: token ids that pad the rows that have ended.

        Raises:
            ValueError: right padding, or another mask than that of the branch.
        """
        check_mask(mask)
        if self._prompt_mask is not None and not self._prompt_mask.agrees(mask):
            raise ValueError(
                "attention_mask= of the branch differs from the mask passed to generate(): leave it out, since the "
                "loop passes the mask on"
            )
        device = input_device(self._model)
        self._begun = _MaskedPrompts(ids.to(device, copy=True), mask.to(device))
        self.set_fills(fills)
        if self._mask is not None:
            length = min(self._mask.shape[1], mask.shape[1])
            if not torch.equal(self._mask[:, :length], self._begun.mask[:, :length].to(self._mask)):
                self.reset()

    def set_fills(self, fills: Sequence[int]) -> None:
        """Set the token ids that pad finished rows.

        Args:
            fills: token ids, besides the end-of-text and pad tokens of the model.
        """
        self._fills = tuple(fills)
        if self._limit is not None:
            self._limit = self._limit._replace(ends=(*fills, *self._tokens.ends, self._tokens.pad))
        self._reader.limit = self._limit

    def end(self) -> None:
        """Discard the mask and the padding tokens that `begin` set, and a static cache, which has no room for other texts."""
        self._begun = None
        self.set_fills(())
        if self._static is not None:
            self._static = None
            self.reset()

    def fix_shapes(self, static: StaticSteps) -> None:
        """Read the next generation with a static cache, and compiled where `generate()` would compile, until `end`.

        A model that runs in a context, such as one without its adapters, keeps a cache that grows, as does one that transformers does not
        compile.

        Args:
            static: the steps.
        """
        is_plain = self._unwrapped.is_adapted and not self._reader.is_variation and not self._is_encoder_decoder
        if is_plain and self._model._can_compile_fullgraph:
            self._static = static
            self.reset()

    def limit_tokens(self, size: int) -> None:
        """Declare that ids of generated tokens are below `size`, so that they need not be checked.

        Args:
            size: the vocabulary size of the main model.
        """
        self._below = size

    def reset(self) -> None:
        """Discard the last call and its cache: the next call has new prompts."""
        self._reader.reset()
        self._seen: Tensor | None = None  # the rows of the last call
        self._hidden = 0  # number of their first tokens that the model does not see
        self._mask: Tensor | None = None  # of the first columns; later columns are all text
        self._prompt_length = 0

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the model's logits of the token after each row.

        Args:
            input_ids: `(B, T)` int64, on any device.

        Returns:
            `(B, V)` in the model's dtype, on the model's device. They may be a view; do not change them in place.
        """
        ids = input_ids.to(input_device(self._model) if self._seen is None else self._seen.device, copy=True)
        if self._seen is None or ids.shape[1] != self._seen.shape[1] + 1:
            self._reset_if_changed()
        continued = self._find(ids)
        if continued is None or not self._rewind(ids, continued):
            return self._start(ids)[:, -1]
        return self._continue(ids, ids.shape[1] - continued.kept)[:, -1]

    @torch.no_grad()
    def catch_up(self, input_ids: Tensor) -> Tensor:
        """Return the model's logits after rows that continue those of the last call by any number of generated tokens.

        They are read in one forward pass, or in one pass each by a model whose cache takes one token at a time. A window stays where it is,
        and images are not read again.

        Args:
            input_ids: `(B, T)` int64, on any device. Beams may be in another order than at the last call.

        Returns:
            `(B, V)` as of a call.
        """
        if self._seen is None or input_ids.shape[1] <= self._seen.shape[1] + 1:
            return self(input_ids)
        ids = input_ids.to(self._seen.device, copy=True)
        self._reset_if_changed()
        seen, continued = self._seen, self._find(ids)
        if seen is None or continued is None or continued.kept < seen.shape[1]:
            return self(input_ids)
        self._reorder(continued)
        new = ids.shape[1] - continued.kept
        if self._reader.crop(continued.kept - self._hidden, new=new):
            return self._continue(ids, new)[:, -1]
        for length in range(continued.kept + 1, ids.shape[1]):
            self._continue(ids[:, :length], 1)
        return self._continue(ids, 1)[:, -1]

    @torch.no_grad()
    def score(self, input_ids: Tensor, count: int, attention_mask: Tensor | None = None) -> Tensor:
        """Return the model's logits of the last `count` tokens of each row, from one forward pass without a cache.

        Args:
            input_ids: `(B, T)` int64, prompts and continuations; tokens that pad continuations on the right have no effect.
            count: number of last tokens to predict, below `T`.
            attention_mask: `(B, T)`, 0 for the padding before the prompts, and for that after the continuations, which does
                not count towards the model's context.

        Returns:
            `(B, count, V)`.
        """
        self._reset_if_changed()
        ids = input_ids.to(input_device(self._model))
        mask: Tensor | None = None
        unread: Tensor | int = 1  # the last token is predicted, not read
        if attention_mask is not None:  # no token sees what comes after it, so that padding at the end needs no mask
            unread = (attention_mask[:, -count:] == 0).sum(-1).to(ids.device) + 1
            mask = fit_mask(attention_mask[:, :-count].to(ids), ids.shape[1])
        logits = self._start(ids, scored=count, mask=mask, unread=unread)[:, -count - 1 : -1]
        self.reset()
        return logits

    def joint_prompts(self, model: Any, ids: Tensor) -> Prompts | None:
        """Return the branch's rows for a joint forward pass, if `model` is its model with adapters enabled.

        Args:
            model: the main model.
            ids: `(B, T)` int64, its prompts.
        """
        return self.prompts(ids) if self._model is model and self._unwrapped.is_adapted else None

    def prompts(self, ids: Tensor) -> Prompts:
        """Return prompts as this branch reads them, ready for a first forward pass.

        Args:
            ids: `(B, T)` int64, the prompts of the main model.
        """
        self._reset_if_changed()
        ids = ids.to(input_device(self._model))
        if self._encoder_inputs is not None:
            return Prompts(ids, self._encode(self._encoder_inputs, rows=len(ids)))
        mask = self._find_mask(ids)
        hidden = 0 if self._window is None else max(0, ids.shape[1] - self._window)
        return self._prepare(self._tokens.replace(ids, mask), mask, hidden)

    def _prepare(self, ids: Tensor, mask: Tensor, hidden: int) -> Prompts:
        """Prepare rows of known tokens for a first forward pass without their first `hidden` columns."""
        visible = mask[:, hidden:]
        if self._encoder_inputs is not None:
            kwargs = self._encode(self._encoder_inputs, rows=len(ids))
            kwargs |= {} if self._prompt_mask is None else {"decoder_attention_mask": visible}
            return Prompts(ids[:, hidden:], kwargs)
        check_images(self._model, ids[:, hidden:], self._vision_inputs or {})
        if self._vision_inputs:
            return self._prepare_vision(ids, self._vision_inputs, mask)
        return prepare_images(self._model, ids[:, hidden:], {"attention_mask": visible}, len(ids))

    def _prepare_vision(self, ids: Tensor, vision_inputs: Mapping[str, Any], mask: Tensor) -> Prompts:
        """Prepare rows with their images, which are encoded once per prompt for all rows of the prompt."""
        prompts = self._prompts if self._prompt_mask is not None else len(ids)
        repeats = len(ids) // prompts
        inputs = {**vision_inputs, "attention_mask": mask[::repeats]}
        for name in TOKEN_TYPES:
            if inputs.get(name) is not None:  # a continuation is text
                inputs[name] = pad(inputs[name], (0, ids.shape[1] - inputs[name].shape[1]))
        with self._reader.context():
            prepared = prepare_images(self._model, ids[::repeats], inputs, len(ids))
        return Prompts(ids, prepared.kwargs)  # the rows of a prompt have the same inputs, but not the same tokens

    def _reset_if_changed(self) -> None:
        """Discard the cache if the model's weights or adapters have changed."""
        if (state := model_state(self._model)) != self._state:
            self.reset()
            self._encoder_outputs, self._state = None, state

    def _find(self, ids: Tensor) -> _Continuation | None:
        """Compare rows with those of the last call. A row's last token is always fed again, for its logits."""
        seen = self._seen
        if seen is None or self._reader.cache is None or len(seen) != len(ids):
            return None
        length = min(seen.shape[1], ids.shape[1] - 1)
        if torch.equal(seen[:, :length], ids[:, :length]):
            return _Continuation(length)
        if length == seen.shape[1] and (rows := self._match_rows(seen, ids)) is not None:
            return _Continuation(length, rows)
        shared = (seen[:, :length] == ids[:, :length]).all(0).cumprod(0).sum()
        return _Continuation(int(shared)) if shared else None

    def _match_rows(self, seen: Tensor, ids: Tensor) -> Tensor | None:
        """Return for each row the cached row of the same prompt that it continues; None if a row continues none."""
        per_prompt = len(ids) // self._prompts
        cached = {(i // per_prompt, row.tobytes()): i for i, row in enumerate(seen.cpu().numpy())}
        starts = ids[:, : seen.shape[1]].cpu().numpy()
        rows = [cached.get((i // per_prompt, row.tobytes()), -1) for i, row in enumerate(starts)]
        return None if -1 in rows else torch.tensor(rows, device=ids.device)

    @property
    def _prompts(self) -> int:
        """Return the number of prompts of the rows; 1 if rows of equal tokens are interchangeable."""
        if self._encoder_inputs is not None:
            return len(next(iter(self._encoder_inputs.values())))
        return 1 if self._prompt_mask is None else len(self._prompt_mask.mask)

    def _rewind(self, ids: Tensor, continued: _Continuation) -> bool:
        """Rewind the cache to the state after the kept tokens of `ids`; return False if that is impossible."""
        assert self._seen is not None
        assert self._mask is not None
        dropped, new = self._seen.shape[1] - continued.kept, ids.shape[1] - continued.kept
        if self._window is not None and (dropped or new > 1):
            if continued.kept >= self._prompt_length and dropped:
                raise ValueError(
                    "a branch with a window cannot tell a sequence whose last tokens were removed, as in assisted "
                    "decoding, from a new prompt: decode without the window or without an assistant, or call reset()"
                )
            return False
        if dropped or new > 1:
            if self._vision_inputs:
                return False  # its positions and token types are not a matter of the mask alone
            mask = self._mask if continued.rows is None else self._mask[continued.rows]
            mask = fit_mask(mask, continued.kept)
            if not continued.kept or not mask[:, -1].all():
                return False  # the shared beginning ends within the padding
            if not torch.equal(self._find_mask(ids), fit_mask(mask, ids.shape[1])):
                return False
            if not self._reader.crop(continued.kept - self._hidden, new=new):
                return False
        self._reorder(continued)
        return True

    def _reorder(self, continued: _Continuation) -> None:
        """Bring the cached rows into the order of the rows that continue them."""
        assert self._mask is not None
        if continued.rows is not None:
            self._reader.reorder(continued.rows)
            self._mask = self._mask[continued.rows]
        self._mask = self._mask[:, : continued.kept]

    def _start(self, ids: Tensor, *, scored: int = 0, mask: Tensor | None = None, unread: Tensor | int = 0) -> Tensor:
        """Run the model on whole prompts, and on the continuations to be scored. Logits `(B, ..., V)`."""
        self.reset()
        self._prompt_length = ids.shape[1] - scored
        self._hidden = 0 if self._window is None else max(0, self._prompt_length - self._window)
        self._mask = self._find_mask(ids) if mask is None else mask
        prompts = self._prepare(self._replace_unknown(ids, self._mask), self._mask, self._hidden)
        static = None if scored else self._static
        cache = None if static is None else static.cache(self._model)
        logits = self._reader.prefill(prompts, cache=cache, keep=scored + 1, unread=unread)
        if static is not None:
            self._reader.compiled = static.compiled(self._reader)
        self._seen = ids
        return self._select(logits)

    def _continue(self, ids: Tensor, new: int) -> Tensor:
        """Run the model on the last `new` columns of rows. Logits `(B, 1, V)` of the last one."""
        assert self._mask is not None
        known, self._seen = self._known(ids, new, self._mask), None
        logits = self._reader.read(known[:, self._hidden :], new=new, keep=1)
        self._seen = ids
        if self._reader.compiled is not None:  # the next compiled call may write over its outputs
            logits = logits.clone()
        return self._select(logits)

    def _select(self, logits: Tensor) -> Tensor:
        """Return the branch's logits `(B, n, V)` from those of the reader."""
        return logits

    def _find_mask(self, ids: Tensor) -> Tensor:
        """Return the attention mask `(B, T)` of rows, 0 for the padding before the prompts."""
        if self._prompt_mask is not None:
            return self._prompt_mask.fit(ids)
        for known in (self._begun, self._single):
            if known is not None and known.begin(ids):
                return fit_mask(known.mask.to(ids), ids.shape[1])
        if self._is_encoder_decoder:  # its rows begin with a start token, which may well be the pad token
            return torch.ones_like(ids)
        mask = padding_of(self._model, ids)
        if len(ids) > 1 and torch.equal(ids, ids[:1].expand_as(ids)):
            self._single = _MaskedPrompts(ids, mask)
        return mask

    def _known(self, ids: Tensor, new: int, mask: Tensor) -> Tensor:
        """Replace tokens outside the model's vocabulary.

        A generated token of a main model whose vocabulary is no larger needs no look at the tokens, for which the processor
        would wait for the device.
        """
        if new == 1 and self._below is not None and self._below <= self._tokens.size:
            return ids
        return ids if int(ids[:, -new:].max()) < self._tokens.size else self._replace_unknown(ids, mask)

    def _replace_unknown(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Replace padding, before the prompts and after finished rows, by a token in the model's vocabulary."""
        mask = fit_mask(mask, ids.shape[1])
        return self._tokens.replace(ids, mask, {*self._fills, *ids[mask == 0].tolist()})

    def _encode(self, inputs: Mapping[str, Tensor], *, rows: int) -> dict[str, Any]:
        """Run the encoder once, and repeat its output and its mask for every row of each prompt."""
        repeats, rest = divmod(rows, self._prompts)
        if rest:
            raise ValueError(f"the encoder inputs contain {self._prompts} prompts, which do not fit {rows} rows")
        inputs = {name: value.to(input_device(self._model)) for name, value in inputs.items()}
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if mask is None and ids is not None:
            mask = inputs["attention_mask"] = source_padding(self._model, ids)
        if self._encoder_outputs is None:
            if mask is not None:
                check_source(self._model, mask)
            if ids is not None and mask is not None:
                inputs["input_ids"] = ids.masked_fill(mask == 0, self._tokens.pad)
            with self._reader.context():
                self._encoder_outputs = self._model.get_encoder()(**inputs, return_dict=True)
        hidden = self._encoder_outputs.last_hidden_state.repeat_interleave(repeats, dim=0)
        return {
            "encoder_outputs": type(self._encoder_outputs)(last_hidden_state=hidden),
            "attention_mask": None if mask is None else mask.repeat_interleave(repeats, dim=0),
        }
