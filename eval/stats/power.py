"""Smallest detectable differences of paired tests at a given level and power."""

import math

import numpy as np
from scipy.stats import binom

__all__ = ["detectable", "detectable_by_error"]


def detectable(items: int, discordance: float, *, level: float = 0.05, power: float = 0.8) -> float | None:
    """Return the smallest difference of accuracies that McNemar's exact test finds with the given power.

    Of n documents d are answered rightly by just one system, d binomial with the discordance q; of these the better system wins w,
    binomial with the chance (1 + difference / q) / 2. The test is two-sided:

        power(difference) = sum_d P(d) P(p(w, d) <= level)    q = max(discordance, difference)

    Args:
        items: The number of documents.
        discordance: The share of documents that just one system answers rightly, observed or expected.
        level: The level of the test.
        power: The probability of finding the difference.

    Returns:
        The difference; None if the documents are too few to find any.

    Raises:
        ValueError: A share lies outside [0, 1].

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
    """Return the probability that the exact test finds a difference above 0."""
    share = max(discordance, difference)
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
    McNemar's test would find on as many units is scaled to the metric by the quotient of both standard errors:

        detectable(units, apart / units) error / (sqrt(apart) / units)

    For many units it is (z(1 - level / 2) + z(power)) error, z the normal quantile; for differences of +1 and -1 it is `detectable`.

    Args:
        error: The standard error of the difference under the null hypothesis, such as sqrt(sum of the units' squared differences) / n.
        units: The number of units.
        apart: The number of units on which the systems differ, at least one.
        level: The level of the two-sided test.
        power: The probability of finding the difference.

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
