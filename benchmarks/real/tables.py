"""Make the cells of the card's tables: shares and means with intervals, paired tests, detectable differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from contralto.eval import stats
from contralto.eval.stats.counts import by_cluster, mean, score_table
from real.line import Figure

__all__ = [
    "Change",
    "against",
    "against_clustered",
    "against_means",
    "mean_cell",
    "mean_figure",
    "p_text",
    "share_cell",
    "share_figure",
    "table",
]


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


class Change(NamedTuple):
    """The difference of two shares on the same items by several models."""

    value: float
    low: float
    high: float
    won: int
    """Answers that only the second system gives rightly, over all models."""
    lost: int
    p: float
    detectable: float | None

    @property
    def cells(self) -> list[str]:
        """Return the cells of a table: difference with interval, won and lost answers, p, detectable difference."""
        return [
            f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]",
            f"+{self.won} / -{self.lost}",
            p_text(self.p),
            "none" if self.detectable is None else f"{self.detectable:.3f}",
        ]


def against_clustered(
    control: NDArray[np.bool_], hits: NDArray[np.bool_], clusters: Sequence[int], *, resamples: int = 2000
) -> Change:
    """Compare two systems on the same items, several models together, where items share a cluster such as a picture.

    The unit of the test is a cluster with the answers of all models: the sign of its difference is exchanged, and all signs are
    counted, as `contralto compare` does.

    Args:
        control: `(models, items)`, whether the control is right.
        hits: `(models, items)`, whether the other system is right.
        clusters: `(items,)`, the cluster of each item.
        resamples: The number of bootstrap draws of clusters, for the interval.
    """
    change = hits.astype(np.float64) - control.astype(np.float64)
    test = stats.sign_flip(change.sum(0), clusters=clusters)
    tables = {name: score_table(each.mean(0)) for name, each in (("control", control), ("hits", hits))}
    found = stats.Bootstrap(tables, clusters=clusters, resamples=resamples).difference("control", "hits", mean)
    least = None
    if test.units:
        sums = by_cluster(change.sum(0)[:, None], clusters)
        error = math.sqrt(float((sums**2).sum())) / change.size
        least = stats.detectable_by_error(error, units=len(sums), apart=test.units)
    won, lost = int((change > 0).sum()), int((change < 0).sum())
    return Change(found.value, found.low, found.high, won, lost, test.p, least)


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
