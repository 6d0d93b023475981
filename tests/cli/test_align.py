"""`contralto align`: recipes, flags, mistakes; kills, two processes, resumed runs."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from helpers.kills import killed_at
from helpers.ranks import run_ranks
from safetensors.torch import load_file
from torch.testing import assert_close

from contralto import testbed
from contralto.align import parsing, run
from contralto.align.__main__ import main as align_main
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.cli import align as cli_align
from contralto.testbed import worlds

PAPERS = {"apo_zero": 0.1, "simpo": 2.0, "dpo_norm": 5.0}
QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
LORA = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
SMALL = ["--max_steps", "3", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]


@pytest.fixture
def pairs(tmp_path):
    """Plain texts in a file: right solutions, and ones that stop early."""
    path = tmp_path / "pairs.jsonl"
    problems = [p for p in itertools.islice(worlds.problems(0, "train"), 60) if len(p.steps) > 1][:24]
    rows = [{"prompt": p.question, "chosen": p.solution(), "rejected": p.solution(stop_after=1)} for p in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _argv(recipe, pairs, out, *more, adapter=LORA):
    data = ["--model_name_or_path", "testbed:student", "--dataset_name", pairs, "--output_dir", out]
    return [str(word) for word in (recipe, *data, *QUIET, *adapter, *SMALL, *more)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["kto", "npo", "gradient_difference"])
def test_completions_with_labels_are_trained_on(recipe, pairs, tmp_path, capsys):
    """Pairs are taken apart; rejected completions are forgotten."""
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "3", "--eval_dataset_name", pairs]
    cli_align.run(_argv(recipe, pairs, tmp_path / "out", *evaluation))
    assert "batch: 4 rows per step" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained on completions with labels" in card


@pytest.mark.slow
def test_a_recipe_and_flags_train_an_adapter(pairs, tmp_path):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "3", "--eval_dataset_name", pairs]
    cli_align.run(
        _argv("apo_zero", pairs, tmp_path / "out", "--learning_rate", "0.0003", "--save_steps", "3", *evaluation)
    )
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert max(value.abs().max() for name, value in weights.items() if "lora_B" in name) > 1e-5
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    (found,) = [line for line in state["log_history"] if "eval_loss" in line]
    assert found["eval_loss"] < 0.999  # 1 before training


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [[], ["--precompute_ref_log_probs"]],
    ids=["plain", "precomputed"],
)
def test_a_streamed_file_trains_on_the_same_rows(pairs, tmp_path, more):
    """Of a stream the Trainer shuffles nothing, so neither run does."""
    same = ["--learning_rate", "0.01", "--save_strategy", "no", "--monitor_pairs", "0", *more]
    same += ["--train_sampling_strategy", "sequential", "--max_steps", "2"]
    same += ["--reference_cache", str(tmp_path / "cache")] if more else []
    cli_align.run(_argv("apo_zero", pairs, tmp_path / "whole", *same))
    cli_align.run(_argv("apo_zero", pairs, tmp_path / "streamed", *same, "--dataset_streaming", "true"))
    whole, streamed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "streamed"))
    for name, weight in whole.items():
        assert_close(streamed[name], weight)


@pytest.mark.parametrize("name", sorted(parsing.recipes()))
def test_every_recipe_is_a_configuration(name, tmp_path):
    argv = parsing.resolve_recipe([name, "--output_dir", str(tmp_path), "--report_to", "none"])
    (_, args, _, _), *_ = parsing.parse(argv)
    values = yaml.safe_load(parsing.recipes()[name].read_text())
    assert all(getattr(args, key) == value for key, value in values.items() if hasattr(args, key))
    assert getattr(args, "beta", None) == PAPERS.get(name, getattr(args, "beta", None))


@pytest.mark.parametrize("name", sorted(parsing.recipes()))
def test_every_recipe_has_a_rate_for_all_weights_and_one_for_adapters(name, capsys):
    """And says where that of adapters is from; a rate on the command line wins over both."""
    values = yaml.safe_load(parsing.recipes()[name].read_text())
    assert 9.9 <= values["lora_learning_rate"] / values["learning_rate"] <= 251
    assert "rate" in "".join(line for line in parsing.recipes()[name].read_text().splitlines(True) if line[0] == "#")

    def rate(*flags):
        argv = parsing.resolve_learning_rate(parsing.resolve_recipe([name, "--output_dir", "out", *flags]))
        return float(parsing.option_value(argv, "learning_rate"))

    assert rate("--use_peft", "false") == values["learning_rate"]
    assert f"learning_rate {values['learning_rate']:g}: the recipe's for all weights" in capsys.readouterr().out
    assert rate("--use_peft") == rate("--adapter", "a", "--use_peft", "false") == values["lora_learning_rate"]
    assert f"learning_rate {values['lora_learning_rate']:g}: the recipe's for adapters" in capsys.readouterr().out
    assert rate("--use_peft", "--learning_rate", "3e-3") == rate("--learning_rate=3e-3") == 3e-3
    assert not capsys.readouterr().out
    assert rate("--use_peft", "--lora_learning_rate", "4e-4") == 4e-4


def test_a_recipe_says_what_it_sets(capsys, tmp_path):
    """Not what the command line sets, nor secrets, nor learning rates, which have a line of their own."""
    path = tmp_path / "mine.yaml"
    path.write_text("optim: rmsprop\nlearning_rate: 1\nwarmup_steps: 150\nhub_token: hf_x\nloss_type: [sft, sigmoid]\n")
    parsing.print_recipe(parsing.resolve_recipe([str(path), "--warmup_steps=0"]))
    assert capsys.readouterr().out == "recipe mine: optim rmsprop, loss_type sft sigmoid\n"
    parsing.print_recipe(["--beta", "1"])
    assert not capsys.readouterr().out


def test_the_default_rate_is_said_to_be_one(capsys):
    parsing.resolve_learning_rate(["--trainer", "distill", "--output_dir", "out"])
    assert capsys.readouterr().out.startswith("learning_rate 5e-05: the default of DistillationConfig;")


def test_the_module_explains_itself(monkeypatch, capsys):
    for words in ([], ["apo_zero", "--help"]):
        monkeypatch.setattr(sys, "argv", ["align", *words])
        assert align_main() == 0
        assert capsys.readouterr().out.startswith("usage: accelerate launch")


@pytest.mark.slow
def test_the_readmes_first_training_moves_the_model(pairs, tmp_path):
    """With the recipe's own rate for adapters."""
    argv = ["apo_zero", "--model_name_or_path", "testbed:student", "--dataset_name", str(pairs), "--use_peft", *QUIET]
    cli_align.run([*argv, "--conversations", "--output_dir", str(tmp_path / "out"), "--save_strategy", "no"])
    record = json.loads((tmp_path / "out" / "monitor.json").read_text())
    change = [
        chosen - rejected
        for chosen, rejected in zip(record["points"][-1]["chosen"], record["points"][-1]["rejected"], strict=True)
    ]
    assert sum(change) / len(change) > 0.001
    assert not record["findings"]
    assert not record["warnings"]


