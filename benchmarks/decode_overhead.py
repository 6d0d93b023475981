"""Measure the cost of contrastive decoding relative to its two models.

    python benchmarks/decode_overhead.py                     all settings; writes benchmarks/results/decode_overhead.md
    python benchmarks/decode_overhead.py --shapes testbed --batches 1 --contexts 64 --rounds 1 --seconds 0 --tokens 8 --no-write

Each round runs, one after the other, greedy generate() of the expert, of the amateur alone, and of the expert with
ContrastiveDecodingLogitsProcessor, with its loop(), and with a processor that only runs the amateur, on the same prompts. The time of a token
is the median gap between two steps, so that the prompt's forward does not count. The ratio to the floor, contrastive / (expert + amateur), is
taken within a round; the table gives its median and the range of the middle half of the rounds.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import gaps, llama, prompts_of, publish, setting_lines
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor

from contralto import testbed
from contralto.decoding import ContrastiveDecodingLogitsProcessor

RESULTS = Path(__file__).parent / "results" / "decode_overhead.md"
TARGET = 1.10


class Round(NamedTuple):
    """Milliseconds per token of one round."""

    expert: float
    amateur: float
    contrastive: float
    loop: float
    bare: float

    @property
    def floor(self) -> float:
        """Return the time of both models alone."""
        return self.expert + self.amateur

    @property
    def ratio(self) -> float:
        """Return the time by contrast relative to that of both models alone."""
        return self.contrastive / self.floor


class Bare(LogitsProcessor):
    """Runs a model in turn with the main one by transformers' own calls, and leaves the scores as they are: no rule, no checks."""

    supports_continuous_batching = False

    def __init__(self, model: Any) -> None:
        self._model, self._kwargs = model, dict[str, Any]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        model, first = self._model, not self._kwargs
        if first:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand_as(input_ids)
            self._kwargs = {"use_cache": True, "logits_to_keep": 1, "position_ids": positions}
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=None if first else 1, is_first_iteration=first, **self._kwargs
        )
        outputs = model(**inputs, return_dict=True)
        self._kwargs = model._update_model_kwargs_for_generation(outputs, self._kwargs, is_encoder_decoder=False)
        return scores


def pair(shape: str, device: str) -> tuple[Any, Any]:
    """Expert and amateur of a shape."""
    torch.manual_seed(0)
    if shape == "testbed":
        models = testbed.load("expert"), testbed.load("amateur")
        for model in models:
            model.config.max_position_embeddings = 4096  # longer than they were trained for: only time counts here
    else:
        models = llama(576, 9, 1536), llama(256, 2, 768)
    return models[0].to(device), models[1].to(device)


def rounds(models: tuple[Any, Any], prompts: Tensor, tokens: int, count: int, seconds: float = 0) -> Iterator[Round]:
    """The three systems in turn, at least `count` times and for at least so many seconds."""
    expert, amateur = models
    end = time.perf_counter() + seconds
    for done in itertools.count():
        if done >= count and time.perf_counter() > end:
            return
        contrast = ContrastiveDecodingLogitsProcessor(amateur, attention_mask=torch.ones_like(prompts))
        runs = (
            gaps(expert, prompts, tokens),
            gaps(amateur, prompts, tokens),
            gaps(expert, prompts, tokens, logits_processor=[contrast]),
            gaps(expert, prompts, tokens, custom_generate=contrast.loop()),
            gaps(expert, prompts, tokens, logits_processor=[Bare(amateur)]),
        )
        yield Round(*(statistics.median(run) for run in runs))


def row(shape: str, batch: int, context: int, found: list[Round]) -> str:
    """A line of the table."""
    expert, amateur, contrastive, *_ = (statistics.median(column) for column in zip(*found, strict=True))
    times = [(each.contrastive, each.loop, each.bare) for each in found]
    beyond, loop, bare = (
        statistics.median(time - each.floor for time, each in zip(column, found, strict=True))
        for column in zip(*times, strict=True)
    )
    ratios = sorted(each.ratio for each in found)
    quarter = len(ratios) // 4
    verdict = "yes" if statistics.median(ratios) <= TARGET else "no"
    return (
        f"| {shape} | {batch} | {context} | {expert:.2f} | {amateur:.2f} | {contrastive:.2f} | {beyond:+.2f} | "
        f"{loop:+.2f} | {bare:+.2f} | "
        f"{statistics.median(ratios):.3f} | {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f} | {len(ratios)} | {verdict} |"
    )


