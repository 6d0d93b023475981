"""Differences of two rows: intervals, exact tests, and the smallest detectable difference."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from contralto.eval import stats
from contralto.eval.comparison.answers import Answers, TaskFrame
from contralto.eval.comparison.columns import Column
from contralto.eval.comparison.rows import ComparisonRow
from contralto.eval.metrics import MetricCounts
from contralto.eval.stats.counts import Array

__all__ = [
    "ModelView",
    "adjust",
    "auroc_of",
    "bucket_of",
    "interval_of",
    "resample",
    "rival_of",
    "score_of",
    "smallest_difference",
    "test_against",
]

YES_NO_METRICS = ("f1", "yes_ratio")
"""The metrics of yes/no tasks whose differences are tested besides the main metric."""


class ModelView(NamedTuple):
    """The answers of one model, and bootstrap draws of their counts."""

    frame: TaskFrame
    column: Column
    answers: Mapping[str, Answers]
    draws: stats.Bootstrap
    """By (row, metric), and by (row, "in", bucket) for the main metric."""


def resample(frame: TaskFrame, column: Column, answers: Mapping[str, Answers]) -> ModelView:
    """Draw the counts of all rows of a model together.

    Args:
        frame: The task.
        column: The runs of the model.
        answers: The answers of its rows.
    """
    tables: dict[Any, Array] = {
        (row, name): measurement.table for row, own in answers.items() for name, measurement in own.measures.items()
    }
    for bucket in set(frame.buckets):
        inside = np.array([each == bucket for each in frame.buckets])[:, None]
        tables |= {(row, "in", bucket): own.measures[frame.metric].table * inside for row, own in answers.items()}
    draws = stats.Bootstrap(tables, clusters=frame.clusters, resamples=frame.resamples)
    return ModelView(frame, column, answers, draws)


def score_of(view: ModelView, row: str) -> dict[str, float]:
    """Return the main metric of a row with its interval.

    Args:
        view: The model.
        row: The name of the row.

    Returns:
        `value`, `low` and `high`: Wilson's interval for shares of right answers, else the bootstrap's.
    """
    frame, own = view.frame, view.answers[row]
    main, count = own.measures[frame.metric], len(own.seeds)
    if not main.is_binary:
        return interval_of(view, row, frame.metric)
    hits = np.concatenate([seed[frame.metric].table[:, 0] for seed in own.seeds])
    documents = frame.clusters if frame.clusters is not None else range(len(main.table)) if count > 1 else None
    share = stats.proportion(hits, clusters=None if documents is None else [*documents] * count)
    return {"value": share.value, "low": share.low, "high": share.high}


def interval_of(view: ModelView, row: str, name: str) -> dict[str, float]:
    """Return a metric of a row with its bootstrap interval.

    Args:
        view: The model.
        row: The name of the row.
        name: The name of the metric.

    Returns:
        `value`, `low` and `high`.
    """
    value, low, high = view.draws.interval((row, name), view.answers[row].measures[name].metric)
    return {"value": value, "low": low, "high": high}


def test_against(view: ModelView, row: str, control: str) -> dict[str, Any]:
    """Test a row against one of its controls.

    Args:
        view: The model.
        row: The name of the row.
        control: The name of the control.

    Returns:
        `against`; `value`, `low`, `high` and `p` of the difference of the main metric; `power` and `detectable`; for right and wrong answers
        `won`, `lost`, `seeds` and `per_seed`; for yes/no tasks the same differences of `f1` and `yes_ratio`.
    """
    name = view.frame.metric
    test: dict[str, Any] = {"against": control} | _difference(view, control, row, name)
    if _is_binary(view, row, control):
        by_seed = [
            stats.mcnemar_exact(first[name].table[:, 0] > 0, second[name].table[:, 0] > 0)
            for first, second in _seed_pairs(view.answers[control], view.answers[row])
        ]
        test |= {"won": sum(t.won for t in by_seed), "lost": sum(t.lost for t in by_seed), "seeds": len(by_seed)}
        test["per_seed"] = [t._asdict() for t in by_seed]
    test["power"] = _power(view, row, control, test)
    test["detectable"] = smallest_difference(test["power"])
    if view.frame.task.yes_no:
        test |= {name: _difference(view, control, row, name) for name in YES_NO_METRICS}
    return test


def _is_binary(view: ModelView, *rows: str) -> bool:
    return all(view.answers[row].measures[view.frame.metric].is_binary for row in rows)


def _power(view: ModelView, row: str, control: str, test: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the inputs of `smallest_difference`; None if the power of the test is unknown."""
    clusters, name = view.frame.clusters, view.frame.metric
    first, second = _same_weight(view.answers[control], view.answers[row], name)
    main = view.answers[row].measures[name]
    units = len(first) if clusters is None else len(set(clusters))
    if not test["units"]:  # no unit differs: the power of a test of whole answers is known, of other metrics it is not
        return {"units": units, "apart": 0, "error": 0.0} if _is_binary(view, row, control) else None
    if main.numerators is not None:
        sums = stats.by_cluster((second - first)[:, main.numerators].sum(-1, keepdims=True), clusters)
        error = math.sqrt(float((sums**2).sum())) / float(first[:, -1].sum())
    else:
        error = view.draws.error((control, name), (row, name), main.metric)
    return {"units": units, "apart": test["units"], "error": error}


