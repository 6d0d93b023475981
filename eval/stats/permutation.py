"""Exact paired permutation tests.

Two systems answer the same documents. Under the null hypothesis either system could have given either answer, so the sign of each
unit's difference is random. A unit is what is exchanged as a whole: a document with all its seeds, or all documents of a cluster.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from contralto.eval.stats.counts import Array, CountMetric, by_cluster

__all__ = ["Permutation", "sign_flip", "swap"]

ENUMERATED = 14
"""The number of units up to which all assignments are enumerated."""
LATTICE = 60
"""The largest denominator of differences whose distribution is computed exactly, such as 1 / 3 of three seeds."""
LONGEST = 200_000
"""The largest sum of whole differences whose distribution is computed exactly."""
CLOSE = 1e-9
"""The relative distance within which two statistics are equal."""


class Permutation(NamedTuple):
    """The result of a permutation test."""

    p: float
    """Two-sided."""
    units: int
    """The number of units on which the systems differ."""
    exact: bool
    """Whether all assignments were counted; else some were drawn."""


def sign_flip(
    differences: ArrayLike, *, clusters: ArrayLike | None = None, resamples: int = 10_000, seed: int = 0
) -> Permutation:
    """Test whether differences of paired scores are symmetric about 0 (Fisher's randomisation test, 1935).

    With the sums d_k over each unit, and signs e_k that are +1 or -1 with equal chance:

        p = P(|sum_k e_k d_k| >= |sum_k d_k|)

    Differences that are multiples of a common step, such as those of scores 0 and 1 over any number of seeds, have their exact
    distribution computed for any number of documents. So do up to 14 units of any differences. For others `resamples` assignments
    are drawn, and p = (1 + those at least as far from 0) / (1 + resamples). For scores 0 and 1, one seed and no clusters this is
    McNemar's exact test.

    Args:
        differences: `(n,)`, the second system's score less the first's, of each document; summed over seeds.
        clusters: `(n,)`, the cluster of each document; None if every document is its own cluster.
        resamples: The number of assignments to draw where they are not enumerated.
        seed: The seed of the draws.

    Returns:
        p, the number of units that differ, and whether p is exact.

    Raises:
        ValueError: There are no documents, or not exactly one cluster per document.

    Examples:
        >>> sign_flip([0, 1, 1, 1, 1] + [0] * 25)
        Permutation(p=0.125, units=4, exact=True)
        >>> round(sign_flip([1, 1, 1, 1, 1, -1]).p, 6)  # McNemar's: five won, one lost
        0.21875
    """
    sums = by_cluster(np.asarray(differences, dtype=np.float64)[:, None], clusters)[:, 0]
    apart = sums[np.abs(sums) > CLOSE * max(1.0, float(np.abs(sums).max()))]
    if not apart.size:
        return Permutation(1.0, 0, True)
    if (whole := _whole(apart)) is not None:
        return Permutation(_counted(whole), apart.size, True)
    signs, exact = _assignments(apart.size, resamples, seed)
    reached = int((np.abs((1 - 2 * signs) @ apart) >= abs(apart.sum()) * (1 - CLOSE)).sum())
    return Permutation(_share(reached, len(signs), exact), apart.size, exact)


def _whole(differences: Array) -> NDArray[np.int64] | None:
    """Return the differences as integer multiples of a common step; None without one, or if they are too large."""
    for step in range(1, LATTICE + 1):
        scaled = differences * step
        nearest = np.rint(scaled)
        if np.all(np.abs(scaled - nearest) < 1e-6):
            whole: Any = nearest.astype(np.int64)
            whole //= np.gcd.reduce(np.abs(whole))
            return whole if np.abs(whole).sum() <= LONGEST else None
    return None


def _counted(differences: NDArray[np.int64]) -> float:
    """Return the exact p of integer differences, from the distribution of the sum of those with a positive sign.

    The signed sum is twice that sum less the sum of all. Equal differences are one binomial.
    """
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    chances = np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        longer = np.zeros(len(chances) + size * count)
        for kept, chance in enumerate(binom.pmf(np.arange(count + 1), count, 0.5)):
            longer[size * kept : size * kept + len(chances)] += chance * chances
        chances = longer
    distance = np.abs(2 * np.arange(len(chances)) - (len(chances) - 1))
    return min(1.0, float(chances[distance >= abs(int(differences.sum()))].sum()))


def swap(
    first: ArrayLike,
    second: ArrayLike,
    metric: CountMetric,
    *,
    clusters: ArrayLike | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Permutation:
    """Test a difference of metrics that are not means, such as F1, by exchanging the systems' counts unit by unit.

        p = P(|metric(second*) - metric(first*)| >= |metric(second) - metric(first)|)

    Args:
        first: `(n, C)`, the first system's counts of each document.
        second: `(n, C)`, the second system's counts.
        metric: A function from summed counts `(..., C)` to the metric `(...)`.
        clusters: `(n,)`, the cluster of each document; None if every document is its own cluster.
        resamples: The number of assignments to draw where more than 14 units differ.
        seed: The seed of the draws.

    Returns:
        p, the number of units that differ, and whether p is exact.

    Raises:
        ValueError: There are no documents, not exactly one cluster per document, or the tables differ in length.

    Examples:
        >>> from contralto.eval import stats
        >>> one, two = stats.score_table([0, 0, 0, 0, 1]), stats.score_table([1, 1, 1, 1, 1])
        >>> swap(one, two, stats.mean)
        Permutation(p=0.125, units=4, exact=True)
    """
    tables = [by_cluster(np.asarray(table, dtype=np.float64), clusters) for table in (first, second)]
    if tables[0].shape != tables[1].shape:
        raise ValueError(f"a paired test needs the same documents, not {len(tables[0])} and {len(tables[1])}")
    change = tables[1] - tables[0]
    change = change[np.any(change != 0, axis=1)]
    if not len(change):
        return Permutation(1.0, 0, True)
    totals = [table.sum(0) for table in tables]
    signs, exact = _assignments(len(change), resamples, seed)
    moved = signs @ change
    differences = np.abs(metric(totals[1] - moved) - metric(totals[0] + moved))
    least = abs(float(metric(totals[1]) - metric(totals[0])))
    reached = int((differences >= least - CLOSE * max(1.0, least)).sum())
    return Permutation(_share(reached, len(signs), exact), len(change), exact)


def _assignments(units: int, resamples: int, seed: int) -> tuple[Array, bool]:
    """Return rows of 0 and 1, the units to exchange, and whether these are all possible rows or random ones."""
    if units <= ENUMERATED:
        return ((np.arange(2**units)[:, None] >> np.arange(units)) & 1).astype(np.float64), True
    return np.random.default_rng(seed).integers(2, size=(resamples, units)).astype(np.float64), False


def _share(reached: int, rows: int, exact: bool) -> float:
    return reached / rows if exact else (1 + reached) / (1 + rows)
