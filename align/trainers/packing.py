"""Pack the pairs of a batch into rows: prefix sharing with packing (Wang & Hegde 2024, arXiv 2410.20305).

Pairs of many lengths leave much padding, whether a pair has two rows or one. Here several pairs lie in one row, each with its common
prefix once, or several sequences that share nothing. They are assigned to rows by first-fit decreasing: from the longest to the shortest,
each goes into the first row in which it fits. The numbers stay those of the padded batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from contralto.align.trainers.layout_masks import MASKED
from contralto.align.trainers.layouts import LAYOUTS, Layout, at_places, common_prefix, packed

__all__ = ["arrangement", "first_fit_decreasing", "packed_rows"]


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign items to bins: from the longest to the shortest, each to the first bin in which it fits.

    It takes at most 11/9 of the fewest bins that are possible, and 6/9 of a bin (Dosa 2007).

    Args:
        lengths: of the items.
        capacity: of a bin.

    Returns:
        The numbers of the items in each bin.

    Raises:
        ValueError: an item is longer than a bin.

    Examples:
        >>> first_fit_decreasing([3, 6, 4, 2, 5], capacity=8)
        [[1, 3], [4, 0], [2]]
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(
            f"a sequence of {max(lengths)} tokens is longer than pack_length, {capacity}: raise pack_length, or lower max_length"
        )
    bins: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        into = next((i for i, space in enumerate(free) if lengths[item] <= space), len(bins))
        if into == len(bins):
            bins.append([])
            free.append(capacity)
        bins[into].append(item)
        free[into] -= lengths[item]
    return bins


def packed_rows(
    input_ids: Tensor, attention_mask: Tensor, *, share: bool = True, pack_length: int | None = None
) -> Layout:
    """Return rows that hold several pairs each, with the common prefix of a pair once.

    Args:
        input_ids: `(2B, T)`, padded on the right, the chosen rows first.
        attention_mask: `(2B, T)`.
        share: compute the common prefix of a pair once. False packs sequences.
        pack_length: the width of the rows; a pair that is longer is packed as two sequences. None takes the longest pair, or sequence.

    Raises:
        ValueError: a sequence is longer than `pack_length`.

    Examples:
        >>> ids = torch.tensor([[5, 6, 7, 8], [2, 3, 0, 0], [5, 6, 9, 0], [2, 4, 0, 0]])
        >>> layout = packed_rows(ids, (ids > 0).long(), pack_length=8)
        >>> layout.inputs["input_ids"], layout.inputs["position_ids"]
        (tensor([[5, 6, 7, 8, 9, 2, 3, 4]]), tensor([[0, 1, 2, 3, 2, 0, 1, 1]]))
        >>> layout.ends
        tensor([[5, 5, 4, 4, 5, 8, 7, 8]])
    """
    valid, common = attention_mask.bool(), common_prefix(input_ids, attention_mask)
    pairs = len(common)
    *lengths, shared = torch.cat([valid.sum(-1, keepdim=True), common]).view(3, pairs).tolist()  # to the host at once
    chosen, rejected = lengths
    sizes = [a + b - c for a, b, c in zip(chosen, rejected, shared, strict=True)]
    limit = max(sizes) if pack_length is None else pack_length
    fits = [share and same > 0 and size <= limit for size, same in zip(sizes, shared, strict=True)]
    units = [[i, i + pairs] for i in range(pairs) if fits[i]]
    units += [[i + side] for i in range(pairs) if not fits[i] for side in (0, pairs)]
    own = [*chosen, *(b - c * fit for b, c, fit in zip(rejected, shared, fits, strict=True))]
    unit_lengths = [sum(own[i] for i in unit) for unit in units]
    width = pack_length or max(unit_lengths)
    rows = first_fit_decreasing(unit_lengths, width)
    places = _places([[i for unit in row for i in units[unit]] for row in rows], own, width).to(valid.device)
    common = common * torch.tensor(fits, device=valid.device)[:, None]
    return at_places(input_ids, valid, common=common, places=places, shape=(len(rows), width))


def _places(rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> Tensor:
    """Return `(n, 1)` the positions in the flattened layout at which sequences begin that lie one behind another in their rows."""
    places = [0] * len(lengths)
    for number, row in enumerate(rows):
        at = number * width
        for sequence in row:
            places[sequence] = at
            at += lengths[sequence]
    return torch.tensor(places)[:, None]


def arrangement(args: Any, attention: str) -> Callable[[Tensor, Tensor], Layout] | None:
    """Return the layout of batches that the options select; None leaves them padded.

    Args:
        args: a `PreferenceConfig`.
        attention: the `attn_implementation` of the model. One that takes no mask gets sequences in one row without padding.
    """
    if args.packing and attention in MASKED:
        return partial(packed_rows, share=args.prefix_sharing, pack_length=args.pack_length)
    if args.packing:
        return packed
    return next((layout for option, layout in LAYOUTS.items() if getattr(args, option)), None)
