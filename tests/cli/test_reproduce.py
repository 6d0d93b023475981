"""`contralto reproduce`: every recipe is listed, its commands are read by their parsers, and it runs on stand-ins."""

import json
import re
import sys

import pytest
from project.test_blocks import PAPERS, ROOT

from contralto import cli
from contralto.recipes import running
from contralto.recipes.papers import PaperRecipe, paper_recipes

RECIPES = list(paper_recipes().values())
RUN_BY_PAGES = {page.rpartition("/")[2].removesuffix(".md") for page in PAPERS}


def test_all_papers_are_listed(capsys):
    assert cli.main(["reproduce", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for recipe in RECIPES:
        assert len([line for line in lines if f" {recipe.arxiv} " in line]) == 1
    assert re.search(r"^  simpo +2405\.14734  2 GPUs of 80 GB, about \d+ GPU hours$", "\n".join(lines), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [pytest.param(recipe, id=recipe.key) for recipe in RECIPES if recipe.hub])
def test_dry_run(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", recipe.key, "--dry-run"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert re.search(r"^\d+ commands? read by their parsers\.$", out, re.MULTILINE) or "python" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    "recipe", [pytest.param(each, id=each.key) for each in RECIPES if each.here and each.arxiv not in RUN_BY_PAGES]
)
def test_small_run(recipe, capfd, tmp_path):
    """Recipes whose pages are parsed and not run."""
    needed = running.missing(recipe, running.prepare(recipe, is_small=True, places={}))
    places = [f"--set={name}={ROOT / name}" for name in needed]
    argv = ["reproduce", recipe.key, "--small", "--output", str(tmp_path), *places]
    assert cli.main(argv) == 0, capfd.readouterr().err[-3000:]


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_prints_what_to_compare_with(capfd, tmp_path):
    argv = ["reproduce", "west-of-n", "--small", "--output", str(tmp_path / "west")]
    assert cli.main(argv) == 0
    assert (tmp_path / "west/pairs/dataset").is_dir()
    (done,) = json.loads((tmp_path / "west/reproduce.json").read_text())["done"]
    assert done["command"] == "contralto data run recipe.yaml"
    assert (tmp_path / "west/step-1.log").read_text()
    capfd.readouterr()
    assert cli.main(argv) == 0
    assert "[1/1] done before: contralto data run recipe.yaml" in capfd.readouterr().out


def test_what_is_missing_is_said_before_anything_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", "vcd"]) == 2
    error = capsys.readouterr().err
    assert "needs DIR, which you bring: say where with --set DIR=PLACE. LLaVA-1.5-7B" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vcd", "--set", "DIR"], "--set takes NAME=PLACE, such as DIR=/data/coco, not 'DIR'"),
        (["vcd", "--set", "X=y"], "the recipe of Visual contrastive decoding (VCD) needs no X; it takes DIR"),
        (["dpo", "--set", "X=y"], "the recipe of DPO needs no X; it takes nothing"),
        (["1610.02424"], "the recipe of Diverse beam search has no commands for a full run: there is only --small"),
        (["rituall"], "there is no recipe 'rituall' (did you mean 'ritual'?)"),
    ],
)
def test_mistakes_are_sentences(argv, message, capsys):
    assert cli.main(["reproduce", *argv]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------- the run


def scripts(*names):
    """A recipe of scripts, each of which writes what it is called, and ends as `fails` says."""
    text = (
        "import pathlib, sys\nprint(__file__[-4])\nsys.exit(pathlib.Path('fails').exists() and __file__[-4] == 'b')\n"
    )
    files = {f"{name}.py": text for name in names}
    recipe = PaperRecipe("0", "N", "C.", "M.", hub="\n".join(f"python {name}.py" for name in names), hub_files=files)
    return running.prepare(recipe, is_small=False, places={})


def test_commands_that_ended_are_not_run_again_and_those_after_a_change_are(tmp_path, capsys):
    (tmp_path / "fails").touch()
    with pytest.raises(
        ValueError, match=r"command 2 of 3 ended with status 1: python b\.py; see above and .*step-2\.log"
    ):
        running.run(scripts("a", "b", "c"), tmp_path)
    (tmp_path / "fails").unlink()
    capsys.readouterr()
    running.run(scripts("a", "b", "c"), tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["[1/3] done before: python a.py", "[2/3] python b.py", "b", "[3/3] python c.py", "c"]
    running.run(scripts("a", "c", "b"), tmp_path)
    assert "[3/3] python b.py" in capsys.readouterr().out


def test_commands_get_the_option_by_which_they_go_on(tmp_path):
    (tmp_path / "texts.jsonl").touch()
    (tmp_path / "tuned").mkdir()

    def words(command):
        (step,) = running.steps_of(command, {})
        return running._resumed(step, tmp_path)[len(command.split()) :]

    assert words("contralto generate --output texts.jsonl") == ["--resume"]
    assert words("contralto generate --output others.jsonl") == []
    assert words("contralto align dpo --output_dir tuned") == ["--resume_from_checkpoint", "last"]
    assert words("contralto align dpo --rounds 2 --output_dir tuned") == []
    assert words("contralto eval --tasks a") == ["--use_cache", "answers"]
    assert words("contralto eval --tasks a --use_cache b") == []


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "is there, and asks for a licence"),
        (OSError("no network"), "not looked up: the hub cannot be reached (OSError)"),
    ],
)
def test_names_are_looked_up_on_the_hub(monkeypatch, error, state):
    class Api:
        calls = 0

        def repo_info(self, name, *, repo_type, timeout):
            Api.calls += 1
            if error:
                raise error
            return type("Info", (), {"gated": "manual"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    steps = running.steps_of("contralto generate --model a/b --amateur a/c --file x.jsonl", {})
    states = running.on_hub(steps)
    assert list(states) == ["a/b", "a/c"]
    assert states["a/b"] == state
    assert Api.calls == (1 if error else 2)


def test_a_script_runs_in_the_python_of_the_command(tmp_path):
    recipe = PaperRecipe(
        "0", "N", "C.", "M.", hub="python a.py", hub_files={"a.py": "import sys; print(sys.executable)"}
    )
    running.run(running.prepare(recipe, is_small=False, places={}), tmp_path)
    assert (tmp_path / "step-1.log").read_text().strip() == sys.executable
