"""The answers of one model to one task, by every row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contralto.decoding.aligned import aligned_tokenizers
from contralto.decoding.branches import ModelVariant
from contralto.eval.comparison.rows import ComparisonRow
from contralto.eval.comparison.runs import Run, Runner, logged_samples
from contralto.eval.comparison.tasks import Task

__all__ = ["Column", "gather"]

SAMPLING_OPTIONS = ("temperature", "min_p")
"""Options of rows that do not change the cost of a token."""


@dataclass
class Column:
    """The answers of one model to one task."""

    model: str
    runs: dict[str, list[Run]] = field(default_factory=dict)
    """By row, a run per seed."""
    margins: dict[str, list[float]] = field(default_factory=dict)
    """By row, how far each question leans to yes: log p(yes) - log p(no)."""
    likelihoods: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By row, log p(yes) and log p(no) of each question."""
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    """By row, `forwards` and `flops` per unit."""
    attention: dict[str, Any] = field(default_factory=dict)
    """The attention to text and image, see `Runner.attention`; empty for tasks without questions of yes and no about images."""
    images: list[Any] = field(default_factory=list)
    """The images of each document; none if the task has no images."""


def gather(
    lm: Any,
    name: str,
    task: Task,
    rows: Sequence[ComparisonRow],
    runner: Runner,
    *,
    logged: Mapping[str, Path] | None = None,
    progress: Callable[[str], str] = str,
) -> Column:
    """Collect the answers of one model to one task, by every row.

    Args:
        lm: A `ContraltoLM`, with any decoder.
        name: The name of the model.
        task: The task.
        rows: The rows of the comparison.
        runner: Runs decoders and keeps their answers.
        logged: Further rows, by name, from folders in which any run of lm-eval logged its samples.
        progress: Receives the title of each run, returns the line under which its progress is shown.

    Raises:
        ValueError: The samples do not have the metric, kept or logged answers are answers to other questions, or the words of yes and no are the same tokens for the
            model.
    """
    _check_words(lm, task)
    requests, column = task.requests(lm), Column(name)
    if task.has_images:
        column.images = [request.args[2]["visual"] for request in requests]
    for row in rows:
        if row.is_run:
            own = lm if row.alone is None else _other_model(lm, rows, row.alone)
            _add_row(column, own, task, requests, row, runner, progress)
    if task.has_images and task.yes_no:
        column.attention = runner.attention(lm.decoding_by(), task, requests)
    for label, folder in (logged or {}).items():
        column.runs[label] = [logged_samples(folder, task, task.identities(requests))]
    return column


def _check_words(lm: Any, task: Task) -> None:
    """Raise an error if the tokenizer does not distinguish the words of yes and no, whose margins would all be zero."""
    if task.yes_no is None:
        return
    yes, no = task.yes_no
    if list(lm.tok_encode(yes, add_special_tokens=False)) == list(lm.tok_encode(no, add_special_tokens=False)):
        raise ValueError(
            f"the answers {yes!r} and {no!r} of {task.name} are the same tokens for this model, whose tokenizer may not know "
            'them: name the words with which it answers in the task\'s metadata, such as {"yes_no": ["yes", "no"]}'
        )


def _add_row(
    column: Column,
    lm: Any,
    task: Task,
    requests: Sequence[Any],
    row: ComparisonRow,
    runner: Runner,
    progress: Callable[[str], str],
) -> None:
    """Run a row with all seeds, count its cost, and score yes and no where the task has them."""
    if row.hint is not None:
        task = task.hinted(row.hint)
        requests = task.requests(lm)
    documents = task.identities(requests)
    seeds = runner.conditions.seeds if row.is_sampled else (*runner.conditions.seeds, 0)[:1]
    column.runs[row.name] = []
    for seed in seeds:
        title = progress(f"{task.name}, {column.model}, {row.name}" + (f", seed {seed}" if row.is_sampled else ""))
        decoding = lm.decoding_by(**row.options, seed=seed)
        column.runs[row.name].append(runner.run(decoding, task, documents, title=title))
        task.metric_of(column.runs[row.name][-1].samples)  # an unknown metric ends the first run
    unsampled = {key: value for key, value in row.options.items() if key not in SAMPLING_OPTIONS}
    column.costs[row.name] = runner.cost(lm.decoding_by(**unsampled, seed=seeds[0]), task, requests)
    if task.yes_no and not row.is_sampled:
        decoding = lm.decoding_by(**row.options, seed=seeds[0])
        scores = runner.yes_no_likelihoods(decoding, task, requests, title=f"{title}, lean")
        column.likelihoods[row.name], column.margins[row.name] = scores, [yes - no for yes, no in scores]


def _other_model(lm: Any, rows: Sequence[ComparisonRow], option: str) -> Any:
    """Return the other model that a row's option names, to be evaluated alone."""
    options = next(row.options for row in rows if option in row.options and "control" not in row.options)
    decoding = lm.decoding_by(**options)
    model = decoding.other_models[option]
    model = model.alone() if isinstance(model, ModelVariant) else model
    own = aligned_tokenizers(decoding.decoder.config, lm.tokenizer, {})  # an amateur with another tokenizer
    return type(lm)(
        model,
        tokenizer=own.get("amateur_tokenizer", lm.tokenizer),
        device=str(lm.device),
        batch_size=lm.batch_size,
        max_length=lm.max_length,
    )
