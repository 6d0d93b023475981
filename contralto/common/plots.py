"""Draw plots with matplotlib that are readable on light and on dark paper."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PALETTE",
    "TEXT",
    "fit_margins",
    "integer_axis",
    "style_axes",
    "svg_style",
    "to_svg",
]

GREY, BLUE, ORANGE, GREEN = "#7a8899", "#2f7fc1", "#c2571a", "#3a8f5b"
"""Colours of lines and points, which have a contrast of at least 3:1 with light and with dark paper."""
TEXT = "#5b6675"
"""The colour of text, which has a contrast of 4.5:1 with light paper; `to_svg` makes it the page's own, for dark paper too."""
PALETTE = (ORANGE, BLUE, GREEN, "#8a5fc0", "#b8457f", "#8f7a1e")
"""Colours of methods, strategies and other series, in their order."""


def style_axes(axes: Any, *, size: int = 10) -> None:
    """Set a grid, two spines and tick labels.

    Args:
        axes: the axes of a plot.
        size: the font size of tick labels, in points.
    """
    axes.grid(color=GREY, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=TEXT, labelsize=size, which="both")


def integer_axis(axis: Any) -> None:
    """Put the ticks of an axis at whole numbers, such as steps.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
    """
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def fit_margins(figure: Any, grid: Sequence[Any], *, top: float, bottom: float, least: float = 0.1) -> None:
    """Set the margins of a grid of plots so that no tick label is cut or covers another plot.

    Unlike matplotlib's layout engines, which take a second per figure, only the tick labels are measured.

    Args:
        figure: the figure.
        grid: its plots, drawn and with their ticks.
        top: the margin for the title above each plot, in inches.
        bottom: the margin for the labels below each plot, in inches.
        least: the smallest margin at the left and the right of each plot, in inches.
    """
    rows, columns = grid[0].get_subplotspec().get_gridspec().get_geometry()
    width, height = figure.get_size_inches() / (columns, rows)  # of a plot with its margins
    left = right = least
    for axes in grid:
        box, ticks = axes.get_window_extent(), [axis.get_tightbbox() for axis in (axes.xaxis, axes.yaxis)]
        left = max([left, *(least + (box.x0 - each.x0) / figure.dpi for each in ticks if each)])
        right = max([right, *(least + (each.x1 - box.x1) / figure.dpi for each in ticks if each)])
    inner_width, inner_height = width - left - right, height - top - bottom
    figure.subplots_adjust(
        left=left / width / columns,
        right=1 - right / width / columns,
        top=1 - top / height / rows,
        bottom=bottom / height / rows,
        wspace=(left + right) / inner_width,
        hspace=(top + bottom) / inner_height,
    )


@contextmanager
def svg_style(salt: str) -> Iterator[None]:
    """Draw with settings that make the SVG of a figure the same in every run, with text as text.

    Args:
        salt: makes the ids of the SVG; figures of one page whose ids must differ need different ones.
    """
    import matplotlib as mpl

    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "text.parse_math": False,  # names may hold dollar signs
            "svg.hashsalt": salt,
        }
    ):
        yield


def to_svg(figure: Any) -> Markup:
    """Return a figure as an SVG element for an HTML page, with text in the page's colour `--soft`.

    Args:
        figure: drawn, and saved, within `svg_style`.
    """
    image = io.StringIO()
    figure.savefig(image, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = image.getvalue().replace(f"fill: {TEXT}", "fill: var(--soft)")
    return Markup(drawn[drawn.index("<svg") :])  # drop the XML declaration, which HTML has not
