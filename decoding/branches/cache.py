"""Crop, copy and reorder the caches of transformers: the operations that `Cache` does not offer itself.

Read from transformers 5.23.0: `Cache.is_linear`, `Cache.layers`, and the attributes of its layers (`keys`, `values`,
`cumulative_length`).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.generation.utils import ALL_CACHE_NAMES

__all__ = [
    "JOINABLE",
    "crop_cache",
    "crop_layers",
    "drop_positions",
    "find_cache",
    "fork_cache",
    "join_caches",
    "keep_position",
    "linear_layers",
    "repeat_cache",
    "repeat_rows",
    "split_cache",
    "trim_cache",
]


JOINABLE = (DynamicLayer, DynamicSlidingWindowLayer)
"""The layers whose states can be padded on the left: the last tokens are at the end."""


def find_cache(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache in keyword arguments or outputs of a model, under any of its usual names; None without one.

    Args:
        kwargs: keyword arguments or outputs of a model.
    """
    return next((kwargs[name] for name in ALL_CACHE_NAMES if kwargs.get(name) is not None), None)


def split_cache(cache: Any) -> tuple[Any, Any]:
    """Return the decoder's own cache, and that of its cross-attention if the model has an encoder.

    Args:
        cache: of a decoder-only model or of an encoder-decoder.
    """
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None


def linear_layers(cache: Any) -> list[bool]:
    """Return for each layer of the decoder's own cache whether it holds a recurrent state.

    Args:
        cache: of a decoder-only model or of an encoder-decoder.
    """
    return list(split_cache(cache)[0].is_linear)


def crop_cache(cache: Any, dropped: int, new: int) -> bool:
    """Remove the last tokens from a cache, in place.

    Args:
        cache: of a model.
        dropped: number of tokens to remove.
        new: number of tokens that the next forward pass feeds.

    Returns:
        False if the cache cannot do that; it must not be used any more then.
    """
    if any(linear_layers(cache)):
        return not dropped and new == 1  # a recurrent state cannot go back, and Mamba drops it when fed several tokens
    try:
        if dropped:
            crop_layers(cache, dropped)
    except RuntimeError:  # a sliding window that has already moved on
        return False
    return True


def crop_layers(cache: Any, dropped: int) -> None:
    """Crop the layers that hold something: a sliding window that was never filled, as of a skipped layer, cannot be cropped.

    Args:
        cache: of a model.
        dropped: number of tokens to remove; with 0, sliding windows let go of what they recorded.

    Raises:
        RuntimeError: a sliding window has moved on, and records nothing.
    """
    for layer in split_cache(cache)[0].layers:
        if getattr(layer, "is_initialized", True):
            layer.crop(-dropped)


def fork_cache(cache: Any) -> Any:
    """Return a copy of a cache that shares its tensors. Dynamic layers never change a tensor that they share.

    Args:
        cache: of a model.
    """
    fork = copy.copy(cache)
    own, encoded = split_cache(cache)
    if encoded is not None:
        fork.self_attention_cache, fork.cross_attention_cache = fork_cache(own), fork_cache(encoded)
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


def keep_position(cache: Any, choice: Tensor, length: int, count: int) -> None:
    """Move one of the last `count` positions of each row to the first of them, in place.

    Args:
        cache: the decoder's own cache, of dynamic or static layers.
        choice: `(R,)` int64, the position of each row, from 0 to `count` - 1.
        length: number of tokens before these positions.
        count: number of last positions.
    """
    for layer in cache.layers:
        first = length if isinstance(layer, StaticLayer) else layer.keys.shape[-2] - count
        for states in (layer.keys, layer.values):  # (R, heads, width, head size)
            last = states[:, :, first : first + count]
            index = choice.to(last.device)[:, None, None, None].expand(-1, last.shape[1], 1, last.shape[3])
            last[:, :, :1] = last.gather(2, index)  # (R, heads, 1, head size)


def drop_positions(cache: Any, count: int) -> None:
    """Remove the last positions from a cache, also from a static one, in place.

    Args:
        cache: the decoder's own cache, of dynamic or static layers.
        count: number of positions to remove.
    """
    if cache.is_compileable:
        for layer in cache.layers:
            layer.cumulative_length.sub_(count)
    else:
        crop_layers(cache, count)


def join_caches(caches: Sequence[Any]) -> bool:
    """Join caches into the first one, their rows one after the other, padded on the left to one length.

    Args:
        caches: of one decoder-only model.

    Returns:
        False if a layer cannot be padded, such as one with a recurrent state; nothing is changed then.
    """
    if len(caches) == 1:
        return True
    every = [layer for cache in caches for layer in cache.layers]
    if any(type(layer) not in JOINABLE or getattr(layer, "record_past", False) for layer in every):
        return False
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            states = [getattr(layer, name) for layer in layers]  # (R, heads, length, head size)
            width = max(state.shape[2] for state in states)  # of sliding windows that of the window at most
            setattr(layers[0], name, torch.cat([pad(state, (0, 0, width - state.shape[2], 0)) for state in states]))
        if layers[0].is_sliding:
            layers[0].cumulative_length = max(layer.cumulative_length for layer in layers)
    return True


def trim_cache(cache: Any, count: int) -> bool:
    """Remove the first tokens from a cache, in place: padding of all rows, such as that of a longer row that has left.

    Args:
        cache: of a decoder-only model.
        count: number of tokens to remove.

    Returns:
        False if a layer keeps them in another form, such as a recurrent state; nothing is changed then.
    """
    if any(type(layer) not in JOINABLE or getattr(layer, "record_past", False) for layer in cache.layers):
        return False
    for layer in cache.layers:
        width = layer.keys.shape[2] - count
        if layer.is_sliding:
            layer.cumulative_length -= count
            width = min(layer.keys.shape[2], layer.cumulative_length)
        first = layer.keys.shape[2] - width
        layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
    return True


def repeat_cache(cache: Any, copies: int, index: Tensor) -> None:
    """Repeat each row of a cache, in place.

    Args:
        cache: the decoder's own cache, or that of its cross-attention, see `split_cache`.
        copies: number of copies of each row.
        index: `(R * copies,)` int64, the row of each copy.
    """
    for layer in cache.layers:
        # Both calls do the same; the first is faster, and only these two types have it.
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layer.batch_repeat_interleave(copies)
        else:
            layer.reorder_cache(index)


def repeat_rows(value: Any, rows: int, copies: int, *, dim: int = 0) -> Any:
    """Repeat each row of a model input; inputs without a row per sequence stay as they are.

    Args:
        value: a tensor, a mapping of tensors, or anything else.
        rows: number of rows of the batch.
        copies: number of copies of each row.
        dim: the dimension of the rows.
    """
    if isinstance(value, Tensor):
        return value.repeat_interleave(copies, dim) if value.ndim and value.shape[dim] == rows else value
    if isinstance(value, Mapping):
        return type(value)(**{name: repeat_rows(each, rows, copies) for name, each in value.items()})
    return value
