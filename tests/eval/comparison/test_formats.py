"""The tables of a comparison in Markdown, CSV and LaTeX: those of the page, each cell once."""

import csv
import io
import re

import pytest
from helpers import comparisons

from contralto.cli.compare import SUFFIXES, _task_names
from contralto.eval.comparison import report
from contralto.eval.comparison.report.formats import CSV_COLUMNS, FORMATS, _tex, render, render_tables
from contralto.eval.comparison.report.tabulate import Cell, Table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def comparison():
    return comparisons.comparison()


def _cells(comparison):
    every = [("", report.glance(comparison))]
    every += [(task["name"], table) for task in comparison["tasks"] for table in report.tables(task)]
    for name, table in every:
        for row, role, cells in table.rows:
            for column, cell in zip(table.head, cells, strict=True):
                yield name or column, table.title, row, role, column, cell


def test_the_command_offers_all_formats():
    assert list(SUFFIXES) == list(FORMATS)


def test_csv_has_a_line_for_every_cell(comparison):
    head, *lines = csv.reader(io.StringIO(render(comparison, "csv")))
    assert tuple(head) == CSV_COLUMNS
    expected = [[*where, cell.main, cell.small, "yes" if cell.is_found else ""] for *where, cell in _cells(comparison)]
    assert lines == expected
    assert any(line[-1] for line in lines)


@pytest.mark.parametrize("name", ["=1+2", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_no_name_is_a_formula_of_a_spreadsheet(name):
    table = Table(name, "", [name], [(name, "", [Cell("-0.500", "[-1, 0]")])])
    _, line = csv.reader(io.StringIO(render_tables("", [(name, table)], "csv"), newline=""))
    assert line == [*[f"'{name.strip()}"] * 3, "", f"'{name.strip()}", "-0.500", "[-1, 0]", ""]


def test_markdown_has_every_cell_in_tables_of_one_width(comparison):
    text = render(comparison, "markdown")
    assert text.startswith(comparison["verdict"]["sentence"])
    for *_, cell in _cells(comparison):
        assert f"**{cell.main}**" in text if cell.is_found else cell.main in text
        assert cell.small.replace("|", "\\|") in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_latex_escapes_what_it_would_read(comparison):
    text = render(comparison, "latex")
    body = re.sub(r"\\[&%$#_{}]|\\(text[a-z]+|geq|pm)|\$[^$]*\$", "", text)
    assert (
        text.count(r"\begin{table}")
        == text.count(r"\end{table}")
        == 1 + len([table for task in comparison["tasks"] for table in report.tables(task)])
    )
    for line in body.splitlines()[1:]:
        assert not set("#_~^≥±") & set(line)
        assert line.count("{") == line.count("}")
    assert _tex("a_b & 5% <|x|> ≥ {") == r"a\_b \& 5\% $<$$|$x$|$$>$ $\geq$ \{"


def test_tasks_may_be_separated_by_commas(tmp_path):
    path = tmp_path / "a,b.yaml"
    path.write_text("")
    assert _task_names(["x,y", "z", str(path)]) == ["x", "y", "z", str(path)]
