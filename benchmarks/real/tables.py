"""Make the cells of the card's tables: shares and means with intervals, paired tests, detectable differences."""

import math
from collections.abc import Sequence

import numpy as np

from contralto.eval import stats
from contralto.eval.stats.counts import mean, score_table
from real.line import Figure

__all__ = ["against", "against_means", "mean_cell", "mean_figure", "p_text", "share_cell", "share_figure", "table"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table.

    Args:
        head: The headings.
        rows: The cells of each row.
    """
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def share_figure(hits: Sequence[bool]) -> Figure:
    """Return a share with its Wilson interval.

    Args:
        hits: Whether each item counts.
    """
    found = stats.proportion(hits)
    return Figure(found.value, found.low, found.high)


def share_cell(hits: Sequence[bool]) -> str:
    """Return a share with its Wilson interval as text.

    Args:
        hits: Whether each item counts.
    """
    return _cell(share_figure(hits), 3)


def mean_figure(values: Sequence[float], *, resamples: int = 2000) -> Figure:
    """Return a mean with its bootstrap interval.

    Args:
        values: One per item.
        resamples: The number of draws.
    """
    found = stats.Bootstrap({"values": score_table(values)}, resamples=resamples)
    return Figure(*found.interval("values", mean))


def mean_cell(values: Sequence[float], *, digits: int = 3) -> str:
    """Return a mean with its bootstrap interval as text.

    Args:
        values: One per item.
        digits: Digits after the point.
    """
    return _cell(mean_figure(values), digits)


def against(control: Sequence[bool], hits: Sequence[bool]) -> str:
    """Return the exact McNemar test of two systems on the same items, with the smallest detectable difference.

    Args:
        control: Whether the control is right on each item.
        hits: Whether the other system is right.
    """
    test = stats.mcnemar_exact(control, hits)
    found = stats.detectable(len(hits), (test.won + test.lost) / len(hits))
    return f"+{test.won} / -{test.lost}, p {p_text(test.p)}; {_detectable(found, 3)}"


def against_means(control: Sequence[float], values: Sequence[float], *, digits: int = 3) -> str:
    """Return the paired difference of two means, its sign-flip test, and the smallest detectable difference.

    Args:
        control: The control's value of each item.
        values: The other system's.
        digits: Digits after the point.
    """
    differences = np.asarray(values, dtype=np.float64) - np.asarray(control, dtype=np.float64)
    test = stats.sign_flip(differences)
    found = None
    if test.units:
        error = math.sqrt(float((differences**2).sum())) / differences.size
        found = stats.detectable_by_error(error, units=differences.size, apart=test.units)
    return f"{differences.mean():+.{digits}f}, p {p_text(test.p)}; {_detectable(found, digits)}"


def p_text(p: float) -> str:
    """Return a p-value with two significant digits.

    Args:
        p: The value.
    """
    return f"{p:.2g}"


def _cell(figure: Figure, digits: int) -> str:
    value, low, high = figure
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _detectable(difference: float | None, digits: int) -> str:
    return "detectable: none" if difference is None else f"detectable {difference:.{digits}f}"
