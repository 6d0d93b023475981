"""The registry of metrics; `docs/extending/metric.md` is followed by `tests/project/test_extending.py`."""

import inspect
from dataclasses import fields

import pytest

from contralto.eval import stats
from contralto.eval.metrics import METRICS, Metric, measure, register
from contralto.eval.metrics.base import is_counts, stack


@pytest.mark.parametrize("missing", [field.name for field in fields(Metric)])
def test_every_field_of_a_declaration_is_required(missing):
    complete = {field.name: getattr(METRICS["diversity"], field.name) for field in fields(Metric)}
    with pytest.raises(TypeError, match=missing):
        Metric(**{name: value for name, value in complete.items() if name != missing})


def test_a_metric_is_looked_up_by_the_form_of_its_values():
    captions, answers = [(3, 2, 1, 2), (1, 0, 1, 2)], [(True, True), (True, None), (False, True)]
    table, metric, *_ = measure("recall", captions)
    assert float(metric(table.sum(0))) == 2 / 4
    table, metric, *_ = measure("recall", answers)
    assert float(metric(table.sum(0))) == 1 / 2
    table, metric, _, numerators = measure("yes_ratio", answers)
    assert float(table[:, numerators].sum() / len(answers)) == float(metric(table.sum(0))) == 2 / 3


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="already a metric 'diversity'"):
        register(
            Metric(
                **{field.name: getattr(METRICS["rep_2"], field.name) for field in fields(Metric)}
                | {"name": "diversity"}
            )
        )
    with pytest.raises(ValueError, match=r"must be a .*Metric, not a function"):
        register(lambda: None, name="anything")
    assert "anything" not in METRICS


def test_counts_are_flat_numbers():
    assert is_counts([1, 2.5], 2)
    assert not any(is_counts(value, 2) for value in ([True, False], [1], 1, "ab", [[1, 2], [3, 4]]))
    assert stack([[[1, 2], [3, 4]]]).tolist() == [[1, 2, 3, 4]]
    assert float(stats.ratio(stack([[0.0]])[0, 0], stack([[0.0]])[0, 0], empty=1.0)) == 1
    assert list(inspect.signature(Metric).parameters) == [field.name for field in fields(Metric)]
