"""Attention masks of rows that hold several sequences, or sequences with a common prefix.

The sequences of a row form a forest: a token attends to the tokens before it on its own path. Where the tokens lie in depth-first order,
each token is seen from its own position to the end of what follows from it, and one number per token describes the mask:

    k sees into q    if    k <= q < end(k)    and, in a layer with a window w,    position(q) - position(k) < w

Positions count along the path. FlexAttention skips the blocks of the mask that are empty; other
implementations take it as a dense tensor, quadratic in the width of a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from contralto.align.trl_compat import attention_of

__all__ = ["MASKED", "WINDOWED", "attends", "dense_mask", "layer_windows", "model_mask"]

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWED = (FULL, SLIDING)
"""Kinds of layers whose masks are made here, by the names of transformers."""
FLEX = "flex_attention"
MASKED = ("sdpa", "eager", FLEX)
"""Values of `attn_implementation` that take a mask of pairs of tokens."""


def attends(ends: Tensor, positions: Tensor, window: int | None = None) -> Callable[..., Tensor]:
    """Return the function `(row, head, query, key)` that is true where a query attends to a key, as FlexAttention calls it.

    Args:
        ends: `(rows, width)`, see `Layout.ends`.
        positions: `(rows, width)` positions along the sequences.
        window: tokens that a layer attends to, itself included; None is no limit.
    """

    def attended(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < ends[row, key])
        return seen if window is None else seen & (positions[row, query] - positions[row, key] < window)

    return attended


def dense_mask(ends: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """Return `attends` as a tensor `(rows, 1, width, width)`.

    Args:
        ends: see `attends`.
        positions: see `attends`.
        window: see `attends`.

    Examples:
        >>> ends, positions = torch.tensor([[4, 3, 3, 4]]), torch.tensor([[0, 1, 2, 1]])
        >>> dense_mask(ends, positions)[0, 0].long()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 0, 0, 1]])
    """
    rows, at = (torch.arange(size, device=ends.device) for size in ends.shape)
    return attends(ends, positions, window)(rows[:, None, None, None], rows[:1], at[:, None], at)


def layer_windows(config: Any) -> dict[str, int | None]:
    """Return the window of each kind of layers that a model has, None for no window.

    Args:
        config: the configuration of a language model.

    Examples:
        >>> from transformers import LlamaConfig, MistralConfig
        >>> layer_windows(LlamaConfig()), layer_windows(MistralConfig(sliding_window=8))
        ({'full_attention': None}, {'sliding_attention': 8})
    """
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    kinds = kinds or [FULL if window is None else SLIDING]
    return {kind: window if kind == SLIDING else None for kind in dict.fromkeys(kinds)}


def model_mask(model: Any, ends: Tensor, positions: Tensor) -> Tensor | BlockMask | dict[str, Tensor | BlockMask]:
    """Return the mask as the attention of a model takes it: additive for eager, in blocks for FlexAttention, else boolean.

    A model with several kinds of layers takes a mask for each by name.

    Args:
        model: a model of transformers, not wrapped.
        ends: see `attends`.
        positions: see `attends`.
    """
    config = model.config.get_text_config()
    attention, windows = attention_of(config), layer_windows(config)
    masks = {kind: _in_form(model, attention, ends, positions, window) for kind, window in windows.items()}
    return masks if len(masks) > 1 else masks[next(iter(masks))]


def _in_form(model: Any, attention: str, ends: Tensor, positions: Tensor, window: int | None) -> Tensor | BlockMask:
    if attention == FLEX:
        rows, width = ends.shape
        return create_block_mask(attends(ends, positions, window), rows, None, width, width, device=ends.device)
    mask = dense_mask(ends, positions, window)
    if attention != "eager":
        return mask
    closed = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    return closed.masked_fill(~mask, torch.finfo(model.dtype).min)
