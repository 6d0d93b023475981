"""The page and the tables of a comparison of made-up answers."""

import io
import json
import re

import pytest
from helpers import comparisons, pages
from rich.console import Console

from contralto.eval.comparison import report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def comparison():
    """As it is kept: through JSON and back."""
    return json.loads(json.dumps(comparisons.comparison()))


@pytest.fixture(scope="module")
def html(comparison):
    return report.page(comparison)


def _cells(comparison, task, row):
    return next(each for each in comparison["tasks"][task]["rows"] if each["name"] == row)["cells"]


@pytest.mark.slow
def test_the_page_needs_nothing_but_itself(html):
    assert "<script" not in html
    places = set(re.findall(r'(?:href|src)="([^"]*)"', html))
    assert all(place.startswith(("#", "data:")) for place in places if not place.startswith("#m"))
    bare = re.sub(r'xmlns(:\w+)?="[^"]*"|<rdf:RDF.*?</rdf:RDF>|<!DOCTYPE[^>]*>', "", html, flags=re.DOTALL)
    assert not re.search(r"https?://", bare)
    assert html.count("<svg") == 3 + 2  # cost, bias and buckets; cost and buckets


def test_answers_are_text_not_html(html):
    assert "&lt;b&gt;perhaps&lt;/b&gt;" in html
    assert "<b>perhaps</b>" not in html
    assert "&lt;|user|&gt;question" in html


def test_every_row_is_in_every_form(comparison, html):
    console = Console(width=160, record=True, file=io.StringIO())
    report.show(comparison, console)
    text = console.export_text()
    for task in comparison["tasks"]:
        for row in task["rows"]:
            assert f"<td>{row['name']}</td>" in html
            assert row["name"] in text
            for cell in row["cells"].values():
                shown = f"{cell['score']['value']:.3f} [{cell['score']['low']:.3f}, {cell['score']['high']:.3f}]"
                assert shown in text
    assert "cd beta=0.5 over greedy, yes as cd beta=0.5" in text


def test_tests_show_counts_p_and_holm(comparison):
    table = report.tables(comparison["tasks"][0])[1]
    rows = {name: cells for name, _, cells in table.rows}
    test = _cells(comparison, 0, "cd beta=0.5")["one"]["tests"][0]
    cell = rows["cd beta=0.5 over greedy"][0]
    assert cell.main == f"+{test['won']} / -{test['lost']}"
    assert cell.small.startswith(f"p {test['p']:.1g}")
    assert f"{test['holm']:.1g}" in cell.small
    assert cell.is_found == (test["value"] > 0 and test["holm"] < 0.05)


def test_the_glance_counts_what_survives_every_control(comparison):
    table = report.glance(comparison)
    rows = {name: cells for name, _, cells in table.rows}
    for at in range(2):
        cells = _cells(comparison, at, "cd beta=0.5").values()
        mean = sum(cell["tests"][0]["value"] for cell in cells) / 2
        won = sum(cell["tests"][0]["value"] > 0 and cell["tests"][0]["holm"] < 0.05 for cell in cells)
        all_won = sum(all(t["value"] > 0 and t["holm"] < 0.05 for t in cell["tests"]) for cell in cells)
        assert rows["cd beta=0.5"][at] == (f"{mean:+.3f}", f"({won}/{all_won} of 2)", all_won == 2)
    assert not rows["dola"][0].is_found  # as good as greedy


def test_where_less_is_better_a_fall_is_found():
    test = {"against": "greedy", "value": -0.2, "low": -0.3, "high": -0.1, "p": 0.001, "holm": 0.001}
    cell = {"tests": [test], "per_seed": [0.1]}
    row = {"name": "cd", "role": "method", "cells": {"one": cell}}
    for higher, found in ((True, False), (False, True)):
        task = {"name": "t", "rows": [row], "higher_is_better": higher}
        assert report.glance({"tasks": [task]}).rows[0][2][0].is_found == found


def test_the_cost_plot_speaks_of_the_baseline(comparison, html):
    assert "FLOPs per token, of the baseline" in html
    cost = next(table for table in report.tables(comparison["tasks"][0]) if table.title == "Cost, one")
    assert cost.rows[0][2][1].small == "x 1.00"
    assert {name: cells for name, _, cells in cost.rows}["cd beta=0.5"][0].main == "2.00"


def test_disagreements_unfold(comparison, html):
    shown = sum(len(documents) for task in comparison["tasks"] for documents in task["documents"].values())
    assert html.count('<div class="said">') == shown > 0


def test_page_terminal_and_json_have_the_same_sentences(comparison, html):
    console = Console(width=1000, record=True, file=io.StringIO())
    report.show(comparison, console)
    text = console.export_text()
    for verdict in (comparison["verdict"], *(task["verdict"] for task in comparison["tasks"])):
        assert f'<p class="verdict">{verdict["sentence"]}</p>' in html
    assert comparison["verdict"]["sentence"] in text


def test_the_rival_is_the_best_of_the_other_rows_without_a_contrast(comparison):
    rows = comparison["tasks"][1]["rows"]
    scores = {row["name"]: row["cells"] for row in rows if row["role"] != "method"}
    for model, cell in _cells(comparison, 1, "cd beta=0.5").items():
        others = [scores[name][model]["score"]["value"] for name in scores if name != "greedy"]
        assert scores[cell["rival"]["against"]][model]["score"]["value"] == max(others)
        assert cell["rival"]["holm"] >= cell["rival"]["p"]


def test_no_text_of_a_plot_is_cut(html):
    assert [pages.cut_texts(plot) for plot in pages.plots(html)] == [[]] * 5
    assert "fill: var(--soft)" in html
