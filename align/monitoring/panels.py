"""The plots of training reports, of one run or of several."""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any, NamedTuple

from markupsafe import Markup

from contralto.align.monitoring.record import Record
from contralto.common.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    TEXT,
    fit_margins,
    integer_axis,
    style_axes,
    svg_style,
    to_svg,
)

__all__ = ["Panel", "Series", "ches_panel", "inline_svg", "panels_of", "panels_of_runs", "series_of", "write_picture"]

CHOSEN, REJECTED, OTHER = BLUE, ORANGE, GREEN
SIZE = (5.2, 3.4)
"""The size of each plot, in inches."""
TITLE_WIDTH = 46
"""Characters of a line of a title."""
LOGGED = (
    ("Loss", ("loss", "eval_loss")),
    ("Accuracy of rewards", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("Gradient norm", ("grad_norm",)),
)
"""Titles of plots of the trainer's log, with the keys of the training and held-out values."""
STEP = "step"


class Panel(NamedTuple):
    """A plot of the report."""

    title: str
    draw: Callable[[Any], None]
    x_label: str = STEP


class Series(NamedTuple):
    """A value per step, of one run."""

    title: str
    points: list[tuple[int, float]]


# --------------------------------------------------------------------------------------------------------------- one run


def panels_of(record: Record) -> list[Panel]:
    """Return the plots of a run.

    Args:
        record: a record with at least one measurement.
    """
    panels = [
        Panel("Change of log-probability since the start, nats", lambda axes: _change_plot(axes, record)),
        Panel("Share of pairs", lambda axes: _share_plot(axes, record)),
    ]
    if record.points[-1].kl is not None:
        panels.append(Panel("KL(reference ‖ policy), nats per token", lambda axes: _line(axes, record, "kl")))
    if record.points[-1].length is not None:
        panels.append(Panel("Tokens that the model writes", lambda axes: _line(axes, record, "length")))
    return panels + [
        Panel(title, lambda axes, keys=keys: _log_plot(axes, record, keys))  # type: ignore[misc]
        for title, keys in LOGGED
        if any(key in line for line in record.logs for key in keys)
    ]


def ches_panel(pairs: Sequence[tuple[float, float]]) -> Panel:
    """Return the plot of the chosen completions' changes against ln-CHES.

    Args:
        pairs: ln-CHES and change of each pair.
    """
    return Panel("Chosen texts' change, by ln-CHES before training", lambda axes: _ches_plot(axes, pairs), "ln-CHES")


def _change_plot(axes: Any, record: Record) -> None:
    """Plot the means, and the middle half of the pairs as a band."""
    steps = [point.step for point in record.points]
    for name, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        values = [getattr(point, name) for point in record.points]
        axes.plot(steps, [fmean(each) for each in values], color=colour, label=name, marker=".")
        if len(values[0]) > 1:
            quarters = [quantiles(each, n=4) for each in values]
            axes.fill_between(steps, [q[0] for q in quarters], [q[2] for q in quarters], color=colour, alpha=0.18, lw=0)
    axes.axhline(0, color=GREY, lw=0.8)


def _share_plot(axes: Any, record: Record) -> None:
    points = record.points[1:] or record.points  # before the first step nothing has changed
    steps = [point.step for point in points]
    axes.plot(steps, [point.displaced for point in points], color=REJECTED, marker=".", label="chosen text lost")
    axes.plot(steps, [point.won for point in points], color=OTHER, marker=".", label="margin grew")
    axes.set_ylim(-0.03, 1.03)


def _line(axes: Any, record: Record, name: str) -> None:
    points = [(point.step, getattr(point, name)) for point in record.points if getattr(point, name) is not None]
    axes.plot(*zip(*points, strict=True), color=CHOSEN, marker=".")


def _log_plot(axes: Any, record: Record, keys: Sequence[str]) -> None:
    for key, colour in zip(keys, (CHOSEN, REJECTED), strict=False):
        points = _logged(record, key)
        if points:
            label = "held-out" if key.startswith("eval_") else "training"
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=_marker(points))


