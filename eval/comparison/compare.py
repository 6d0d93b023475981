"""Decoders side by side on the same documents: what their runs add up to, and whether it is more than chance.

`compare` runs them, `summarise` compares the runs of one task. What they return is plain data, which `report` shows.
"""

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval.tasks import TaskManager
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

from contralto import __version__
from contralto.common.hub import from_pretrained
from contralto.eval import stats
from contralto.eval.comparison.controls import (
    FORCED_FROM,
    FORCED_WITHIN,
    Choice,
    Row,
    generation_rows,
    parse,
    ranking_rows,
)
from contralto.eval.comparison.runs import Column, Conditions, Run, Runner, Sample, Task, gather
from contralto.eval.data import TASKS, local_tasks
from contralto.eval.metrics import Measurement, measure, register_in_lm_eval
from contralto.eval.stats.counts import Array

__all__ = ["Subject", "adjust", "compare", "summarise"]

# ------------------------------------------------------------------------------------------------------------- statistics


class _Answers(NamedTuple):
    """All answers of one row and model, the seeds summed."""

    measures: dict[str, Measurement]
    """By metric; the tables are summed over seeds."""
    seeds: list[dict[str, Measurement]]
    pairs: list[list[tuple[bool, bool | None]]]
    """Of yes/no tasks, per seed: labels and answers."""


class _View(NamedTuple):
    """The answers of one model, and what was drawn again of their counts."""

    frame: "_Frame"
    column: Column
    answers: Mapping[str, _Answers]
    drawn: stats.Bootstrap
    """By (row, metric), and by (row, "in", bucket) of the main metric."""


class _Frame(NamedTuple):
    """What is common to all rows of a task and model."""

    task: Task
    metric: str
    clusters: Any
    buckets: list[str]
    resamples: int


def summarise(
    task: Task,
    rows: Sequence[Row],
    columns: Sequence[Column],
    *,
    resamples: int = 10_000,
    shown: int = 12,
) -> dict[str, Any]:
    """The comparison of one task as plain data: what `report` shows, and what is written as JSON.

    Accuracies have Wilson intervals, clustered where documents share an image or a row has several seeds. A row is tested
    against its controls by permutation: the signs of the differences are exchanged, of a document with all its seeds at once, or
    of all documents that share an image. For right and wrong answers of one seed that is McNemar's exact test. Metrics that are
    no means, such as F1, are tested by exchanging the counts themselves. Intervals of differences are the paired bootstrap's.

    Args:
        task: the task.
        rows: what was compared; rows that only exist as logged samples are added.
        columns: the answers, a column per model.
        resamples: of the bootstrap.
        shown: at most so many documents of each kind of disagreement.
    """
    named = {row.name: row for row in rows}
    for column in columns:
        for name in column.runs:
            against = tuple(row.name for row in rows[:1])
            named.setdefault(name, Row(name=name, role="method", against=against, note="from logged samples"))
    frame = _frame(task, columns[0], resamples)
    cells: dict[str, dict[str, Any]] = {name: {} for name in named}
    documents = {}
    for column in columns:
        answers = {name: _answers(frame, runs) for name, runs in column.runs.items()}
        _derive(frame, named.values(), column, answers)
        view = _View(frame, column, answers, _draw(frame, answers))
        for name, row in named.items():
            if name in answers:
                cells[name][column.model] = _cell(view, row)
        documents[column.model] = _disagreements(frame, named.values(), column, answers, shown)
    first = next(iter(columns[0].runs.values()))[0]
    return {
        "name": task.name,
        "kind": "ranking" if task.is_ranking else "yes_no" if task.yes_no else "text",
        "metric": frame.metric,
        "higher_is_better": task.higher_is_better,
        "items": len(first.samples),
        "cluster": task.cluster,
        "clusters": None if frame.clusters is None else len(set(frame.clusters)),
        "bucket": task.bucket if frame.buckets else None,
        "buckets": sorted(set(frame.buckets), key=_natural),
        "columns": [column.model for column in columns],
        "rows": [
            {"name": name, "role": row.role, "note": row.note, "is_sampled": row.is_sampled, "cells": cells[name]}
            for name, row in named.items()
            if cells[name]
        ],
        "documents": documents,
    }


def _frame(task: Task, column: Column, resamples: int) -> _Frame:
    samples = next(iter(column.runs.values()))[0].samples
    clusters, buckets = (_field(samples, name) for name in (task.cluster, task.bucket))
    return _Frame(task, task.metric_of(samples), clusters, buckets or [], resamples)


