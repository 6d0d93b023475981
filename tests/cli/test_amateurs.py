"""Every command of docs/amateurs.md runs; the model itself is an amateur in every command."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from helpers.task_index import one_index  # noqa: F401  for every test here

from contralto import cli
from contralto.data_gen.engines import TransformersEngine
from contralto.data_gen.types import Ask, Sampling, make_request

PAGE = (Path(__file__).parents[2] / "docs" / "amateurs.md").read_text()
QUESTION = "Mia has 9 coins. She finds 4, loses 2, wins 5. How many coins does Mia have?"


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    contralto (.*)$", PAGE, flags=re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        assert cli.main(shlex.split(command)) == 0, command
    assert "for contrastive decoding against testbed:expert" in Path("amateur/README.md").read_text()
    assert len(re.findall(r"#### \d+", capsys.readouterr().out)) == 5


def test_the_code_of_the_page_runs(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "amateurs.py").write_text(code)
    runpy.run_path(str(tmp_path / "amateurs.py"))
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_first_layers_correct_the_mistake(capsys):
    assert cli.main(["generate", "--model", "testbed:expert", "--amateur", "self:layers=1", QUESTION]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("wins 5: 11 + 5 = 16. #### 16\n")
    assert captured.err.endswith("cd: 1 model per token; amateur is the first 1 of the model's 3 layers\n")
    by_processor = ["--executor", "processor", "--amateur", "self:layers=1", QUESTION]
    assert cli.main(["generate", "--model", "testbed:expert", *by_processor]) == 0
    assert "cd: 1.33 models per token;" in capsys.readouterr().err


def test_a_wrong_spelling_is_rejected_with_the_right_ones(capsys):
    assert cli.main(["generate", "--model", "testbed:expert", "--amateur", "self:layer=1", QUESTION]) == 2
    assert "--amateur: the model itself as an amateur is spelled self:layers=8" in capsys.readouterr().err


def test_explain_and_data_take_the_model_itself(tmp_path):
    page = tmp_path / "page.html"
    argv = ["explain", "--model", "testbed:expert", "--amateur", "self:dropout=0.3", "--html", str(page)]
    assert cli.main([*argv, "--max-new-tokens", "8", QUESTION]) == 0
    assert "self:dropout=0.3" in page.read_text() or page.stat().st_size
    engine = TransformersEngine(model="testbed:expert", method="cd", amateur="self:layers=1")
    assert engine.identity["options"]["amateur"] == "self:layers=1"
    ask = Ask(role="target", messages=[{"role": "user", "content": QUESTION}])
    request = make_request(ask, engine=engine.identity, sampling=Sampling(temperature=0), seed=0, row="a")
    ((_, answer),) = next(engine.answer([request]))
    assert answer.text.endswith("#### 16")


@pytest.mark.slow
@pytest.mark.usefixtures("one_metered")
def test_eval_and_compare_take_the_model_itself(tmp_path):
    argv = ["compare", "--tasks", "testbed_arithmetic", "--model", "testbed:expert-0", "--amateur", "self:layers=1"]
    argv += ["--methods", "cd", "--limit", "6", "--seeds", "1", "--output", str(tmp_path / "compare")]
    assert cli.main(argv) == 0
    rows = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert "amateur alone" in json.dumps(rows)
    args = "pretrained=testbed:expert-0,method=cd,amateur=self:layers=1"
    argv = [
        "eval",
        "run",
        "--model",
        "contralto",
        "--tasks",
        "testbed_arithmetic",
        "--limit",
        "4",
        "--model_args",
        args,
    ]
    assert cli.main([*argv, "--output_path", str(tmp_path / "eval")]) == 0
