"""Draw plots with matplotlib that are readable on light and on dark paper."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "PALETTE", "style_axes", "svg_style", "to_svg"]

GREY, BLUE, ORANGE, GREEN = "#7a8899", "#2f7fc1", "#c2571a", "#3a8f5b"
PALETTE = (ORANGE, BLUE, GREEN, "#8a5fc0", "#b8457f", "#8f7a1e")
"""Colours of methods, strategies and other series, in their order."""


def style_axes(axes: Any, *, size: int = 10) -> None:
    """Set a grid, two spines and tick labels in grey.

    Args:
        axes: the axes of a plot.
        size: the font size of tick labels, in points.
    """
    axes.grid(color=GREY, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=size, which="both")


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
    """Return a figure as an SVG element for an HTML page.

    Args:
        figure: drawn, and saved, within `svg_style`.
    """
    image = io.StringIO()
    figure.savefig(image, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Markup(image.getvalue()[image.getvalue().index("<svg") :])  # drop the XML declaration, which HTML has not
