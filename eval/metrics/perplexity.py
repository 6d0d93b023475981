"""Perplexities of whole texts, as lm-eval defines them, from the log-likelihood and the length of each document."""

import math

import numpy as np

from contralto.eval import stats
from contralto.eval.metrics.base import Metric, is_counts, stack
from contralto.eval.stats.counts import Array

__all__ = ["METRICS", "bits_per_byte", "perplexity"]


def perplexity(counts: Array) -> Array:
    """Return exp(-log-likelihood / units).

    Args:
        counts: `(..., 2)`, summed log-likelihoods in nats, and numbers of words or bytes.

    Returns:
        `(...)`, at least 1.
    """
    return np.exp(-stats.ratio(counts[..., 0], counts[..., 1]))


def bits_per_byte(counts: Array) -> Array:
    """Return -log-likelihood / (bytes log 2).

    Args:
        counts: `(..., 2)`, summed log-likelihoods in nats, and numbers of bytes.

    Returns:
        `(...)`, in bits.
    """
    return -stats.ratio(counts[..., 0], counts[..., 1]) / math.log(2)


METRICS = tuple(
    Metric(
        name=name,
        logged_as=name,
        description=description,
        accepts=lambda value: is_counts(value, 2),
        table=stack,
        value=value,
        numerators=None,
        higher_is_better=False,
        document=None,
    )
    for name, description, value in (
        ("word_perplexity", "perplexity per word", perplexity),
        ("byte_perplexity", "perplexity per byte", perplexity),
        ("bits_per_byte", "log-likelihood per byte, in bits", bits_per_byte),
    )
)
"""lm-eval keeps the log-likelihood and the length of each document."""
