"""Measure the cost of a second branch of the same model: one forward pass per token (loop), or two (processor).

    python benchmarks/stacked_branches.py                    all settings; writes benchmarks/results/stacked_branches.md
    python benchmarks/stacked_branches.py --device cuda --dtype bfloat16 --sizes 0.5B 1.5B 8B

Context-aware decoding with a contrast prompt half as long as the prompt stands for every method whose branches are inputs of
one model (CID, CFG, VCD, ICD, RITUAL have the same cost). Each round runs, one after the other, plain greedy generate(),
greedy generate() of a batch of twice as many rows, the loop, and the logits processor. The time of a token is the median gap
between two steps. Ratios are taken within a round; the table gives their medians and the middle half of the rounds.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import gaps, llama, parse_flags, prompts_of, publish, setting_lines, spread
from torch import Tensor
from tqdm import tqdm

from contralto.decoding import ContextAwareDecodingLogitsProcessor

RESULTS = Path(__file__).parent / "results" / "stacked_branches.md"
SIZES = {
    "50M": (576, 9, 1536, 32000),
    "0.5B": (896, 24, 4864, 151936),
    "1.5B": (1536, 28, 8960, 151936),
    "8B": (4096, 36, 12288, 151936),
}
"""Hidden size, layers, intermediate size, vocabulary."""


class Round(NamedTuple):
    """Milliseconds per token of one round."""

    greedy: float
    doubled: float
    loop: float
    processor: float


def rounds(
    model: Any, prompts: Tensor, tokens: int, count: int, seconds: float, how: dict[str, Any]
) -> Iterator[Round]:
    """The four systems in turn, at least `count` times and for at least so many seconds."""
    end, other = time.perf_counter() + seconds, prompts[:, : prompts.shape[1] // 2]
    inputs = {"input_ids": other, "attention_mask": torch.ones_like(other)}
    for done in itertools.count():
        if done >= count and time.perf_counter() > end:
            return
        method = ContextAwareDecodingLogitsProcessor(model, inputs)
        runs = (
            gaps(model, prompts, tokens, **how),
            gaps(model, prompts.repeat(2, 1), tokens, **how),
            gaps(model, prompts, tokens, custom_generate=method.loop(), **how),
            gaps(model, prompts, tokens, logits_processor=[method], **how),
        )
        yield Round(*(statistics.median(run) for run in runs))


def row(size: str, batch: int, context: int, found: list[Round]) -> str:
    """A line of the table."""
    times = [f"{statistics.median(column):.2f}" for column in zip(*found, strict=True)]
    ratios = [
        [each.loop / each.greedy for each in found],
        [each.loop / each.doubled for each in found],
        [each.processor / each.loop for each in found],
    ]
    return " | ".join([f"| {size}", str(batch), str(context), *times, *map(spread, ratios), f"{len(found)} |"])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["50M"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--contexts", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="at least so many per setting")
    parser.add_argument("--seconds", type=float, default=20, help="at least so long per setting")
    parser.add_argument("--static", action="store_true", help="static caches, which generate() compiles on a GPU")
    args = parse_flags(parser)
    how = {"cache_implementation": "static"} if args.static else {}
    lines = [
        "# What a second view of the same model costs",
        "",
        "Milliseconds per token, greedy, medians, with a second prompt half as long as the first. `loop` stacks both views into",
        "one forward per token, the processor has a forward of its own; `twice the rows` is plain greedy search of both. In brackets the",
        "middle half of the rounds. Target: on a CPU, the loop at most the cost of twice the rows; on a GPU at batch 1, 1.15 times greedy.",
        "",
        "| model | batch | context | greedy | twice the rows | loop | processor | loop / greedy | loop / twice the rows "
        + "| processor / loop | rounds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    settings = list(itertools.product(args.sizes, args.batches, args.contexts))
    for size, batch, context in tqdm(settings, unit="setting"):
        torch.manual_seed(0)
        model = llama(*SIZES[size]).to(device=args.device, dtype=getattr(torch, args.dtype))
        prompts = prompts_of(batch, context, args.device)
        next(rounds(model, prompts, 4, 1, 0, how))  # warm-up
        lines.append(
            row(size, batch, context, list(rounds(model, prompts, args.tokens, args.rounds, args.seconds, how)))
        )
    lines += [
        "",
        *setting_lines(args.tokens, args.device, args.threads),
        f"Random Llamas, {args.dtype}, {'static' if args.static else 'dynamic'} caches. "
        + "Command: `python benchmarks/stacked_branches.py`.",
    ]
    publish(lines, None if args.no_write else RESULTS)


if __name__ == "__main__":
    main()
