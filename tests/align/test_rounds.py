"""Rounds of writing and training: who writes, from which model each round begins, what is kept; kills; mistakes."""

import itertools
import json
import os
import signal
import sys

import pytest
import torch
import yaml
from datasets import load_dataset
from helpers.kills import killed_at
from safetensors.torch import load_file

from contralto.align import rounds
from contralto.align import run as align_run
from contralto.align.rounds import make_pairs
from contralto.align.rounds_config import Round
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.cli import align as cli_align
from contralto.common.files import locked_folder
from contralto.data_gen.store import Store

pytestmark = pytest.mark.slow

JUDGED = """
rows: {source: "contralto.testbed.questions:problems", arguments: {count: 12, seed: 3}}
strategies: [on_policy_judge]
roles:
  target: {engine: transformers, model: this-round, batch_size: 12, temperature: 1.0, max_new_tokens: 40}
  judge: {engine: function, use: "contralto.testbed.questions:judge"}
"""
TEXTS = """
rows: {source: "contralto.testbed.questions:problems", arguments: {count: 12, seed: 3}}
seed: 7
strategies: [{use: teacher_student, max_new_tokens: 40}]
roles:
  teacher: {engine: transformers, model: "testbed:expert", batch_size: 12}
  student: {engine: transformers, model: this-round, batch_size: 12}
"""
QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
LORA = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
SMALL = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--learning_rate", "0.003"]


@pytest.fixture
def recipes(tmp_path):
    (tmp_path / "judged.yaml").write_text(JUDGED)
    (tmp_path / "texts.yaml").write_text(TEXTS)
    return tmp_path


@pytest.fixture
def in_process(monkeypatch):
    """The processes of the rounds in this one; what they were asked."""
    asked = []

    def child(words, lock, what):
        asked.append((what, list(words)))
        if words[0] == "contralto":
            cli_align.run(words[2:])
        else:
            monkeypatch.setattr(sys, "argv", list(words))
            assert rounds.main() == 0

    monkeypatch.setattr(rounds, "_run_module", child)
    return asked


def _argv(name, recipes, out, *more, data="judged.yaml", rounds=2):
    words = [name, "--data_recipe", recipes / data, "--rounds", rounds, "--model_name_or_path", "testbed:student"]
    return [str(word) for word in (*words, "--output_dir", out, *QUIET, *SMALL, *more)]


