"""The pages that name tests for what they say: every line names some, and all of them exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/.]+)::(\w+)`")
PAGES = {"docs/security.md": "threat"}
"""Pages, with the heading of the first column of their tables of evidence."""


@cache
def functions(file):
    path = ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def missing(text):
    """Return the tests that a text names and that do not exist."""
    return [f"{file}::{name}" for file, name in NAMED.findall(text) if name not in functions(file)]


def unproved(text, heading):
    """Return the rows of tables with a heading that name no test."""
    rows, wanted = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if not line.startswith("|"):
            wanted = False
        elif cells[0] == heading:
            wanted = True
        elif wanted and not line.startswith("|--") and not NAMED.search(cells[-1]):
            rows.append(line)
    return rows


@pytest.mark.parametrize("page", PAGES)
def test_every_line_names_tests_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(NAMED.findall(text)) > 30
    assert len(NAMED.findall(text)) == text.count("::test_")
    assert missing(text) == []
    assert unproved(text, PAGES[page]) == []


def test_a_line_without_a_test_and_a_test_that_is_gone_are_found():
    gone = "`tests/project/test_evidence.py::test_gone`, `tests/none.py::test_a`"
    here = "`tests/project/test_evidence.py::test_every_line_names_tests_that_exist`"
    assert missing(f"{here}, {gone}") == ["tests/project/test_evidence.py::test_gone", "tests/none.py::test_a"]
    table = f"| threat | tests |\n|---|---|\n| one | {here} |\n| two | it is safe |\n\n| other | |\n|---|---|\n| three | |\n"
    assert unproved(table, "threat") == ["| two | it is safe |"]
