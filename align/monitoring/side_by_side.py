"""The reports of several trainings on one page: curves over each other, figures and differing settings in columns."""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from contralto import __version__
from contralto.align.monitoring.panels import inline_svg, panels_of_runs
from contralto.align.monitoring.record import RECORD, Record
from contralto.align.monitoring.report import mean_with_error, verdict
from contralto.common.files import replace_text
from contralto.common.html import render_page

__all__ = ["differing_settings", "figures_of_runs", "find_runs", "run_labels", "write_comparison"]


def find_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the folders of runs; a folder of on-policy rounds stands for the trainings of its rounds, in their order.

    Args:
        folders: `output_dir` of runs, or of rounds.

    Raises:
        ValueError: a folder has no record of a training, or is named twice.
    """
    runs: list[Path] = []
    for folder in map(Path, folders):
        rounds = sorted(folder.glob(f"round-*/model/{RECORD}"), key=lambda path: int(path.parts[-3].partition("-")[2]))
        if not (folder / RECORD).is_file() and not rounds:
            raise ValueError(
                f"there is no {RECORD} in {folder}: give the output_dir of trainings with monitor_pairs above 0"
            )
        runs += [folder] if (folder / RECORD).is_file() else [path.parent for path in rounds]
    resolved = [run.resolve() for run in runs]
    if double := next((run for at, run in enumerate(runs) if run.resolve() in resolved[:at]), None):
        raise ValueError(f"the run {double} is given twice: give each run once")
    return runs


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


def write_comparison(folders: Sequence[str | os.PathLike[str]], path: Path) -> Path:
    """Write one page about several runs.

    Args:
        folders: see `find_runs`; at least two runs.
        path: the page.

    Returns:
        The path of the page.

    Raises:
        ValueError: a folder has no record, or there is just one run.
        ImportError: matplotlib is not installed.
    """
    runs = find_runs(folders)
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two runs, not {len(runs)}")
    records = dict(zip(run_labels(runs), map(Record.load, runs), strict=True))
    page = render_page(
        "contralto.align.monitoring",
        "side_by_side.html.j2",
        records=records,
        verdicts={label: verdict(record) for label, record in records.items()},
        figures=figures_of_runs(records),
        settings=differing_settings(records),
        plots=[inline_svg(panel) for panel in panels_of_runs(records)],
        same_pairs=len({record.key for record in records.values()}) == 1,
        version=__version__,
    )
    replace_text(path, page)
    return path


def figures_of_runs(records: Mapping[str, Record]) -> list[tuple[str, list[str]]]:
    """Return the rows of a table of the last measurements, a column per run; a figure that no run has is left out.

    Args:
        records: the records by the labels of the runs.
    """
    figures: dict[str, Callable[[Record], str]] = {
        "loss": lambda record: ", ".join(record.about["losses"]),
        "steps": lambda record: f"{record.points[-1].step} of {record.about['steps']}",
        "seconds": lambda record: f"{record.about['seconds']:.0f}",
        "chosen, nats": lambda record: mean_with_error(record.points[-1].chosen),
        "rejected, nats": lambda record: mean_with_error(record.points[-1].rejected),
        "margins that grew": lambda record: f"{record.points[-1].won:.0%}",
        "chosen texts that lost": lambda record: f"{record.points[-1].displaced:.0%}",
        "KL, nats per token": lambda record: _figure(record.points[-1].kl, ".3g"),
        "tokens written": lambda record: _figure(record.points[-1].length, ".1f"),
        "warnings": lambda record: str(len(record.warnings)),
    }
    rows = [(name, [of(record) for record in records.values()]) for name, of in figures.items()]
    return [(name, values) for name, values in rows if any(values)]


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def differing_settings(records: Mapping[str, Record]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, a column per run; empty where a run has the default.

    Args:
        records: the records by the labels of the runs.
    """
    flat = [_settings(record.about) for record in records.values()]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [(name, [settings.get(name, "") for settings in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _settings(about: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run was trained with, as strings by name."""
    single = {
        name: about[name] for name in ("model", "adapter", "learning_rate", "beta", "batch", "processes", "device")
    }
    sizes = {f"rows of {name}": size for name, size in about["datasets"].items() if size is not None}
    versions = {f"version of {name}": version for name, version in about["versions"].items()}
    return {name: str(value) for name, value in (single | sizes | about["settings"] | versions).items()}
