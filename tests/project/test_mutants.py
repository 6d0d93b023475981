"""The mutation tester itself: it changes what it says, its lists are not out of date, and a sample of changes is noticed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "mutants"
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


def _run(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE), "--jobs", "1", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])


@pytest.mark.slow
def test_a_sample_of_changes_is_noticed():
    """A change that no test notices is printed, and the status says so."""
    result = _run("--declared", "--sample", "8", "--fresh")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " survived" in result.stdout
