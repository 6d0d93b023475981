"""Measure the passes over logits between the head's two products, in torch and in the Triton kernel.

    python benchmarks/head_passes.py --device cuda --dtype bfloat16       writes benchmarks/results/head_passes.md
    TRITON_INTERPRET=1 python benchmarks/head_passes.py --tokens 8 --vocabulary 64 --rounds 1 --no-write

The first table has the passes over one chunk of products, as large as the head makes it: to log-probabilities alone, as a reference needs
them, with the gradient, and with the metrics of a step that is logged. GB/s is the memory of the products times how often the kernel reads and writes them, over its
time. The second table has the head of a LoRA training as a whole, from hidden states to their gradient; on a CPU a third one has the cast of its
weight under autocast. Each round runs both, one
after the other; ratios are taken within a round, and the tables give medians and the middle half of the rounds. Before that the library makes its own
choice, which compares their results; the last lines say how it went. Where Triton is missing, or there is neither a GPU nor its
interpreter, the torch passes are measured alone.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from timing import parse_flags, publish, setting_lines, spread
from torch import Tensor
from tqdm import tqdm

from contralto.align.losses import sweep
from contralto.align.losses.chunked import Head, chunked_logps
from contralto.align.losses.formulas import STATISTICS
from contralto.align.losses.passes_choice import PassesChoice, load_kernel
from contralto.align.losses.sweep import LogitsSource
from contralto.align.losses.target_passes import TargetResult, TargetTile, torch_passes
from contralto.align.losses.workspace import Workspace, cast_for_now, tokens_per_chunk

RESULTS = Path(__file__).parent / "results" / "head_passes.md"
KINDS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "log-probabilities": (False, ()),
    "and gradient": (True, ()),
    "and gradient and metrics": (True, STATISTICS),
}
"""Whether there is a gradient, and the statistics."""

Run = Callable[[TargetTile, Workspace], TargetResult]


def by_kernel(tile: TargetTile, work: Workspace) -> TargetResult:
    """Run the passes in the kernel."""
    return load_kernel()(tile)


def runs(device: str) -> dict[str, Run]:
    """Return the passes that can be run here."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    has_kernel = importlib.util.find_spec("triton") is not None and (device != "cpu" or is_interpreted)
    found: dict[str, Run] = {"torch": torch_passes}
    return found | {"kernel": by_kernel} if has_kernel else found


