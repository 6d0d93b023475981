"""Agreement of raters beyond chance: Cohen's kappa of two raters, Fleiss' kappa of any number.

Chance is the agreement that the raters' own shares of each category would give. 1 is full agreement, 0 that of chance.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["cohen_kappa", "count_labels", "fleiss_kappa"]


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Return Cohen's kappa of two raters on the same items (Cohen 1960).

        kappa = (p_o - p_e) / (1 - p_e)    p_o = share of equal labels    p_e = sum_c p_first(c) p_second(c)

    Args:
        first: the labels of the first rater, any values.
        second: the labels of the second rater, in the same order.

    Returns:
        At most 1; nan where both raters gave one and the same label to every item, so that chance explains everything.

    Raises:
        ValueError: there are no items, or the raters have different numbers of them.

    Examples:
        >>> round(cohen_kappa("AABB", "AABA"), 3), cohen_kappa("AABB", "AABB")
        (0.5, 1.0)
    """
    if not len(first) or len(first) != len(second):
        raise ValueError(f"kappa needs the same items from both raters, not {len(first)} and {len(second)}")
    labels = sorted({*first, *second}, key=str)
    one, other = (np.array([[label == each for each in labels] for label in rater]) for rater in (first, second))
    observed = float((one & other).any(axis=1).mean())
    return _beyond_chance(observed, float(one.mean(0) @ other.mean(0)))


def fleiss_kappa(counts: ArrayLike) -> float:
    """Return Fleiss' kappa of a fixed number of raters (Fleiss 1971).

        P_i = (sum_c n_ic^2 - m) / (m (m - 1))    p_e = sum_c (sum_i n_ic / (n m))^2    kappa = (mean P_i - p_e) / (1 - p_e)

    Args:
        counts: `(n, C)`, how many of the m raters gave each of C labels to each of n items; every row has the same sum m, at least 2.

    Returns:
        At most 1; nan where every rating is the same label.

    Raises:
        ValueError: there are no items, rows have different sums, or there are fewer than two raters.

    Examples:
        >>> round(fleiss_kappa([[3, 0], [0, 3], [2, 1]]), 3)
        0.55
    """
    table = np.asarray(counts, dtype=np.float64)
    raters = table.sum(axis=1) if table.ndim == 2 and table.size else np.zeros(1)
    if raters.min() < 2 or raters.min() != raters.max():
        raise ValueError(
            "Fleiss' kappa needs at least one item, and the same number of ratings, at least 2, of every item"
        )
    m = float(raters[0])
    agreement = ((table**2).sum(axis=1) - m) / (m * (m - 1))
    shares = table.sum(axis=0) / table.sum()
    return _beyond_chance(float(agreement.mean()), float((shares**2).sum()))


def count_labels(ratings: Sequence[Sequence[Hashable]], labels: Sequence[Hashable]) -> list[list[int]]:
    """Return how often each label was given to each item, the argument of `fleiss_kappa`.

    Args:
        ratings: for each item the labels that the raters gave.
        labels: all labels, the columns of the result.

    Examples:
        >>> count_labels(["AAB", "BBB"], "AB")
        [[2, 1], [0, 3]]
    """
    return [[sum(given == label for given in item) for label in labels] for item in ratings]


def _beyond_chance(observed: float, chance: float) -> float:
    return math.nan if math.isclose(chance, 1.0) else (observed - chance) / (1 - chance)
