"""Prefill prompts of very different lengths in passes of their own, and join their caches into one batch.

The branches of one model share a forward pass per token, so their rows share a width. A prompt of 512 tokens beside one of 1024
would be padded by half, and the prefill is the part of a short answer that costs most. So prompts are read together only where
the padding costs less than another forward pass.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

from contralto.decoding.branches.cache import JOINABLE, find_cache
from contralto.decoding.branches.context import ContextLimit
from contralto.decoding.branches.prompts import TOKEN_TYPES, Prompts, stack
from contralto.decoding.branches.reader import CachedReader, join_readers

__all__ = ["fits_static", "partition", "pass_tokens", "prefill_apart", "prefill_groups"]

CPU_TOKENS, ACCELERATOR_TOKENS = 32, 256
"""The number of tokens whose arithmetic takes as long as a forward pass takes to read the weights.

On CPUs it was measured: a pass of SmolLM2-135M in float32 on one core takes about 160 + 5 n milliseconds for n tokens. On
accelerators it is the ratio of arithmetic to memory bandwidth, in half precision 2 operations per 2 bytes: 156 on an A100, 295
on an H100."""

JOINED = {"attention_mask", "position_ids", *TOKEN_TYPES, "mm_encoder_outputs"}
"""Inputs of prompts that can be read apart: those of rows, which are joined, and images, which belong to the prefill alone."""


def pass_tokens(device: torch.device) -> int:
    """Return the fixed cost of a forward pass, in tokens.

    Args:
        device: of the model.
    """
    return CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS


def partition(shapes: Sequence[tuple[int, int]], overhead: int) -> list[slice]:
    """Return the groups of neighbouring parts that are cheapest to read.

        cost = sum over groups of (rows * width + overhead)

    where the width of a group is that of its longest part. Attention, quadratic in the width, is left out, which favours
    reading together.

    Args:
        shapes: rows and tokens per row of each part.
        overhead: fixed cost of a pass in tokens.

    Returns:
        The groups, in order. Of equally cheap ones the fewest.

    Examples:
        >>> partition([(1, 1024), (1, 512)], overhead=256)
        [slice(0, 1, None), slice(1, 2, None)]
        >>> partition([(1, 64), (1, 8)], overhead=256)
        [slice(0, 2, None)]
    """

    def cost(groups: list[slice]) -> tuple[int, int]:
        members = [shapes[group] for group in groups]
        tokens = sum(sum(rows for rows, _ in each) * max(width for _, width in each) for each in members)
        return tokens + overhead * len(groups), len(groups)

    options = []
    for cuts in product((False, True), repeat=len(shapes) - 1):
        ends = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(shapes)]
        options.append([slice(*ends_of) for ends_of in pairwise(ends)])
    return min(options, key=cost)


def prefill_groups(model: Any, parts: Sequence[Prompts]) -> list[Prompts]:
    """Join prompts of one model into the groups that are read in one pass each.

    Args:
        model: a decoder-only transformers model.
        parts: prepared prompts that `stack` can join.

    Returns:
        The groups, whose rows follow each other in the order of `parts`; a single one if their caches or inputs cannot be
        joined afterwards, or if reading them apart costs more.
    """
    groups = [slice(0, len(parts))]
    if _are_joinable(model, parts):
        groups = partition([(len(part.ids), part.ids.shape[1]) for part in parts], pass_tokens(parts[0].ids.device))
    stacked = [stack(parts[group]) for group in groups]
    assert all(stacked), "parts that can be joined can be joined in groups"
    return stacked  # type: ignore[return-value]


def _are_joinable(model: Any, parts: Sequence[Prompts]) -> bool:
    """Return whether prompts have inputs alone that can be joined after the prefill, and caches that can be padded."""
    names = [{name for name, value in part.kwargs.items() if value is not None} for part in parts]
    rows = [each - {"mm_encoder_outputs"} for each in names]
    if model.config.is_encoder_decoder or any(each != rows[0] or not each <= JOINED for each in rows):
        return False
    config = model.config.get_text_config(decoder=True)
    # A cache without layers is made by the model layer by layer, of full attention.
    return all(type(layer) in JOINABLE for layer in DynamicCache(config=config).layers)


def prefill_apart(
    readers: Sequence[CachedReader], groups: Sequence[Prompts], limit: ContextLimit | None, static: Any = None
) -> Tensor | None:
    """Read groups of prompts in a pass each, and join them into the first reader.

    Args:
        readers: new readers of the model, one per group.
        groups: of `prefill_groups`, the main rows first.
        limit: of the rows, for the first reader as for all; the main rows are its `exempt`.
        static: an empty static cache for all rows, which the joined states fill; None keeps the dynamic one.

    Returns:
        Logits `(R, 1, V)` of all rows; None if the caches cannot be joined, and then nothing is kept.
    """
    first, *others = readers
    first.limit = limit
    for reader in others:
        reader.limit = None if limit is None else limit._replace(exempt=0)
    logits = [reader.prefill(prompts) for reader, prompts in zip(readers, groups, strict=True)]
    if not join_readers(readers):
        first.reset()
        return None
    if static is not None:
        _fill(static, first)
    return torch.cat(logits)


def _fill(static: Any, reader: CachedReader) -> None:
    """Put the states of a reader's dynamic cache into a static one, which takes its place."""
    cache = find_cache(reader.kwargs)
    for layer, filled in zip(static.layers, cache.layers, strict=True):
        layer.update(filled.keys, filled.values)
    name = next(name for name, value in reader.kwargs.items() if value is cache)
    reader.kwargs[name] = static


def fits_static(static: Any) -> bool:
    """Return whether a static cache can be filled after the prefill: a sliding window takes the tokens in turn.

    Args:
        static: an empty static cache.
    """
    return all(type(layer) is StaticLayer for layer in static.layers)
