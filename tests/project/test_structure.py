"""The source tree keeps the rules of structure.py, and its docstrings are read by griffe without a warning."""

import logging

import griffe
import pytest
from project import structure


@pytest.mark.parametrize("check", structure.CHECKS)
def test_every_module_keeps_the_rules(check):
    assert structure.findings(check) == []


def test_no_modules_import_each_other():
    assert structure.circles() == []


def test_no_class_name_stands_for_two_things():
    assert structure.classes_twice() == {}


BREAKS = {
    "sizes": "def long():\n" + "    x = 1\n" * 60,
    "arrows": "from contralto.cli import generate",
    "names": "def of(name):\n    return name == 'vcd'",
    "privates": "def of(branch):\n    branch._fills = 1",
    "docstrings": "def of():\n    '''What it gives.'''",
    "undocumented": "'''A module.'''\nclass _Given:\n    def _find(self):\n        pass\n    def read(self):\n        return 1",
    "retired": "def of(told):\n    return told",
}


@pytest.mark.parametrize("check", structure.CHECKS)
def test_a_broken_rule_is_found(check):
    import ast

    module = structure.Module(
        "contralto.decoding.broken", structure.ROOT / "decoding" / "broken.py", ast.parse(BREAKS[check]), 9
    )
    assert len(list(structure.CHECKS[check](module))) == 1


def test_modules_that_import_each_other_are_found(monkeypatch):
    """Imports inside functions count."""
    import ast

    texts = {
        "contralto.a": "import contralto.b",
        "contralto.b": "def late():\n    from contralto import c",
        "contralto.c": "import contralto.a",
    }
    made = {
        name: structure.Module(name, structure.ROOT / f"{name}.py", ast.parse(text), 1) for name, text in texts.items()
    }
    monkeypatch.setattr(structure, "modules", lambda: made)
    assert structure.circles() == [["contralto.a", "contralto.b", "contralto.c"]]


@pytest.mark.slow
def test_griffe_reads_every_docstring(caplog):
    """As mkdocstrings does: an entry for each parameter, no parameter that is not there."""
    read = 0

    def walk(part):
        nonlocal read
        if part.is_alias:
            return
        if part.docstring:
            read += bool(part.docstring.parsed)
        for member in part.members.values():
            walk(member)

    with caplog.at_level(logging.WARNING, logger="griffe"):
        walk(griffe.load("contralto", search_paths=[structure.ROOT], docstring_parser="google", allow_inspection=False))
    assert [record.getMessage() for record in caplog.records] == []
    assert read > 2000
