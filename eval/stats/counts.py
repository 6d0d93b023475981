"""Per-document counts and the metrics that are functions of their sums.

A table has one row per document. Its rows can be summed over documents, seeds, clusters and bootstrap draws, and a metric is
computed from the summed row, so that ratios such as F1 are resampled correctly.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Array",
    "CountMetric",
    "accuracy",
    "by_cluster",
    "f1",
    "mean",
    "precision",
    "ratio",
    "recall",
    "score_table",
    "yes_no_table",
    "yes_ratio",
]

Array = NDArray[np.float64]
CountMetric = Callable[[Array], Array]
"""A function from summed counts `(..., C)` to the metric `(...)`."""


def yes_no_table(labels: ArrayLike, answers: Sequence[bool | None]) -> Array:
    """Count yes/no answers: one row per question, to be summed over questions and given to a metric.

    Args:
        labels: `(n,)`, whether the right answer is yes.
        answers: `n` values, whether the answer was yes; None for an answer that is neither, which counts as wrong and not as yes.

    Returns:
        `(n, 5)`, float64: right yes, wrong yes, right no, questions whose right answer is yes, questions.

    Raises:
        ValueError: The numbers of labels and answers differ.

    Examples:
        >>> table = yes_no_table([True, True, False, False], [True, None, True, False])
        >>> [float(each(table.sum(0))) for each in (accuracy, precision, recall, f1, yes_ratio)]
        [0.5, 0.5, 0.5, 0.5, 0.5]
    """
    truth = np.asarray(labels, dtype=bool)
    if truth.size != len(answers):
        raise ValueError(f"yes_no_table needs an answer per label, not {len(answers)} for {truth.size}")
    yes = np.array([answer is not None and bool(answer) for answer in answers], dtype=bool)
    no = np.array([answer is not None and not answer for answer in answers], dtype=bool)
    columns = (yes & truth, yes & ~truth, no & ~truth, truth, np.ones_like(truth))
    return np.stack(columns, axis=-1).astype(np.float64)


def score_table(values: ArrayLike) -> Array:
    """Return scores as counts whose `mean` is their average.

    Args:
        values: `(n,)`, one score per document.

    Returns:
        `(n, 2)`, float64: the score, and 1.
    """
    x = np.asarray(values, dtype=np.float64)
    return np.stack((x, np.ones_like(x)), axis=-1)


def mean(counts: Array) -> Array:
    """Return the mean score.

    Args:
        counts: `(..., 2)`, sums of rows of a `score_table`.

    Returns:
        `(...)`, the sum of scores divided by the number of documents.
    """
    return ratio(counts[..., 0], counts[..., 1])


def accuracy(counts: Array) -> Array:
    """Return (right yes + right no) / questions.

    Args:
        counts: `(..., 5)`, sums of rows of a `yes_no_table`.

    Returns:
        `(...)`, a share in [0, 1].
    """
    return ratio(counts[..., 0] + counts[..., 2], counts[..., 4])


def precision(counts: Array) -> Array:
    """Return right yes / all yes; 0 where nothing is answered yes.

    Args:
        counts: `(..., 5)`, sums of rows of a `yes_no_table`.

    Returns:
        `(...)`, a share in [0, 1].
    """
    return ratio(counts[..., 0], counts[..., 0] + counts[..., 1])


def recall(counts: Array) -> Array:
    """Return right yes / questions whose right answer is yes; 0 where there are none.

    Args:
        counts: `(..., 5)`, sums of rows of a `yes_no_table`.

    Returns:
        `(...)`, a share in [0, 1].
    """
    return ratio(counts[..., 0], counts[..., 3])


def f1(counts: Array) -> Array:
    """Return the harmonic mean of precision and recall: 2 right yes / (all yes + questions whose right answer is yes).

    Args:
        counts: `(..., 5)`, sums of rows of a `yes_no_table`.

    Returns:
        `(...)`, a share in [0, 1]; 0 where the denominator is 0.
    """
    return ratio(2 * counts[..., 0], counts[..., 0] + counts[..., 1] + counts[..., 3])


def yes_ratio(counts: Array) -> Array:
    """Return all yes / questions: the share of yes among the answers, not among the labels.

    Args:
        counts: `(..., 5)`, sums of rows of a `yes_no_table`.

    Returns:
        `(...)`, a share in [0, 1].
    """
    return ratio(counts[..., 0] + counts[..., 1], counts[..., 4])


def ratio(numerator: Array, denominator: Array, *, empty: float = 0.0) -> Array:
    """Return `numerator / denominator`, and `empty` where the denominator is 0.

    Args:
        numerator: `(...)`.
        denominator: `(...)`.
        empty: The value of 0 / 0.

    Returns:
        `(...)`, float64.
    """
    return np.divide(numerator, denominator, out=np.full_like(numerator, empty), where=denominator != 0)


def by_cluster(table: Array, clusters: ArrayLike | None) -> Array:
    """Sum the rows of each cluster.

    Args:
        table: `(n, C)`, the counts of each document.
        clusters: `(n,)`, the cluster of each document, any labels; None if every document is its own cluster.

    Returns:
        `(K, C)`, one row per cluster.

    Raises:
        ValueError: There are no documents, or not exactly one cluster per document.
    """
    if not len(table):
        raise ValueError("there are no items to compare")
    if clusters is None:
        return table
    labels = np.asarray(clusters)
    if labels.shape != (len(table),):
        raise ValueError(f"clusters must name one cluster per item, not {labels.shape} for {len(table)}")
    names, index = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(names), table.shape[1]))
    np.add.at(sums, index, table)
    return sums
