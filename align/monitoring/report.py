"""The report of a training: one HTML page without scripts or network access, and its plots as a PNG.

Both are made from `monitor.json`, which `monitor.Monitor` writes at every measurement, so `write_report(folder)` also works for a run that
was killed.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contralto import __version__
from contralto.align.monitoring.panels import ches_panel, inline_svg, panels_of, write_picture
from contralto.align.monitoring.record import Record
from contralto.common.files import replace_text
from contralto.common.html import render_page

__all__ = ["PAGE", "PICTURE", "ches_correlation", "mean_with_error", "verdict", "write_report"]

PAGE, PICTURE = "training_report.html", "training_report.png"
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
    panels = panels_of(record)
    if ches_correlation(record) is not None:
        panels.append(ches_panel(_ches_pairs(record)))
    write_picture(panels, output / PICTURE)
    page = render_page(
        "contralto.align.monitoring",
        "report.html.j2",
        record=record,
        about=record.about,
        verdict=verdict(record),
        plots=[inline_svg(panel) for panel in panels],
        figures=_figures(record),
        worst=_worst(record),
        ches=_ches_sentence(record),
        version=__version__,
    )
    replace_text(output / PAGE, page)
    return output / PAGE


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
        ("chosen, nats", [mean_with_error(point.chosen) for point in kept]),
        ("rejected, nats", [mean_with_error(point.rejected) for point in kept]),
        ("chosen texts that lost", [f"{point.displaced:.0%}" if point.step else "" for point in kept]),
        ("margins that grew", [f"{point.won:.0%}" if point.step else "" for point in kept]),
    ]
    if points[-1].kl is not None:
        rows.append(("KL, nats per token", ["" if point.kl is None else f"{point.kl:.3g}" for point in kept]))
    if points[-1].length is not None:
        rows.append(("tokens written", ["" if point.length is None else f"{point.length:.1f}" for point in kept]))
    return rows


def mean_with_error(values: Sequence[float]) -> str:
    """Format the mean and twice its standard error.

    Args:
        values: at least one value.

    Examples:
        >>> mean_with_error([1.0, 2.0, 3.0])
        '+2.00 ± 1.15'
    """
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
