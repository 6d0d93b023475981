"""Every example runs, is short, and prints what its embedded models say."""

import runpy
from pathlib import Path

import pytest

ELSEWHERE = {"ray_data"}
"""Needs a cluster; its functions are tested in test_pipeline."""
EXAMPLES = [
    path for path in sorted((Path(__file__).parents[2] / "examples").glob("*.py")) if path.stem not in ELSEWHERE
]
SOLVED = "finds 4: 9 + 4 = 13. loses 2: 13 - 2 = 11. wins 5: 11 + 5 = 16. sells 3: 16 - 3 = 13. #### 13"
SAYS = {
    "cd": ["finds 4: 9 + 4 = 13. loses 2: 13 - 2 = 11. #### 11", SOLVED],
    "speculative": [SOLVED, "forwards of the expert"],
    "cid": ["lam 0: Mia went", "lam 50: Mia went"],
    "ritual": [": "],
}
"""What some of them are known to print."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem == "cd" else pytest.mark.slow) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_examples(path, capsys, monkeypatch):
    if path.stem == "self_contrast":
        pytest.importorskip("peft")
    monkeypatch.setattr("sys.argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert out.strip()
    assert all(text in out for text in SAYS.get(path.stem, []))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 25
    assert lines[0].startswith('"""')
