"""The declaration of a metric."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from contralto.eval.stats.counts import Array, CountMetric

__all__ = ["Metric", "is_counts", "stack"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric that is a function of summed per-document counts.

    From one declaration lm-eval gets its aggregation (and its per-document function, if `document` is given), and a comparison
    gets intervals and paired tests, which need the counts of every document. Every field is required.

    Attributes:
        name: The name in the registry, and in the `aggregation` entry of a task.
        logged_as: The name under which tasks keep the per-document value, usually `name`.
        description: One line.
        accepts: Returns True if a per-document value has the form that this metric reads. Several metrics may share `logged_as`
            if their forms differ, as the `recall` of answers and of captions.
        table: Converts the values of `n` documents to counts `(n, C)`.
        value: Converts summed counts `(..., C)` to the metric `(...)`.
        numerators: The columns whose sum, divided by the number of documents, is the metric; None if it is not a mean. Paired
            tests of means are exact for many more documents.
        higher_is_better: None if neither direction is better.
        document: Computes the per-document value from the answer and the target; None if only the task can compute it.

    Examples:
        >>> from contralto.eval import stats
        >>> from contralto.eval.metrics import register, unregister
        >>> shouting = Metric(
        ...     name="upper_case",
        ...     logged_as="upper_case",
        ...     description="share of upper-case letters",
        ...     accepts=lambda value: is_counts(value, 2),
        ...     table=stack,
        ...     value=lambda counts: stats.ratio(counts[..., 0], counts[..., 1]),
        ...     numerators=None,
        ...     higher_is_better=False,
        ...     document=lambda answer, target: [sum(map(str.isupper, answer)), sum(map(str.isalpha, answer))],
        ... )
        >>> register(shouting) is shouting
        True
        >>> shouting.aggregate([shouting.document("YES I do", ""), shouting.document("no", "")])
        0.5
        >>> unregister("upper_case")
    """

    name: str
    logged_as: str
    description: str
    accepts: Callable[[Any], bool]
    table: Callable[[Sequence[Any]], Array]
    value: CountMetric
    numerators: tuple[int, ...] | None
    higher_is_better: bool | None
    document: Callable[[str, Any], Any] | None

    def aggregate(self, values: Sequence[Any]) -> float:
        """Return the metric over documents; lm-eval's aggregation.

        Args:
            values: The per-document values, at least one.
        """
        return float(self.value(self.table(values).sum(0)))


def is_counts(value: Any, length: int) -> bool:
    """Return True if a per-document value is a sequence of `length` numbers.

    Args:
        value: The value, as a task returns it or as it is read from a file.
        length: The number of counts.
    """
    is_sequence = isinstance(value, list | tuple) and len(value) == length
    return is_sequence and all(isinstance(each, Real) and not isinstance(each, bool) for each in value)


def stack(values: Sequence[Any]) -> Array:
    """Return per-document counts as a table; nested counts are flattened.

    Args:
        values: `n` values of `C` counts each.

    Returns:
        `(n, C)`, float64.
    """
    return np.array(values, dtype=np.float64).reshape(len(values), -1)
