"""`contralto generate` in several processes: the file of one process, byte for byte."""

import os
import subprocess
import sys

import pytest
from helpers.ranks import run_ranks

from contralto import testbed
from contralto.cli import main
from contralto.testbed.questions import problems

QUESTIONS = [row["prompt"] for row in problems(count=7, seed=3, split="test")]
WAYS = {
    "greedy": "--method cd --amateur testbed:amateur --batch-size 2 --compare greedy",
    "sampled": "--method cd --amateur testbed:amateur --batch-size 3 --sample --seed 5",
}


def _prompts(folder):
    path = folder / "prompts.txt"
    path.write_text("".join(f"{question}\n" for question in QUESTIONS))
    return path


def _command(prompts, output, way):
    run = f"generate --model testbed:expert --file {prompts} --output {output} --max-new-tokens 24 {WAYS[way]}"
    return run.split()


def _run(argv):
    assert main(argv) == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_write_the_file_of_one(way, tmp_path):
    """Four or three batches for two processes; and again after a kill in the middle of a row."""
    testbed.load("expert")
    prompts, one, two = _prompts(tmp_path), tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    _run(_command(prompts, one, way))
    run_ranks(lambda: _run(_command(prompts, two, way)))
    assert two.read_bytes() == one.read_bytes()
    two.write_bytes(one.read_bytes()[: one.read_bytes().index(b"\n") + 20])
    run_ranks(lambda: _run([*_command(prompts, two, way), "--resume"]))
    one.write_bytes(one.read_bytes()[: one.read_bytes().index(b"\n") + 20])
    _run([*_command(prompts, one, way), "--resume"])
    assert two.read_bytes() == one.read_bytes()
    run_ranks(lambda: _run([*_command(prompts, two, way), "--resume"]))


def test_what_several_processes_cannot_share(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for given, message in (
        (["--device", "cpu", "a"], "--device cpu is for one process, and each of several has its own"),
        ([], "standard input is that of one process"),
    ):
        monkeypatch.setattr("contralto.common.processes.device_of_process", lambda: "cpu")
        assert main(["generate", "--model", "testbed:expert", *given])
        assert message in capsys.readouterr().err


RANKS = """import os, sys
from contralto.cli import main
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], file=sys.stderr)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_launcher_starts_it(tmp_path):
    """As the page on several GPUs says, on a CPU, where accelerate launch would start one process."""
    prompts, output, script = _prompts(tmp_path), tmp_path / "out.jsonl", tmp_path / "ranks.py"
    script.write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, *_command(prompts, output, "greedy")]
    done = subprocess.run(command, check=False, env=os.environ | quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"rank 0 of 2", "rank 1 of 2"} <= {*done.stderr.splitlines()}
    assert output.read_text().count("\n") == len(QUESTIONS)
