"""The win rate that two systems would have with answers of equal length."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["LengthControlled", "length_controlled"]

Array = NDArray[np.float64]
RIDGE = 0.01
"""The weight of the squared coefficients, which keeps them finite where one system wins everything."""
CHUNK = 2_000_000
"""The number of weights of questions to hold in memory at a time."""
STEPS = 50
"""The largest number of Newton steps; the objective is strictly convex."""


class LengthControlled(NamedTuple):
    """A length-controlled win rate with its percentile interval."""

    value: float
    low: float
    high: float
    coefficient: float
    """phi: how much the judge favours longer answers; 0 for not at all."""


def length_controlled(
    shares: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    *,
    resamples: int = 2_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LengthControlled:
    """Return the win rate of the first system, controlled for length (Dubois et al. 2024, arXiv 2404.04475).

        P(first wins) = sigmoid(theta + phi tanh((len_first - len_second) / s))    s: standard deviation of the differences

        win rate = sigmoid(theta), that is at no difference of length

    theta and phi maximise the likelihood of the shares, less 0.01 / 2 (theta^2 + phi^2). AlpacaEval 2.0 adds a term for the
    difficulty of each instruction and a penalty towards two gamed baselines, both from fits of its leaderboard, and chooses the
    strength of an L1 penalty by cross-validation; these are left out. The interval is that of resampled questions, with s fixed.

    Args:
        shares: `(n,)`, in [0, 1]: the share of verdicts for the first system on each question.
        first: `(n,)`, the length of its answers, in characters as in AlpacaEval.
        second: `(n,)`, the length of the other system's answers.
        resamples: the number of bootstrap draws.
        confidence: the level of the two-sided interval, in (0, 1).
        seed: the seed of the draws.

    Raises:
        ValueError: there are no questions, or the numbers of values differ.

    Examples:
        >>> longer_wins = length_controlled([1, 1, 0, 0] * 20, [90, 80, 20, 10] * 20, [50] * 80)
        >>> f"{longer_wins.value:.2f}, phi {longer_wins.coefficient > 1}"
        '0.50, phi True'
    """
    y, one, other = (np.asarray(values, dtype=np.float64) for values in (shares, first, second))
    if not y.size or not y.shape == one.shape == other.shape:
        raise ValueError(
            f"a length-controlled win rate needs lengths of both answers to every question, not {one.size} and {other.size} for {y.size}"
        )
    features = np.stack((np.ones_like(y), np.tanh(_scaled(one - other))), axis=1)
    parts = [_fit(features, y, np.ones((1, y.size)))]
    parts += [_fit(features, y, drawn) for drawn in _draws(y.size, resamples, seed)]
    coefficients = np.concatenate(parts)
    rates = 1 / (1 + np.exp(-coefficients[:, 0]))
    low, high = np.quantile(rates[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return LengthControlled(float(rates[0]), float(low), float(high), float(coefficients[0, 1]))


def _scaled(differences: Array) -> Array:
    """Return differences divided by their standard deviation, as AlpacaEval does: without subtracting the mean."""
    deviation = differences.std(ddof=1) if differences.size > 1 else 0.0
    return differences / deviation if deviation > 0 else np.zeros_like(differences)


def _draws(count: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield how often each question is drawn, `(r, n)` at a time."""
    rng, step = np.random.default_rng(seed), max(1, CHUNK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _fit(features: Array, y: Array, weights: Array) -> Array:
    """Return the coefficients of weighted logistic regressions with soft targets, `(R, 2)`, by Newton's method."""
    coefficients = np.zeros((len(weights), features.shape[1]))
    products = (features[:, :, None] * features[:, None, :]).reshape(len(y), -1)
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-coefficients @ features.T))
        gradient = (weights * (y - p)) @ features - RIDGE * coefficients
        curvature = ((weights * p * (1 - p)) @ products).reshape(len(weights), 2, 2) + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        step *= np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-12))
        coefficients += step
        if np.abs(step).max() < 1e-10:
            break
    return coefficients
