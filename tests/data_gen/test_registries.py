"""Strategies, engines and checks of other packages work from a recipe by their names."""

import sys

import pytest
import yaml

from contralto import cli
from contralto.data_gen.checks import CHECKS
from contralto.data_gen.engines import ENGINES
from contralto.data_gen.strategies import STRATEGIES

TOY = """
from contralto.data_gen import Answer, Ask, Pair
from contralto.data_gen.checks import answer_text, writes


def shouted(row, *, target="target", mark="!"):
    answer = yield Ask(role=target, messages=row["prompt"])
    columns = {"strategy": "shouted"}
    return Pair(prompt=row["prompt"], chosen=answer.text, rejected=answer.text.upper() + mark, columns=columns)


class Echo:
    rows_together = 1

    def __init__(self, *, prefix: str):
        self.identity = {"engine": "echo", "prefix": prefix}
        self.prefix = prefix

    def answer(self, requests):
        for request in requests:
            yield [(request, Answer(text=self.prefix + request.messages[-1]["content"]))]


@writes("vowels")
def vowels(rows, *, letters="aeiou"):
    return {"vowels": [sum(letter in letters for letter in answer_text(row, "chosen")) for row in rows]}
"""
POINTS = """
[contralto.strategies]
shouted = toy_data:shouted
no_strategy = toy_data:Echo
[contralto.engines]
echo = toy_data:Echo
[contralto.checks]
vowels = toy_data:vowels
"""
RECIPE = {
    "rows": "rows.jsonl",
    "output": "out",
    "strategies": [{"use": "shouted", "mark": "?"}],
    "roles": {"target": {"engine": "echo", "prefix": "so: "}},
    "checks": {"vowels": {}},
    "filters": {"vowels": [3, None]},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Install a package with a strategy, an engine and a check, beside a recipe that uses them."""
    (tmp_path / "toy_data.py").write_text(TOY)
    info = tmp_path / "toy_data-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "banana"}\n{"id": "b", "prompt": "nth"}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in (STRATEGIES, ENGINES, CHECKS):  # names and entries as in a process that begins
        monkeypatch.setattr(registry, "_points", None)
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    yield tmp_path
    sys.modules.pop("toy_data", None)


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
    assert "toy_data" not in sys.modules