def test_flags_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.2]\nbeta: 0.5\nlearning_rate: 1.0e-5\n")
    argv = parsing.resolve_recipe([str(recipe), "--beta", "0.7", "--output_dir", str(tmp_path), "--report_to", "none"])
    _, args, model, _ = parsing.make_parser().parse_args_and_config(argv)
    assert (args.loss_type, args.loss_weights, args.beta, args.learning_rate) == (
        ["sigmoid", "sft"],
        [1.0, 0.2],
        0.7,
        1e-5,
    )
    assert model.dtype is None


def test_options_may_be_written_with_dashes(pairs, tmp_path, monkeypatch):
    """Also those that are read before TRL's parser, such as the recipe's learning rate for adapters."""
    import accelerate.commands.launch

    trained, launched = [], []
    monkeypatch.setattr(run, "_train", lambda *arguments: trained.append(arguments))
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", launched.append)
    cli_align.run(
        ["apo_zero", "--output-dir", str(tmp_path / "a-b"), "--report-to", "none", "--use-peft", "--lora-r=3"]
    )
    ((_, args, model, _),) = trained
    assert args.learning_rate == yaml.safe_load(parsing.recipes()["apo_zero"].read_text())["lora_learning_rate"]
    assert (args.output_dir, model.use_peft, model.lora_r) == (str(tmp_path / "a-b"), True, 3)
    cli_align.run(["cpo", "--num-processes", "2", "--multi-gpu", "--output-dir", str(tmp_path)])
    assert launched[0].num_processes == 2


