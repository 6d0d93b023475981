"""Run every check that needs a GPU, the most important first, each within a time limit of its own.

    python benchmarks/gpu.py                                eight minutes on one H100 or H200; writes benchmarks/results/gpu/
    python benchmarks/gpu.py --checks packing train_step --minutes 4
    python benchmarks/gpu.py --toy --folder out             everything at toy size on a CPU, to see that it runs

A check is a script of this folder, or the tests marked `gpu`, in a process of its own. What it has printed is written as soon as it ends,
also if it was stopped at its limit; a check that fails does not stop the others. The last lines say how each of them ended, and so does
the exit code.
"""

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from timing import named_versions
from tqdm import tqdm

HERE = Path(__file__).parent


class Check(NamedTuple):
    """A script with its arguments on a GPU and at toy size."""

    shows: str
    script: str
    """A file of this folder, or a module."""
    seconds: int
    """Its limit on a GPU."""
    gpu: str
    toy: str
    needs: str = ""
    """A package that has to be installed."""


CHECKS = {
    "tests": Check(
        "losses, gradients and tokens on the device, in bfloat16 beside TRL",
        "pytest",
        100,
        "-q -m 'gpu or kernel' tests/align tests/decoding tests/eval",
        "-q -m 'gpu or kernel' tests/align/losses",
    ),
    "train_step": Check(
        "a step of training beside stock TRL, 0.5B",
        "train_step.py",
        100,
        "--device cuda --dtype bfloat16 --sizes 0.5B --pairs 4 --rounds 3 --no-write",
        "--sizes testbed --lengths 64/192 --pairs 1 --rounds 1 --steps 1 --no-write",
    ),
    "packing": Check(
        "pairs of many lengths, packed and padded",
        "packing.py",
        80,
        "--device cuda --dtype bfloat16 --size 0.5B --vocabulary 151936 --attention flex_attention --pack-length 2048 --no-write",
        "--size testbed --vocabulary 500 --pairs 3 --max-length 128 --rounds 1 --no-write",
    ),
    "head_passes": Check(
        "the passes over logits at the head, in torch and in the Triton kernel",
        "head_passes.py",
        40,
        "--device cuda --dtype bfloat16 --no-write",
        "--tokens 8 --vocabulary 64 --width 8 --rounds 1 --no-write",
    ),
    "head": Check(
        "divergences at the head, in time and memory",
        "distill_loss.py",
        50,
        "--device cuda --dtype bfloat16 --tokens 4096 --rounds 5 --no-write",
        "--tokens 8 --vocabulary 64 --widths 8 8 --rounds 1 --no-write",
    ),
    "train_step_1.5B": Check(
        "the same step, 1.5B with checkpointed activations",
        "train_step.py",
        80,
        "--device cuda --dtype bfloat16 --sizes 1.5B --pairs 4 --rounds 2 --checkpointing --no-write",
        "--sizes testbed --lengths 192/64 --pairs 1 --rounds 1 --steps 1 --checkpointing --no-write",
    ),
    "decode_overhead": Check(
        "a decoding step beside greedy search",
        "decode_overhead.py",
        50,
        "--device cuda --shapes 50M/10M --rounds 2 --seconds 2 --no-write",
        "--shapes testbed --batches 1 --contexts 64 --rounds 1 --seconds 0 --tokens 8 --no-write",
    ),
    "contrastive_search": Check(
        "contrastive search beside greedy search",
        "contrastive_search.py",
        40,
        "--device cuda --dtype bfloat16 --rounds 2 --seconds 1 --no-write",
        "--heads 9/3 --contexts 32 --ks 2 --tokens 4 --rounds 1 --seconds 0 --no-write",
    ),
    "stacked_branches": Check(
        "branches in one forward pass",
        "stacked_branches.py",
        40,
        "--device cuda --dtype bfloat16 --rounds 2 --seconds 1 --static --no-write",
        "--sizes 50M --batches 1 --contexts 16 --rounds 1 --seconds 0 --tokens 4 --no-write",
    ),
    "compiled_steps": Check(
        "steps over static caches, in CUDA graphs and not",
        "compiled_steps.py",
        60,
        "--device cuda --dtype bfloat16 --shapes 50M/10M --rounds 3 --no-write",
        "--shapes testbed --backend eager --tokens 6 --rounds 1 --no-write",
    ),
    "compiled_layers": Check(
        "a step with layers compiled one by one",
        "compiled_layers.py",
        60,
        "--device cuda --dtype bfloat16 --size 0.5B --vocabulary 151936 --attention flex_attention --max-length 1024 --pack-length 2048 "
        "--batches 1 --rounds 2 --no-write",
        "--size testbed --vocabulary 500 --pairs 2 --batches 1 --max-length 64 --pack-length 128 --rounds 1 --no-write",
    ),
    "vllm_pairs": Check(
        "pairs of requests in vLLM, with CUDA graphs",
        "vllm_pairs.py",
        120,
        "--device cuda --dtype bfloat16 --rounds 3 --no-write",
        "--samples 1 --tokens 4 --rounds 1 --no-write",
        needs="vllm",
    ),
}
"""The checks by name, the most important first."""


