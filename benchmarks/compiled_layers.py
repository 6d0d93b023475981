"""Measure a preference-training step with compiled layers (`torch_compile`) beside one without: seconds, and what compiling takes.

    python benchmarks/compiled_layers.py                       writes benchmarks/results/compiled_layers.md
    python benchmarks/compiled_layers.py --device cuda --dtype bfloat16 --size 0.5B --attention flex_attention
    python benchmarks/compiled_layers.py --size testbed --pairs 2 --batches 2 --rounds 1 --no-write

Model, pairs and steps are those of `packing.py`, packed with common prefixes once into rows of `--pack-length` tokens, so that batches
differ in the number of rows alone. All batches are visited once before anything is timed, which compiles what they need; its seconds are
a column of the table. Then rounds visit both trainers in turn, in one process, and ratios are taken within a round. Losses are compared
first.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packing import PROMPT, SIZES, Setting, batches_of, build, spread_of
from timing import named_versions
from torch._dynamo.utils import counters
from tqdm import tqdm
from train_step import step

RESULTS = Path(__file__).parent / "results" / "compiled_layers.md"
ROWS = {"eager": False, "compiled": True}
COLUMNS = ["row", "loss", "graphs", "seconds of the first visit", "seconds", "of eager: seconds"]


class Visit(NamedTuple):
    """The first visit of all batches."""

    losses: list[float]
    graphs: int
    seconds: float


def first_visit(trainer: Any, batches: list[Any]) -> Visit:
    """Return losses, compiled graphs and seconds of the first visit."""
    before, start = counters["stats"]["unique_graphs"], time.perf_counter()
    losses = [step(trainer, batch) for batch in batches]
    return Visit(losses, counters["stats"]["unique_graphs"] - before, time.perf_counter() - start)


def measure(setting: Setting, rounds: int) -> tuple[dict[str, Visit], dict[str, list[float]]]:
    """Return the first visit by row, and the seconds of further ones, one number per round."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            row: build(setting, "packing, prefix_sharing", f"{folder}/{row}", torch_compile=compiled)
            for row, compiled in ROWS.items()
        }
        batches = {row: batches_of(trainer, setting) for row, trainer in trainers.items()}
        visits = {row: first_visit(trainer, batches[row]) for row, trainer in trainers.items()}
        found: dict[str, list[float]] = {row: [] for row in ROWS}
        for _ in tqdm(range(rounds), desc="rounds"):
            for row, trainer in trainers.items():
                start = time.perf_counter()
                for batch in batches[row]:
                    step(trainer, batch)
                found[row].append(time.perf_counter() - start)
    return visits, found


def table(visits: dict[str, Visit], times: dict[str, list[float]]) -> list[list[str]]:
    """Return the lines of the table."""
    lines = []
    for row, one in visits.items():
        ratios = [own / eager for own, eager in zip(times[row], times["eager"], strict=True)]
        figures = [f"{statistics.mean(one.losses):.6f}", str(one.graphs), f"{one.seconds:.0f}"]
        lines.append([row, *figures, f"{statistics.median(times[row]):.2f}", spread_of(ratios)])
    return lines


def main() -> None:
    """Measure both, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="10M", choices=SIZES)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--pairs", type=int, default=4, help="per batch (default 4)")
    parser.add_argument("--batches", type=int, default=2, help="per round (default 2)")
    parser.add_argument("--prompt", type=float, default=PROMPT[0], help="median tokens of a prompt")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--pack-length", type=int, default=512)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true", help="checkpoint activations, as TRL does by default")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    setting = Setting(*(getattr(args, name) for name in Setting._fields))
    visits, times = measure(setting, args.rounds)
    for eager, compiled in zip(*(one.losses for one in visits.values()), strict=True):
        if abs(eager - compiled) > (1e-5 if args.dtype == "float32" else 3e-2) * max(1, abs(eager)):
            raise SystemExit(f"{setting}: the rows do not agree on the loss: {eager}, {compiled}")
    lines = table(visits, times)
    text = "\n".join("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines])
    print(text)
    if not args.no_write:
        command = " ".join(["python benchmarks/compiled_layers.py", *sys.argv[1:]])
        machine = f"CPU, {torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
        libraries = named_versions("contralto", "trl", "torch", "transformers", "peft")
        RESULTS.write_text(f"# Compiled layers\n\n`{command}` on {machine}; {libraries}.\n\n{text}\n")


if __name__ == "__main__":
    main()
