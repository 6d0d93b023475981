"""Run the documentation: every docstring example, the README's example, the paper index."""

import doctest
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PARTS = ("align", "contralto", "data_gen", "decoding", "eval", "recipes", "testbed")


def modules():
    """Every module with an example; those that import vLLM are run where there is one."""
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            if ">>>" not in path.read_text() or (part == "contralto" and path.relative_to(ROOT).parts[1] in PARTS):
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name if part == "contralto" else f"contralto.{name}"


@pytest.mark.parametrize("name", list(modules()))
def test_docstring_examples(name):
    module = import_module(name)
    import torch

    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_rule_has_an_example():
    rules = import_module("contralto.decoding.rules")
    assert all(">>>" in getattr(rules, name).__doc__ for name in rules.__all__)


def test_readme_example_prints_what_it_says(capsys, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    runpy.run_path(str(tmp_path / "example.py"))
    said = re.findall(r"^# (.*)$", code, flags=re.MULTILINE)
    assert capsys.readouterr().out.split("\n")[: len(said)] == said


def test_the_readme_is_short():
    assert len(README.encode()) <= 8 * 1024


def test_paper_index_names_every_rule_and_processor():
    index = (ROOT / "docs" / "papers.md").read_text()
    rules = import_module("contralto.decoding.rules")
    processors = import_module("contralto.decoding.processors")
    assert all(f"`{name}`" in index for name in [*rules.__all__, *processors.__all__])
