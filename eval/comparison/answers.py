"""The answers of a row as counts: from its own runs, or derived from another row."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from contralto.eval import stats
from contralto.eval.comparison.columns import Column
from contralto.eval.comparison.controls import OLM_DISTANCE, OLM_MASS
from contralto.eval.comparison.rows import ComparisonRow
from contralto.eval.comparison.runs import Run
from contralto.eval.comparison.samples import Sample
from contralto.eval.comparison.tasks import Task
from contralto.eval.metrics import MetricCounts, measure

__all__ = ["Answers", "TaskFrame", "collect", "frame_of", "modified_answers"]

YesNoPair = tuple[bool, bool | None]
"""The right answer and the given answer."""


class TaskFrame(NamedTuple):
    """The properties of a task that are common to all rows and models."""

    task: Task
    metric: str
    """The main metric."""
    clusters: list[str] | None
    """The cluster of each document; None if every document is its own."""
    buckets: list[str]
    """The bucket of each document; empty if results are not broken down."""
    resamples: int


class Answers(NamedTuple):
    """All answers of one row and model."""

    measures: dict[str, MetricCounts]
    """By metric; the tables are summed over seeds."""
    seeds: list[dict[str, MetricCounts]]
    """By metric, for each seed."""
    pairs: list[list[YesNoPair]]
    """The labels and answers of yes/no tasks, for each seed."""


def frame_of(task: Task, column: Column, resamples: int) -> TaskFrame:
    """Return the main metric, clusters and buckets of a task.

    Args:
        task: The task.
        column: The answers of any model.
        resamples: The number of bootstrap draws.

    Raises:
        ValueError: The samples do not have the main metric.
    """
    samples = next(iter(column.runs.values()))[0].samples
    clusters, buckets = (_field(samples, name) for name in (task.cluster, task.bucket))
    return TaskFrame(task, task.metric_of(samples), clusters, buckets or [], resamples)


def _field(samples: Sequence[Sample], name: str | None) -> list[str] | None:
    """Return a field of all documents; None if one does not have it."""
    if name is None or any(name not in sample.doc for sample in samples):
        return None
    return [str(sample.doc[name]) for sample in samples]


def collect(frame: TaskFrame, rows: Iterable[ComparisonRow], column: Column) -> dict[str, Answers]:
    """Return the answers of all rows of a model; derive those of rows without a run.

    Args:
        frame: The task.
        rows: The rows of the comparison.
        column: The runs of the model.
    """
    answers = {name: _answers(frame, runs) for name, runs in column.runs.items()}
    for row in rows:
        if row.same_as:
            answers[row.name] = answers[row.same_as]
        elif row.matched_to and row.matched_to in answers:
            ((*pairs,),) = answers[row.matched_to].pairs
            margins, count = column.margins[row.against[0]], sum(answer is True for _, answer in pairs)
            answers[row.name] = _replaced(frame, pairs, stats.bias_matched(margins, count).tolist())
        elif row.modified and row.against[0] in column.likelihoods:
            ((*pairs,),) = answers[row.against[0]].pairs
            answers[row.name] = _replaced(frame, pairs, modified_answers(pairs, column.likelihoods[row.against[0]]))
    return answers


def _answers(frame: TaskFrame, runs: Sequence[Run]) -> Answers:
    seeds = [_measures(frame, run.samples) for run in runs]
    summed = {
        name: first._replace(table=np.sum([seed[name].table for seed in seeds], axis=0))
        for name, first in seeds[0].items()
    }
    pairs = [[_pair(sample) for sample in run.samples] for run in runs] if frame.task.yes_no else []
    return Answers(summed, seeds, pairs)


def _pair(sample: Sample) -> YesNoPair:
    label, answer = sample.metrics["f1"]
    return label, answer


def _measures(frame: TaskFrame, samples: Sequence[Sample]) -> dict[str, MetricCounts]:
    """Return the counts of all metrics that can be paired; the main metric must be one of them."""
    measures = {}
    for name in samples[0].metrics:
        values = [sample.metrics[name] for sample in samples]
        try:
            measures[name] = measure(name, values)
        except ValueError:
            if name == frame.metric:
                raise
    if frame.task.yes_no:
        measures["yes_ratio"] = measure("yes_ratio", [_pair(sample) for sample in samples])
    return measures


def modified_answers(pairs: Sequence[YesNoPair], likelihoods: Sequence[tuple[float, float]]) -> list[bool | None]:
    """Apply output layer modification: answer yes where yes and no are likely and their probabilities are close.

    Args:
        pairs: The right answer and the greedy answer of each question.
        likelihoods: log p(yes) and log p(no) of each question.
    """
    chances = [(math.exp(yes), math.exp(no)) for yes, no in likelihoods]
    return [
        True if yes + no > OLM_MASS and abs(yes - no) < OLM_DISTANCE else answer
        for (_, answer), (yes, no) in zip(pairs, chances, strict=True)
    ]


def _replaced(frame: TaskFrame, pairs: Sequence[YesNoPair], answers: Sequence[bool | None]) -> Answers:
    """Return the counts of other answers to the same questions."""
    replaced: list[Any] = [(label, answer) for (label, _), answer in zip(pairs, answers, strict=True)]
    measures = {name: measure(name, replaced) for name in ("precision", "recall", "f1", "yes_ratio")}
    measures[frame.metric] = measure(frame.metric, [float(label == answer) for label, answer in replaced])
    return Answers(measures, [measures], [replaced])