def test_every_option_has_a_spelling_with_underscores():
    from accelerate.commands.launch import launch_command_parser

    for parser in (parsing.make_parser(), launch_command_parser()):
        for action in parser._actions:
            long = [option for option in action.option_strings if option.startswith("--")]
            assert not long or any("-" not in option[2:] for option in long)


def test_help_shows_options_of_contralto_first_and_is_kept(tmp_path, monkeypatch, capsys):
    from contralto.cli import align_help

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli_align.run(["dpo", "--help"])
    text = capsys.readouterr().out
    places = [
        text.index(word) for word in ("--data_recipe", "--loss_type", "--audit", "data (TRL)", "--learning_rate ")
    ]
    assert places == sorted(places)
    assert "--lora-r" not in text
    assert "arpo, brio, cal, cal_dpo, cont, cpo,\n  cpo_simpo, distill, " in text
    assert all(
        text.count(f"\n  {option} ") == 1 for option in ("--beta", "--loss_weights", "--output_dir", "--adapter")
    )
    assert "(default: rmsprop)" in text
    assert "(default: 5e-05)" in text  # lora_learning_rate
    monkeypatch.setattr(align_help, "make_parser", lambda trainer: 1 / 0)
    cli_align.run(["dpo", "--help"])
    assert capsys.readouterr().out == text
    monkeypatch.setattr(align_help, "versions", lambda: {"trl": "9"})
    with pytest.raises(ZeroDivisionError):  # another version of TRL
        cli_align.run(["--help"])


@pytest.mark.parametrize("trainer", ["distill", "reward", "unpaired", "brio", "cont"])
def test_help_of_the_other_trainers(trainer):
    from contralto.cli.align_help import help_text

    assert f"{trainer} training (contralto):" in help_text(trainer) or trainer == "reward"


def test_the_number_of_pairs_per_step_is_said():
    from types import SimpleNamespace

    from contralto.align.run import _batch_line

    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=8)
    one = SimpleNamespace(args=args, accelerator=SimpleNamespace(num_processes=2), train_dataset=range(64))
    line = _batch_line(one)
    assert line.startswith("batch: 64 pairs per step = 4 per device (per_device_train_batch_size) x 8")
    assert line.endswith("x 2 processes")
    one.train_dataset = range(6)
    assert _batch_line(one).endswith("x 2 processes; the data have 6, so that a step sees 6")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of machines without an accelerator")
def test_bfloat16_on_a_cpu_needs_no_further_option():
    argv = parsing.resolve_recipe(["dpo", "--bf16", "true", "--output_dir", "out", "--report_to", "none"])
    (_, args, _, _), *_ = parsing.parse(argv)
    assert args.use_cpu
    assert args.bf16


def test_every_flag_of_trl_dpo_is_taken():
    from trl.scripts.dpo import make_parser

    def flags(parser):
        return {option for action in parser._actions for option in action.option_strings}

    assert flags(make_parser()) <= flags(parsing.make_parser())


def test_flags_of_accelerate_are_passed_on(pairs, tmp_path, monkeypatch):
    import accelerate.commands.launch

    launched = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", launched.append)
    cli_align.run(
        [
            "cpo",
            "--num_processes",
            "2",
            "--multi_gpu",
            "--beta",
            "0.3",
            "--mixed_precision",
            "no",
            "--output_dir",
            str(tmp_path),
        ]
    )
    (args,) = launched
    assert (args.num_processes, args.mixed_precision, args.training_script, args.module) == (
        2,
        "no",
        "contralto.align",
        True,
    )
    assert args.training_script_args[:1] == ["--config"]
    assert args.training_script_args[2:] == ["--beta", "0.3", "--output_dir", str(tmp_path)]