def _logged(record: Record, key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in record.logs if key in line]


def _marker(points: Sequence[Any]) -> str | None:
    return "." if len(points) < 40 else None


def _ches_plot(axes: Any, pairs: Sequence[tuple[float, float]]) -> None:
    axes.plot(*zip(*pairs, strict=True), color=CHOSEN, marker="o", ls="none", alpha=0.7)
    axes.axhline(0, color=GREY, lw=0.8)


# ------------------------------------------------------------------------------------------------------------ several runs


def panels_of_runs(runs: Mapping[str, Iterable[Series]]) -> list[Panel]:
    """Return the plots of several runs, with a line per run in each.

    Args:
        runs: the series of each run by its label; empty ones are left out.
    """
    by_title: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for label, series in runs.items():
        for title, points in series:
            if points:
                by_title.setdefault(title, {})[label] = points
    colours = {label: PALETTE[at % len(PALETTE)] for at, label in enumerate(runs)}
    return [
        Panel(title, lambda axes, lines=lines: _lines(axes, lines, colours))  # type: ignore[misc]
        for title, lines in by_title.items()
    ]


def series_of(record: Record) -> Iterable[Series]:
    """Yield the values of a run by which it is compared with others; empty where they were not measured.

    Args:
        record: a record with at least one measurement.
    """
    yield Series("Chosen: change of log-probability, nats", [(p.step, fmean(p.chosen)) for p in record.points])
    yield Series("Rejected: change of log-probability, nats", [(p.step, fmean(p.rejected)) for p in record.points])
    later = record.points[1:] or record.points
    yield Series("Share of pairs whose margin grew", [(p.step, p.won) for p in later])
    yield Series("Share of chosen texts that lost", [(p.step, p.displaced) for p in later])
    yield Series("KL(reference ‖ policy), nats per token", [(p.step, p.kl) for p in record.points if p.kl is not None])
    lengths = [(p.step, p.length) for p in record.points if p.length is not None]
    yield Series("Tokens that the model writes", lengths)
    for title, keys in LOGGED:
        for key in keys:
            yield Series(f"{title}, held-out" if key.startswith("eval_") else title, _logged(record, key))


def _lines(axes: Any, lines: Mapping[str, list[tuple[int, float]]], colours: Mapping[str, str]) -> None:
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), color=colours[label], label=label, marker=_marker(points))


# ---------------------------------------------------------------------------------------------------------------- drawing


def _figure(count: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows))
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in grid[count:]:
        unused.set_axis_off()
    return figure, grid[:count]


def _fill(axes: Any, panel: Panel) -> None:
    panel.draw(axes)
    axes.set_title(textwrap.fill(panel.title, TITLE_WIDTH), color=TEXT, size=11)
    axes.set_xlabel(panel.x_label, color=TEXT, size=10)
    style_axes(axes)
    if panel.x_label == STEP:
        integer_axis(axes.xaxis)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=TEXT)


def _title_height(panels: Iterable[Panel]) -> float:
    """Return the height of the highest title, in inches."""
    lines = max(len(textwrap.wrap(panel.title, TITLE_WIDTH)) for panel in panels)
    return 0.17 + 0.18 * lines


def inline_svg(panel: Panel) -> Markup:
    """Return a plot as inline SVG with text as text, in colours for light and dark backgrounds.

    Args:
        panel: the plot.
    """
    with svg_style(panel.title):
        figure, axes = _figure(1, 1)
        _fill(axes[0], panel)
        fit_margins(figure, axes, top=_title_height([panel]), bottom=0.5)
        return to_svg(figure)


def write_picture(panels: Sequence[Panel], path: Path) -> None:
    """Write all plots into one PNG with a white background.

    Args:
        panels: the plots.
        path: the file.
    """
    figure, grid = _figure(len(panels), min(3, len(panels)))
    for axes, panel in zip(grid, panels, strict=True):
        _fill(axes, panel)
    fit_margins(figure, grid, top=_title_height(panels), bottom=0.5)
    figure.savefig(path, dpi=110)
