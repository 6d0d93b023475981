"""Read a model token by token with a cache: prefill, read, crop, reorder, fork.

One class serves every branch and executor, so that mask, positions, token types and cache grow and shrink together in one
place. It prepares a forward pass as `generate()` does, so that every model that generates can be read.

Read from transformers 5.23.0: `_update_model_kwargs_for_generation`, which models override (PaliGemma gives generated tokens
another token type than the last one of the prompt).
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from contralto.common.placement import input_device
from contralto.decoding.branches.cache import (
    crop_cache,
    crop_layers,
    find_cache,
    fork_cache,
    join_caches,
    repeat_cache,
    repeat_rows,
    split_cache,
    trim_cache,
)
from contralto.decoding.branches.context import ContextLimit
from contralto.decoding.branches.padding import fit_mask
from contralto.decoding.branches.prefixes import PrefixCaches
from contralto.decoding.branches.prompts import MULTIMODAL_INPUTS, TOKEN_TYPES, Prompts

__all__ = ["CachedReader", "join_readers", "last_hidden"]


class CachedReader:
    """A model with a cache, which reads prompts first and then any number of further tokens at a time.

    `kwargs` are the keyword arguments that `generate()` calls `model_kwargs`. After every call their mask, positions and token
    types have one column more than the model has read: that of the next token.

    Args:
        model: a transformers model that can generate.
        context: returns the context manager that forward passes run in.
        limit: the longest rows that may be read; None for no limit.
    """

    def __init__(
        self,
        model: Any,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        limit: ContextLimit | None = None,
    ) -> None:
        self.model, self.context, self.limit = model, context, limit
        self.name = type(model).__name__
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        prefix = "decoder_" if self.is_encoder_decoder else ""
        self.mask_name, self.positions_name = f"{prefix}attention_mask", f"{prefix}position_ids"
        self._takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._growing = (self.mask_name, self.positions_name, *TOKEN_TYPES)
        self.reset()

    def reset(self) -> None:
        """Discard the cache."""
        self.kwargs: dict[str, Any] = {}
        self.rows = 0
        """Number of rows."""
        self.length = 0
        """Number of tokens that the model has read of each row, padding included."""
        self.hidden: Tensor | None = None
        """`(R, n, d)` the last layer's hidden states of the last pass, if `output_hidden_states` is among the inputs."""
        self._records = False
        self._constant: dict[int, tuple[dict[str, Any], Any]] = {}
        """Other inputs and the cross-attention cache by number of copies: they do not change from step to step."""
        self.compiled: Any = None
        """The compiled forward, called in place of the model after the prompts."""

    @property
    def cache(self) -> Any:
        """Return the cache; None before the first forward pass and for models without one."""
        return find_cache(self.kwargs)

    @property
    def mask(self) -> Tensor | None:
        """Return the mask of the tokens that were read, `(R, length)`; None if there is no padding."""
        mask = self.kwargs.get(self.mask_name)
        return None if mask is None else mask[:, : self.length]

    @torch.no_grad()
    def prefill(self, prompts: Prompts, *, cache: Any = None, keep: int = 1, unread: Tensor | int = 0) -> Tensor:
        """Read prompts from their beginning, or what follows one that was read before, see `reused_prefixes`.

        Args:
            prompts: `(R, T)` token ids with the inputs that belong to them.
            cache: an empty cache to fill; None for the model's default.
            keep: number of last positions whose logits are returned.
            unread: number of tokens at the end of each row, `(R,)` or one number, that do not count towards the limit.

        Returns:
            Logits `(R, keep, V)`.
        """
        prefixes = PrefixCaches.current() if cache is None else None
        if prefixes is not None:
            return prefixes.prefill(self, prompts, keep=keep, unread=unread)
        return self.prefill_from(prompts, cache=cache, keep=keep, unread=unread)

    @torch.no_grad()
    def prefill_from(
        self, prompts: Prompts, *, cache: Any = None, known: int = 0, keep: int = 1, unread: Tensor | int = 0
    ) -> Tensor:
        """Read prompts from their column `known` on.

        Args:
            prompts: `(R, T)` token ids with the inputs that belong to them.
            cache: a cache of the first `known` columns; None for the model's default, which is empty.
            known: number of columns that the cache holds, at most `T - keep`.
            keep: see `prefill`.
            unread: see `prefill`.

        Returns:
            Logits `(R, keep, V)`.
        """
        self.reset()
        self.kwargs, self.rows = {"use_cache": True, **prompts.kwargs}, len(prompts.ids)
        mask = self.kwargs.get("attention_mask")
        if not self.is_encoder_decoder and mask is not None and mask.all():
            self.kwargs["attention_mask"] = None  # as in generate(): attention without a mask is faster
        if cache is not None:
            self.kwargs["past_key_values"] = cache
        self._check_length(prompts.ids, prompts.ids.shape[1], unread)
        outputs = self._run(prompts.ids, new=prompts.ids.shape[1] - known if known else None, keep=keep)
        embeds = self.kwargs.get("inputs_embeds")  # in place of token ids, whose rows are empty then
        self._commit(outputs, prompts.ids.shape[1] if embeds is None else embeds.shape[1])
        logits: Tensor = outputs.logits[:, -keep:]
        return logits

    @torch.no_grad()
    def read(self, ids: Tensor, *, new: int = 1, keep: int | None = None) -> Tensor:
        """Feed the last columns of `ids` to the model, and extend its cache.

        Args:
            ids: `(R, T)` token ids, of which the last `new` columns are fed.
            new: number of columns to feed.
            keep: number of last positions whose logits are returned; None for all of the new ones.

        Returns:
            Logits `(R, keep, V)`.
        """
        keep = new if keep is None else keep
        self._check_length(ids, new)
        self._lengthen(new - 1)
        outputs = self._run(ids, new=new, keep=keep)
        self._commit(outputs, new)
        logits: Tensor = outputs.logits[:, -keep:]
        return logits

    def crop(self, length: int, *, new: int = 1) -> bool:
        """Keep the first `length` tokens of each row.

        Args:
            length: number of tokens to keep.
            new: number of tokens that the next `read` feeds.

        Returns:
            False if the cache cannot go back; then the prompts have to be read again.
        """
        dropped = self.length - length
        if self._records:
            crop_layers(self.cache, dropped)  # also by 0: sliding windows let go of what they recorded
        elif not crop_cache(self.cache, dropped, new):
            return False
        for name in self._growing:
            if self.kwargs.get(name) is not None:
                self.kwargs[name] = self.kwargs[name][..., : length + 1]
        self.length = length
        return True

    def record_past(self) -> None:
        """Keep the tokens that sliding windows drop until the next `crop`. Call it after `prefill`, whose tokens need not be kept."""
        self.cache.activate_past_recording()
        self._records = True

    def reorder(self, rows: Tensor) -> None:
        """Select rows, in any order and number.

        Args:
            rows: `(R,)` int64, the row that each row continues.
        """
        self.cache.reorder_cache(rows)
        for name in ("attention_mask", "decoder_attention_mask", "position_ids", *TOKEN_TYPES):
            value = self.kwargs.get(name)
            if value is not None and value.shape[-2] == self.rows:
                self.kwargs[name] = value.index_select(-2, rows.to(value.device))
        self.rows = len(rows)

    def trim(self, count: int) -> None:
        """Remove the first columns, which are padding in all rows; nothing where the cache cannot.

        Args:
            count: number of columns.
        """
        if count < 1 or not trim_cache(self.cache, count):
            return
        for name in self._growing:
            if (value := self.kwargs.get(name)) is not None:
                self.kwargs[name] = value[..., count:]
        self.length -= count

    @property
    def is_variation(self) -> bool:
        """Return whether forward passes yield more than this class reads, such as the states of early layers."""
        return type(self) is not CachedReader

    def alike(self) -> "CachedReader":
        """Return a reader of the same model without rows and without a limit."""
        return CachedReader(self.model, context=self.context)

    def fork(self) -> "CachedReader":
        """Return a reader of the same rows whose cache grows by itself. Tensors are shared, not copied."""
        fork = copy.copy(self)
        fork.kwargs = dict(self.kwargs)
        name = next(name for name, value in fork.kwargs.items() if value is self.cache)
        fork.kwargs[name] = fork_cache(self.cache)
        return fork

    def replicate(self, copies: int) -> "CachedReader":
        """Return a reader of `copies` copies of each row, one after the other, with a cache of its own.

        Args:
            copies: number of copies of each row.
        """
        fork, rows = self.fork(), self.rows
        fork.rows = rows * copies
        index = torch.arange(rows, device=input_device(self.model)).repeat_interleave(copies)
        own, encoded = split_cache(fork.cache)
        repeat_cache(own, copies, index)
        if copies not in self._constant:
            if encoded is not None:
                repeat_cache(encoded, copies, index)
            constant = {n: v for n, v in self.kwargs.items() if n not in self._growing and v is not self.cache}
            repeated = {n: repeat_rows(v, rows, copies) for n, v in constant.items() if n not in MULTIMODAL_INPUTS}
            self._constant[copies] = repeated, encoded
        fork.kwargs |= self._constant[copies][0]
        if encoded is not None:
            fork.cache.cross_attention_cache = self._constant[copies][1]
        for name in self._growing:
            dim = -2 if name == self.positions_name else 0
            if name in fork.kwargs:
                fork.kwargs[name] = repeat_rows(fork.kwargs[name], rows, copies, dim=dim)
        return fork

    def take(self, copies: "CachedReader", index: Tensor) -> None:
        """Take over the cache of replicated rows, one copy of each row.

        Args:
            copies: a reader from `replicate` that has read one token more.
            index: `(R,)` int64, the rows of `copies` to continue with.
        """
        own, encoded = split_cache(copies.cache)
        own.reorder_cache(index)
        if encoded is not None:
            copies.cache.cross_attention_cache = split_cache(self.cache)[1]
        name = next(name for name, value in self.kwargs.items() if value is self.cache)
        self.kwargs[name] = copies.cache
        self.advance()

    def advance(self) -> None:
        """Advance by the next token if the cache already contains it."""
        self._lengthen(1)
        self.length += 1

    def peek(self, ids: Tensor, *, mask: Tensor | None = None, layer_masks: Any = None) -> Any:
        """Run several candidates for the next token at its position; they enter the cache, but `length` does not count them.

        Args:
            ids: `(R, k)` token ids.
            mask: `(R, length + k)`, used in place of the mask of the rows.
            layer_masks: a mask as the model's layers take it, `(R or 1, 1, k, width)`, or one by kind of layer; used in place
                of any other mask.

        Returns:
            The outputs of the model, with logits `(R, k, V)` and hidden states.
        """
        count = ids.shape[1]
        changed: dict[str, Any] = {"output_hidden_states": True}
        for name in (self.positions_name, *TOKEN_TYPES):
            if (value := self.kwargs.get(name)) is not None:
                # (..., R, T) -> (..., R, k), contiguous, since compiled passes look at strides too
                changed[name] = value[..., -1:].expand(*value.shape[:-1], count).contiguous()
        if mask is not None or layer_masks is not None:
            changed[self.mask_name] = mask if layer_masks is None else None
        return self._run(ids, new=count, keep=count, layer_masks=layer_masks, **changed)

    def _run(self, ids: Tensor, *, new: int | None, keep: int, layer_masks: Any = None, **changed: Any) -> Any:
        """Run the model on the last `new` columns (None: on whole prompts) and return its outputs."""
        kwargs = self.kwargs | ({"logits_to_keep": keep} if self._takes_keep else {}) | changed
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, is_first_iteration=new is None, **kwargs
        )
        if layer_masks is not None:
            inputs[self.mask_name] = layer_masks
        call = self.model if new is None or self.compiled is None else self.compiled
        try:
            with self.context():
                return call(**inputs, return_dict=True)
        except torch.OutOfMemoryError as error:
            self.reset()
            raise torch.OutOfMemoryError(
                f"there is not enough memory for {self.name} ({self.model.num_parameters():,} parameters) in addition "
                "to the main model: load it quantized or on another device, use AdaptersOff, or lower the batch size"
            ) from error

    def _commit(self, outputs: Any, new: int) -> None:
        """Keep the cache, and add the column of the next token to mask, positions and token types."""
        self.kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self.is_encoder_decoder
        )
        self.length += new
        self.hidden = last_hidden(outputs)

    def whole_mask(self) -> Tensor:
        """Return the mask of the rows and their next token, `(R, length + 1)`, also where there is no padding."""
        mask: Tensor | None = self.kwargs.get(self.mask_name)
        if mask is None:
            mask = torch.ones(self.rows, self.length + 1, dtype=torch.long, device=input_device(self.model))
        return mask

    def _lengthen(self, count: int) -> None:
        """Add `count` columns of generated tokens to mask, positions and token types."""
        if count < 1:
            return
        for name in self._growing:
            if (value := self.kwargs.get(name)) is None:
                continue
            columns = value[..., -1:].expand(*value.shape[:-1], count)
            if name == self.positions_name:
                columns = columns + torch.arange(1, count + 1, dtype=value.dtype, device=value.device)
            self.kwargs[name] = torch.cat([value, columns], dim=-1)

    def _check_length(self, ids: Tensor, new: int, unread: Tensor | int = 0) -> None:
        """Raise ValueError if an unfinished row is longer than the limit, usually without a device synchronisation."""
        length = self.length + new
        if self.limit is None or length <= self.limit.tokens:
            return
        mask = self.kwargs.get(self.mask_name)
        mask = torch.ones(len(ids), length, device=ids.device) if mask is None else fit_mask(mask, length)
        self.limit.check(mask.sum(-1).to(ids.device) - unread, ids[:, -1] if self.length else None)


