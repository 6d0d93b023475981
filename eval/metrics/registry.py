"""The registry of metrics, and the counts of logged values for paired comparisons."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from contralto.common.registry import Registry
from contralto.eval import stats
from contralto.eval.metrics import amber, chair, openended, perplexity, pope
from contralto.eval.metrics.base import Metric
from contralto.eval.stats.counts import Array, CountMetric

__all__ = ["METRICS", "MetricCounts", "measure", "register", "register_in_lm_eval", "unregister"]


def _check(metric: Any) -> None:
    if not isinstance(metric, Metric):
        raise ValueError(f"a metric must be a contralto.eval.metrics.Metric, not a {type(metric).__name__}")  # noqa: TRY004


METRICS: Registry[Metric] = Registry("metric", group="contralto.metrics", check=_check)
"""All metrics by name; other packages add to them by `register` or by entry points of the group `contralto.metrics`."""
register, unregister = METRICS.register, METRICS.unregister

for _metric in (
    *pope.METRICS,
    *chair.METRICS,
    *chair.CUT_METRICS,
    *amber.METRICS,
    *openended.METRICS,
    *perplexity.METRICS,
):
    register(_metric)


class MetricCounts(NamedTuple):
    """A metric of some answers: the counts of each document, and the function of their sum."""

    table: Array
    """`(n, C)`."""
    metric: CountMetric
    is_binary: bool
    """True if the metric is a share of right answers."""
    numerators: tuple[int, ...] | None
    """See `Metric.numerators`."""


def measure(name: str, values: Sequence[Any]) -> MetricCounts:
    """Convert the values that lm-eval logs for each document under a metric's name to counts.

        a number                       its mean
        any other form                 the registered metric of that name which accepts it

    Args:
        name: The name of the metric in lm-eval's samples.
        values: One value per document.

    Returns:
        The counts, which can be summed and resampled, and the function from their sum to the metric.

    Raises:
        ValueError: No registered metric accepts the values.

    Examples:
        >>> table, metric, is_binary, _ = measure("acc", [1.0, 0.0, 1.0, 1.0])
        >>> float(metric(table.sum(0))), is_binary
        (0.75, True)
    """
    first = values[0]
    if isinstance(first, bool | int | float):
        is_binary = all(value in (0, 1) for value in values)
        return MetricCounts(stats.score_table(values), stats.mean, is_binary, (0,))
    for metric in map(METRICS.get, METRICS.names()):
        if metric.logged_as == name and metric.accepts(first):
            return MetricCounts(metric.table(values), metric.value, False, metric.numerators)
    raise ValueError(
        f"the metric {name} is kept as {first!r} per document, and compare cannot pair that: name another, or register it "
        "with contralto.eval.metrics.register"
    )


def register_in_lm_eval() -> None:
    """Register all metrics in lm-eval, so that tasks can name them; lm-eval's own metrics are not replaced.

    A task then needs `metric: NAME` and `aggregation: NAME`, or `metric: NAME` alone if the declaration has `document`.
    Read from lm_eval 0.4.13: `register_metric`, `register_aggregation`, the call of a metric with `references` and
    `predictions` in `ConfigurableTask.process_results`.
    """
    import lm_eval.api.metrics  # noqa: F401  (fills lm-eval's registries, which it otherwise does only if they are empty)
    from lm_eval.api import registry

    for name, metric in METRICS.items():
        if name not in registry.aggregation_registry:
            registry.register_aggregation(name)(metric.aggregate)
            if metric.document is not None and name not in registry.metric_registry:
                direction = {} if metric.higher_is_better is None else {"higher_is_better": metric.higher_is_better}
                registry.register_metric(metric=name, aggregation=name, **direction)(_DocumentFunction(metric))


class _DocumentFunction:
    """The per-document function of a metric, called as lm-eval calls its own metrics."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def __call__(self, *, references: Sequence[Any], predictions: Sequence[str]) -> Any:
        """Return the value of one document."""
        assert self.metric.document is not None
        return self.metric.document(predictions[0], references[0])
