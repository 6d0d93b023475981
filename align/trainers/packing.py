"""Pack the pairs of a batch into rows: prefix sharing with packing (Wang & Hegde 2024, arXiv 2410.20305).

Pairs of many lengths leave much padding, whether a pair has two rows or one. Here several lie in one row, with what they have in common
once, or several sequences that share nothing. They are assigned to rows by first-fit decreasing: from the longest to the shortest,
each goes into the first row in which it fits. The numbers stay those of the padded batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.trainers.layout_masks import MASKED
from contralto.align.trainers.layouts import (
    LAYOUTS,
    Layout,
    Sharing,
    at_places,
    common_prefix,
    packed,
    paired,
    row_lengths,
)

__all__ = ["arrangement", "first_fit_decreasing", "joined", "packed_rows"]

LEAST = (1, 16)
"""Tokens in common for which sequences are put into one tree: both are tried, and the rows that hold fewer places are taken."""


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
    """Return rows that hold several sequences each, with common prefixes once.

    Sequences that begin alike form a tree, which lies in one row: the two of a pair, all completions of one prompt, conversations of which
    one goes on where the other ends, and what follows the same system prompt.

    Args:
        input_ids: `(2B, T)`, padded on the right, the chosen rows first.
        attention_mask: `(2B, T)`.
        share: compute common prefixes once. False packs sequences.
        pack_length: the width of the rows; a tree that is longer is divided. None takes the longest pair, or sequence.

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
    ids, mask = input_ids.cpu(), attention_mask.cpu()
    lengths = row_lengths(mask)
    order = list(range(len(lengths)))
    if not share:
        arranged = _Rows.of(Sharing(order, [0] * len(order)), lengths, pack_length)
    else:
        tokens = ids.tolist()
        order.sort(key=lambda row: tokens[row][: lengths[row]])
        common = [0, *common_prefix(ids, mask, torch.tensor(order[:-1]), torch.tensor(order[1:]))]
        limit = _longest_pair(ids, mask) if pack_length is None else pack_length
        found = (
            _Rows.of(joined(Sharing(order, common), lengths, limit, least), lengths, pack_length) for least in LEAST
        )
        arranged = min(found, key=lambda rows: (rows.shape[0] * rows.shape[1], sum(rows.sharing.own_lengths(lengths))))
    return at_places(ids, mask, arranged.sharing, places=arranged.places, shape=arranged.shape, device=input_ids.device)


def joined(sharing: Sharing, lengths: Sequence[int], limit: int, least: int = 1) -> Sharing:
    """Join sequences that begin alike to trees, those that have most in common first, as long as a tree does not get too long.

    Args:
        sharing: the sequences in lexicographic order, with all that neighbours have in common.
        lengths: of the rows of the padded batch.
        limit: tokens of a tree.
        least: tokens in common for which two trees are joined: large trees fill rows less well.

    Examples:
        >>> joined(Sharing([2, 0, 1], [0, 3, 1]), lengths=[5, 4, 6], limit=8)
        Sharing(order=[2, 0, 1], common=[0, 3, 0])
    """
    trees = [[at] for at in range(len(sharing.order))]
    sizes, common = [lengths[row] for row in sharing.order], [0] * len(trees)
    for at in sorted(range(1, len(trees)), key=lambda at: -sharing.common[at]):
        tree, other, shared = trees[at - 1], trees[at], sharing.common[at]
        size = sizes[tree[0]] + sizes[other[0]] - shared
        if shared >= least and size <= limit:
            common[at], sizes[tree[0]] = shared, size
            tree += other
            for each in other:
                trees[each] = tree
    return Sharing(sharing.order, common)


class _Rows(NamedTuple):
    """Trees of sequences in rows."""

    sharing: Sharing
    places: list[int]
    """See `at_places`."""
    shape: tuple[int, int]
    """Rows and width."""

    @classmethod
    def of(cls, sharing: Sharing, lengths: Sequence[int], pack_length: int | None) -> "_Rows":
        """Assign trees to rows.

        Args:
            sharing: the trees.
            lengths: of the rows of the padded batch.
            pack_length: the width of the rows; None takes the longest tree.
        """
        own, trees = sharing.own_lengths(lengths), list[list[int]]()
        for at, shared in enumerate(sharing.common):
            trees[-1].append(at) if shared else trees.append([at])
        sizes = [sum(own[at] for at in tree) for tree in trees]
        width = pack_length or max(sizes)
        rows, places = first_fit_decreasing(sizes, width), [0] * len(own)
        for number, row in enumerate(rows):
            start = number * width
            for at in (at for tree in row for at in trees[tree]):
                places[at] = start
                start += own[at]
        return cls(sharing, places, (len(rows), width))


def _longest_pair(input_ids: Tensor, attention_mask: Tensor) -> int:
    """Return the tokens of the longest pair, its common prefix once."""
    own = paired(input_ids, attention_mask).own_lengths(row_lengths(attention_mask))
    return max(map(sum, zip(own[::2], own[1::2], strict=True)))


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
