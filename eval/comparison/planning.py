"""The plan of a comparison: the models and rows of each task."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

from contralto.common.hub import from_pretrained
from contralto.eval.comparison.controls import generation_rows, ranking_rows
from contralto.eval.comparison.decoders import DecoderChoice, parse_decoder
from contralto.eval.comparison.rows import ComparisonRow
from contralto.eval.comparison.tasks import Conditions, Task

__all__ = ["Subject", "TaskPlan", "check_decoders", "count_runs", "make_plans", "short_names", "takes_images"]


class Subject(NamedTuple):
    """A model to compare, with the sources of its other branches."""

    name: str
    """A folder, a hub id, or `testbed:NAME`."""
    sources: Mapping[str, Any] = {}
    """Such as `{"amateur": "testbed:amateur"}`, for the methods that read them."""
    adapter: str | None = None
    """An adapter of the model, a folder or a hub id."""


class TaskPlan(NamedTuple):
    """The runs of one task."""

    task: Task
    rows: list[ComparisonRow]
    """The rows of the comparison."""
    subjects: list[tuple[Subject, list[ComparisonRow]]]
    """The models with their rows, which differ in their sources."""


def short_names(subjects: Sequence[Subject]) -> dict[str, str]:
    """Return the name of each model's column: the last part of its name where that is unique.

    Args:
        subjects: The models.

    Raises:
        ValueError: A model is given twice.
    """
    full = [subject.name for subject in subjects]
    if repeated := [name for name in full if full.count(name) > 1]:
        raise ValueError(f"{repeated[0]} is given twice: a model is one column")
    short = {name: re.split(r"[/:]", name.rstrip("/"))[-1] for name in full}
    return {name: each if list(short.values()).count(each) == 1 else name for name, each in short.items()}


def check_decoders(decoders: Sequence[str], logged: Mapping[str, Path], subjects: Sequence[Subject]) -> None:
    """Raise an error if decoders cannot be compared, before anything is loaded.

    Args:
        decoders: The decoders, see `parse_decoder`.
        logged: Further rows from logged samples.
        subjects: The models.

    Raises:
        ValueError: There is nothing to compare, a decoder is given twice or is invalid, or samples belong to no single model.
    """
    if not decoders and not logged:
        raise ValueError("there is nothing to compare: name methods, such as cd, or decoders, such as 'cd beta=1'")
    if repeated := [text for text in decoders if list(decoders).count(text) > 1]:
        raise ValueError(f"the decoder {repeated[0]!r} is given twice")
    if logged and len(subjects) > 1:
        raise ValueError("logged samples add rows to one model, and several are given: compare them apart")
    for subject in subjects:
        _choices(subject, decoders)


def _choices(subject: Subject, decoders: Sequence[str]) -> list[DecoderChoice]:
    return [parse_decoder(text, subject.sources) for text in decoders]


def takes_images(subject: Subject) -> bool:
    """Return True if a model takes images.

    Args:
        subject: The model, whose configuration is read.
    """
    return type(from_pretrained(AutoConfig, subject.name)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def make_plans(
    tasks: Sequence[Task], subjects: Sequence[Subject], decoders: Sequence[str], *, sampled: bool
) -> list[TaskPlan]:
    """Assign models and rows to tasks.

    Image tasks go to the models that take images; text tasks to the others, or to all if all take images. Methods that contrast
    images are compared on image tasks alone; those that need other models, on text tasks if there are models of both kinds.

    Args:
        tasks: The tasks.
        subjects: The models.
        decoders: The decoders, see `parse_decoder`.
        sampled: Add sampled rows.

    Raises:
        ValueError: A task has no model, a model no task, or a decoder no task.
    """
    with_images = [subject for subject in subjects if takes_images(subject)]
    text_only = [subject for subject in subjects if subject not in with_images]
    is_mixed = bool(with_images and text_only)
    plans = []
    for task in tasks:
        partners = with_images if task.has_images else text_only or with_images
        if not partners:
            raise ValueError(f"{task.name} asks about images, and none of the models sees any: {subjects[0].name}, ...")
        rows = [
            (subject, _rows(task, _fitting(_choices(subject, decoders), task, is_mixed=is_mixed), sampled))
            for subject in partners
        ]
        plans.append(TaskPlan(task, rows[0][1], rows))
    _check_plans(plans, subjects, decoders)
    return plans


def _check_plans(plans: Sequence[TaskPlan], subjects: Sequence[Subject], decoders: Sequence[str]) -> None:
    """Raise an error for models and decoders without a task."""
    used = [subject for plan in plans for subject, _ in plan.subjects]
    if idle := [subject for subject in subjects if subject not in used]:
        raise ValueError(
            f"none of the tasks is for {idle[0].name}: image-text models answer about images where both kinds are given"
        )
    for text, choice in zip(decoders, _choices(subjects[0], decoders), strict=True):
        if not any(row.options.get("method") == choice.options["method"] for plan in plans for row in plan.rows):
            raise ValueError(
                f"none of the tasks is for the decoder {text!r}: it contrasts images, or has no likelihoods"
            )


def _fitting(choices: Sequence[DecoderChoice], task: Task, *, is_mixed: bool) -> list[DecoderChoice]:
    """Return the methods that apply to a task: image contrasts to image tasks, others to text tasks."""
    fitting = []
    for choice in choices:
        method = choice.config.declaration
        has_images = task.has_images or not method.reads_images
        if has_images and not (task.has_images and is_mixed and method.models):
            fitting.append(choice)
    return fitting


def _rows(task: Task, choices: Sequence[DecoderChoice], sampled: bool) -> list[ComparisonRow]:
    if task.is_ranking:
        return ranking_rows(choices)
    rows = generation_rows(choices, sampled=sampled, yes_no=bool(task.yes_no), hint=task.hint)
    return [
        row for row in rows if not (row.alone and task.has_images)
    ]  # lm-eval loads an image model by its name alone


def count_runs(rows: Sequence[ComparisonRow], conditions: Conditions) -> int:
    """Return the number of runs of some rows, over all seeds.

    Args:
        rows: The rows.
        conditions: The settings, with the seeds.
    """
    return sum(len(conditions.seeds) if row.is_sampled else 1 for row in rows if row.is_run)
