"""A sample of the trials of `make faults`, and trials of components that are careless on purpose."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which("cc"), reason="the shim is loaded by Linux's loader, and compiled"
    ),
]


def _run(*words):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)


def test_a_sample_of_all_calls():
    """Of the components that need no model; `make faults` runs those of all."""
    names = ["store", "reference cache", "teacher cache"]
    result = _run(HERE, "--no-keep", "--every", 90, *(word for name in names for word in ("--component", name)))
    assert result.returncode == 0, result.stderr
    lines = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == names
    assert all(int(line[3]) >= 6 for line in lines), result.stdout


CARELESS = f"""
import json, os, sys
from pathlib import Path
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import injection
injection.preloaded()
import trials
from components import Component
from injection import Kind, tried

from contralto.common.files import replace_text

folder = Path(sys.argv[1]) / "trial" / "work"
CONTENT = "x" * 100

def in_place(folder, is_resumed):  # trusts a file that is there
    if not (folder / "a").exists():
        with open(folder / "a", "wb", buffering=0) as file:
            left = memoryview(CONTENT.encode())
            while left:
                left = left[file.write(left):]

def atomic(folder, is_resumed):
    if not (folder / "a").exists():
        replace_text(folder / "a", CONTENT)

def unclear(folder, is_resumed):
    try:
        atomic(folder, is_resumed)
    except OSError:
        {{}}["key"]

def stubborn(folder, is_resumed):
    if is_resumed and not (folder / "a").exists():
        raise ValueError("begin anew")
    atomic(folder, is_resumed)

def read(folder, result):
    return (folder / "a").read_text()

verdicts = {{}}
for run in (in_place, atomic, unclear, stubborn):
    component = Component(run.__name__, run, read)
    expected = trials.undisturbed(component, folder)
    for kind in Kind:
        numbers = range(trials.calls(component, folder, kind))
        made = trials.trials(component, folder, kind, numbers, expected)
        verdicts[f"{{run.__name__}} {{kind.name}}"] = [trial.verdict for trial in made]

left = {{}}
for kind in Kind:
    (folder / "a").unlink(missing_ok=True)
    number = 0 if kind in (Kind.TORN, Kind.SHORT) else 1  # the first call opens the file
    outcome = tried(lambda: in_place(folder, False), lambda result: read(folder, result), folder, kind, number)
    left[kind.name] = [outcome.how, outcome.struck, len(read(folder, None))]
print(json.dumps([verdicts, left]))
"""


def test_careless_components_are_found(tmp_path):
    """A file that is written in place, an error without a sentence, a run that cannot be resumed; and each kind does what it says."""
    result = _run("-c", CARELESS, tmp_path)
    assert result.returncode == 0, result.stderr
    verdicts, left = json.loads(result.stdout)
    for kind in ("FULL", "ERROR", "TORN", "KILLED"):
        assert "silent" in verdicts[f"in_place {kind}"]
        assert set(verdicts[f"atomic {kind}"]) <= {"recovered", "unharmed"}
        assert "recovered" in verdicts[f"atomic {kind}"]
        assert "refused" in verdicts[f"stubborn {kind}"]
    assert "unclear" in verdicts["unclear ERROR"]
    assert set(verdicts["atomic SHORT"]) == set(verdicts["atomic INTERRUPTED"]) == {"unharmed"}
    assert left == {
        "FULL": ["refused", "write a", 0],
        "ERROR": ["refused", "write a", 0],
        "TORN": ["refused", "write a", 50],
        "INTERRUPTED": ["done", "write a", 100],
        "SHORT": ["done", "write a", 100],
        "KILLED": ["killed", "", 50],
    }
