"""Proportions of right answers: Wilson intervals, McNemar's exact test and Holm's adjustment."""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom

from contralto.eval.stats.counts import Array, by_cluster

__all__ = ["McNemar", "Proportion", "holm", "mcnemar_exact", "proportion"]


class Proportion(NamedTuple):
    """The share of n documents with its confidence interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class McNemar(NamedTuple):
    """The result of McNemar's test: the documents on which just one of two systems is right."""

    won: int
    """Items that only the second system gets right."""
    lost: int
    """Items that only the first system gets right."""
    p: float


def proportion(hits: ArrayLike, *, clusters: ArrayLike | None = None, confidence: float = 0.95) -> Proportion:
    """Return the share of hits with Wilson's score interval (Wilson 1927), which is valid near 0 and 1 and for small n.

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    z the normal quantile

    With clusters, n is replaced by the effective n / deff (Korn & Graubard 1998). The design effect deff is the variance of
    the share estimated from the clusters, divided by the p (1 - p) / n of independent documents:

        deff = K / (K - 1) sum_k (sum_{i in k} (x_i - p))^2 / (n p (1 - p))    for K clusters, at least 1

    A share of 0 or 1 has no variance to estimate; then the effective n is the number of clusters.

    Args:
        hits: `(n,)`, one truth value per document, at least one.
        clusters: `(n,)`, the cluster of each document, any labels; None if all are independent.
        confidence: The level of the two-sided interval, in (0, 1).

    Returns:
        The share, its interval and n.

    Raises:
        ValueError: There are no documents, or not exactly one cluster per document.

    Examples:
        >>> print(proportion([True] * 8 + [False] * 2))
        0.800 [0.490, 0.943]
        >>> print(proportion([True] * 8 + [False] * 2, clusters=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]))
        0.800 [0.337, 0.969]
    """
    x = np.asarray(hits, dtype=np.float64)
    n, z = x.size, NormalDist().inv_cdf((1 + confidence) / 2)
    if not n:
        raise ValueError("a proportion needs at least one item, not none")
    p = float(x.mean())
    size = n if clusters is None else _effective_n(x, clusters)
    centre, scale = p + z * z / (2 * size), 1 + z * z / size
    half = z * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size))
    low, high = (centre - half) / scale, (centre + half) / scale
    return Proportion(p, max(0.0, min(p, low)), min(1.0, max(p, high)), n)  # rounding must not push p out


def _effective_n(x: Array, clusters: ArrayLike) -> float:
    p, sums = x.mean(), by_cluster((x - x.mean())[:, None], clusters)
    count = len(sums)
    if p in (0, 1) or count == 1:
        return count
    deff = count / (count - 1) * float((sums**2).sum() / (x.size * p * (1 - p)))
    return x.size / max(1.0, deff)


def mcnemar_exact(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Run the exact two-sided McNemar test of two systems on the same documents (McNemar 1947, exact form).

    Of the d documents on which just one system is right, the second wins w. Under the null hypothesis w is binomial(d, 1/2):

        p = min(1, 2 * sum_{k <= min(w, d - w)} C(d, k) / 2^d)

    Args:
        first: `(n,)`, whether the first system is right on each document.
        second: `(n,)`, whether the second system is right, in the same order.

    Returns:
        The documents won and lost by the second system, and p.

    Raises:
        ValueError: The numbers of documents differ.

    Examples:
        >>> mcnemar_exact([True, False, False, False, False, False], [False, True, True, True, True, True])
        McNemar(won=5, lost=1, p=0.21875)
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"a paired test needs the same items for both systems, not {a.size} and {b.size}")
    won, lost = int((b & ~a).sum()), int((a & ~b).sum())
    return McNemar(won, lost, min(1.0, 2 * float(binom.cdf(min(won, lost), won + lost, 0.5))))


def holm(p_values: ArrayLike) -> Array:
    """Adjust p-values of several tests by Holm's step-down method (Holm 1979).

        p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))    p_(1) <= ... <= p_(m)

    The family-wise error rate of the m tests stays at the level, whatever their dependence. Compare the adjusted values with the
    level directly.

    Args:
        p_values: `(m,)`, in any order.

    Returns:
        `(m,)`, the adjusted values in the same order.

    Examples:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, (p.size - np.arange(p.size)) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted
