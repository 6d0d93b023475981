"""The reports of several trainings on one page: curves over each other, figures and differing settings in columns."""

import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from contralto import __version__
from contralto.align.monitoring.log_report import (
    LOG,
    ONCE,
    PANELS,
    figures_of_log,
    log_verdict,
    logged_values,
    read_log,
)
from contralto.align.monitoring.panels import Series, inline_svg, panels_of_runs, series_of
from contralto.align.monitoring.record import RECORD, Record
from contralto.align.monitoring.report import mean_with_error, verdict
from contralto.common.files import replace_text
from contralto.common.html import render_page

__all__ = [
    "TrainingRun",
    "differing_settings",
    "figures_of_runs",
    "find_runs",
    "read_run",
    "run_labels",
    "write_comparison",
]


def find_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the folders of runs; a folder of on-policy rounds stands for the trainings of its rounds, in their order.

    Args:
        folders: `output_dir` of runs, or of rounds.

    Raises:
        ValueError: a folder has no record of a training, or is named twice.
    """
    runs: list[Path] = []
    for folder in map(Path, folders):
        own = [folder] if _is_run(folder) else []
        parts = {each: each.parent.name.partition("-")[2] for each in folder.glob("round-*/model") if _is_run(each)}
        rounds = sorted((each for each in parts if parts[each].isdecimal()), key=lambda each: int(parts[each]))
        if not (own or rounds):
            raise ValueError(
                f"there is no {RECORD} or {LOG} in {folder}: give the output_dir of trainings with monitor_pairs above 0, or of "
                "distillations with report set"
            )
        runs += own or rounds
    resolved = [run.resolve() for run in runs]
    if double := next((run for at, run in enumerate(runs) if run.resolve() in resolved[:at]), None):
        raise ValueError(f"the run {double} is given twice: give each run once")
    return runs


def _is_run(folder: Path) -> bool:
    return (folder / RECORD).is_file() or (folder / LOG).is_file()


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Return names for runs: their paths without the parts that all have in common at the beginning and the end.

    Args:
        folders: different folders.

    Examples:
        >>> run_labels([Path("out/round-1/model"), Path("out/round-2/model")])
        ['round-1', 'round-2']
        >>> run_labels([Path("dpo"), Path("/tmp/apo")])
        ['dpo', 'apo']
    """
    paths = [folder.resolve().parts for folder in folders]
    if len({parts[-1] for parts in paths}) == len(paths):
        return [parts[-1] for parts in paths]
    start, end = _common(paths), _common([parts[::-1] for parts in paths])
    labels = ["/".join(parts[start : len(parts) - end]) for parts in paths]
    return labels if all(labels) and len(set(labels)) == len(labels) else [str(folder) for folder in folders]


def _common(paths: Sequence[Sequence[str]]) -> int:
    """Return the number of equal parts that all paths begin with."""
    return sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*paths, strict=False)))


class TrainingRun(NamedTuple):
    """A run as the page shows it."""

    key: str
    """Of the measured pairs; equal where two runs were measured on the same."""
    about: Mapping[str, Any]
    verdict: str
    warnings: Sequence[Mapping[str, Any]]
    """`step` and `text` of each."""
    figures: Mapping[str, str]
    series: Sequence[Series]


def read_run(folder: Path) -> TrainingRun:
    """Read a run: the record of a preference training, or the log of a distillation.

    Args:
        folder: one of `find_runs`.

    Raises:
        ValueError: the folder has neither.
    """
    if (folder / RECORD).is_file():
        record = Record.load(folder)
        key, figures = f"pairs {record.key}", _figures_of_record(record)
        return TrainingRun(key, record.about, verdict(record), record.warnings, figures, list(series_of(record)))
    content = read_log(folder)
    about, logs = content["about"], content["logs"]
    figures = {"loss": ", ".join(about["losses"]), "steps": f"{about['done']} of {about['steps']}"}
    figures |= {"seconds": f"{about['seconds']:.0f}"}
    figures |= {
        name: last if first == ONCE else f"{first} to {last}" for name, (first, last, _) in figures_of_log(logs)[1:]
    }
    series = [
        Series(title if len(curves) == 1 else f"{title}: {curve.label}", logged_values(logs, curve.key))
        for title, curves in PANELS.items()
        for curve in curves
    ]
    return TrainingRun("a log", about, log_verdict(about, logs), [], figures, series)


def write_comparison(folders: Sequence[str | os.PathLike[str]], path: Path) -> Path:
    """Write one page about several runs.

    Args:
        folders: see `find_runs`; at least two runs.
        path: the page.

    Returns:
        The path of the page.

    Raises:
        ValueError: a folder has no record, there is just one run, or the runs are of different kinds.
        ImportError: matplotlib is not installed.
    """
    found = find_runs(folders)
    if len(found) < 2:
        raise ValueError(f"a comparison needs at least two runs, not {len(found)}")
    kinds = {(folder / RECORD).is_file() for folder in found}
    if len(kinds) > 1:
        raise ValueError("preference trainings and distillations have no figures in common: give runs of one kind")
    runs = dict(zip(run_labels(found), map(read_run, found), strict=True))
    page = render_page(
        "contralto.align.monitoring",
        "side_by_side.html.j2",
        runs=runs,
        figures=figures_of_runs(runs),
        settings=differing_settings(runs),
        plots=[inline_svg(panel) for panel in panels_of_runs({label: run.series for label, run in runs.items()})],
        are_distillations=kinds == {False},
        same_pairs=len({run.key for run in runs.values()}) == 1,
        version=__version__,
    )
    replace_text(path, page)
    return path


def figures_of_runs(runs: Mapping[str, TrainingRun]) -> list[tuple[str, list[str]]]:
    """Return the rows of a table of figures, a column per run; a figure that no run has is left out.

    Args:
        runs: the runs by their labels.
    """
    names = dict.fromkeys(name for run in runs.values() for name in run.figures)
    rows = [(name, [run.figures.get(name, "") for run in runs.values()]) for name in names]
    return [(name, values) for name, values in rows if any(values)]


def _figures_of_record(record: Record) -> dict[str, str]:
    """Return the last measurements of a run."""
    last = record.points[-1]
    return {
        "loss": ", ".join(record.about["losses"]),
        "steps": f"{last.step} of {record.about['steps']}",
        "seconds": f"{record.about['seconds']:.0f}",
        "chosen, nats": mean_with_error(last.chosen),
        "rejected, nats": mean_with_error(last.rejected),
        "margins that grew": f"{last.won:.0%}",
        "chosen texts that lost": f"{last.displaced:.0%}",
        "KL, nats per token": "" if last.kl is None else f"{last.kl:.3g}",
        "tokens written": "" if last.length is None else f"{last.length:.1f}",
        "warnings": str(len(record.warnings)),
    }


def differing_settings(runs: Mapping[str, TrainingRun]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, a column per run; empty where a run has the default.

    Args:
        runs: the runs by their labels.
    """
    flat = [_settings(run.about) for run in runs.values()]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [(name, [settings.get(name, "") for settings in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _settings(about: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run was trained with, as strings by name."""
    names = ("model", "teacher", "adapter", "learning_rate", "beta", "batch", "processes", "device")
    single = {name: about[name] for name in names if name in about}
    sizes = {f"rows of {name}": size for name, size in about["datasets"].items() if size is not None}
    versions = {f"version of {name}": version for name, version in about["versions"].items()}
    return {name: str(value) for name, value in (single | sizes | about["settings"] | versions).items()}
