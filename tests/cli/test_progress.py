"""Progress bars of commands: what they count, and that they change nothing."""

import json

import pytest
import torch

from contralto import cli
from contralto.cli import explain, generate
from contralto.cli.token_bar import TokenBar

AMATEUR = ["--amateur", "testbed:amateur"]


@pytest.fixture
def bars(monkeypatch):
    """The bars that a command made, as on a terminal."""
    made = []

    def bar(*args, **kwargs):
        made.append(TokenBar(*args, **kwargs))
        return made[-1]

    class Kind(type):
        def __instancecheck__(cls, value):
            return isinstance(value, TokenBar)

        def __call__(cls, *args, **kwargs):
            return bar(*args, **kwargs)

    class Recorded(metaclass=Kind):
        pass

    for module in (generate, explain):
        monkeypatch.setattr(module, "TokenBar", Recorded)
    return made


METHODS = {"cd": AMATEUR, "scd": [*AMATEUR, "--method", "scd"], "search": ["--method", "search"], "none": []}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_token_of_a_batch_is_counted(name, tmp_path, bars):
    """And rows have their texts, with those of greedy search beside them."""
    words = [
        "generate",
        "--model",
        "testbed:expert",
        *METHODS[name],
        "Ben went",
        "Mia saw the",
        "--max-new-tokens",
        "7",
    ]
    compare = [] if name == "none" else ["--compare", "greedy"]
    path = tmp_path / "out.jsonl"
    assert cli.main([*words, *compare, "--output", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(row["text"] and ("greedy" in row) == bool(compare) for row in rows)
    assert [bar.done for bar in bars] == [14 if compare else 7]


@pytest.mark.slow
def test_explain_counts_both_texts(tmp_path, bars, capsys):
    argv = ["explain", "--model", "testbed:expert", *AMATEUR, "Ben went", "--max-new-tokens", "5"]
    assert cli.main([*argv, "--html", str(tmp_path / "a.html")]) == 0
    assert [bar.done for bar in bars] == [10]


def test_calls_that_end_early_and_steps_of_several_tokens():
    with TokenBar(5, calls=3, shown=False) as bar:
        for steps in ([1, 1], [3, 3], [1]):
            bar.put(torch.zeros(1, 9, dtype=torch.long))
            for count in steps:
                bar.put(torch.zeros(1, count) if count > 1 else torch.zeros(1))
            bar.end()
    assert bar.done == 15
