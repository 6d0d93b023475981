"""Measure what `prefix_cache` saves in an evaluation whose prompts begin with the same examples.

    python benchmarks/prefix_reuse.py                                          the testbed; writes benchmarks/results/prefix_reuse.md
    python benchmarks/prefix_reuse.py --data DIR --model SMOLLM2 --amateur PRUNED    beside it, GSM8K with a real model

Each round answers the same documents without and with it, one after the other, once with one token per answer (the prompts) and once with
`--tokens`. Times are those of the process, not of the wall; ratios are taken within a round, and the table gives their medians and the middle
half of the rounds. Likelihoods: of a right and a wrong continuation of each prompt.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from timing import parse_flags, publish, setting_lines, spread
from tqdm import tqdm

from contralto.decoding.branches import PrefixCaches
from contralto.eval.data import local_tasks
from contralto.eval.models.lm import ContraltoLM
from contralto.testbed import worlds

RESULTS = Path(__file__).parent / "results" / "prefix_reuse.md"
SEED, EXAMPLES = 2032, 3
COLUMNS = [
    "model",
    "what",
    "batch",
    "tokens of a prompt",
    "not read again",
    "prompts, s without",
    "s with",
    "with / without",
    "all, s without",
    "s with",
    "with / without",
    "same results",
    "rounds",
]


class Setting(NamedTuple):
    """What is measured in a row of the table."""

    model: str
    what: str
    batch: int
    lm: Any
    short: Sequence[Instance]
    """Requests for one token, or for likelihoods."""
    long: Sequence[Instance]
    """Requests for more; likelihoods have none."""


def testbed_requests(count: int) -> list[tuple[dict[str, Any], str]]:
    """Documents and prompts: problems of the testbed, after examples with their solutions."""
    problems = list(itertools.islice(worlds.problems(SEED, "test"), count + EXAMPLES))
    examples = "\n".join(f"{each.question} {each.solution()}" for each in problems[:EXAMPLES])
    return [({"question": each.question}, f"{examples}\n{each.question}") for each in problems[EXAMPLES:]]


def gsm8k_requests(data: Path, count: int) -> list[tuple[dict[str, Any], str]]:
    """Documents and prompts of lm-eval's `gsm8k_cot`: eight examples before each problem."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = TaskManager().load(local_tasks(["gsm8k_cot"], data, Path(folder)).tasks)["tasks"]
        task = next(iter(tasks.values()))
        task.build_all_requests(limit=count, rank=0, world_size=1)
    return [(dict(each.doc), each.args[0]) for each in task.instances]


def generations(requests: Sequence[tuple[dict[str, Any], str]], tokens: int) -> list[Instance]:
    """Requests for answers of exactly so many tokens at most, without stop strings."""
    options = {"until": [], "max_gen_toks": tokens}
    return [Instance("generate_until", doc, (prompt, options), i) for i, (doc, prompt) in enumerate(requests)]


def likelihoods(requests: Sequence[tuple[dict[str, Any], str]]) -> list[Instance]:
    """Requests for the likelihoods of two continuations of each prompt."""
    texts = (" The answer is 18.", " The answer is 7.")
    return [Instance("loglikelihood", doc, (prompt, text), 0) for doc, prompt in requests for text in texts]


def timed(lm: Any, requests: Sequence[Instance], enabled: bool) -> tuple[float, list[Any]]:
    """Seconds of the process for all answers, and the answers."""
    lm.prefix_cache, start = enabled, time.process_time()
    found = getattr(lm, requests[0].request_type)(requests, disable_tqdm=True)
    return time.process_time() - start, found


def shares(lm: Any, requests: Sequence[Instance]) -> tuple[float, float]:
    """The mean length of the prompts, and the share of the tokens of all branches that is not read again."""
    lengths = [len(lm.tok_encode(each.args[0])) for each in requests]
    kept: list[PrefixCaches] = []
    known = PrefixCaches.__init__

    def noted(self: PrefixCaches, *args: Any, **kwargs: Any) -> None:
        known(self, *args, **kwargs)
        kept.append(self)

    PrefixCaches.__init__ = noted  # type: ignore[method-assign]
    try:
        timed(lm, requests, True)
    finally:
        PrefixCaches.__init__ = known  # type: ignore[method-assign]
    reused, tokens = sum(each.reused for each in kept), sum(each.tokens for each in kept)
    return statistics.mean(lengths), reused / max(1, tokens)


