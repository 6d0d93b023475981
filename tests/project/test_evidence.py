"""The pages that name tests for what they say: every line names some, and all of them exist.

A promise also names what makes its tests fail: a test that breaks the mechanism, or a declared change that one of them, or their file, must notice.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/.]+)::(\w+)`")
CHANGED = re.compile(r"`([\w/]+\.py)`: `([^`]+)`")
PAGES = {"docs/security.md": "threat", "docs/promises.md": "promise"}
"""Pages, with the heading of the first column of their tables of evidence."""


@cache
def functions(file):
    path = ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def missing(text):
    """Return the tests that a text names and that do not exist."""
    return [f"{file}::{name}" for file, name in NAMED.findall(text) if name not in functions(file)]


def rows(text, heading):
    """Yield the cells of the rows of tables with a heading."""
    wanted = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if not line.startswith("|"):
            wanted = False
        elif cells[0] == heading:
            wanted = True
        elif wanted and not line.startswith("|--"):
            yield cells


def unproved(text, heading, column):
    """Return the first cells of rows that name no test in a column."""
    return [cells[0] for cells in rows(text, heading) if not NAMED.search(cells[column])]


@cache
def changes():
    listings = sorted((ROOT / "tests/mutants/declared").glob("*.yaml"))
    return [change for listing in listings for change in yaml.safe_load(listing.read_text(encoding="utf-8"))]


def unbroken(cells):
    """Return whether nothing that a promise names makes one of its tests fail."""
    tests = {(file, name) for file, name in NAMED.findall(cells[-2])}
    if set(NAMED.findall(cells[-1])) - tests:
        return False
    for file, old in CHANGED.findall(cells[-1]):
        for change in changes():
            noticed = {tuple(test.partition("[")[0].partition("::")[::2]) for test in change["tests"]}
            known = noticed & (tests | {(file, "") for file, _ in tests})
            if change["file"] == file and change["old"].strip().startswith(old) and known:
                return False
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_line_names_tests_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(NAMED.findall(text)) > 30
    assert len(NAMED.findall(text)) == text.count("::test_")
    assert missing(text) == []
    assert unproved(text, PAGES[page], -1 if page == "docs/security.md" else -2) == []


def test_every_promise_names_what_breaks_it():
    promises = list(rows((ROOT / "docs/promises.md").read_text(encoding="utf-8"), "promise"))
    assert len(promises) > 30
    assert [cells[0] for cells in promises if len(cells) != 4 or unbroken(cells)] == []


def test_a_line_without_a_test_and_a_test_that_is_gone_are_found():
    gone = "`tests/project/test_evidence.py::test_gone`, `tests/none.py::test_a`"
    here = "`tests/project/test_evidence.py::test_every_line_names_tests_that_exist`"
    assert missing(f"{here}, {gone}") == ["tests/project/test_evidence.py::test_gone", "tests/none.py::test_a"]
    table = f"| threat | tests |\n|---|---|\n| one | {here} |\n| two | it is safe |\n\n| other | |\n|---|---|\n| three | |\n"
    assert unproved(table, "threat", -1) == ["two"]


def test_a_promise_that_nothing_breaks_is_found():
    of_store = "`tests/data_gen/test_store.py::test_the_first_answer_stands_and_ends_the_failure`"
    change = "`data_gen/store.py`: `INSERT OR IGNORE INTO answers`"
    assert not unbroken(["it stands", "", of_store, change])
    for without in (
        "",
        "`data_gen/store.py`: `another text`",
        "`data_gen/rows.py`: `INSERT OR IGNORE INTO answers`",
        of_store,
    ):
        assert unbroken(["it stands", "", of_store, without])
    other = "`tests/data_gen/test_rows.py::test_another`"  # a change that the named test need not notice
    assert unbroken(["it stands", "", other, change])
