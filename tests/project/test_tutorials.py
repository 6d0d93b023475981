"""The notebooks run as they are, and print as many lines as they show."""

import json
import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

TUTORIALS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.ipynb"))
MINUTES = [path for path in TUTORIALS if path.stem != "contrastive_decoding"]
"""Notebooks that only `make test-all` runs."""


def printed(notebook):
    """The number of lines that each cell prints to the standard output."""
    texts = [
        "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return [text.count("\n") for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.full] * (path in MINUTES), id=path.stem) for path in TUTORIALS]
)
def test_tutorials(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    shown = printed(notebook)
    assert sum(shown) > 5
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    assert printed(notebook) == shown


def test_the_notebooks_show_no_machine():
    assert len(TUTORIALS) == 3
    for path in TUTORIALS:
        text = path.read_text(encoding="utf-8")
        assert json.loads(text)["cells"][0]["source"][0].startswith("# ")
        assert text.count('"# ') == 1, "headings after the title are of the second level"
        assert "/tmp/" not in text
        assert "/home/" not in text
        assert '"output_type": "error"' not in text