def _field(samples: Sequence[Sample], name: str | None) -> list[str] | None:
    """A field of all documents; None if not all have it."""
    if name is None or any(name not in sample.doc for sample in samples):
        return None
    return [str(sample.doc[name]) for sample in samples]


def _natural(text: str) -> tuple[Any, ...]:
    """Numbers in texts sort as numbers."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text))


def _answers(frame: _Frame, runs: Sequence[Run]) -> _Answers:
    seeds = [_measures(frame, run.samples) for run in runs]
    summed = {
        name: first._replace(table=np.sum([seed[name].table for seed in seeds], axis=0))
        for name, first in seeds[0].items()
    }
    pairs = [[tuple(s.metrics["f1"]) for s in run.samples] for run in runs] if frame.task.yes_no else []
    return _Answers(summed, seeds, pairs)


def _measures(frame: _Frame, samples: Sequence[Sample]) -> dict[str, Measurement]:
    found = {}
    for name in samples[0].metrics:
        values = [sample.metrics[name] for sample in samples]
        try:
            found[name] = measure(name, values)
        except ValueError:
            if name == frame.metric:
                raise
    if frame.task.yes_no:
        found["yes_ratio"] = measure("yes_ratio", [sample.metrics["f1"] for sample in samples])
    return found


def _derive(frame: _Frame, rows: Iterable[Row], column: Column, answers: dict[str, _Answers]) -> None:
    """Add rows that need no run: equal to others by definition, or greedy decoding that says yes more often."""
    for row in rows:
        if row.same_as:
            answers[row.name] = answers[row.same_as]
        elif row.as_often_as and row.as_often_as in answers:
            ((*pairs,),) = answers[row.as_often_as].pairs
            lean, count = column.leans[row.against[0]], sum(said is True for _, said in pairs)
            answers[row.name] = _said(frame, pairs, stats.bias_matched(lean, count).tolist())
        elif row.forced and row.against[0] in column.words:
            ((*pairs,),) = answers[row.against[0]].pairs
            answers[row.name] = _said(frame, pairs, _forced(pairs, column.words[row.against[0]]))


def _forced(pairs: Sequence[tuple[bool, bool | None]], words: Sequence[tuple[float, float]]) -> list[bool | None]:
    """Return greedy answers with yes in the place of those whose yes and no are likely enough and close enough."""
    chances = [(math.exp(yes), math.exp(no)) for yes, no in words]
    return [
        True if yes + no > FORCED_FROM and abs(yes - no) < FORCED_WITHIN else said
        for (_, said), (yes, no) in zip(pairs, chances, strict=True)
    ]


def _said(frame: _Frame, pairs: Sequence[tuple[bool, bool | None]], said: Sequence[bool | None]) -> _Answers:
    """Return the measures of other answers to the same questions."""
    labels = [label for label, _ in pairs]
    names = ("precision", "recall", "f1", "yes_ratio")
    found = {name: measure(name, [*zip(labels, said, strict=True)]) for name in names}
    hits = [float(label == answer) for label, answer in zip(labels, said, strict=True)]
    found[frame.metric] = measure(frame.metric, hits)
    return _Answers(found, [found], [list(zip(labels, said, strict=True))])


def _draw(frame: _Frame, answers: Mapping[str, _Answers]) -> stats.Bootstrap:
    """All counts of all rows, drawn again together."""
    tables: dict[Any, Array] = {
        (row, name): each.table for row, own in answers.items() for name, each in own.measures.items()
    }
    for bucket in set(frame.buckets):
        inside = np.array([each == bucket for each in frame.buckets])[:, None]
        tables |= {(row, "in", bucket): own.measures[frame.metric].table * inside for row, own in answers.items()}
    return stats.Bootstrap(tables, clusters=frame.clusters, resamples=frame.resamples)


def _cell(view: _View, row: Row) -> dict[str, Any]:
    """All figures of one row and model."""
    frame, column, own = view.frame, view.column, view.answers[row.name]
    runs = column.runs.get(row.same_as or row.name, [])
    invalid = [s.is_invalid or bool(s.metrics.get("unparsed")) for run in runs for s in run.samples]
    scored = sum(run.scored for run in runs)
    cell = {
        "score": _score(view, row),
        "per_seed": [float(seed[frame.metric].metric(seed[frame.metric].table.sum(0))) for seed in own.seeds],
        "metrics": {
            name: _interval(view, row.name, name) for name in own.measures if name not in (frame.metric, "unparsed")
        },
        "tests": [_test(view, row.name, other) for other in row.against if other in view.answers],
        "unparsed": sum(invalid) / len(invalid) if invalid else None,
        "ruled_out": sum(run.ruled_out for run in runs) / scored if scored and row.options.get("masked") else None,
        "cost": _cost(runs, column.costs.get(row.same_as or row.name, {})),
        "buckets": {bucket: _bucket(view, row, bucket) for bucket in sorted(set(frame.buckets), key=_natural)},
    }
    if row.name in column.leans:
        cell["auroc"] = _auroc(frame, row, column, own)
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


def _score(view: _View, row: Row) -> dict[str, float]:
    """The main metric with its interval."""
    frame, own = view.frame, view.answers[row.name]
    main, count = own.measures[frame.metric], len(own.seeds)
    if not main.is_binary:
        return _interval(view, row.name, frame.metric)
    hits = np.concatenate([seed[frame.metric].table[:, 0] for seed in own.seeds])
    documents = frame.clusters if frame.clusters is not None else range(len(main.table)) if count > 1 else None
    share = stats.proportion(hits, clusters=None if documents is None else [*documents] * count)
    return {"value": share.value, "low": share.low, "high": share.high}


def _interval(view: _View, row: str, name: str) -> dict[str, float]:
    value, low, high = view.drawn.interval((row, name), view.answers[row].measures[name].metric)
    return {"value": value, "low": low, "high": high}


def _test(view: _View, row: str, against: str) -> dict[str, Any]:
    """Return a row's test against one of its controls."""
    frame, control, own = view.frame, view.answers[against], view.answers[row]
    found: dict[str, Any] = {"against": against} | _difference(view, against, row, frame.metric)
    if _is_binary(view, row, against):
        pairs = _seed_pairs(control, own)
        each = [stats.mcnemar_exact(a[frame.metric].table[:, 0] > 0, b[frame.metric].table[:, 0] > 0) for a, b in pairs]
        found |= {"won": sum(t.won for t in each), "lost": sum(t.lost for t in each), "seeds": len(each)}
        found["per_seed"] = [t._asdict() for t in each]
    found["detectable"] = _detectable(view, row, against, found)
    if frame.task.yes_no:
        found |= {name: _difference(view, against, row, name) for name in ("f1", "yes_ratio")}
    return found