def _pairs(folder):
    return load_dataset("parquet", data_files=str(folder / "pairs" / "dataset" / "data" / "train.parquet"))["train"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute")
def test_each_round_is_written_by_and_begins_with_what_the_last_one_trained(recipes, in_process):
    out = recipes / "out"
    cli_align.run(_argv("on_policy", recipes, out, *LORA, "--save_strategy", "no"))
    assert [what for what, _ in in_process] == [
        f"round {number}: {stage}" for number in (1, 2) for stage in ("the pairs", "the training")
    ]
    first, second = (json.loads((out / f"round-{number}" / "round.json").read_text()) for number in (1, 2))
    assert (first["model"], first["adapter"]) == ("testbed:student", None)
    assert (second["model"], second["adapter"]) == ("testbed:student", str(out / "round-1" / "model"))
    one, two = (_pairs(out / f"round-{number}") for number in (1, 2))
    assert set(one["rejected"][0][0]) == {"role", "content"}
    assert one["rejected"] != two["rejected"]
    begun, ended = (load_file(out / f"round-{number}" / "model" / "adapter_model.safetensors") for number in (1, 2))
    kept = load_file(out / "round-2" / "model" / "ref" / "adapter_model.safetensors")  # the second round's reference
    assert begun.keys() == ended.keys()
    for name, weight in begun.items():
        assert torch.equal(kept[name], weight)
    assert any(not torch.equal(ended[name], weight) for name, weight in begun.items())


@pytest.mark.slow
def test_the_rounds_of_a_distillation_are_epochs_of_its_curriculum(recipes, in_process):
    out = recipes / "out"
    teacher = ["--teacher_model_name_or_path", "testbed:expert", "--logging_steps", "1"]
    cli_align.run(_argv("distill_on_policy", recipes, out, *teacher, data="texts.yaml", rounds=2))
    betas = []
    for number in (1, 2):
        told = yaml.safe_load((out / f"round-{number}" / "train.yaml").read_text())
        assert (told["first_epoch"], told["all_epochs"], told["trainer"]) == (number, 2, "distill")
        assert told["model_name_or_path"] == ("testbed:student" if number == 1 else str(out / "round-1" / "model"))
        state = json.loads(next((out / f"round-{number}").glob("model/checkpoint-*/trainer_state.json")).read_text())
        betas += [line["beta"] for line in state["log_history"] if "beta" in line]
    assert betas == pytest.approx([0.5, 0.5 + 1 / 6, 0.5 + 2 / 6, 1, 1, 1])
    one, two = (_pairs(out / f"round-{number}") for number in (1, 2))
    assert one["models"][0] == ["teacher: testbed:expert", "student: testbed:student"]
    assert two["models"][0] == ["teacher: testbed:expert", f"student: {out / 'round-1' / 'model'}"]
    assert one["chosen"] != two["chosen"]  # the teacher writes anew, too


@pytest.mark.slow
def test_the_seed_is_the_recipes_and_the_rounds(recipes):
    """And what is there is not asked again."""
    told = {"rounds": 3, "data_recipe": str(recipes / "texts.yaml"), "role": "student", "model": "testbed:amateur"}
    assert rounds.data_of(Round(number=2, **told), recipes / "out")[0].seed == 9
    assert make_pairs(Round(number=2, **told), recipes / "out") == 12
    before = (recipes / "out" / "answers.sqlite").read_bytes()
    assert make_pairs(Round(number=2, **told), recipes / "out") == 12
    assert (recipes / "out" / "answers.sqlite").read_bytes() == before


def test_fresh_prompts_are_each_rounds_own(recipes):
    told = {"rounds": 3, "data_recipe": str(recipes / "judged.yaml"), "role": "target", "model": "testbed:amateur"}
    rows = [
        [row["id"] for row in rounds.data_of(Round(number=n, fresh_prompts=True, **told), recipes)[1]]
        for n in (1, 2, 3)
    ]
    assert all(rows)
    assert sorted(itertools.chain(*rows)) == sorted(
        row["id"] for row in rounds.data_of(Round(number=1, **told), recipes)[1]
    )


def test_rounds_that_are_done_are_left_alone_and_settings_stand(recipes, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(rounds, "_run_module", lambda words, lock, what: asked.append(what))
    out = recipes / "out"
    cli_align.run(_argv("on_policy", recipes, out, "--mixed_precision", "no", rounds=1))
    assert asked == ["round 1: the pairs", "round 1: the training"]
    del asked[:]
    cli_align.run(_argv("on_policy", recipes, out, "--mixed_precision", "no", rounds=2))
    assert asked == ["round 2: the pairs", "round 2: the training"]
    assert not capsys.readouterr().err
    (recipes / "judged.yaml").write_text(JUDGED.replace("temperature: 1.0", "temperature: 0.5"))
    cli_align.run(_argv("on_policy", recipes, out, "--mixed_precision", "no", rounds=2))
    assert "has changed since the first round: rounds that are done keep their pairs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="were begun with another flags"):
        cli_align.run(_argv("on_policy", recipes, out, "--beta", "0.2", rounds=2))
    with pytest.raises(ValueError, match="were begun with another recipe"):
        cli_align.run(_argv("on_policy_apo_zero", recipes, out, "--mixed_precision", "no"))
    with locked_folder(out, ""), pytest.raises(OSError, match="another process is working on"):
        cli_align.run(_argv("on_policy", recipes, out, "--mixed_precision", "no", rounds=3))


@pytest.mark.slow
def test_a_failure_is_told_and_the_round_is_not_done(recipes, capfd):
    out = recipes / "out"
    (recipes / "own.yaml").write_text(JUDGED.replace("this-round", "x").replace("on_policy_judge", "own:none"))
    (recipes / "own.py").write_text(
        "def none(row):\n    from contralto.data_gen.types import Rejected\n    yield []\n    return Rejected('no')\n"
    )
    with pytest.raises(OSError, match="round 1: the pairs ended with status 2, for the reason above"):
        cli_align.run(_argv("on_policy", recipes, out, data="own.yaml"))
    assert "there are no pairs: no (12 times)" in capfd.readouterr().err
    assert not (out / "round-1" / "done.json").exists()


MISTAKES = [
    (["on_policy", "--data_recipe", "judged.yaml"], "no model: set --model_name_or_path"),
    (
        ["on_policy", "--data_recipe", "judged.yaml", "--model_name_or_path", "testbed:student"],
        "no output folder: set --output_dir",
    ),
    (["HERE", "--rounds", "0"], "rounds must be a whole number of at least 1, not 0"),
    (["HERE", "--dataset_name", "x"], "dataset_name is given, and data_recipe, which makes the data"),
    (["HERE", "--policy_role", "nobody"], "there is no role 'nobody'; the recipe has target, judge"),
    (["HERE", "--betta", "1"], "--betta is no flag of contralto align or of accelerate launch"),
    (["HERE", "--beta", "-1"], "beta must be a finite number above 0"),
    (["HERE", "--data_recipe", "empty.yaml"], "has neither a role student nor a role target"),
    (["HERE", "--data_recipe", "served.yaml", "--use_peft", "--rounds", "2"], "engine 'openai' has no 'adapter'"),
    (["HERE", "--fresh_prompts", "--rounds", "500"], "too few rows for 500 rounds of fresh prompts"),
    (["HERE", "--trainer", "nothing"], "there is no trainer 'nothing'; there are preference, distill"),
    (["cpo", "--rounds", "2"], "rounds is for data_recipe"),
    (["on_policy", "--dataset_name", "x"], "rounds is for data_recipe, by which the model writes its pairs"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_mistakes_are_one_sentence_before_anything_is_written(recipes, monkeypatch, argv, message):
    monkeypatch.chdir(recipes)
    monkeypatch.setattr(rounds, "_run_module", lambda *_: pytest.fail("a process was started"))
    (recipes / "empty.yaml").write_text(JUDGED.replace("target:", "someone:"))
    served = 'target: {engine: openai, model: x, base_url: "http://localhost:1"}\n  #'
    (recipes / "served.yaml").write_text(JUDGED.replace("target:", served))
    here = [
        "on_policy",
        "--data_recipe",
        "judged.yaml",
        "--model_name_or_path",
        "testbed:student",
        "--output_dir",
        "out",
    ]
    argv = [*here, *argv[1:]] if argv[0] == "HERE" else argv
    with pytest.raises(ValueError, match=message) as error:
        cli_align.run([*argv, "--report_to", "none"])
    assert "\n" not in str(error.value)
    assert not (recipes / "out").exists()


def test_rounds_are_not_started_by_accelerate(recipes):
    with pytest.raises(ValueError, match="starts processes of its own: call contralto align, with --num_processes"):
        align_run.run(_argv("on_policy", recipes, recipes / "out"), launched=True)


# ------------------------------------------------------------------------------------------------------------- killed


def _killed_at(argv, point):
    """All rounds in a process of their own that is killed at `point`; how it ended."""
    return killed_at(lambda: cli_align.run(argv), *point)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_kills_and_the_same_model(recipes, in_process):
    """Killed while answers are recorded, a step is taken, a checkpoint is written, a round is closed: the same texts and weights in the end."""
    saving = [*LORA, "--save_strategy", "steps", "--save_steps", "1"]
    whole, broken = (_argv("on_policy", recipes, recipes / name, *saving) for name in ("whole", "broken"))
    assert _killed_at(whole, (Store, "record", -1)) == 0
    step, save = (PreferenceTrainer, "training_step"), (PreferenceTrainer, "_save_rng_state")
    for point in (
        (Store, "record", 1),
        (*step, 1),
        (*save, 0),
        (rounds, "replace_text", 4),
        (Store, "record", 0),
        (*step, 1),
    ):
        assert os.WTERMSIG(_killed_at(broken, point)) == signal.SIGKILL
    assert _killed_at(broken, (*step, 4)) == 0  # more steps would be done twice
    for number in (1, 2):
        one, other = (recipes / name / f"round-{number}" for name in ("whole", "broken"))
        texts = [[(row["chosen"], row["rejected"]) for row in _pairs(folder)] for folder in (one, other)]
        assert texts[0] == texts[1]
        first, second = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (one, other))
        for name, weight in first.items():
            assert torch.equal(weight, second[name]), name
