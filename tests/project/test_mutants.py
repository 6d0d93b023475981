"""The mutation tester itself: its changes, its lists, and a sample of mutants that tests detect."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests/mutants"
SOURCE = '''
"""A text that stays."""
import math
def margin(scores, alpha=0.5):
    """Return nothing of interest: 1 + 1."""
    if alpha < 0:
        raise ValueError(f"alpha must be {1 + 1}")
    return math.exp(-alpha) * scores.sum(dim=-1) if alpha else True
'''


@pytest.fixture
def operators(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import operators

    return operators


def test_the_changes_of_a_function(operators):
    """Texts, imports and messages stay; every mutant is a module of its own that differs in one place."""
    found = list(operators.mutants(SOURCE))
    assert {(m.before, m.after) for m in found} == {
        ("alpha < 0", "alpha <= 0"),
        ("0", "1"),
        ("math.exp(-alpha) * scores.sum(dim=-1) if alpha else True", "math.exp(-alpha) * scores.sum(dim=-1)"),
        ("math.exp(-alpha) * scores.sum(dim=-1) if alpha else True", "True"),
        ("math.exp(-alpha) * scores.sum(dim=-1)", "math.exp(-alpha) / scores.sum(dim=-1)"),
        ("math.exp", "math.log"),
        ("-alpha", "alpha"),
        ("scores.sum(dim=-1)", "scores.sum(dim=0)"),
        ("scores.sum", "scores.mean"),
        ("-1", "1"),
        ("1", "2"),
        ("True", "False"),
    }
    for mutant in found:
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(SOURCE))
        assert mutant.where == "margin"


def _read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _is_test(name):
    """Return whether a file of tests exists, or one with that test."""
    file, _, test = name.partition("::")
    path = ROOT / file
    return path.is_file() and (not test or f"def {test.partition('[')[0]}(" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("listing", sorted((HERE / "declared").glob("*.yaml")), ids=lambda path: path.stem)
def test_declared_changes_are_of_the_sources_as_they_are(listing):
    """The text that is replaced stands in its file exactly once, and the tests that should notice exist."""
    for change in _read(listing):
        assert set(change) == {"file", "old", "new", "tests"}, change
        text = (ROOT / change["file"]).read_text(encoding="utf-8")
        assert text.count(change["old"]) == 1, change
        assert change["new"] != change["old"], change
        ast.parse(text.replace(change["old"], change["new"]))
        assert change["tests"], change
        assert all(map(_is_test, change["tests"])), change


def test_targets_are_files_with_tests():
    for pattern, tests in _read(HERE / "targets.yaml").items():
        assert list(ROOT.glob(pattern)), pattern
        assert tests, pattern
        assert all(map(_is_test, tests)), pattern


@pytest.mark.slow
def test_equivalent_changes_are_changes_of_the_sources_as_they_are(operators):
    for entry in _read(HERE / "equivalent.yaml"):
        found = operators.mutants((ROOT / entry["file"]).read_text(encoding="utf-8"))
        assert (entry["where"], entry["before"], entry["after"]) in {mutant.key for mutant in found}, entry
        assert entry["reason"], entry


def _run(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE), "--jobs", "1", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_a_sample_of_changes_is_noticed():
    """A change that no test notices is printed, and the status says so."""
    result = _run("--declared", "--sample", "2", "--fresh")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " survived" in result.stdout