MISTAKES = [
    (["no_such"], "there is no recipe no_such: give a YAML file, or one of alphapo, apo_auto"),
    (["cpo", "--config", "other.yaml"], "there are two recipes"),
    (["cpo", "--no_such_flag", "1"], "--no_such_flag is no flag of contralto align or of accelerate launch"),
    (["cpo", "--beta", "-1"], "beta must be a finite number above 0"),
    (["cpo", "--loss_type", "nothing"], "there is no loss 'nothing'"),
    (["cpo"], "no model: set --model_name_or_path"),
    (["cpo", "--model_name_or_path", "testbed:expert"], "no dataset: set --dataset_name"),
    (["cpo", "--model_name_or_path", "testbed:expert", "--dataset_name", "pairs.csv"], "pairs.csv"),
    (["cpo", "--model_name_or_path", "testbed:nobody", "--dataset_name", "PAIRS"], "the testbed has no model 'nobody'"),
    (
        ["cpo", "--model_name_or_path", "testbed:expert", "--dataset_name", "PAIRS", "--eval_strategy", "epoch"],
        "is one file, without a split to evaluate on",
    ),
    (["margin.yaml", "--model_name_or_path", "testbed:expert", "--dataset_name", "PAIRS"], "has no column margin"),
    (
        ["cpo", "--num_processes", "2"],
        "accelerate launch starts one process on a CPU, not 2: .* torchrun --nproc_per_node 2",
    ),
    (["cpo", "--num_processes", "3", "--cpu"], "starts one process on a CPU, not 3"),
    (["strange.yaml"], r"--betta is no flag of contralto align or of accelerate launch \(did you mean --beta\?\)"),
    (["cpo", "--lr", "1"], r"--lr is no flag .*did you mean --learning_rate\?"),
    (["cpo", "--model", "testbed:none", "--dataset", "PAIRS"], "none"),
    (["cpo", "--learning-rat", "1"], r"--learning_rat is no flag .*did you mean --learning_rate\?"),
    (["cpoo"], r"there is no recipe cpoo \(did you mean 'cpo'\?\)"),
    (
        ["on_policy", "--data_recipe", "judged.yaml", "--dataset_streaming", "true"],
        "dataset_streaming reads data that are",
    ),
    (["dpo", "--lora_learning_rate", "1e-5"], "lora_learning_rate is for an adapter: give use_peft"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=lambda value: str(value)[:50])
def test_mistakes_are_one_sentence(pairs, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "margin.yaml").write_text("loss_type: [odpo]\n")
    (tmp_path / "strange.yaml").write_text("betta: 0.2\n")
    argv = [str(pairs) if word == "PAIRS" else word for word in argv]
    with pytest.raises(ValueError, match=message) as error:
        cli_align.run([*argv, "--report_to", "none", "--output_dir", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_conversations_need_a_template(pairs, tmp_path):
    shutil.copytree(testbed.path("student"), tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    argv = _argv("dpo", pairs, tmp_path / "out", "--model_name_or_path", tmp_path / "base", "--conversations")
    with pytest.raises(
        ValueError, match=r"the rows are conversations, and the tokenizer of .*base has no chat template"
    ):
        cli_align.run(argv)
    streamed = [*argv, "--dataset_streaming", "true"]
    with pytest.raises(ValueError, match="has no chat template"):
        cli_align.run(streamed)


# -------------------------------------------------------------------------------------------------- killed and resumed


def _killed_at(argv, point):
    """Run in a process of its own that is killed at `point`; how it ended."""
    kind, count = point
    name = "training_step" if kind == "step" else "_save_rng_state"
    return killed_at(lambda: cli_align.run(argv), PreferenceTrainer, name, count)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("kills", [3, pytest.param(6, marks=pytest.mark.full)])
def test_kills_and_the_same_weights(pairs, tmp_path, kills):
    """Killed at random micro-batches and while a checkpoint is written, resumed each time."""
    rng = random.Random(0)
    options = [
        "--max_steps",
        "18",
        "--gradient_accumulation_steps",
        "2",
        "--save_steps",
        "2",
        "--learning_rate",
        "0.01",
    ]
    options += [
        "--save_total_limit",
        "3",
        "--resume_from_checkpoint",
        "last",
        "--lora_dropout",
        "0.1",
        "--precompute_ref_log_probs",
    ]
    options += ["--disable_dropout", "false", "--reference_cache", str(tmp_path / "cache")]
    whole, broken = (_argv("apo_zero", pairs, tmp_path / name, *options) for name in ("whole", "broken"))
    assert _killed_at(whole, ("step", -1)) == 0
    for kill in range(kills):
        point = ("save", rng.randint(0, 1)) if kill % 3 == 2 else ("step", rng.randint(1, 9))
        assert os.WTERMSIG(_killed_at(broken, point)) == signal.SIGKILL
    assert _killed_at(broken, ("step", 35)) == 0  # a run that started over would have 36 micro-batches
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


FSDP2 = "fsdp: true\nfsdp_config: {version: 2, transformer_layer_cls_to_wrap: [LlamaDecoderLayer]}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "adapter", "sharded"),
    [
        ("apo_zero", LORA, ""),
        pytest.param("tdpo2", LORA, "", marks=pytest.mark.full),
        ("tdpo1", [], FSDP2),
        ("apo_zero", [], FSDP2),
        pytest.param("cpo", [], FSDP2, marks=pytest.mark.full),
    ],
    ids=["apo_zero-lora", "tdpo2-lora", "tdpo1-fsdp2", "apo_zero-fsdp2", "cpo-fsdp2"],
)
def test_two_processes_equal_one_with_twice_the_accumulation(pairs, tmp_path, loss, adapter, sharded):
    """By gloo; with a precomputed reference, whole and in shards, with a divergence, with sharded models, without a reference."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"loss_type: [{loss}]\n")
    both = ["--learning_rate", "0.01", "--save_strategy", "no", "--gradient_checkpointing", "false"]
    caches = {name: tmp_path / f"cache-{name}" for name in ("one", "two")}
    own = {name: ["--precompute_ref_log_probs", "--reference_cache", str(cache)] for name, cache in caches.items()}
    own = own if loss == "apo_zero" else {"one": [], "two": []}
    one = _argv(recipe, pairs, tmp_path / "one", *both, *own["one"], adapter=adapter)
    cli_align.run([*one, "--gradient_accumulation_steps", "2"])
    recipe.write_text(recipe.read_text() + sharded)
    argv = _argv(recipe, pairs, tmp_path / "two", *both, *own["two"], adapter=adapter)
    run_ranks(lambda: run.run(argv, launched=True))
    file = "adapter_model.safetensors" if adapter else "model.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert_close(two[name], weight, rtol=1e-4, atol=1e-5)
    kept = [{path.relative_to(cache) for path in cache.glob("*/*.arrow")} for cache in caches.values()]
    assert kept[0] == kept[1], "the key is that of the whole weights"
    assert bool(kept[0]) == (loss == "apo_zero")


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(pairs, tmp_path):
    """By torchrun, killed after a checkpoint: over within a minute, nothing left behind, and the same bits after all."""
    options = ["--max_steps", "12", "--save_steps", "4", "--learning_rate", "0.01", "--resume_from_checkpoint", "last"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "contralto.align"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true"}
    whole, broken = ([*launch, *_argv("apo_zero", pairs, tmp_path / name, *options)] for name in ("whole", "broken"))
    subprocess.run(whole, check=True, env=env, capture_output=True)
    run = subprocess.Popen(broken, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "broken" / "checkpoint-4").exists() and run.poll() is None:
        time.sleep(0.02)
    ranks = {each.environ()["RANK"]: each for each in psutil.Process(run.pid).children() if "RANK" in each.environ()}
    ranks["1"].kill()
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 1
    assert "Root Cause" in said
    assert "Signal 9 (SIGKILL)" in said
    assert not any(each.is_running() for each in ranks.values())
    assert not (tmp_path / "broken" / "adapter_model.safetensors").exists()
    subprocess.run(broken, check=True, env=env, capture_output=True)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


@pytest.mark.slow
def test_a_trained_adapter_loads_in_peft(pairs, tmp_path):
    from peft import PeftModel

    cli_align.run(_argv("cpo", pairs, tmp_path / "out", "--save_strategy", "no"))
    model = PeftModel.from_pretrained(testbed.load("student"), tmp_path / "out")
    assert model(input_ids=torch.tensor([[2, 4, 5]])).logits.shape[1] == 3