def growth_row(shape: str, models: tuple[Any, Any], tokens: int, count: int, seconds: float, device: str) -> str:
    """The ratio in the first and in the last quarter of a long text: does a token cost more the later it comes?"""
    prompts, end = prompts_of(1, 64, device), time.perf_counter() + seconds
    quarters: tuple[list[float], list[float]] = ([], [])
    while len(quarters[0]) < count or time.perf_counter() < end:
        contrast = ContrastiveDecodingLogitsProcessor(models[1], attention_mask=torch.ones_like(prompts))
        expert, amateur = gaps(models[0], prompts, tokens), gaps(models[1], prompts, tokens)
        both = gaps(models[0], prompts, tokens, logits_processor=[contrast])
        for ratios, part in zip(quarters, (slice(tokens // 4), slice(-(tokens // 4), None)), strict=True):
            e, a, c = (statistics.median(times[part]) for times in (expert, amateur, both))
            ratios.append(c / (e + a))
    first, last = (statistics.median(ratios) for ratios in quarters)
    return f"| {shape} | {tokens} | {first:.3f} | {last:.3f} | {len(quarters[0])} |"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=["testbed", "50M/10M"], default=["testbed", "50M/10M"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--contexts", nargs="+", type=int, default=[64, 1024])
    parser.add_argument(
        "--most", type=int, default=4096, help="tokens of the prompts of a batch; larger settings are left out"
    )
    parser.add_argument("--tokens", type=int, default=64, help="generated per run; eight times as many for the growth")
    parser.add_argument("--rounds", type=int, default=5, help="at least so many per setting")
    parser.add_argument("--seconds", type=float, default=30, help="at least so long per setting")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-write", action="store_true", help="only print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        "# What contrastive decoding costs beyond its two models",
        "",
        "Milliseconds per token, greedy, medians. Floor: expert + amateur, each alone in `generate()`, measured in turn with",
        f"contrastive decoding in the same round. Target: at most {TARGET:.2f} times the floor. Beyond the floor lie the logits processor, its loop, and",
        "a processor that only runs the amateur by transformers' own calls, without rule, checks or comparison of rows.",
        "",
        "| models | batch | context | expert | amateur | contrastive | beyond the floor | the loop | the amateur alone in turn | ratio | middle half | rounds | target met |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    settings = [
        (s, b, c) for s in args.shapes for b in args.batches for c in args.contexts if b * c <= args.most
    ]  # a prompt of 16 x 1024 tokens takes longer than all that is measured after it
    models = {shape: pair(shape, args.device) for shape in args.shapes}
    for shape, batch, context in tqdm(settings, unit="setting"):
        prompts = prompts_of(batch, context, args.device)
        next(rounds(models[shape], prompts, 4, 1))  # warm-up
        lines.append(
            row(shape, batch, context, list(rounds(models[shape], prompts, args.tokens, args.rounds, args.seconds)))
        )
    lines += [
        "",
        "Does a token cost more the later it comes, beyond attention itself? The same ratio at batch 1, context 64, in the",
        "first and in the last quarter of a long text:",
        "",
        "| models | generated tokens | first quarter | last quarter | rounds |",
        "|---|---|---|---|---|",
    ]
    long = 8 * args.tokens
    lines += [growth_row(s, models[s], long, min(3, args.rounds), 2 * args.seconds, args.device) for s in args.shapes]
    lines += [
        "",
        *setting_lines(args.tokens, args.device, args.threads),
        "The testbed's steps take milliseconds, nearly all of it Python: there the ratio is that of a constant, the time in the",
        "column `beyond the floor`, to very little work.",
        "Models: the testbed's expert (0.17M parameters) and amateur (0.02M); random Llamas of 54M and 10M parameters,",
        "vocabulary 32000. Command: `python benchmarks/decode_overhead.py`.",
    ]
    publish(lines, None if args.no_write else RESULTS)


if __name__ == "__main__":
    main()
