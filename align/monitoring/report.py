"""The report of a training: one HTML page without scripts or network access, and its plots as a PNG.

Both are made from `monitor.json`, which `monitor.Monitor` writes at every measurement, so `write_report(folder)` also works for a run that
was killed.
"""

import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from contralto import __version__
from contralto.align.monitoring.record import Record
from contralto.common.html import render_page
from contralto.common.plots import BLUE, GREEN, GREY, ORANGE, style_axes, svg_style, to_svg

__all__ = ["PAGE", "PICTURE", "ches_correlation", "verdict", "versions", "write_report"]

PAGE, PICTURE = "training_report.html", "training_report.png"
CHOSEN, REJECTED, OTHER = BLUE, ORANGE, GREEN
SIZE = (5.2, 3.4)  # inches, of each plot
WORST_PAIRS = 6
"""Pairs that are shown: those whose chosen completion lost most."""
SIGNIFICANCE = 0.05
LEAST_LOSS = 0.01
"""Nats that a completion must have lost to be shown."""


class Correlation(NamedTuple):
    """Spearman's rank correlation."""

    rho: float
    p: float
    n: int


class Panel(NamedTuple):
    """A plot of the report."""

    title: str
    draw: Callable[[Any], None]


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write the report of a run.

    Args:
        folder: the run's `output_dir`, with its `monitor.json`.

    Returns:
        The path of the page; the picture is beside it.

    Raises:
        ValueError: there is no record in the folder.
        ImportError: matplotlib or scipy is not installed.
    """
    output = Path(folder)
    record = Record.load(output)
    panels = _panels(record)
    _write_picture(panels, output / PICTURE)
    page = render_page(
        "contralto.align.monitoring",
        "report.html.j2",
        record=record,
        about=record.about,
        verdict=verdict(record),
        plots=[_inline_svg(panel) for panel in panels],
        figures=_figures(record),
        worst=_worst(record),
        ches=_ches_sentence(record),
        version=__version__,
    )
    (output / PAGE).write_text(page, encoding="utf-8")
    return output / PAGE


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that determine a training."""
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {"contralto": __version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in names
    }


# ---------------------------------------------------------------------------------------------------------------- words


def verdict(record: "Record") -> str:
    """Return the result of the training in one sentence or two.

    Args:
        record: a record with at least one measurement.
    """
    point = record.points[-1]
    held = "held-out" if record.source != "train_dataset" else "training"
    sentence = (
        f"After {point.step} steps the chosen texts of {len(point.chosen)} {held} pairs are {_likelier(point.chosen)}, "
        f"the rejected ones {_likelier(point.rejected)}; the margin has grown in {point.won:.0%} of the pairs, and {point.displaced:.0%} of "
        "the chosen texts have lost likelihood."
    )
    return (
        sentence if point.kl is None else f"{sentence} The policy is {point.kl:.2g} nats per token from its reference."
    )


def _likelier(changes: Sequence[float]) -> str:
    mean = sum(changes) / len(changes)
    return f"{abs(mean):.3g} nats {'likelier' if mean >= 0 else 'less likely'}"


def ches_correlation(record: "Record") -> Correlation | None:
    """Return the rank correlation of ln-CHES before training with the change of the chosen completions.

    Razin et al. 2024 (arXiv 2410.08847) expect a negative correlation: a high score, then displacement.

    Args:
        record: a record with at least one measurement.

    Returns:
        The correlation; None if there are fewer than five pairs, or all have the same score or change.
    """
    from scipy.stats import spearmanr

    pairs = _ches_pairs(record)
    if len(pairs) < 5 or len({score for score, _ in pairs}) < 2 or len({change for _, change in pairs}) < 2:
        return None
    result = spearmanr(*zip(*pairs, strict=True))
    return Correlation(float(result.statistic), float(result.pvalue), len(pairs))


def _ches_pairs(record: "Record") -> list[tuple[float, float]]:
    return [
        (score, change)
        for score, change in zip(record.ches, record.points[-1].chosen, strict=True)
        if score is not None
    ]


def _ches_sentence(record: "Record") -> str:
    correlation = ches_correlation(record)
    if correlation is None:
        return ""
    figures = f"Spearman's rho {correlation.rho:+.2f}, p {correlation.p:.2g}, {correlation.n} pairs"
    if correlation.p >= SIGNIFICANCE:
        return f"ln-CHES before training does not say which chosen texts lost likelihood here ({figures})."
    if correlation.rho < 0:
        return f"Pairs with a high ln-CHES lost likelihood, as Razin et al. expect ({figures}): leaving them out would help."
    return f"Pairs with a high ln-CHES gained likelihood, against what Razin et al. expect ({figures})."