def problem(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, the head's weight and targets; logits have about the spread of those of language models."""
    torch.manual_seed(0)
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    weight = 3 * args.width**-0.5 * torch.randn(args.vocabulary, args.width, **options)
    targets = torch.randint(args.vocabulary, (args.tokens,), device=args.device)
    return torch.randn(args.tokens, args.width, **options), weight, targets


def chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, gradient: bool, names: tuple[str, ...]
) -> tuple[TargetTile, Workspace]:
    """Return the products of one chunk, and the memory of its sweep."""
    size = min(len(hidden), tokens_per_chunk(hidden, len(weight)))
    work = Workspace(hidden, (size, len(weight)), tiles=1, in_full=False)
    source = LogitsSource(Head(weight), 1.0, hidden)
    source.multiply(slice(size), work.tiles[0])
    memory = work.gradients(work.tiles[0]) if gradient else None
    return TargetTile(work.tiles[0], targets[:size], source, None, memory, names), work


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Return the time of a call."""
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def cells(calls: Mapping[str, Callable[[], object]], args: argparse.Namespace) -> tuple[list[str], float | None]:
    """Return milliseconds of torch and kernel and their ratio as cells, and the kernel's milliseconds."""
    for call in calls.values():
        milliseconds(call, args.device)
    rounds = [[milliseconds(call, args.device) for call in calls.values()] for _ in range(args.rounds)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    if len(medians) == 1:
        return [f"{medians[0]:.3f}", "-", "-"], None
    ratio = spread([kernel / in_torch for in_torch, kernel in rounds])
    return [*(f"{median:.3f}" for median in medians), ratio], medians[1]


def passes_row(name: str, args: argparse.Namespace, choice: PassesChoice) -> str:
    """Return a line of the first table."""
    gradient, names = KINDS[name]
    tile, work = chunk(*problem(args), gradient=gradient, names=names)
    if "kernel" in runs(args.device):
        choice.reason_against(tile, work)
    calls = {key: partial(run, tile, work) for key, run in runs(args.device).items()}
    figures, kernel = cells(calls, args)
    bytes_ = tile.products.nbytes * (2 if gradient else 1) + (0 if tile.gradient is None else tile.gradient.nbytes)
    speed = "-" if kernel is None else f"{bytes_ / kernel / 1e6:.0f}"
    return f"| {name} | {len(tile.products)} | {' | '.join(figures)} | {speed} |"


def head_row(name: str, args: argparse.Namespace) -> str:
    """Return a line of the second table."""
    gradient, names = KINDS[name]
    hidden, weight, targets = problem(args)

    def run(passes: Run) -> None:
        with mock.patch.object(sweep, "run_passes", passes):
            logps = chunked_logps(hidden.requires_grad_(gradient), Head(weight), targets, also=names).logps
        if gradient:
            logps.sum().backward()  # type: ignore[no-untyped-call]
            hidden.grad = None

    figures, _ = cells({key: partial(run, passes) for key, passes in runs(args.device).items()}, args)
    return f"| {name} | {args.tokens} | {' | '.join(figures)} |"


def cast_row(args: argparse.Namespace) -> str:
    """Return the line of the third table."""
    weight = torch.randn(args.vocabulary, args.width)

    def kept() -> None:
        with cast_for_now(weight, torch.bfloat16):
            pass

    figures, _ = cells({"new": lambda: weight.to(torch.bfloat16), "kept": kept}, args)
    return f"| {args.vocabulary} x {args.width} | {' | '.join(figures)} |"


def choices(choice: PassesChoice) -> list[str]:
    """Return the lines about the library's own choice."""
    verdicts = zip(KINDS, choice.reasons, strict=False)
    return [f"The library's choice, {name}: {reason or 'the kernel'}." for name, reason in verdicts]


def main() -> None:
    """Measure, and print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--rounds", type=int, default=9)
    args = parse_flags(parser)
    choice = PassesChoice(load_kernel, lambda call: milliseconds(call, args.device), least_tokens=0)
    lines = [
        "# The passes over logits, in torch and in a kernel",
        "",
        f"Vocabulary {args.vocabulary}, width {args.width}, {args.dtype}. Medians; in brackets the middle half of the rounds.",
        "",
        "| passes over one chunk | tokens | ms torch | ms kernel | kernel / torch | GB/s of the kernel |",
        "|---|---|---|---|---|---|",
        *(passes_row(name, args, choice) for name in tqdm(KINDS, unit="row")),
        "",
        "| the whole head | tokens | ms torch | ms kernel | kernel / torch |",
        "|---|---|---|---|---|",
        *(head_row(name, args) for name in tqdm(KINDS, unit="row")),
        "",
        *choices(choice),
    ]
    if args.device == "cpu":
        lines += [
            "| a frozen weight to bfloat16, as under autocast | ms in new memory | ms in kept memory | kept / new |",
            "|---|---|---|---|",
            cast_row(args),
            "",
        ]
    if "kernel" not in runs(args.device):
        lines += ["The kernel has not been run: it needs Triton, and a GPU or its interpreter."]
    lines += ["", *setting_lines(args.tokens, args.device, args.threads)]
    lines += [f"{args.rounds} rounds. Command: `python benchmarks/head_passes.py {' '.join(sys.argv[1:])}`."]
    publish(lines, None if args.no_write else RESULTS)


if __name__ == "__main__":
    main()