def join_readers(readers: Sequence[CachedReader]) -> bool:
    """Join rows of one decoder-only model into the first reader, padded on the left to one length.

    Args:
        readers: of the same model, with prompts that have no other inputs than mask, positions and token types.

    Returns:
        False if their caches cannot be padded; nothing is changed then.
    """
    length = max(reader.length for reader in readers)
    if not join_caches([reader.cache for reader in readers]):
        return False
    first = readers[0]
    joined: dict[str, Any] = {}
    if any(reader.kwargs.get(first.mask_name) is not None or reader.length < length for reader in readers):
        joined[first.mask_name] = [reader.whole_mask() for reader in readers]
    for name in (first.positions_name, *TOKEN_TYPES):
        if first.kwargs.get(name) is not None:
            joined[name] = [reader.kwargs[name] for reader in readers]
    for name, values in joined.items():
        first.kwargs[name] = torch.cat([pad(value, (length + 1 - value.shape[-1], 0)) for value in values], dim=-2)
    first.length, first.rows = length, sum(reader.rows for reader in readers)
    return True


def last_hidden(outputs: Any) -> Tensor | None:
    """Return the hidden states of the last layer, the decoder's if there are two; None if the outputs have none."""
    states = outputs.get("decoder_hidden_states") or outputs.get("hidden_states")
    return None if states is None else states[-1]
