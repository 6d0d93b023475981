"""The benchmark scripts run, at toy size, and print their tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.scripts import run_script
from torch.utils.flop_counter import FlopCounterMode

from contralto.decoding.methods import METHODS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


def _run(name, *arguments):
    return run_script(BENCHMARKS / name, *arguments)


def test_decode_overhead():
    small = "--shapes testbed --batches 1 --contexts 64 --rounds 1 --seconds 0 --tokens 8 --no-write"
    result = _run("decode_overhead.py", *small.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| testbed | ") == 2


def test_gpu(tmp_path):
    """Pages of what passed; what is not installed, or has no time left, is not run, and the last lines say so."""
    result = _run("gpu.py", "--toy", "--folder", str(tmp_path), "--checks", "decode_overhead", "vllm_pairs")
    assert result.returncode == 0, result.stderr
    assert "| testbed | " in (tmp_path / "decode_overhead.md").read_text()
    assert result.stdout.splitlines()[-1] == "vllm_pairs: not run: vllm is not installed"
    stopped = _run("gpu.py", "--toy", "--folder", str(tmp_path), "--checks", "decode_overhead", "--minutes", "0.025")
    assert (stopped.returncode, stopped.stdout.splitlines()[-1]) == (1, "decode_overhead: stopped after 1 s")


def test_stacked_branches():
    small = "--sizes 50M --batches 1 --contexts 16 --rounds 1 --seconds 0 --tokens 4 --no-write"
    result = _run("stacked_branches.py", *small.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| 50M | 1 | 16 |") == 1


def test_gated():
    small = "--problems 6 --dev-problems 4 --rounds 1 --no-write"
    result = _run("gated.py", *small.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| testbed | ") == 11
    assert "Right of 4 problems of the dev split: no gate " in result.stdout


def test_prefix_reuse():
    small = "--documents 3 --batches 2 --tokens 2 --rounds 1 --no-write"
    result = _run("prefix_reuse.py", *small.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| testbed | ") == 5
    assert result.stdout.count("| 1 of 1 | 1 |") == 5


def test_method_costs():
    """Every method in each of its executors; a loop reads all views in one pass, a processor in a pass each."""
    small = "--batches 1 --tokens 8 --rounds 1 --no-write"
    result = _run("method_costs.py", *small.split())
    assert result.returncode == 0, result.stderr
    lines = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    passes = {(line[0].removeprefix("| "), line[1]): line[2:5] for line in lines if line[1] not in ("executor", "-")}
    methods = [method for method in METHODS.values() if method.contrasts]
    assert {key for key in passes if "gate" not in key[0] and key[1] != "transformers"} == {
        (method.name, executor) for method in methods for executor in method.executors
    }
    assert passes["cfg", "loop"] == ["1.00", "2.00", "0.00"]
    assert passes["cfg", "processor"] == passes["cfg", "transformers"] == ["2.00", "2.00", "0.00"]
    assert passes["cd", "loop"] == ["1.00", "1.00", "1.00"]


def test_compiled_steps():
    small = "--shapes testbed --backend eager --tokens 6 --rounds 1 --no-write"
    result = _run("compiled_steps.py", *small.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n| testbed | ") == 12


@pytest.mark.full
def test_proxy_tuning():
    small = "--experts expert-0 --rows 32 --steps 2 --problems 8 --dev 4 --no-write"
    result = _run("proxy_tuning.py", *small.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n| expert-0 | ") == 4


def test_speculative():
    small = "--sizes testbed --rounds 1 --seconds 0 --tokens 8 --ways greedy --no-write"
    result = _run("speculative.py", *small.split(), "--model", "testbed:expert", "--amateur", "testbed:amateur")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n| testbed") == 7


def test_critic_guidance(tmp_path):
    small = f"--folder {tmp_path} --experts expert-0 --prompts 4 --problems 4 --no-write"
    result = _run("critic_guidance.py", *small.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| best of 8") == 2


@pytest.mark.parametrize("teacher", ["shuffled", "bpe"])
def test_text_distillation(tmp_path, teacher):
    small = f"--folder {tmp_path} --teacher {teacher} --teacher_steps 2 --rows 4 --batch 4 --problems 4 --seeds 1"
    result = _run("text_distillation.py", *small.split(), "--losses", "sft", "uld", "gold, bayesian")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| 0.0002 | 0 |") == 3


@pytest.mark.full
def test_testbed_card_compares_with_the_card():
    """Few problems make wide scatter, so the verdict is open; every figure of the card must be compared."""
    models = BENCHMARKS.parent / "testbed" / "models"
    result = _run("testbed_card.py", "--models", str(models), "--problems", "10", "--items", "4", "--stories", "2")
    assert result.returncode in (0, 1), result.stderr
    assert result.stdout.count("  card ") == 58


def test_vision_card_compares_with_the_card():
    models = BENCHMARKS.parent / "testbed" / "vision_models"
    result = _run("vision_card.py", "--models", str(models), "--pictures", "6", "--dev", "2")
    assert result.returncode in (0, 1), result.stderr
    assert result.stdout.count("  card ") == 60


def test_image_attention():
    result = _run("image_attention.py", "--pictures", "3", "--models", "vision-0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| vision-0 | ") == 8


@pytest.mark.full
@pytest.mark.parametrize(("part", "rows", "lines"), [("c_rag", 40, 5), ("qcrd", 6, 5)])
def test_rationale_card(part, rows, lines, tmp_path):
    small = f"{part} --folder {tmp_path / 'kept'} --rows {rows} --steps 2 --problems 4 --seeds 1"
    result = _run("rationale_card.py", *small.split())
    assert result.returncode == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith("| ") and " | 0 | " in line]
    assert len(table) == lines
    again = _run("rationale_card.py", *small.split())
    assert [line for line in again.stdout.splitlines() if line in table] == table, "outcomes are kept"


def test_distill_loss():
    small = "--tokens 16 --vocabulary 500 --widths 8 12 --rounds 1 --no-write"
    result = _run("distill_loss.py", *small.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| 16 | ") == 8


def test_head_passes():
    """Without a GPU the torch passes alone."""
    small = "--tokens 8 --vocabulary 64 --width 8 --rounds 1 --no-write"
    result = _run("head_passes.py", *small.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| 8 | ") == 6
    assert "The kernel has not been run: it needs Triton, and a GPU or its interpreter." in result.stdout


def test_long_runs():
    """Two hours of the endpoint instead of a day, and what is right whatever the machine does meanwhile."""
    result = _run("long_runs.py", "--share", "0.04", "--no-write")
    assert result.returncode in (0, 1), result.stderr
    table = [line.split(" | ") for line in result.stdout.split("|---|\n")[1].splitlines() if line.startswith("| ")]
    assert [line[0].split(",")[0] for line in table] == ["| endpoint", "| evaluation", "| training"]
    assert [line[7] for line in table] == ["0", "0", "0"], "nothing is lost"
    assert table[0][8] == "0", "nothing is asked twice"
    assert all(float(line[3]) < 1.2 for line in table), "memory"


def test_data_size():
    result = _run("data_size.py", "--sizes", "40", "80", "--no-write")
    assert result.returncode == 0, result.stderr
    assert "\n| 80 | " in result.stdout


@pytest.mark.full
def test_compiled_layers():
    small = (
        "--size testbed --vocabulary 500 --pairs 2 --batches 2 --max-length 64 --pack-length 128 --rounds 1 --no-write"
    )
    result = _run("compiled_layers.py", *small.split())
    assert result.returncode == 0, result.stderr
    lines = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith(("| eager", "| compiled"))]
    eager, compiled = (int(line[2]) for line in lines)
    assert eager == 0 < compiled


@pytest.mark.full
def test_train_step():
    small = "--sizes testbed --vocabularies 500 --lengths 192/64 --rounds 1 --steps 1 --pairs 1 --no-write"
    result = _run("train_step.py", *small.split())
    assert result.returncode == 0, result.stderr
    lines = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| testbed | ")]
    flops = {(line[2], line[3]): float(line[9]) for line in lines}
    stock, compact, ours = (flops["192/64", row] for row in ("stock", "stock, completion tokens only", "ours"))
    assert ours <= compact < stock == 1


@pytest.mark.full
def test_learning_curve():
    result = _run("learning_curve.py", "--steps", "2", "--pairs", "4", "--rounds", "1", "--no-write")
    assert result.returncode == 0, result.stderr
    lines = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| contralto")]
    assert len(lines) == 2
    assert all(float(line[3]) < 1e-5 for line in lines), "the losses of stock TRL"


@pytest.mark.full
def test_packing():
    small = "--size testbed --vocabulary 500 --pairs 3 --batches 1 --max-length 128 --rounds 1 --no-write"
    result = _run("packing.py", *small.split())
    assert result.returncode == 0, result.stderr
    lines = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| p")]
    tokens = {line[0].removeprefix("| "): int(line[2].replace(",", "")) for line in lines}
    assert tokens["packing, prefix_sharing"] <= tokens["prefix_sharing"] < tokens["padded"]
    assert tokens["padding_free"] <= tokens["packing"] <= tokens["padded"]


def test_the_step_benchmark_counts_products_in_place_and_leaves_trl_as_it_was(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train_step
    import trl.trainer.utils as stock

    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with FlopCounterMode(display=False, custom_mapping=train_step.IN_PLACE) as counter:
        torch.zeros(3, 5).addmm_(a, b)
        torch.addmm(torch.zeros(3, 5), a, b)
    assert counter.get_total_flops() == 2 * (2 * 3 * 4 * 5)
    before = stock._use_triton
    with train_step.compaction(True):
        assert stock._use_triton(a.device)
    assert stock._use_triton is before


@pytest.mark.full
def test_a_stopped_distill_card_goes_on(tmp_path):
    """What was kept is taken, what was not is done again, with the same answers."""
    kept = tmp_path / "runs.jsonl"
    small = f"--prompts 16 --epochs 2 --problems 8 --dev 4 --seeds 0 --rates 1e-3 --no-write --runs {kept}"
    small += " --settings skew_kl gradual paper sft+contrast kept+contrast"
    found = []
    for _ in range(2):
        result = _run("distill_card.py", *small.split())
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("| 0.001 | ") == 6
        found.append([json.loads(line) for line in kept.read_text().splitlines()])
        kept.write_text("".join(json.dumps(line) + "\n" for line in found[0][:4]))
    one, two = ([(each["key"], each["run"]["dev"], each["run"]["right"]) for each in lines] for lines in found)
    assert one == two
    assert [each["run"]["seconds"] for each in found[0][:4]] == [each["run"]["seconds"] for each in found[1][:4]]


@pytest.mark.real
def test_data_ray():
    pytest.importorskip("ray")
    command = [sys.executable, str(BENCHMARKS / "data_ray.py"), "--rows", "300", "--seconds", "2", "--no-write"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # Ray does not survive a fork
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| 0 | 0 | ") == 3
    assert result.stdout.count("| yes |") == 3
