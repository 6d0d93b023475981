"""Exact tests of paired comparisons, and the smallest difference that they would find.

Two systems answer the same documents. If neither is better, either could have given either answer, and it is chance which of them
gave which: the sign of each document's difference. A unit is what chance decides on at once: a document with all its seeds, or all
documents that share an image.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from contralto.eval.stats import by_cluster

__all__ = ["Permutation", "detectable", "detectable_by_error", "sign_flip", "swap"]

Array = NDArray[np.float64]
ENUMERATED = 14
"""The number of units up to which all assignments are counted."""
LATTICE = 60
"""The largest denominator of differences that are counted exactly, such as 1 / 3 of three seeds."""
LONGEST = 200_000
"""The largest sum of whole differences that is counted exactly."""
CLOSE = 1e-9
"""Relative distance within which two statistics are equal."""


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

    Differences that are multiples of a common step, such as those of scores 0 and 1 over any number of seeds, are counted
    exactly for any number of documents. So are up to 14 units of any differences. For others `resamples` assignments are drawn,
    and p = (1 + those at least as far from 0) / (1 + resamples). For scores 0 and 1, one seed and no clusters this is
    McNemar's exact test.

    Args:
        differences: `(n,)`, the second system's score less the first's, of each document; summed over seeds.
        clusters: the cluster of each document; None if every document is one.
        resamples: the number of assignments to draw where they are not counted.
        seed: the seed of the draws.

    Returns:
        p, the units that differ, and whether p is exact.

    Raises:
        ValueError: no documents, or not one cluster per document.

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
    """Return the differences as multiples of their common step; None if they have none, or are too large."""
    for step in range(1, LATTICE + 1):
        scaled = differences * step
        nearest = np.rint(scaled)
        if np.all(np.abs(scaled - nearest) < 1e-6):
            whole: Any = nearest.astype(np.int64)
            whole //= np.gcd.reduce(np.abs(whole))
            return whole if np.abs(whole).sum() <= LONGEST else None
    return None


def _counted(differences: NDArray[np.int64]) -> float:
    """Return the exact p of whole differences: the distribution of the sum of those that keep a positive sign.

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
    metric: Callable[[Array], Array],
    *,
    clusters: ArrayLike | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Permutation:
    """Test a difference of metrics that are no means, such as F1: the systems' counts change places unit by unit.

        p = P(|metric(second*) - metric(first*)| >= |metric(second) - metric(first)|)

    Args:
        first: `(n, C)`, the first system's counts of each document.
        second: `(n, C)`, the second system's counts.
        metric: makes the metric `(...)` of summed counts `(..., C)`.
        clusters: the cluster of each document; None if every document is one.
        resamples: the number of assignments to draw where there are more than 14 units that differ.
        seed: the seed of the draws.

    Returns:
        p, the units that differ, and whether p is exact.

    Raises:
        ValueError: no documents, not one cluster per document, or other documents for the second system.

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
    found = np.abs(metric(totals[1] - moved) - metric(totals[0] + moved))
    least = abs(float(metric(totals[1]) - metric(totals[0])))
    reached = int((found >= least - CLOSE * max(1.0, least)).sum())
    return Permutation(_share(reached, len(signs), exact), len(change), exact)


def _assignments(units: int, resamples: int, seed: int) -> tuple[Array, bool]:
    """Return rows of 0 and 1, which units change places: all rows of few units, else drawn ones; and whether they are all."""
    if units <= ENUMERATED:
        return ((np.arange(2**units)[:, None] >> np.arange(units)) & 1).astype(np.float64), True
    return np.random.default_rng(seed).integers(2, size=(resamples, units)).astype(np.float64), False


def _share(reached: int, rows: int, exact: bool) -> float:
    return reached / rows if exact else (1 + reached) / (1 + rows)


# ------------------------------------------------------------------------------------------------- what a test would find


def detectable(items: int, discordance: float, *, level: float = 0.05, power: float = 0.8) -> float | None:
    """Return the smallest difference of accuracies that McNemar's exact test finds with the given power.

    Of n documents d are answered rightly by just one system, d binomial with the discordance q; of these the better system wins w,
    binomial with the chance (1 + difference / q) / 2. The test is two-sided:

        power(difference) = sum_d P(d) P(p(w, d) <= level)    q = max(discordance, difference)

    Args:
        items: the number of documents.
        discordance: the share of documents that just one system answers rightly, as it was observed or is expected.
        level: the level of the test.
        power: the chance to find the difference.

    Returns:
        The difference; None if the documents are too few to find any.

    Raises:
        ValueError: a share outside [0, 1].

    Examples:
        >>> round(detectable(1000, 0.1), 3)
        0.029
        >>> detectable(5, 0.5) is None
        True
    """
    for name, value in (("discordance", discordance), ("level", level), ("power", power)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {value}")
    low, high = 0.0, 1.0
    if _power(items, discordance, high, level) < power:
        return None
    for _ in range(14):  # to 0.0001
        middle = (low + high) / 2
        low, high = (low, middle) if _power(items, discordance, middle, level) >= power else (middle, high)
    return high


def _power(items: int, discordance: float, difference: float, level: float) -> float:
    """Return the chance that the exact test finds a difference."""
    share = max(discordance, difference)
    if share == 0:
        return 0.0
    apart = np.arange(int(binom.ppf(1e-12, items, share)), int(binom.isf(1e-12, items, share)) + 1)
    lost = binom.ppf(level / 2, apart, 0.5)  # the most that the better system may lose
    lost = np.where(2 * binom.cdf(lost, apart, 0.5) <= level, lost, lost - 1)
    chance = (1 + difference / share) / 2
    found = binom.cdf(lost, apart, chance) + binom.sf(apart - lost - 1, apart, chance)
    return float((binom.pmf(apart, items, share) * np.where(lost >= 0, found, 0.0)).sum())


def detectable_by_error(
    error: float, *, units: int, apart: int, level: float = 0.05, power: float = 0.8
) -> float | None:
    """Return the smallest difference of any metric that a permutation test finds with the given power.

    With units that differ by unequal amounts, what counts is how many differ and the standard error. The difference of shares that
    McNemar's test would find on as many units is brought to the scale of the metric by the quotient of both standard errors:

        detectable(units, apart / units) error / (sqrt(apart) / units)

    For many units it is (z(1 - level / 2) + z(power)) error, z the normal quantile; for differences of +1 and -1 it is `detectable`.

    Args:
        error: the standard error of the difference if there is none, such as sqrt(sum of the units' squared differences) / n.
        units: the number of units.
        apart: the number of those on which the systems differ, at least one.
        level: the level of the two-sided test.
        power: the chance to find the difference.

    Returns:
        The difference; None if the units are too few to find any.

    Examples:
        >>> round(detectable_by_error(0.01, units=100_000, apart=50_000), 4)
        0.0281
        >>> detectable_by_error(0.01, units=5, apart=2) is None
        True
    """
    found = detectable(units, apart / units, level=level, power=power)
    return None if found is None else found * error * units / math.sqrt(apart)
