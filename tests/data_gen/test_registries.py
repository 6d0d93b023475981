"""Strategies, engines and checks of other packages work from a recipe by their names; the pages of `docs/extending` are followed."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from contralto import cli
from contralto.data_gen.checks import CHECKS
from contralto.data_gen.engines import ENGINES
from contralto.data_gen.strategies import STRATEGIES

PAGES = [Path(__file__).parents[2] / "docs" / "extending" / f"{kind}.md" for kind in ("strategy", "engine", "check")]


def block(page, language):
    """Return the first block of code of a page in a language."""
    return re.search(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]


MODULES = ("shouting", "echoing", "counting")
RECIPE = {"rows": "rows.jsonl", "output": "out"} | {
    key: value for page in PAGES for key, value in yaml.safe_load(block(page, "yaml")).items()
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Install the strategy, the engine and the check of the pages, and one that is broken, as a package."""
    points = {"contralto.strategies": {"no_strategy": "echoing:Echo"}}
    for page in PAGES:
        module = re.search(r"`(\w+\.py)`:", page.read_text(encoding="utf-8"))[1]
        (tmp_path / module).write_text(block(page, "python"))
        for group, entries in tomllib.loads(block(page, "toml"))["project"]["entry-points"].items():
            points.setdefault(group, {}).update(entries)
    info = tmp_path / "toy_data-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
    lines = [line for group, entries in points.items() for line in (f"[{group}]", *map(" = ".join, entries.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "banana"}\n{"id": "b", "prompt": "nth"}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in (STRATEGIES, ENGINES, CHECKS):  # names and entries as in a process that begins
        monkeypatch.setattr(registry, "_points", None)
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    yield tmp_path
    for module in MODULES:
        sys.modules.pop(module, None)


def run(folder, action="run", **changed):
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **changed}))
    return cli.main(["data", action, str(folder / "recipe.yaml")])


def test_a_strategy_an_engine_and_a_check_of_another_package(folder, capsys):
    assert run(folder) == 0
    assert "1 pair, 0 rejected, 0 failed, 1 dropped by filters" in capsys.readouterr().out
    text = (folder / "out" / "dataset" / "data" / "train.jsonl").read_text()
    assert '"so: banana"' in text
    assert '"SO: BANANA?"' in text
    assert '"vowels": 4' in text
    assert run(folder, "status") == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strategies": [{"use": "shouted", "marc": "?"}]}, "shouted has no setting 'marc'; it has target, mark"),
        ({"strategies": ["shout"]}, "strategy 1: there is no strategy 'shout'; there are clair,"),
        ({"strategies": ["no_strategy"]}, "the strategy 'no_strategy' of the package toy-data cannot be loaded: "),
        ({"roles": {"target": {"engine": "echo"}}}, "role 'target': engine 'echo' needs prefix"),
        (
            {"roles": {"target": {"engine": "echo", "prefix": "", "model": "m"}}},
            "engine 'echo' has no 'model'; it has prefix; and of sampling",
        ),
        ({"checks": {"vowels": {"letter": "a"}}}, "check vowels has no setting 'letter'; it has letters"),
        ({"checks": {}}, "filter vowels reads what the check vowels writes: name that check too"),
    ],
)
def test_mistakes_in_their_settings_are_one_sentence(folder, capsys, changed, message):
    assert run(folder, **changed) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_the_help_lists_them(folder, capsys):
    with pytest.raises(SystemExit):
        cli.main(["data", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert {"shouted", "echo", "vowels", "clair", "transformers", "contrast"} <= set(words)
    assert not set(MODULES) & set(sys.modules)
