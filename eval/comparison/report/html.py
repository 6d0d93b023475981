"""A comparison as one HTML page without scripts that needs no network."""

from collections.abc import Mapping, Sequence
from typing import Any

from contralto.common.html import render_page
from contralto.eval.comparison.report.plots import plots
from contralto.eval.comparison.report.tabulate import glance, tables

__all__ = ["page"]


def page(
    comparison: Mapping[str, Any],
    *,
    title: str = "Decoders compared",
    lead: str = "",
    before: str = "",
    reading: Sequence[str] = (),
    made_by: str = "contralto compare",
) -> str:
    """Render a comparison as one self-contained page, for light and dark paper.

    Args:
        comparison: The result of `compare`.
        title: The title of the page.
        lead: An introduction of one paragraph.
        before: HTML (`Markup`) that stands before the figures.
        reading: Further paragraphs on how to read them.
        made_by: The command that made the page.

    Returns:
        The HTML.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return render_page(
        "contralto.eval.comparison.report",
        "report.html.j2",
        title=title,
        lead=lead,
        before=before,
        reading=reading,
        made_by=made_by,
        comparison=comparison,
        glance=glance(comparison),
        tables=tables,
        plots=plots,
        verdict=_verdict,
    )


def _verdict(answer: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """Return right or wrong for an answer, or its score."""
    score = answer["score"]
    return {0.0: "wrong", 1.0: "right"}.get(score, f"{score:.2f}") if task["higher_is_better"] else f"{score:.2f}"
