"""The examples of `contralto demo`: problems token by token, and the cost of a token."""

import shutil
import textwrap
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from contralto.cli.demo.comparison import contrast_with
from contralto.decoding.trace import Step, trace
from contralto.testbed import worlds
from contralto.testbed.measure import decode, is_right

__all__ = ["Example", "TokenCost", "describe_cost", "find_examples", "format_example", "measure_cost", "space", "word"]

BATCH_SIZE = 100
COUNT = 3
LEAST = 0.005
"""The smallest probability of a candidate that is shown."""


class Example(NamedTuple):
    """A problem on which the contrast changed the solution, both solutions, and the steps of the second."""

    problem: worlds.Problem
    greedy: str
    contrastive: str
    steps: list[Step]


class TokenCost(NamedTuple):
    """Median milliseconds per token at batch size 1, measured in turn on the same problems."""

    greedy: float
    amateur: float
    contrastive: float

    @property
    def ratio(self) -> float:
        """Return the cost of contrastive decoding divided by that of its two models."""
        return self.contrastive / (self.greedy + self.amateur)


def word(token: int, tokenizer: Any) -> str:
    """Return the text of a token without its leading space.

    Args:
        token: the token's id.
        tokenizer: the tokenizer of the testbed.
    """
    text: str = tokenizer.convert_ids_to_tokens(token)
    return text.removeprefix("▁")


def space(token: int, tokenizer: Any) -> str:
    """Return the space before a token, or an empty string.

    Args:
        token: the token's id.
        tokenizer: the tokenizer of the testbed.
    """
    return " " if tokenizer.convert_ids_to_tokens(token).startswith("▁") else ""


def find_examples(problems: Sequence[worlds.Problem], expert: Any, amateur: Any, tokenizer: Any) -> list[Example]:
    """Return the first three problems whose two solutions differ, whichever is right.

    Args:
        problems: the problems, in order.
        expert: the expert.
        amateur: the amateur.
        tokenizer: their tokenizer.
    """
    contrast = contrast_with(amateur)
    examples: list[Example] = []
    for start in range(0, len(problems), BATCH_SIZE):
        batch = problems[start : start + BATCH_SIZE]
        solutions = [decode(expert, tokenizer, batch, processor=processor) for processor in (None, contrast)]
        rows = zip(batch, *solutions, strict=True)
        for problem, greedy, contrastive in (row for row in rows if row[1] != row[2]):
            if len(examples) == COUNT:
                return examples
            chat = [{"role": "user", "content": problem.question}]
            prompt = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            tokens = torch.tensor(tokenizer(contrastive, add_special_tokens=False)["input_ids"])
            examples.append(Example(problem, greedy, contrastive, trace(contrast, expert, prompt, tokens)))
    return examples


def measure_cost(problems: Sequence[worlds.Problem], expert: Any, amateur: Any, tokenizer: Any) -> TokenCost:
    """Measure the time per token of the expert, of the amateur and of the contrast.

    Args:
        problems: each system decodes each problem in turn; the first problem is a warm-up and does not count.
        expert: the expert.
        amateur: the amateur.
        tokenizer: their tokenizer.
    """
    systems = ((expert, None), (amateur, None), (expert, contrast_with(amateur)))
    times: list[list[float]] = [[] for _ in systems]
    for problem in tqdm(problems, desc="cost of a token", unit="problem", leave=False, disable=None):
        for taken, (model, processor) in zip(times, systems, strict=True):
            start = time.perf_counter()
            (text,) = decode(model, tokenizer, [problem], processor=processor)
            taken.append(1000 * (time.perf_counter() - start) / len(tokenizer(text)["input_ids"]))
    return TokenCost(*(sorted(taken[1:])[len(taken) // 2 - 1] for taken in times))


def describe_cost(cost: TokenCost) -> str:
    """Return a sentence about the cost of the contrast.

    Args:
        cost: the cost.
    """
    return (
        f"Milliseconds per token at batch 1: greedy {cost.greedy:.2f}, amateur alone {cost.amateur:.2f}, contrastive "
        f"{cost.contrastive:.2f}, which is {cost.ratio:.2f} times the sum of the two."
    )


def format_example(number: int, example: Example, tokenizer: Any) -> str:
    """Return an example as lines for the terminal.

    Args:
        number: the number of the example.
        example: the example.
        tokenizer: the tokenizer of the testbed.
    """
    marked = "".join(
        space(step.token, tokenizer)
        + (f"[{word(step.token, tokenizer)}]" if step.changed else word(step.token, tokenizer))
        for step in example.steps
    )
    lines = [f"Problem {number}. {example.problem.question} (Answer: {example.problem.totals[-1]})"]
    for name, text, shown in (
        ("greedy", example.greedy, example.greedy),
        ("contrastive", example.contrastive, marked.strip()),
    ):
        verdict = "right" if is_right(example.problem, text) else "wrong"
        lines.append(f"  {name:<12} {shown}  <- {verdict}")
    for step in (step for step in example.steps if step.changed):
        lines += [f"  at [{word(step.token, tokenizer)}]", *_candidate_lines(step, tokenizer)]
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    indents = [" " * 15 if line.startswith("  ") else "" for line in lines]
    wrapped = (textwrap.fill(line, width, subsequent_indent=i) for line, i in zip(lines, indents, strict=True))
    return "\n".join(wrapped) + "\n"


def _candidate_lines(step: Step, tokenizer: Any) -> list[str]:
    """Return a line of candidates for each branch and for the contrast."""
    rows = (("expert", step.main), ("amateur", step.contrast), ("contrast", step.combined))
    return [
        f"    {name:<10} "
        + "  ".join(f"{word(c.token, tokenizer)} {c.probability:.2f}" for c in candidates if c.probability > LEAST)
        for name, candidates in rows
    ]
