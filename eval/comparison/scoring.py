"""Notice that the filters, metrics or functions of a task have changed since its answers were kept.

Read from lm_eval 0.4.13: the fields of a task's configuration, and how it is written into results.
"""

import json
from collections.abc import Mapping
from typing import Any

from lm_eval.utils import handle_non_serializable

from contralto.common.hashing import source_digest
from contralto.eval.comparison.samples import value_digest
from contralto.eval.metrics import METRICS

__all__ = ["is_scored_alike", "scoring_digest"]

FIELDS = ("filter_list", "metric_list", "process_results")
"""The fields of a task's configuration that determine the metrics of an answer."""


def scoring_digest(task: Any) -> str:
    """Return a hash of all that turns the answers to a task into metrics, functions by their source.

    Args:
        task: lm-eval's task.
    """
    return value_digest([_described(getattr(task.config, name, None)) for name in FIELDS])


def _described(value: Any) -> Any:
    """Return a value of a configuration as JSON: functions, and metrics that are registered, by a hash of their source."""
    if isinstance(value, Mapping):
        return {str(name): _described(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_described(each) for each in value]
    if isinstance(value, str) and value in METRICS.names():
        metric = METRICS.get(value)
        return [value, source_digest(metric.document or metric.table)]
    return source_digest(value) if callable(value) else value


def is_scored_alike(task: Any, logged: Mapping[str, Any] | None) -> bool:
    """Return True if lm-eval scored logged samples with the filters, metrics and functions that a task has now.

    Only the source of the functions themselves is compared, since results hold nothing else.

    Args:
        task: lm-eval's task.
        logged: The configuration of the task in lm-eval's results; None if there is none.
    """
    if logged is None:
        return True
    own = json.loads(json.dumps(task.dump_config(), default=handle_non_serializable))
    return all(own.get(name) == logged.get(name) for name in FIELDS)