def run(check: Check, *, toy: bool, limit: float) -> tuple[str, str]:
    """Return how a check ended, and what it has printed.

    Args:
        check: the check.
        toy: at toy size.
        limit: seconds after which it is stopped.
    """
    if check.needs and importlib.util.find_spec(check.needs) is None:
        return f"not run: {check.needs} is not installed", ""
    start = ["-m", check.script] if check.script == "pytest" else [str(HERE / check.script)]
    command = [sys.executable, *start, *shlex.split(check.toy if toy else check.gpu)]
    process = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env={**os.environ, "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    begin = time.monotonic()
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        return f"stopped after {limit:.0f} s", out
    took = f"{time.monotonic() - begin:.0f} s"
    if process.returncode == 0:
        return f"passed in {took}", out
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), f"exit code {process.returncode}")
    return f"failed after {took}: {last}", out


def page(name: str, check: Check, ended: str, printed: str, *, toy: bool) -> str:
    """Return the page of a check."""
    where = "a CPU at toy size" if toy else torch.cuda.get_device_name()
    command = f"python benchmarks/{check.script} {check.toy if toy else check.gpu}".replace(
        "benchmarks/pytest", "-m pytest"
    )
    versions = named_versions("contralto", "torch", "transformers", "trl", "peft")
    shown = printed.strip() or "It has printed nothing."
    if "|" not in shown:
        shown = f"```text\n{shown[-2000:]}\n```"
    return f"# {name}: {check.shows}\n\n`{command}` on {where}: {ended}.\n\n{shown}\n\n{versions}\n"


def main() -> None:
    """Run the checks, and write their pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), help="by default all")
    parser.add_argument(
        "--minutes", type=float, default=8, help="for all of them (default 8); what is left over is not begun"
    )
    parser.add_argument("--toy", action="store_true", help="on a CPU, at toy size")
    parser.add_argument("--folder", type=Path, default=HERE / "results" / "gpu", help="for the pages")
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: run it where there is one, or with --toy")
    args.folder.mkdir(parents=True, exist_ok=True)
    deadline, endings = time.monotonic() + 60 * args.minutes, {}
    for name in tqdm(args.checks, desc="checks"):
        check, left = CHECKS[name], deadline - time.monotonic()
        if left < 1:
            endings[name] = "not run: no time is left"
            continue
        endings[name], printed = run(check, toy=args.toy, limit=left if args.toy else min(left, check.seconds))
        (args.folder / f"{name}.md").write_text(page(name, check, endings[name], printed, toy=args.toy))
    for name, ended in endings.items():
        print(f"{name}: {ended}")
    if any(ended.startswith(("failed", "stopped")) for ended in endings.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
