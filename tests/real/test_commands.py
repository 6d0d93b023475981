"""Every command with SmolLM2-135M-Instruct, as a user types it, each in a process of its own; what is printed is read, too."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers.real_models import FIRST_LAYERS

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("commands")]
QUESTION = "What is the capital of France?"
ODD = re.compile(r"warn|deprecat|traceback|failed|fatal|kernels|\bnan\b|MatMul8bit|not initialized", re.IGNORECASE)
"""What a user who did nothing wrong should not read."""
EXPECTED = ("--limit SHOULD ONLY BE USED FOR TESTING", "audit:", "0 failed", "failed=0")
"""Warnings that say something about the tiny amounts of these tests, and counts of nothing."""
KERNEL = "Failed to load CPU gemm_4bit_forward"
"""What bitsandbytes says of a model in 4 bits on CPUs with AVX512-BF16, for which there is a faster kernel in a package."""
RECIPE = """output: data
seed: 0
rows: rows.jsonl
strategies: [stronger_preferred]
roles:
  target: {{engine: transformers, model: {amateur}, temperature: 1.0, max_new_tokens: 8}}
  stronger: {{engine: transformers, model: {model}, method: cd, amateur: {amateur}, temperature: 0.0, max_new_tokens: 8}}
"""
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"What is {n} + 1?"}],
        "chosen": [{"role": "assistant", "content": f"{n + 1}"}],
        "rejected": [{"role": "assistant", "content": f"The answer is {n}."}],
    }
    for n in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def run(folder):
    """Run a command; return its standard output, after a look at what it says on standard error."""

    def call(*argv):
        command = [sys.executable, "-m", "contralto", *map(str, argv)]
        where = {**os.environ, "OMP_NUM_THREADS": "1"}  # a worker of pytest for each core
        done = subprocess.run(command, check=False, cwd=folder, env=where, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        expected = (*EXPECTED, KERNEL) if "--load-in-4bit" in argv else EXPECTED
        lines = [line for line in re.split(r"[\r\n]+", done.stdout + "\n" + done.stderr) if ODD.search(line)]
        assert [line for line in lines if not any(known in line for known in expected)] == []
        return done.stdout

    return call


@pytest.fixture(scope="module")
def amateur(run, smollm2, folder):
    """The first layers of the model, cut by the command."""
    how = ["--layers", FIRST_LAYERS[0], "--keep", "first", "--texts", 0, "--output", "amateur"]
    assert "37% of the expert's" in run("amateur", smollm2, *how)
    return folder / "amateur"


def test_generate(run, smollm2, amateur):
    assert run("generate", "--model", smollm2, "--max-new-tokens", 8, QUESTION) == "The capital of France is Paris.\n"
    how = ["--model", smollm2, "--max-new-tokens", 6, "--dtype", "bfloat16", QUESTION]
    loop = run("generate", "--amateur", amateur, "--compare", "greedy", *how)
    assert "--- greedy\nThe capital of France is Paris" in loop


def test_explain(run, smollm2, amateur, folder):
    run("explain", "--model", smollm2, "--amateur", amateur, "--max-new-tokens", 4, QUESTION)
    assert "Ġ" not in (folder / "explain.html").read_text()


def test_eval_and_compare(run, smollm2, amateur):
    how = ["--tasks", "testbed_stories", "--limit", 2]
    args = f"pretrained={smollm2},amateur={amateur},method=cd"
    assert "testbed_stories" in run("eval", "--model_args", args, "--device", "cpu", *how)
    run("compare", "--model", smollm2, "--amateur", amateur, "--methods", "cd", "--seeds", 1, *how, "--output", "both")


def test_data(run, smollm2, amateur, folder):
    prompts = [{"prompt": [{"role": "user", "content": f"{QUESTION} {n}"}]} for n in range(2)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in prompts))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=smollm2, amateur=amateur))
    run("data", "run", "recipe.yaml")


def test_align_and_what_it_saved(run, smollm2, folder):
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PAIRS))
    how = ["--use_peft", "--max_steps", 2, "--use_cpu", "--per_device_train_batch_size", 2, "--report_to", "none"]
    data = ["--dataset_name", "pairs.jsonl", "--output_dir", "tuned", "--learning_rate", 1e-3]
    run("align", "dpo", "--model_name_or_path", smollm2, *data, *how)
    texts = [
        run("generate", *model, "--max-new-tokens", 6, "What is 2 + 1?")
        for model in (["--model", "tuned"], ["--model", smollm2, "--adapter", "tuned"])
    ]
    assert texts[0] == texts[1]


def test_quantised(run, smollm2):
    pytest.importorskip("bitsandbytes")
    for flag in ("--load-in-8bit", "--load-in-4bit"):
        assert "Paris" in run("generate", "--model", smollm2, flag, "--max-new-tokens", 8, QUESTION)
