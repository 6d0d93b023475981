"""Read all candidates of a row in one forward pass, as a tree over one cache.

The candidates are query positions that share one position id. A float mask lets each of them attend to the context and to
itself. Not every model honours such a mask, so the first tree of a model is compared with plain forward passes.

Read from transformers 5.23.0: `_attn_implementation` and `layer_types` of a configuration, and the layers of a cache (`keys`,
`is_sliding`, `get_mask_sizes`, `activate_past_recording`).
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from contralto.common.placement import input_device
from contralto.decoding.branches.attention import grouped_attention, grouped_modules
from contralto.decoding.branches.cache import drop_positions, keep_position
from contralto.decoding.branches.prefixes import TOLERANCE
from contralto.decoding.branches.reader import CachedReader, last_hidden

__all__ = ["CandidateOutputs", "CandidateTree", "tree_obstacle"]

OWN_WINDOWS = ("window_size", "keep_window_size", "local_attention_window_len")
"""Attributes of configurations for windows that no cache layer knows: GPT-Neo, Doge, BLT."""
VISIBLE = 8
"""Number of last tokens that are visible in the first of two comparisons, in which a leak of the others has weight."""
_MASK_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""Exceptions that models raise for a mask that they do not support."""
_VERDICTS: WeakKeyDictionary[Any, dict[Any, str | None]] = WeakKeyDictionary()
"""By model and kind of use: the reason why the model cannot read a tree, or None if it can."""


class CandidateOutputs(NamedTuple):
    """The outputs of a model for each candidate of each row."""

    logits: Tensor
    """`(B, k, V)`."""
    hidden: Tensor
    """`(B, k, d)`, of the last layer."""

    @classmethod
    def of(cls, outputs: Any, candidates: Tensor) -> "CandidateOutputs":
        """Return the outputs of a forward pass over candidates `(B, k)`, which may be rows of their own."""
        hidden = last_hidden(outputs)
        assert hidden is not None
        # (B * k, 1, V) or (1, B * k, V) -> (B, k, V)
        return cls(*(value.reshape(*candidates.shape, value.shape[-1]) for value in (outputs.logits, hidden)))


class CandidateTree:
    """All candidates of a row as query positions of one forward pass, over one cache.

    Args:
        reader: the rows; its cache takes the candidates.
    """

    def __init__(self, reader: CachedReader) -> None:
        self._reader = reader
        self._grouped = grouped_modules(reader.model)
        reader.cache.activate_past_recording()

    def read(self, candidates: Tensor, visible: Tensor | None = None) -> CandidateOutputs:
        """Return the outputs for candidates `(B, k)`, where `visible` `(B, T)` is 0 for tokens that they do not attend to."""
        reader, self._count = self._reader, candidates.shape[1]
        visible = reader.mask if visible is None else visible
        masks = {kind: self._mask(layer, visible) for kind, layer in _mask_kinds(reader.model).items()}
        with grouped_attention(self._grouped if reader.compiled is None else ()):  # a graph has no place for the change
            return CandidateOutputs.of(reader.peek(candidates, layer_masks=masks.get(None, masks)), candidates)

    def _mask(self, layer: int, visible: Tensor | None) -> Tensor:
        """Return the mask of a layer, `(B or 1, 1, k, width)`: 0 for visible positions, else the least number.

        Eager attention adds the mask to its logits, so that a boolean mask would not work there.
        """
        reader, k = self._reader, self._count
        width, start = reader.cache.get_mask_sizes(k, layer)
        dtype, end = reader.cache.layers[layer].keys.dtype, reader.length - start
        low, rows = torch.finfo(dtype).min, 1 if visible is None else len(visible)
        mask = torch.full((rows, 1, k, width), low, dtype=dtype, device=input_device(reader.model))
        mask[..., :end] = 0
        if visible is not None:
            mask[..., :end].masked_fill_(visible[:, None, None, start:].to(mask.device) == 0, low)
        mask[..., end : end + k].diagonal(dim1=-2, dim2=-1).fill_(0)
        return mask

    def keep(self, choice: Tensor) -> None:
        """Keep candidate `choice` `(B,)` of each row in the cache, and remove the others."""
        keep_position(self._reader.cache, choice, self._reader.length, self._count)
        self._drop_last(self._count - 1)
        self._reader.advance()

    def drop(self) -> None:
        """Remove all candidates from the cache."""
        self._drop_last(self._count)

    def _drop_last(self, count: int) -> None:
        drop_positions(self._reader.cache, count)


