"""Measure decoding steps over static caches, compiled and not, beside those that transformers runs as they are.

    python benchmarks/compiled_steps.py                     on a CPU; writes benchmarks/results/compiled_steps.md
    python benchmarks/compiled_steps.py --device cuda --dtype bfloat16
    python benchmarks/compiled_steps.py --shapes testbed --backend eager --tokens 8 --rounds 1 --no-write

A static cache keeps the shapes of all steps the same, so that a forward pass can be compiled once, on a GPU into CUDA graphs. `generate()`
does that by itself on a GPU with `cache_implementation="static"`; on a CPU it has to be told. Each round runs greedy search and the loops of
two methods in turn, each with a growing cache, with static ones, and with static ones and compiled; the time of a token is the median gap
between two steps, so that neither the prompt nor compiling counts.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from decode_overhead import pair
from timing import gaps, parse_flags, prompts_of, publish, setting_lines, spread
from torch import Tensor
from tqdm import tqdm
from transformers import CompileConfig

from contralto.decoding import (
    ClassifierFreeGuidanceLogitsProcessor,
    ContrastiveDecodingLogitsProcessor,
    ContrastiveSearch,
)

RESULTS = Path(__file__).parent / "results" / "compiled_steps.md"
HEAD = ["models", "decoding", "cache", "ms", "time / growing cache", "time / greedy, same cache", "compiling, s"]
CACHES = ("growing", "static", "static, compiled")


def systems(expert: Any, amateur: Any, prompts: Tensor) -> dict[str, Any]:
    """What decodes, by name: arguments of generate(), made for each run."""
    mask = torch.ones_like(prompts)
    return {
        "greedy": dict,
        "cd, loop": lambda: {
            "custom_generate": ContrastiveDecodingLogitsProcessor(amateur, attention_mask=mask).loop()
        },
        "cfg, loop": lambda: {"custom_generate": ClassifierFreeGuidanceLogitsProcessor(expert).loop()},
        "contrastive search": lambda: {"custom_generate": ContrastiveSearch()},
    }


def caches(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The arguments of generate() for each kind of cache."""
    default = args.device != "cpu" and args.backend == "inductor"
    config = CompileConfig() if default else CompileConfig(backend=args.backend, mode="default", fullgraph=False)
    config._compile_all_devices = True  # type: ignore[assignment]
    room = args.context + args.tokens + 2 + ContrastiveSearch().k  # `gaps` reads two tokens more
    static = {"cache_implementation": "static", "max_cache_len": room}
    how: tuple[dict[str, Any], ...] = {}, {**static, "disable_compile": True}, {**static, "compile_config": config}
    return dict(zip(CACHES, how, strict=True))


def table(shape: str, args: argparse.Namespace) -> list[str]:
    """The lines of a pair of models, whose graphs begin anew: PyTorch keeps eight of one forward in a process, and compiles no more."""
    torch._dynamo.reset()
    models = [model.to(getattr(torch, args.dtype)) for model in pair(shape, args.device)]
    prompts = prompts_of(args.batch, args.context, args.device)
    decoders, kinds = systems(models[0], models[1], prompts), caches(args)
    times: dict[tuple[str, str], list[float]] = {(name, cache): [] for name in decoders for cache in kinds}
    first: dict[tuple[str, str], float] = {}
    for name, cache in tqdm(times, desc=f"{shape}, warm-up"):
        begin = time.perf_counter()
        gaps(models[0], prompts, args.tokens, **decoders[name](), **kinds[cache])
        first[name, cache] = time.perf_counter() - begin
    for _ in tqdm(range(args.rounds), desc=shape):
        for (name, cache), own in times.items():
            own.append(statistics.median(gaps(models[0], prompts, args.tokens, **decoders[name](), **kinds[cache])))
    lines = []
    for (name, cache), own in times.items():
        growing, greedy = times[name, CACHES[0]], times["greedy", cache]
        cells = [
            shape,
            name,
            cache,
            f"{statistics.median(own):.2f}",
            "-" if cache == CACHES[0] else spread([a / b for a, b in zip(own, growing, strict=True)]),
            "-" if name == "greedy" else spread([a / b for a, b in zip(own, greedy, strict=True)]),
            f"{first[name, cache]:.0f}" if cache == CACHES[-1] else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["testbed", "50M/10M"], default=["testbed", "50M/10M"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default inductor)")
    args = parse_flags(parser)
    lines = [line for shape in args.shapes for line in table(shape, args)]
    publish(
        [
            "# Compiled steps",
            "",
            f"Milliseconds per token at batch {args.batch}, context {args.context}: medians, ratios within a round with the middle half of {args.rounds} rounds. A static cache alone",
            "costs: attention runs over all of its positions. Compiled, each pass is one graph; the last column is the time of the first run, in",
            "which graphs are made.",
            "",
            f"| {' | '.join(HEAD)} |",
            "|---" * len(HEAD) + "|",
            *lines,
            "",
            *setting_lines(args.tokens, args.device, args.threads),
            f"Weights in {args.dtype}; the testbed's expert (0.17M parameters) and amateur (0.02M), random Llamas of 54M and 10M parameters.",
            "Command: `python benchmarks/compiled_steps.py`.",
        ],
        None if args.no_write else RESULTS,
    )


if __name__ == "__main__":
    main()
