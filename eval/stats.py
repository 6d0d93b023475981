"""Statistics of paired comparisons: exact where they can be, and small enough to check by hand."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

__all__ = ["McNemar", "Proportion", "mcnemar_exact", "proportion"]


class Proportion(NamedTuple):
    """A share of n items with its confidence interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class McNemar(NamedTuple):
    """Two systems on the same items: where they differ, and how likely such a split is by chance."""

    won: int
    """Items that only the second system gets right."""
    lost: int
    """Items that only the first system gets right."""
    p: float


def proportion(hits: Sequence[bool], *, confidence: float = 0.95) -> Proportion:
    """The share of hits with Wilson's score interval (Wilson 1927), which is sound near 0 and 1 and for small n.

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    z the normal quantile

    Args:
        hits: one truth value per item, at least one.
        confidence: of the two-sided interval, in (0, 1).

    Raises:
        ValueError: no items.

    Example:
        >>> print(proportion([True] * 8 + [False] * 2))
        0.800 [0.490, 0.943]
    """
    n = len(hits)
    if not n:
        raise ValueError("a proportion needs at least one item, not none")
    p, z = sum(hits) / n, NormalDist().inv_cdf((1 + confidence) / 2)
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / scale, (centre + half) / scale
    return Proportion(p, max(0.0, min(p, low)), min(1.0, max(p, high)), n)  # rounding must not push p out


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """The exact two-sided McNemar test of two systems on the same items (McNemar 1947, exact form).

    Of the d items on which just one system is right, the second wins w. If neither were better, w would be binomial(d, 1/2):

        p = min(1, 2 * sum_{k <= min(w, d - w)} C(d, k) / 2^d)

    Args:
        first, second: one truth value per item, in the same order.

    Raises:
        ValueError: different numbers of items.

    Example:
        >>> mcnemar_exact([True, False, False, False, False, False], [False, True, True, True, True, True])
        McNemar(won=5, lost=1, p=0.21875)
    """
    won = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return McNemar(won, lost, min(1.0, 2 * tail / 2 ** (won + lost)))
