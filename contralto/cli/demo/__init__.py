"""`contralto demo`: contrastive decoding on the embedded models, next to the baselines that could explain it away."""

import argparse
import logging
import os
import shutil
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, set_seed
from transformers.utils.logging import disable_progress_bar

from contralto import testbed
from contralto.common.errors import require
from contralto.common.outputs import check_output_file
from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.decoding.trace import Step, trace
from contralto.testbed import worlds

BETA, ALPHA = 0.5, 0.1
BATCH = 100
TOGETHER = 200
"""Problems that the comparison decodes at a time."""
MAX_NEW_TOKENS = 100
PROBLEM_SEED = 2026
TASK = "testbed_arithmetic"


class Pair(NamedTuple):
    """An expert and its amateur, by their names in the testbed."""

    title: str
    expert: str
    amateur: str


PAIRS = (
    Pair("seed 0", "expert-0", "amateur"),
    Pair("seed 1", "expert-1", "amateur"),
    Pair("seed 2", "expert-2", "amateur"),
    Pair("control", "control-expert", "control-amateur"),
)

READING = (
    "The gain is built into the world. In the corpus of seeds 0 to 2, six of ten solutions of four or five "
    "steps stop too early. Expert and amateur both learned that mistake; only the expert learned how to go on, and the "
    "contrast brings that out. The control corpus has no such mistake, and there the contrast has nothing to repair. The "
    "mask alone never changes a greedy choice, so its row repeats greedy by definition. Under sampling it is a real baseline, "
    "and so is a lower temperature: a contrast also sharpens, by the factor 1 + beta, and a gain over plain sampling that "
    "T = 1 / (1 + beta) has too is no gain of the contrast."
)


class Example(NamedTuple):
    """A problem on which the contrast changed the text, both texts, and what happened at every token of the second."""

    problem: worlds.Problem
    greedy: str
    contrastive: str
    steps: list[Step]


class Cost(NamedTuple):
    """Median milliseconds per token at batch 1, measured in turn on the same problems."""

    greedy: float
    amateur: float
    contrastive: float

    @property
    def ratio(self) -> float:
        """Contrastive decoding over the sum of its two models."""
        return self.contrastive / (self.greedy + self.amateur)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--html", type=Path, default=Path("demo.html"), help="where the page goes (default demo.html)")
    parser.add_argument("--problems", type=int, default=400, help="held-out problems per model (default 400)")


def run(args: argparse.Namespace) -> None:
    """Decode, print the examples and the tables, write the page."""
    if args.problems < 10:
        raise ValueError(f"--problems must be at least 10, not {args.problems}: fewer say nothing")
    check_output_file(args.html, "--html")
    require("aiohttp", "datasets", "lm_eval", "matplotlib", "peft", "rich", "scipy", "trl", "yaml")
    from contralto.cli.demo import loop as demo_loop
    from contralto.cli.demo import page
    from contralto.eval.comparison import report

    started = time.perf_counter()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading, which takes no time here
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with TemporaryDirectory() as folder:
        aligned = demo_loop.align(PAIRS[0].expert, Path(folder))
        comparison = measure(args.problems, Path(folder) / "answers", aligned)
    tokenizer = testbed.tokenizer()
    expert, amateur = testbed.load(PAIRS[0].expert), testbed.load(PAIRS[0].amateur)
    problems = list(islice(worlds.problems(PROBLEM_SEED, "test"), args.problems))
    examples = find_examples(problems, expert, amateur, tokenizer)
    cost = _cost(problems[:10], expert, amateur, tokenizer)
    for number, example in enumerate(examples, 1):
        print(_example_text(number, example, tokenizer))
    report.show(comparison)
    print("\n".join(["", *textwrap.wrap(price(cost), 110), "", *textwrap.wrap(f"How to read it. {READING}", 110)]))
    args.html.write_text(page.render(comparison, examples, cost, tokenizer), encoding="utf-8")
    print(f"\n{args.html} shows the same with plots. It took {time.perf_counter() - started:.0f} s.")


def measure(n: int, folder: Path, aligned: Path) -> dict[str, Any]:
    """Compare contrastive decoding with its controls on n held-out problems, for every pair and the aligned expert.

    A second section compares the aligned expert with itself before, on the same problems.

    Args:
        n: how many.
        folder: where the answers are kept.
        aligned: the folder of the first pair's expert after alignment.
    """
    from contralto.cli.demo import loop as demo_loop
    from contralto.eval.comparison import Conditions, Subject
    from contralto.eval.comparison.compare import compare

    first, *others = [Subject(f"testbed:{pair.expert}", {"amateur": f"testbed:{pair.amateur}"}) for pair in PAIRS]
    conditions = Conditions(metadata={"n": n, "world_seed": PROBLEM_SEED})
    how: dict[str, Any] = {"output": folder, "model_args": {"batch_size": TOGETHER}}
    decoders = ["cd"]  # its defaults are BETA and ALPHA
    after = Subject(str(aligned), first.sources)
    comparison = compare([first, *others, after], [TASK], decoders, conditions=conditions, **how)
    logged = demo_loop.logged(folder, aligned, TASK)
    greedy = compare([first], [TASK], decoders, conditions=replace(conditions, seeds=()), logged=logged, **how)
    (section,) = greedy["tasks"]
    comparison["tasks"].append({**section, "name": f"{TASK}, before and after alignment"})
    return comparison