def _figures(record: "Record") -> list[tuple[str, list[str]]]:
    """Return the rows of a table of the first, the middle and the last measurement."""
    points = record.points
    kept = [points[0], points[len(points) // 2], points[-1]] if len(points) > 2 else points
    rows = [
        ("step", [str(point.step) for point in kept]),
        ("chosen, nats", [_mean_with_error(point.chosen) for point in kept]),
        ("rejected, nats", [_mean_with_error(point.rejected) for point in kept]),
        ("chosen texts that lost", [f"{point.displaced:.0%}" if point.step else "" for point in kept]),
        ("margins that grew", [f"{point.won:.0%}" if point.step else "" for point in kept]),
    ]
    if points[-1].kl is not None:
        rows.append(("KL, nats per token", ["" if point.kl is None else f"{point.kl:.3g}" for point in kept]))
    if points[-1].length is not None:
        rows.append(("tokens written", ["" if point.length is None else f"{point.length:.1f}" for point in kept]))
    return rows


def _mean_with_error(values: Sequence[float]) -> str:
    """Format the mean and twice its standard error."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return f"{mean:+.2f} ± {2 * (variance / len(values)) ** 0.5:.2f}"


def _worst(record: "Record") -> list[dict[str, Any]]:
    """Return the pairs whose chosen completion lost the most log-probability, the worst first."""
    point = record.points[-1]
    order = sorted(range(len(point.chosen)), key=lambda i: point.chosen[i])[:WORST_PAIRS]
    return [
        record.pairs[i] | {"change": point.chosen[i], "other": point.rejected[i]}
        for i in order
        if point.chosen[i] < -LEAST_LOSS
    ]


# ---------------------------------------------------------------------------------------------------------------- plots


def _panels(record: "Record") -> list[Panel]:
    panels = [
        Panel("Change of log-probability since the start, nats", lambda axes: _change_plot(axes, record)),
        Panel("Share of pairs", lambda axes: _share_plot(axes, record)),
    ]
    if record.points[-1].kl is not None:
        panels.append(Panel("KL(reference ‖ policy), nats per token", lambda axes: _lines(axes, record, ("kl",))))
    if record.points[-1].length is not None:
        panels.append(Panel("Tokens that the model writes", lambda axes: _lines(axes, record, ("length",))))
    panels += [
        Panel(title, lambda axes, keys=keys: _log_plot(axes, record, keys))  # type: ignore[misc]
        for title, keys in (
            ("Loss", ("loss", "eval_loss")),
            ("Accuracy of rewards", ("rewards/accuracies", "eval_rewards/accuracies")),
            ("Gradient norm", ("grad_norm",)),
        )
        if any(key in line for line in record.logs for key in keys)
    ]
    if ches_correlation(record) is not None:
        panels.append(Panel("Chosen texts' change, by ln-CHES before training", lambda axes: _ches_plot(axes, record)))
    return panels


def _change_plot(axes: Any, record: "Record") -> None:
    """Plot the means, and the middle half of the pairs as a band."""
    from statistics import quantiles

    steps = [point.step for point in record.points]
    for name, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        values = [getattr(point, name) for point in record.points]
        axes.plot(steps, [sum(each) / len(each) for each in values], color=colour, label=name, marker=".")
        if len(values[0]) > 1:
            quarters = [quantiles(each, n=4) for each in values]
            axes.fill_between(steps, [q[0] for q in quarters], [q[2] for q in quarters], color=colour, alpha=0.18, lw=0)
    axes.axhline(0, color=GREY, lw=0.8)


def _share_plot(axes: Any, record: "Record") -> None:
    points = record.points[1:] or record.points  # before the first step nothing has changed
    steps = [point.step for point in points]
    axes.plot(steps, [point.displaced for point in points], color=REJECTED, marker=".", label="chosen text lost")
    axes.plot(steps, [point.won for point in points], color=OTHER, marker=".", label="margin grew")
    axes.set_ylim(-0.03, 1.03)


def _lines(axes: Any, record: "Record", names: Sequence[str]) -> None:
    for name in names:
        points = [(point.step, getattr(point, name)) for point in record.points if getattr(point, name) is not None]
        axes.plot(*zip(*points, strict=True), color=CHOSEN, marker=".")


def _log_plot(axes: Any, record: "Record", keys: Sequence[str]) -> None:
    for key, colour in zip(keys, (CHOSEN, REJECTED), strict=False):
        points = [(line["step"], line[key]) for line in record.logs if key in line]
        if points:
            label = "held-out" if key.startswith("eval_") else "training"
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="." if len(points) < 40 else None)


def _ches_plot(axes: Any, record: "Record") -> None:
    axes.plot(*zip(*_ches_pairs(record), strict=True), color=CHOSEN, marker="o", ls="none", alpha=0.7)
    axes.axhline(0, color=GREY, lw=0.8)


def _figure(count: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows))
    # fixed margins: layout engines take a second per figure
    left, right, bottom, top = 0.65 / SIZE[0], 0.1 / SIZE[0], 0.5 / SIZE[1], 0.35 / SIZE[1]
    figure.subplots_adjust(
        left / columns,
        bottom / rows,
        1 - right / columns,
        1 - top / rows,
        wspace=left + right,
        hspace=bottom + top + 0.05,
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in grid[count:]:
        unused.set_axis_off()
    return figure, grid[:count]


def _fill(axes: Any, panel: Panel) -> None:
    panel.draw(axes)
    axes.set_title(panel.title, color=GREY, size=11)
    axes.set_xlabel("ln-CHES" if "CHES" in panel.title else "step", color=GREY, size=10)
    style_axes(axes)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=GREY)


def _inline_svg(panel: Panel) -> Markup:
    """Return a plot as inline SVG with text as text, in colours for light and dark backgrounds."""
    with svg_style(panel.title):
        figure, (axes,) = _figure(1, 1)
        _fill(axes, panel)
        return to_svg(figure)


def _write_picture(panels: Sequence[Panel], path: Path) -> None:
    """Write all plots into one PNG with a white background."""
    figure, grid = _figure(len(panels), min(3, len(panels)))
    for axes, panel in zip(grid, panels, strict=True):
        _fill(axes, panel)
    figure.savefig(path, dpi=110)