def _mask_kinds(model: Any) -> dict[str | None, int]:
    """Return the first layer of each kind of mask by its name; by None if all layers share one mask."""
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    return {None: 0} if types is None else {kind: types.index(kind) for kind in types}


def _sliding_layers(config: Any, layers: int) -> list[bool]:
    """Return for each layer whether the model gives it a mask with a sliding window."""
    types = getattr(config, "layer_types", None)
    if types is None:
        return [getattr(config, "sliding_window", None) is not None] * layers
    return [kind == "sliding_attention" for kind in types]


def tree_obstacle(reader: CachedReader, candidates: Tensor) -> str | None:
    """Return the reason why a model cannot read candidates as a tree; None if it can.

    Args:
        reader: rows that have read their prompts.
        candidates: `(B, k)` int64, the first candidates.
    """
    model, config = reader.model, reader.model.config.get_text_config(decoder=True)
    if reader.kwargs.get(reader.positions_name) is None or reader.is_encoder_decoder:
        return "it computes its positions itself and accepts no position_ids"
    layers = reader.cache.layers
    if (attention := config._attn_implementation) not in ("eager", "sdpa"):
        return f"its attention is {attention!r}, and only 'eager' and 'sdpa' accept a custom mask"
    if unknown := {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer}:
        return f"its cache has a layer of type {unknown.pop().__name__}, which cannot remove candidates"
    if kinds := {kind for kind in _mask_kinds(model) if kind not in (None, "full_attention", "sliding_attention")}:
        return f"it has layers of type {kinds.pop()!r}, whose mask is unknown"
    if _sliding_layers(config, len(layers)) != [layer.is_sliding for layer in layers]:
        return "its cache does not tell which layers have a sliding window"
    if own := [name for name in OWN_WINDOWS if getattr(config, name, None) is not None]:
        return f"it has a window of its own, {own[0]}, which counts positions in the cache"
    return _self_test(reader, candidates)


def _self_test(reader: CachedReader, candidates: Tensor) -> str | None:
    """Compare a tree with plain forward passes, once for each model and kind of use."""
    config, dtype = reader.model.config.get_text_config(decoder=True), reader.cache.layers[0].keys.dtype
    length = reader.length.bit_length()  # 9 to 16 tokens behave alike, 5000 do not
    kind = (config._attn_implementation, dtype, reader.mask is None, reader.cache.is_compileable, length)
    verdicts = _VERDICTS.setdefault(reader.model, {})
    if kind not in verdicts:
        whole = candidates.new_ones(len(candidates), reader.length) if reader.mask is None else reader.mask
        recent = whole.clone()
        recent[:, :-VISIBLE] = 0
        reasons = (_compare(reader, candidates, visible, TOLERANCE[dtype]) for visible in (recent, whole))
        verdicts[kind] = next((reason for reason in reasons if reason is not None), None)
    return verdicts[kind]


def _compare(reader: CachedReader, candidates: Tensor, visible: Tensor, tolerance: float) -> str | None:
    """Compare the last candidate of a tree, the furthest from its position, with a plain forward pass of it."""
    last = candidates[:, -1:]
    plain = CandidateOutputs.of(reader.fork().peek(last, mask=pad(visible, (0, 1), value=1)), last)
    try:
        tree = CandidateTree(reader.fork()).read(candidates, visible)
    except _MASK_ERRORS as error:
        return f"a forward pass over several candidates fails with {type(error).__name__}: {error}"
    for name, one, other in zip(CandidateOutputs._fields, plain, tree, strict=True):
        one, other = one[:, -1].float(), other[:, -1].float()
        if one.shape[-1] == 1:
            continue  # the value of a critic, which has no spread: it follows from the hidden state
        difference = float(((one - other).square().mean(-1).sqrt() / one.std(-1)).max())
        if not difference < tolerance:
            return f"its {name} differ from those of a plain forward pass by {difference:.2g} of their range"
    return None