def smallest_difference(power: Mapping[str, Any] | None, *, level: float = 0.05) -> float | None:
    """Return the smallest difference that a test finds with power 0.8.

    Args:
        power: The value `power` of a test: `units`, `apart` (the units that differ) and `error`, the standard error under the null.
        level: The level of the test.

    Returns:
        The difference; None if the test finds none, or its power is unknown.

    Examples:
        >>> round(smallest_difference({"units": 1000, "apart": 100, "error": 0.01}), 3)
        0.029
    """
    if power is None:
        return None
    if not power["apart"]:
        return stats.detectable(power["units"], 0.0, level=level)
    return stats.detectable_by_error(power["error"], units=power["units"], apart=power["apart"], level=level)


def rival_of(view: ModelView, row: ComparisonRow, rows: Iterable[ComparisonRow]) -> dict[str, Any] | None:
    """Test a method against the best of the rows without a contrast that are not among its controls.

    Args:
        view: The model.
        row: The method.
        rows: The rows of the comparison.

    Returns:
        The test of the main metric, see `test_against`; None if there is no such row.
    """
    sign = 1 if view.frame.task.higher_is_better else -1
    others = [
        each.name
        for each in rows
        if each.role != "method" and not each.same_as and each.name in view.answers and each.name not in row.against
    ]
    if row.role != "method" or not row.against or not others:
        return None
    best = max(others, key=lambda name: sign * score_of(view, name)["value"])
    test = test_against(view, row.name, best)
    return {name: value for name, value in test.items() if name not in YES_NO_METRICS}


def _seed_pairs(control: Answers, own: Answers) -> list[tuple[dict[str, MetricCounts], dict[str, MetricCounts]]]:
    """Pair each seed with the control's same seed; a row with one run pairs it with every seed of the other."""
    if len(control.seeds) == 1:
        return [(control.seeds[0], seed) for seed in own.seeds]
    if len(own.seeds) == 1:
        return [(seed, own.seeds[0]) for seed in control.seeds]
    return list(zip(control.seeds, own.seeds, strict=True))


def _difference(view: ModelView, first: str, second: str, name: str) -> dict[str, Any]:
    """Return the difference of a metric, second row less first: its interval, and p of the permutation test."""
    _, metric, _, numerators = view.answers[second].measures[name]
    difference = view.draws.difference((first, name), (second, name), metric)._asdict()
    one, two = _same_weight(view.answers[first], view.answers[second], name)
    settings: dict[str, Any] = {"clusters": view.frame.clusters, "resamples": view.frame.resamples}
    if numerators is not None:
        test = stats.sign_flip((two - one)[:, numerators].sum(-1), **settings)
    else:
        test = stats.swap(one, two, metric, **settings)
    return difference | {"test": "swap" if numerators is None else "sign flip", **test._asdict()}


def _same_weight(first: Answers, second: Answers, name: str) -> tuple[Array, Array]:
    """Scale the counts of two rows to a common number of seeds."""
    ones, twos = len(first.seeds), len(second.seeds)
    common = math.gcd(ones, twos)
    return first.measures[name].table * (twos // common), second.measures[name].table * (ones // common)


def bucket_of(view: ModelView, row: ComparisonRow, bucket: str) -> dict[str, float]:
    """Return the main metric of a row in a bucket, and its gain over the row's first control.

    Args:
        view: The model.
        row: The row.
        bucket: The bucket.

    Returns:
        `value` and `items`; if the row has a control, `gain` with `low` and `high`.
    """
    main = view.answers[row.name].measures[view.frame.metric]
    inside = np.array([each == bucket for each in view.frame.buckets])
    result = {"value": float(main.metric(main.table[inside].sum(0))), "items": int(inside.sum())}
    if row.against:
        pair = view.draws.difference((row.against[0], "in", bucket), (row.name, "in", bucket), main.metric)
        result |= {"gain": pair.value, "low": pair.low, "high": pair.high}
    return result


def auroc_of(view: ModelView, row: ComparisonRow) -> dict[str, Any]:
    """Return the AUROC of a row's margins to yes, and its difference from the baseline's.

    Args:
        view: The model.
        row: The row.

    Returns:
        `value`, and `difference` if the baseline has margins; empty if all labels are equal.
    """
    margins = view.column.margins
    labels = [label for label, _ in view.answers[row.name].pairs[0]]
    if len(set(labels)) < 2:
        return {}
    result: dict[str, Any] = {"value": stats.auroc(margins[row.name], labels)}
    baseline = row.against[0] if row.against else None
    if baseline in margins:
        difference = stats.auroc_difference(margins[baseline], margins[row.name], labels, clusters=view.frame.clusters)
        result["difference"] = difference._asdict()
    return result


def adjust(tasks: Sequence[dict[str, Any]]) -> None:
    """Add Holm's p to every test, adjusted over the tasks of a kind and the models with the same row and control.

    Args:
        tasks: Summaries of tasks; changed in place.
    """
    families: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for task in tasks:
        for row in task["rows"]:
            for cell in row["cells"].values():
                for test in cell["tests"]:
                    key = (task["kind"], row["name"], test["against"])
                    families.setdefault((*key, "score"), []).append(test)
                    for name in YES_NO_METRICS:
                        if name in test:
                            families.setdefault((*key, name), []).append(test[name])
                if cell.get("rival"):
                    families.setdefault((task["kind"], row["name"], "rival"), []).append(cell["rival"])
                if "difference" in cell.get("auroc", {}):
                    families.setdefault((task["kind"], row["name"], "auroc"), []).append(cell["auroc"]["difference"])
    for family in families.values():
        for test, p in zip(family, stats.holm([test["p"] for test in family]), strict=True):
            test["holm"] = float(p)
