"""The style sheet that all pages share: contrast, no fixed widths, tables that scroll."""

import re
from pathlib import Path

import pytest
from helpers import pages

from contralto.common.plots import GREY, PALETTE, TEXT

ROOT = Path(__file__).parents[2]
PARTS = ("contralto/cli", "contralto/common", "align", "data_gen", "decoding", "eval", "testbed")
TEMPLATES = [path for part in PARTS for path in sorted((ROOT / part).rglob("*.html.j2"))]
ON = ("paper", "panel")
"""What text stands on."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_either_paper(scheme):
    colours = pages.colours()[scheme]
    for name in ("ink", "soft", "accent", "found", "lost"):
        for paper in ON:
            assert pages.contrast(colours[name], colours[paper]) >= 4.5, (name, paper)
    assert pages.contrast(colours["accent"], colours["mark"]) >= 4.5
    for colour in (*PALETTE, GREY):
        assert pages.contrast(colour, colours["paper"]) >= 3


def test_text_of_plots_is_the_pages_own_colour():
    assert pages.colours()["light"]["soft"] == TEXT  # pictures have white paper; SVG takes `--soft`


def test_the_contrast_is_that_of_the_standard():
    assert pages.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert pages.contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_pages_fit_every_screen(template):
    text = template.read_text(encoding="utf-8")
    assert not re.search(r"(?<![-\w])(min-)?width: *\d{3,}px", text + pages.style())
    assert not re.search(r"(?<![-\w])(min-)?width: *(1[3-9]|[2-9]\d)(\.\d+)?rem", text)  # 12 rem fit 400 pixels twice
    assert text.count("<table") == text.count('<div class="scroll"')
    if "<html" in text:
        assert "{{ base_style }}" in text
        assert 'name="viewport" content="width=device-width' in text
        assert "<script" not in text


def test_the_first_column_stays_in_view():
    rule = re.search(r"th:first-child, td:first-child \{([^}]*)\}", pages.style())[1]
    assert "position: sticky; left: 0" in rule
    assert "background: var(--paper)" in rule  # else the cells behind it would show