def _is_binary(view: _View, *rows: str) -> bool:
    return all(view.answers[row].measures[view.frame.metric].is_binary for row in rows)


def _detectable(view: _View, row: str, against: str, test: Mapping[str, Any]) -> float | None:
    """Return the smallest difference that the test would find four times in five; None if it would find none."""
    clusters, name = view.frame.clusters, view.frame.metric
    one, two = _alike(view.answers[against], view.answers[row], name)
    main = view.answers[row].measures[name]
    units = len(one) if clusters is None else len(set(clusters))
    if not test["units"]:  # if any differ, then wholly
        return stats.detectable(units, 0.0) if _is_binary(view, row, against) else None
    if main.numerators is not None:
        sums = stats.by_cluster((two - one)[:, main.numerators].sum(-1, keepdims=True), clusters)
        error = math.sqrt(float((sums**2).sum())) / float(one[:, -1].sum())
    else:
        error = view.drawn.error((against, name), (row, name), main.metric)
    return stats.detectable_by_error(error, units=units, apart=test["units"])


def _seed_pairs(control: _Answers, own: _Answers) -> list[tuple[dict[str, Measurement], dict[str, Measurement]]]:
    """Each seed against the control's of the same number, or against its only one."""
    if len(control.seeds) == 1:
        return [(control.seeds[0], seed) for seed in own.seeds]
    return list(zip(control.seeds, own.seeds, strict=True))


def _difference(view: _View, first: str, second: str, name: str) -> dict[str, Any]:
    """Return how much higher a metric is for the second row: its interval, and p of the permutation test."""
    _, metric, _, numerators = view.answers[second].measures[name]
    found = view.drawn.difference((first, name), (second, name), metric)._asdict()
    one, two = _alike(view.answers[first], view.answers[second], name)
    how = {"clusters": view.frame.clusters, "resamples": view.frame.resamples}
    if numerators is not None:
        test = stats.sign_flip((two - one)[:, numerators].sum(-1), **how)
    else:
        test = stats.swap(one, two, metric, **how)
    return found | {"test": "swap" if numerators is None else "sign flip", **test._asdict()}