def equal(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether answers are the same texts, or likelihoods agree to 1e-3 nats and in what greedy search writes."""
    if isinstance(ours[0], str):
        return list(ours) == list(theirs)
    return all(abs(a - b) < 1e-3 and x == y for (a, x), (b, y) in zip(ours, theirs, strict=True))


def row(setting: Setting, rounds: int) -> str:
    """A line of the table."""
    lm, (length, share) = setting.lm, shares(setting.lm, setting.short)  # the first run also warms up
    seconds: dict[str, list[float]] = {}
    same = 0
    for _ in range(rounds):
        agree = True
        for name, requests in (("short", setting.short), ("long", setting.long)):
            if requests:
                (off, without), (on, answers) = (timed(lm, requests, enabled) for enabled in (False, True))
                seconds.setdefault(f"{name} off", []).append(off)
                seconds.setdefault(f"{name} on", []).append(on)
                agree &= equal(without, answers)
        same += agree
    cells = [f"| {setting.model} | {setting.what} | {setting.batch} | {length:.0f} | {share:.0%}"]
    for name in ("short", "long"):
        if f"{name} off" in seconds:
            former, now = seconds[f"{name} off"], seconds[f"{name} on"]
            ratios = [b / a for a, b in zip(former, now, strict=True)]
            cells.append(f"{statistics.median(former):.2f} | {statistics.median(now):.2f} | {spread(ratios)}")
        else:
            cells.append(" | | ")
    return " | ".join([*cells, f"{same} of {rounds}", f"{rounds} |"])


def settings(
    name: str, model: str, requests: Any, methods: Mapping[str, dict[str, Any]], batches: Sequence[int], tokens: int
) -> list[Setting]:
    """Greedy search and methods, with answers, the likelihoods of the first method, and greedy search on prompts that share nothing."""
    found = []
    apart = [(doc, f"{i}. {prompt}") for i, (doc, prompt) in enumerate(requests, start=1)]
    for batch in batches:
        lm = ContraltoLM(model, batch_size=batch)
        for what, options in {"greedy": {}, **methods}.items():
            answers = (generations(requests, count) for count in (1, tokens))
            found.append(Setting(name, what, batch, lm.decoding_by(**options), *answers))
        first = next(iter(methods))
        scored = lm.decoding_by(**methods[first])
        found.append(Setting(name, f"{first}, likelihoods", batch, scored, likelihoods(requests), []))
        answers = (generations(apart, count) for count in (1, tokens))
        found.append(Setting(name, "greedy, nothing shared", batch, lm.decoding_by(), *answers))
    return found


def methods_of(amateur: str, contrast: str) -> dict[str, dict[str, Any]]:
    """A method with another model, and one with another prompt."""
    return {"cd": {"method": "cd", "amateur": amateur}, "cad": {"method": "cad", "contrast_prompt": contrast}}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with gsm8k/test.jsonl")
    parser.add_argument("--model", help="a real model, for GSM8K")
    parser.add_argument("--amateur", help="its amateur")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--tokens", type=int, default=64, help="generated per answer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parse_flags(parser)
    every = settings(
        "testbed",
        "testbed:expert",
        testbed_requests(args.documents),
        methods_of("testbed:amateur", "{question}"),
        args.batches,
        args.tokens,
    )
    if args.model:
        requests = gsm8k_requests(args.data, args.documents)
        methods = methods_of(args.amateur, "Q: {question}\nA:")
        every += settings("SmolLM2", args.model, requests, methods, args.batches, args.tokens)
    lines = [
        "# What reading shared beginnings once saves in an evaluation",
        "",
        f"Seconds of the process for {args.documents} documents: the prompts with one new token each, and with {args.tokens}. Testbed: {EXAMPLES} solved",
        "problems before each problem. SmolLM2: SmolLM2-135M-Instruct on GSM8K with the eight examples of lm-eval's `gsm8k_cot`. `cad` contrasts",
        "with the problem without its examples. Likelihoods are those of two continuations per prompt. Nothing shared: a number before each prompt,",
        "so that all differ from their first token on, the control.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(row(each, args.rounds) for each in tqdm(every, unit="setting")),
        "",
        "Not read again: the share of the tokens of prompts, padding included, in all branches. The first batch reads the examples as before; with",
        "more documents the share approaches that of the examples in the prompts.",
        *setting_lines(args.tokens, args.device, args.threads),
        (
            f"Command: `python benchmarks/prefix_reuse.py --data DIR --model SMOLLM2 --amateur PRUNED --documents {args.documents} "
            f"--tokens {args.tokens} --rounds {args.rounds} --threads {args.threads}`."
        ),
    ]
    publish(lines, None if args.no_write else RESULTS)


if __name__ == "__main__":
    main()
