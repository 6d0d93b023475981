"""The comparison of one task as plain data."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from contralto.eval.comparison.answers import TaskFrame, collect, frame_of
from contralto.eval.comparison.columns import Column
from contralto.eval.comparison.disagreements import disagreements
from contralto.eval.comparison.rows import ComparisonRow
from contralto.eval.comparison.runs import Run
from contralto.eval.comparison.significance import (
    ModelView,
    auroc_of,
    bucket_of,
    interval_of,
    resample,
    rival_of,
    score_of,
    test_against,
)
from contralto.eval.comparison.tasks import Task

__all__ = ["summarise"]


def summarise(
    task: Task,
    rows: Sequence[ComparisonRow],
    columns: Sequence[Column],
    *,
    resamples: int = 10_000,
    shown: int = 12,
) -> dict[str, Any]:
    """Return the comparison of one task as plain data, which `report` shows and which is written as JSON.

    Accuracies have Wilson intervals, clustered where documents share an image or a row has several seeds. A row is tested
    against its controls by permutation: the signs of the differences are exchanged, of a document with all its seeds at once, or
    of all documents that share an image. For right and wrong answers of one seed that is McNemar's exact test. Metrics that are
    not means, such as F1, are tested by exchanging the counts themselves. Intervals of differences are the paired bootstrap's.

    Args:
        task: The task.
        rows: The rows of the comparison; rows that only exist as logged samples are added.
        columns: The answers, a column per model.
        resamples: The number of bootstrap draws.
        shown: The number of documents to show of each kind of disagreement.

    Raises:
        ValueError: The samples do not have the metric, or its values cannot be paired.
    """
    named = {row.name: row for row in rows}
    for name in [name for column in columns for name in column.runs]:
        against = tuple(row.name for row in rows[:1])
        named.setdefault(name, ComparisonRow(name=name, role="method", against=against, note="from logged samples"))
    frame = frame_of(task, columns[0], resamples)
    cells: dict[str, dict[str, Any]] = {name: {} for name in named}
    documents = {}
    for column in columns:
        answers = collect(frame, named.values(), column)
        view = resample(frame, column, answers)
        for name, row in named.items():
            if name in answers:
                cells[name][column.model] = _cell(view, row, named.values())
        documents[column.model] = disagreements(frame, named.values(), column, answers, shown)
    return {
        **_heading(frame, columns),
        "rows": [
            {"name": name, "role": row.role, "note": row.note, "is_sampled": row.is_sampled, "cells": cells[name]}
            for name, row in named.items()
            if cells[name]
        ],
        "documents": documents,
    }


def _heading(frame: TaskFrame, columns: Sequence[Column]) -> dict[str, Any]:
    """Return the facts about a task that do not depend on a row."""
    task = frame.task
    return {
        "name": task.name,
        "kind": "ranking" if task.is_ranking else "yes_no" if task.yes_no else "text",
        "metric": frame.metric,
        "higher_is_better": task.higher_is_better,
        "items": len(next(iter(columns[0].runs.values()))[0].samples),
        "cluster": task.cluster,
        "clusters": None if frame.clusters is None else len(set(frame.clusters)),
        "bucket": task.bucket if frame.buckets else None,
        "buckets": sorted(set(frame.buckets), key=_natural),
        "columns": [column.model for column in columns],
        "attention": {column.model: column.attention for column in columns if column.attention},
    }


def _natural(text: str) -> tuple[Any, ...]:
    """Return a sort key by which numbers in strings sort as numbers."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text))


def _cell(view: ModelView, row: ComparisonRow, rows: Iterable[ComparisonRow]) -> dict[str, Any]:
    """Return all figures of one row and model."""
    frame, column, own = view.frame, view.column, view.answers[row.name]
    runs = column.runs.get(row.same_as or row.name, [])
    invalid = [s.is_invalid or bool(s.metrics.get("unparsed")) for run in runs for s in run.samples]
    scored = sum(run.scored for run in runs)
    cell = {
        "score": score_of(view, row.name),
        "per_seed": [float(seed[frame.metric].metric(seed[frame.metric].table.sum(0))) for seed in own.seeds],
        "metrics": {
            name: interval_of(view, row.name, name) for name in own.measures if name not in (frame.metric, "unparsed")
        },
        "tests": [test_against(view, row.name, control) for control in row.against if control in view.answers],
        "rival": rival_of(view, row, rows),
        "unparsed": sum(invalid) / len(invalid) if invalid else None,
        "ruled_out": sum(run.ruled_out for run in runs) / scored if scored and row.options.get("masked") else None,
        "cost": _cost(runs, column.costs.get(row.same_as or row.name, {})),
        "buckets": {bucket: bucket_of(view, row, bucket) for bucket in sorted(set(frame.buckets), key=_natural)},
    }
    if row.name in column.margins:
        cell["auroc"] = auroc_of(view, row)
    return cell


def _cost(runs: Sequence[Run], counted: Mapping[str, float]) -> dict[str, float | None]:
    tokens, seconds = sum(run.tokens for run in runs), sum(run.seconds for run in runs)
    lengths = [run.length for run in runs if run.length is not None]
    return {
        "forwards": counted.get("forwards"),
        "flops": counted.get("flops"),
        "ms": 1000 * seconds / tokens if tokens else None,
        "tokens": sum(lengths) / len(lengths) if lengths else None,
    }