def decode(
    model: Any,
    tokenizer: Any,
    problems: Sequence[worlds.Problem],
    *,
    processor: LogitsProcessor | None = None,
    temperature: float | None = None,
) -> list[str]:
    """The model's solutions, through a plain `generate()`, problems of like length together."""
    search = {"do_sample": True, "top_k": 0, "temperature": temperature} if temperature else {"do_sample": False}
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].steps))
    solutions = [""] * len(problems)
    set_seed(0)
    for start in range(0, len(problems), BATCH):
        chosen = order[start : start + BATCH]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": problems[i].question}] for i in chosen],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        processors = [processor] if processor else []
        output = model.generate(**inputs, logits_processor=processors, max_new_tokens=MAX_NEW_TOKENS, **search)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            solutions[i] = text
    return solutions


def is_right(problem: worlds.Problem, text: str) -> bool:
    """Whether the text ends in the right number."""
    return worlds.answer(text) == problem.totals[-1]


def word(token: int, tokenizer: Any) -> str:
    """A token as it is shown."""
    text: str = tokenizer.convert_ids_to_tokens(token)
    return text.removeprefix("▁")


def space(token: int, tokenizer: Any) -> str:
    """What stands before a token: a space, or nothing."""
    return " " if tokenizer.convert_ids_to_tokens(token).startswith("▁") else ""


def _processor(amateur: Any, beta: float) -> ContrastiveDecodingLogitsProcessor:
    return ContrastiveDecodingLogitsProcessor(amateur, beta=beta, alpha=ALPHA)


def find_examples(problems: Sequence[worlds.Problem], expert: Any, amateur: Any, tokenizer: Any) -> list[Example]:
    """The first three problems whose texts differ, whichever is right."""
    contrast = _processor(amateur, BETA)
    examples: list[Example] = []
    for start in range(0, len(problems), BATCH):
        some = problems[start : start + BATCH]
        texts = [decode(expert, tokenizer, some, processor=processor) for processor in (None, contrast)]
        rows = zip(some, *texts, strict=True)
        for problem, greedy, contrastive in (row for row in rows if row[1] != row[2]):
            if len(examples) == 3:
                return examples
            chat = [{"role": "user", "content": problem.question}]
            prompt = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            tokens = torch.tensor(tokenizer(contrastive, add_special_tokens=False)["input_ids"])
            examples.append(Example(problem, greedy, contrastive, trace(contrast, expert, prompt, tokens)))
    return examples


def _cost(problems: Sequence[worlds.Problem], expert: Any, amateur: Any, tokenizer: Any) -> Cost:
    """Every system decodes every problem in turn; the first problem is a warm-up and does not count."""
    runs = ((expert, None), (amateur, None), (expert, _processor(amateur, BETA)))
    times: list[list[float]] = [[] for _ in runs]
    for problem in problems:
        for taken, (model, processor) in zip(times, runs, strict=True):
            start = time.perf_counter()
            (text,) = decode(model, tokenizer, [problem], processor=processor)
            taken.append(1000 * (time.perf_counter() - start) / len(tokenizer(text)["input_ids"]))
    return Cost(*(sorted(taken[1:])[len(taken) // 2 - 1] for taken in times))


def _example_text(number: int, example: Example, tokenizer: Any) -> str:
    marked = ""
    for step in example.steps:
        shown = word(step.token, tokenizer)
        marked += space(step.token, tokenizer) + (f"[{shown}]" if step.changed else shown)
    lines = [f"Problem {number}. {example.problem.question} (Answer: {example.problem.totals[-1]})"]
    for name, text, shown in (
        ("greedy", example.greedy, example.greedy),
        ("contrastive", example.contrastive, marked.strip()),
    ):
        verdict = "right" if is_right(example.problem, text) else "wrong"
        lines.append(f"  {name:<12} {shown}  <- {verdict}")
    for step in (step for step in example.steps if step.changed):
        lines.append(f"  at [{word(step.token, tokenizer)}]")
        for name, candidates in (("expert", step.main), ("amateur", step.contrast), ("contrast", step.combined)):
            likely = "  ".join(
                f"{word(c.token, tokenizer)} {c.probability:.2f}" for c in candidates if c.probability > 0.005
            )
            lines.append(f"    {name:<10} {likely}")
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    indents = [" " * 15 if line.startswith("  ") else "" for line in lines]
    wrapped = (textwrap.fill(line, width, subsequent_indent=i) for line, i in zip(lines, indents, strict=True))
    return "\n".join(wrapped) + "\n"


def price(cost: Cost) -> str:
    """What the contrast costs, in a sentence."""
    return (
        f"Milliseconds per token at batch 1: greedy {cost.greedy:.2f}, amateur alone {cost.amateur:.2f}, contrastive "
        f"{cost.contrastive:.2f}, which is {cost.ratio:.2f} times the sum of the two."
    )
