"""The paired bootstrap over documents or clusters of documents."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from contralto.eval.stats.counts import Array, CountMetric, by_cluster

__all__ = ["Bootstrap", "Difference"]

CHUNK = 4_000_000
"""The number of cluster weights to hold in memory at a time."""


class Difference(NamedTuple):
    """The difference of a metric, second system less first, with its confidence interval and two-sided p."""

    value: float
    low: float
    high: float
    p: float


class Bootstrap:
    """Paired bootstrap: resample the counts of several systems on the same documents, whole clusters at a time.

    Every system sees the same draws (Efron & Tibshirani 1993, section 16.4), so that any number of intervals and differences
    cost one round of resampling: the counts of each cluster times how often it was drawn.

    Args:
        tables: `(n, C)` counts of each document in the same order, by any name; see `yes_no_table` and `score_table`.
        clusters: `(n,)`, the cluster of each document; None if every document is its own cluster.
        resamples: The number of draws.
        seed: The seed of the draws. The same seed and number of clusters give the same draws.

    Raises:
        ValueError: There are no documents, tables differ in length, or not exactly one cluster per document is given.

    Examples:
        >>> from contralto.eval.stats.counts import yes_no_table, yes_ratio
        >>> labels = [True, False] * 100
        >>> right, half = (yes_no_table(labels, [True, is_right, False, False] * 50) for is_right in (False, True))
        >>> both = Bootstrap({"right": right, "half": half})
        >>> result = both.difference("right", "half", yes_ratio)
        >>> f"{result.value:.2f}, p {result.p:.4f}"
        '0.25, p 0.0002'
    """

    def __init__(
        self,
        tables: Mapping[Any, ArrayLike],
        *,
        clusters: ArrayLike | None = None,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> None:
        arrays = {name: np.asarray(table, dtype=np.float64) for name, table in tables.items()}
        lengths = {len(table) for table in arrays.values()}
        if len(lengths) > 1:
            raise ValueError(f"a paired bootstrap needs the same items for all systems, not {sorted(lengths)}")
        sums = by_cluster(np.concatenate(list(arrays.values()), axis=1), clusters)
        ends = np.cumsum([table.shape[1] for table in arrays.values()])[:-1]
        self._totals = dict(zip(arrays, np.split(sums.sum(0), ends), strict=True))
        self._drawn = dict(zip(arrays, np.split(_resampled(sums, resamples, seed), ends, axis=1), strict=True))

    def interval(self, name: Any, metric: CountMetric, *, confidence: float = 0.95) -> tuple[float, float, float]:
        """Return a metric of one system with its percentile interval.

        Args:
            name: The name of the table.
            metric: A function from counts `(..., C)` to values `(...)`.
            confidence: The level of the two-sided interval, in (0, 1).

        Returns:
            The value, and the low and the high end of its interval.
        """
        return float(metric(self._totals[name])), *_percentiles(metric(self._drawn[name]), confidence)

    def error(self, first: Any, second: Any, metric: CountMetric) -> float:
        """Return the standard error of the difference of a metric, second system less first.

        Args:
            first: The name of the first system's table.
            second: The name of the second system's table.
            metric: A function from counts `(..., C)` to values `(...)`.
        """
        return float((metric(self._drawn[second]) - metric(self._drawn[first])).std(ddof=1))

    def difference(self, first: Any, second: Any, metric: CountMetric, *, confidence: float = 0.95) -> Difference:
        """Return the difference of a metric, second system less first, with its percentile interval and p.

        p is the smallest level at which the interval excludes 0, with a correction that keeps it above 0:

            p = min(1, 2 (1 + min(#{d* <= 0}, #{d* >= 0})) / (1 + resamples))

        Args:
            first: The name of the first system's table.
            second: The name of the second system's table.
            metric: A function from counts `(..., C)` to values `(...)`.
            confidence: The level of the two-sided interval, in (0, 1).

        Returns:
            The difference, its interval and p.
        """
        differences = metric(self._drawn[second]) - metric(self._drawn[first])
        below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
        p = min(1.0, 2 * (1 + min(below, above)) / (1 + differences.size))
        value = float(metric(self._totals[second]) - metric(self._totals[first]))
        return Difference(value, *_percentiles(differences, confidence), p)


def _resampled(sums: Array, resamples: int, seed: int) -> Array:
    """Return the total counts of each resample, `(R, C)`: how often each cluster was drawn, times its counts."""
    rng, count = np.random.default_rng(seed), len(sums)
    totals = []
    step = max(1, CHUNK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        totals.append(weights.astype(np.float64) @ sums)
    return np.concatenate(totals)


def _percentiles(values: Array, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