def _alike(first: _Answers, second: _Answers, name: str) -> tuple[Array, Array]:
    """Return the counts of two rows, each as if it had as many seeds as both."""
    ones, twos = len(first.seeds), len(second.seeds)
    common = math.gcd(ones, twos)
    return first.measures[name].table * (twos // common), second.measures[name].table * (ones // common)


def _bucket(view: _View, row: Row, bucket: str) -> dict[str, float]:
    """The main metric in a bucket, and how much higher it is than the first control's."""
    main = view.answers[row.name].measures[view.frame.metric]
    inside = np.array([each == bucket for each in view.frame.buckets])
    found = {"value": float(main.metric(main.table[inside].sum(0))), "items": int(inside.sum())}
    if row.against:
        pair = view.drawn.difference((row.against[0], "in", bucket), (row.name, "in", bucket), main.metric)
        found |= {"gain": pair.value, "low": pair.low, "high": pair.high}
    return found


def _auroc(frame: _Frame, row: Row, column: Column, own: _Answers) -> dict[str, Any]:
    """The AUROC of how far the questions lean to yes, and how much higher it is than the baseline's."""
    labels = [label for label, _ in own.pairs[0]]
    if len(set(labels)) < 2:
        return {}
    found: dict[str, Any] = {"value": stats.auroc(column.leans[row.name], labels)}
    baseline = row.against[0] if row.against else None
    if baseline in column.leans:
        leans = column.leans[baseline], column.leans[row.name]
        found["difference"] = stats.auroc_difference(*leans, labels, clusters=frame.clusters)._asdict()
    return found


def _disagreements(
    frame: _Frame, rows: Iterable[Row], column: Column, answers: Mapping[str, _Answers], shown: int
) -> list[dict[str, Any]]:
    """The documents on which unsampled rows do not get the same score, first those with the most."""
    names = [row.name for row in rows if row.name in column.runs and not row.is_sampled]
    tables = np.stack([_per_document(answers[name].measures[frame.metric]) for name in names])
    order = np.argsort(-np.ptp(tables, axis=0), kind="stable")
    baseline = tables[0]
    gained = [i for i in order if tables[1:, i].max(initial=-np.inf) > baseline[i]][:shown]
    lost = [i for i in order if tables[1:, i].min(initial=np.inf) < baseline[i] and i not in gained][:shown]
    chosen = sorted({int(i) for i in (*gained, *lost)})
    return [_document(frame, column, names, tables, i) for i in chosen]


def _per_document(one: Measurement) -> Array:
    return np.asarray(one.metric(one.table), dtype=np.float64)


def _document(frame: _Frame, column: Column, names: Sequence[str], tables: Array, i: int) -> dict[str, Any]:
    sample = column.runs[names[0]][0].samples[i]
    said = [
        {"row": name, "text": column.runs[name][0].samples[i].said, "score": float(tables[at, i])}
        for at, name in enumerate(names)
    ]
    document = {"number": sample.number, "prompt": sample.prompt, "target": _target(sample), "said": said}
    if frame.buckets:
        document["bucket"] = frame.buckets[i]
    if column.pictures:
        document["pictures"] = [_address(image) for image in column.pictures[i]]
    return document


def _address(image: Any) -> str:
    """A small copy of an image as a data address; drawings of few pixels enlarged, without loss."""
    from PIL.Image import Resampling

    small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((320, 320))
    zoom = max(1, 192 // max(small.size))
    form = "PNG" if max(image.size) <= 256 else "JPEG"
    small.resize((zoom * small.width, zoom * small.height), Resampling.NEAREST).save(file, format=form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _target(sample: Sample) -> str:
    """The right answer; of options, its text."""
    options = next((each for each in sample.doc.values() if isinstance(each, list)), [])
    is_index = sample.target.isdigit() and options and int(sample.target) < len(options)
    return str(options[int(sample.target)]).strip() if is_index else sample.target


def adjust(tasks: Sequence[dict[str, Any]]) -> None:
    """Add Holm's p to every test: over the splits and models on which a row meets the same control, per kind of task.

    Args:
        tasks: of `summarise`; changed in place.
    """
    families: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for task in tasks:
        for row in task["rows"]:
            for cell in row["cells"].values():
                for test in cell["tests"]:
                    own = (task["kind"], row["name"], test["against"])
                    families.setdefault((*own, "score"), []).append(test)
                    for name in ("f1", "yes_ratio"):
                        if name in test:
                            families.setdefault((*own, name), []).append(test[name])
                if "difference" in cell.get("auroc", {}):
                    families.setdefault((task["kind"], row["name"], "auroc"), []).append(cell["auroc"]["difference"])
    for family in families.values():
        for test, p in zip(family, stats.holm([test["p"] for test in family]), strict=True):
            test["holm"] = float(p)


# ------------------------------------------------------------------------------------------------------------- the command


class Subject(NamedTuple):
    """A model to be compared, with where its other branches come from."""

    name: str
    """A folder, a hub id, or `testbed:NAME`."""
    sources: Mapping[str, Any] = {}
    """Such as `{"amateur": "testbed:amateur"}`, of the methods that read it."""


class _Plan(NamedTuple):
    """What runs: per task, the subjects with their rows."""

    task: Task
    rows: list[Row]
    subjects: list[tuple[Subject, list[Row]]]


def compare(
    subjects: Sequence[Subject],
    tasks: Sequence[str],
    decoders: Sequence[str],
    *,
    output: Path,
    conditions: Conditions | None = None,
    model_args: Mapping[str, Any] | None = None,
    include_path: Sequence[str] = (),
    data_dir: Path | None = None,
    reuse: Sequence[Path] = (),
    logged: Mapping[str, Path] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run tasks of lm-eval under several decoders and their controls, and compare the answers.

    Nothing that was answered before is answered again, whether the earlier call ended or was killed.

    Image tasks are answered by the models that see; tasks of texts by those that do not, or by all if all see. Methods that
    contrast images are compared on image tasks alone; those that need other models, on the tasks of texts if there are
    models of both kinds.

    Args:
        subjects: the models; a column each.
        tasks: names of tasks or groups, or YAML files.
        decoders: such as "cd beta=0.5", see `controls.parse`; a method's controls come along.
        output: the folder in which all answers are kept.
        conditions: the same for all.
        model_args: of `ContraltoLM`, the same for all: batch_size, device, dtype, ...
        include_path: folders with more tasks.
        data_dir: local data, see `contralto.eval.data`.
        reuse: folders of lm-eval's own results; runs of the same configuration are taken from there.
        logged: further rows, by name, from folders in which any run of lm-eval logged its samples.
        quiet: show no progress of single runs.

    Returns:
        Plain data: `models`, `decoders`, `conditions`, and `tasks`, each as `summarise` makes them, with Holm's p.

    Raises:
        ValueError: an unknown task, method or option; a model or task without a partner; answers to other questions.
    """
    conditions = conditions or Conditions()
    names = _short_names(subjects)
    _check_decoders(decoders, logged or {}, subjects)
    for subject in subjects:  # before anything is loaded
        _choices(subject, decoders)
    found = _load_tasks(tasks, conditions, include_path, data_dir, output)
    plans = _plan(found, subjects, decoders, sampled=bool(conditions.seeds))
    runner = Runner(output, conditions, reuse=reuse, quiet=quiet)
    total = sum(_count(rows, conditions) for plan in plans for _, rows in plan.subjects)
    done = 0

    def progress(title: str) -> str:
        nonlocal done
        done += 1
        return f"[{done}/{total}] {title}"

    columns: dict[str, list[Column]] = {plan.task.name: [] for plan in plans}
    sizes = {}
    for subject in subjects:
        own = [(plan.task, rows) for plan in plans for each, rows in plan.subjects if each is subject]
        lm = _load(subject, own[0][0].sees or _sees(subject), model_args or {})
        sizes[names[subject.name]] = {
            "name": subject.name,
            "parameters": int(lm.model.num_parameters()),
            **subject.sources,
        }
        for task, rows in own:
            columns[task.name].append(
                gather(lm, names[subject.name], task, rows, runner, logged=logged, progress=progress)
            )
    summaries = [summarise(plan.task, plan.rows, columns[plan.task.name]) for plan in plans]
    adjust(summaries)
    return {
        "contralto": __version__,
        "models": sizes,
        "decoders": list(decoders),
        "conditions": {**conditions.describe(), "seeds": list(conditions.seeds)},
        "batch_size": str((model_args or {}).get("batch_size", 1)),
        "reused": runner.reused,
        "tasks": summaries,
    }


def _short_names(subjects: Sequence[Subject]) -> dict[str, str]:
    """What the columns are called."""
    full = [subject.name for subject in subjects]
    if repeated := [name for name in full if full.count(name) > 1]:
        raise ValueError(f"{repeated[0]} is given twice: a model is one column")
    short = {name: re.split(r"[/:]", name.rstrip("/"))[-1] for name in full}
    return {name: each if list(short.values()).count(each) == 1 else name for name, each in short.items()}


def _check_decoders(decoders: Sequence[str], logged: Mapping[str, Path], subjects: Sequence[Subject]) -> None:
    if not decoders and not logged:
        raise ValueError(
            "there is nothing to compare: name methods, such as --methods cd,dola or --decoder 'cd beta=1'"
        )
    if repeated := [text for text in decoders if list(decoders).count(text) > 1]:
        raise ValueError(f"the decoder {repeated[0]!r} is given twice")
    if logged and len(subjects) > 1:
        raise ValueError("--samples adds rows to one model, and several are given: compare them apart")


def _choices(subject: Subject, decoders: Sequence[str]) -> list[Choice]:
    return [parse(text, subject.sources) for text in decoders]


def _load_tasks(
    names: Sequence[str], conditions: Conditions, include_path: Sequence[str], data_dir: Path | None, output: Path
) -> list[Task]:
    """The tasks that the names mean, without the groups around them."""
    register_in_lm_eval()
    metadata = dict(conditions.metadata)
    if data_dir:
        folder = output / "tasks"
        folder.mkdir(parents=True, exist_ok=True)
        names, more = local_tasks(names, data_dir, folder)
        metadata |= more
    places = [str(TASKS), *include_path]
    manager = TaskManager(include_path=places, include_defaults=False, metadata=metadata)
    known = set(manager.all_tasks)
    if any(name not in known and not Path(name).is_file() for name in names):  # the index of all of lm-eval is slow
        manager = TaskManager(include_path=places, metadata=metadata)
        known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known and not Path(name).is_file()]:
        close = [name for name in manager.all_tasks if unknown[0] in name][:5]
        hint = f"; did you mean {', '.join(close)}?" if close else "; contralto eval ls tasks lists them all"
        raise ValueError(f"there is no task {unknown[0]!r}{hint}")
    loaded = manager.load(list(names))["tasks"]
    return [Task(name, task, conditions) for name, task in loaded.items()]


def _sees(subject: Subject) -> bool:
    """Whether a model takes images."""
    return type(from_pretrained(AutoConfig, subject.name)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _plan(tasks: Sequence[Task], subjects: Sequence[Subject], decoders: Sequence[str], *, sampled: bool) -> list[_Plan]:
    """Who answers what, by which rows."""
    seeing = [subject for subject in subjects if _sees(subject)]
    blind = [subject for subject in subjects if subject not in seeing]
    plans = []
    for task in tasks:
        partners = seeing if task.sees else blind or seeing
        if not partners:
            raise ValueError(f"{task.name} asks about images, and none of the models sees any: {subjects[0].name}, ...")
        rows = [
            (subject, _rows(task, _fitting(_choices(subject, decoders), task, mixed=bool(seeing and blind)), sampled))
            for subject in partners
        ]
        plans.append(_Plan(task, rows[0][1], rows))
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
    return plans


def _fitting(choices: Sequence[Choice], task: Task, *, mixed: bool) -> list[Choice]:
    """The methods that make sense on a task."""
    kept = []
    for choice in choices:
        method = choice.method.declaration
        if (task.sees or not method.reads_images) and not (task.sees and mixed and method.models):
            kept.append(choice)
    return kept


def _rows(task: Task, choices: Sequence[Choice], sampled: bool) -> list[Row]:
    if task.is_ranking:
        return ranking_rows(choices)
    rows = generation_rows(choices, sampled=sampled, yes_no=bool(task.yes_no), hint=task.hint)
    return [row for row in rows if not (row.alone and task.sees)]  # lm-eval makes an image model by its name alone


def _count(rows: Sequence[Row], conditions: Conditions) -> int:
    """How many titles `gather` asks for."""
    return sum(len(conditions.seeds) if row.is_sampled else 1 for row in rows if row.is_run)


def _load(subject: Subject, sees: bool, model_args: Mapping[str, Any]) -> Any:
    from contralto.eval.models.lm import ContraltoLM
    from contralto.eval.models.vlm import ContraltoVLM

    return (ContraltoVLM if sees else ContraltoLM)(pretrained=subject.name, **model_args)
