"""Repetition and diversity of open-ended text."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from contralto.eval import stats
from contralto.eval.metrics.base import Metric, is_counts, stack
from contralto.eval.stats.counts import Array

__all__ = ["METRICS", "diversity", "ngram_counts", "repetition"]

NgramCounts = tuple[int, int]
"""The number of distinct n-grams, and the number of n-grams."""
LENGTHS = (2, 3, 4)
"""The n of the n-grams that `diversity` counts."""


def ngram_counts(text: str, *, n: int) -> NgramCounts:
    """Count the distinct n-grams and all n-grams of a text; its words are separated by white space.

    The code that the literature uses (SimCTG, `simctg/evaluation.py`) leaves out the last n-gram of every text; this function
    does not.

    Args:
        text: The text.
        n: The number of words in an n-gram.

    Examples:
        >>> ngram_counts("a b a b a", n=2)
        (2, 4)
    """
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)), len(grams)


def repetition(counts: Sequence[NgramCounts]) -> float:
    """Return rep-n, the share of n-grams that occurred before in their own text.

        rep-n = 1 - sum_x |unique n-grams of x| / sum_x |n-grams of x|

    Welleck et al. 2020 (arXiv 1908.04319), Su et al. 2022 (arXiv 2202.06417). The sums run over texts, so that only
    repetitions within a text count, and long texts weigh more. Papers print 100 times this value. It is 0 if no text has an
    n-gram.

    Args:
        counts: The counts of every text, from `ngram_counts`.

    Examples:
        >>> repetition([ngram_counts("a b a b a", n=2)])
        0.5
    """
    return float(_repetition(stack(list(counts)).sum(0)))


def diversity(counts: Sequence[Sequence[NgramCounts]]) -> float:
    """Return the diversity of texts over three n-gram lengths at once (Su et al. 2022, arXiv 2202.06417).

        diversity = (1 - rep-2) (1 - rep-3) (1 - rep-4)

    Args:
        counts: Three counts of every text, from `ngram_counts` with n = 2, 3 and 4.

    Examples:
        >>> round(diversity([[ngram_counts("a b c a b c", n=n) for n in (2, 3, 4)]]), 6)
        0.45
    """
    return float(_diversity(stack(list(counts)).sum(0)))


def _repetition(counts: Array) -> Array:
    """Return rep-n of summed counts `(..., 2)`."""
    return 1 - stats.ratio(counts[..., 0], counts[..., 1], empty=1.0)


def _diversity(counts: Array) -> Array:
    """Return the product of 1 - rep-n of summed counts `(..., 2 * lengths)`."""
    shares = [1 - _repetition(counts[..., i : i + 2]) for i in range(0, counts.shape[-1], 2)]
    return np.asarray(math.prod(shares[1:], start=shares[0]))


def _is_diversity(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == len(LENGTHS) and all(is_counts(each, 2) for each in value)


METRICS = (
    *(
        Metric(
            name=f"rep_{n}",
            logged_as=f"rep_{n}",
            description=f"share of {n}-grams that occurred before in their own text",
            accepts=lambda value: is_counts(value, 2),
            table=stack,
            value=_repetition,
            numerators=None,
            higher_is_better=False,
            document=None,
        )
        for n in LENGTHS
    ),
    Metric(
        name="diversity",
        logged_as="diversity",
        description="product of 1 - rep-n for n = 2, 3, 4",
        accepts=_is_diversity,
        table=stack,
        value=_diversity,
        numerators=None,
        higher_is_better=True,
        document=lambda answer, target: [ngram_counts(answer, n=n) for n in LENGTHS],
    ),
)
"""lm-eval keeps the counts of each text."""
