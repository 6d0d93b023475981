"""`contralto demo`: contrastive decoding on the embedded models, next to the baselines that could explain it away."""

import argparse
import os
import shutil
import textwrap
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, set_seed
from transformers.utils.logging import disable_progress_bar

from contralto import testbed
from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.decoding.trace import Step, trace
from contralto.eval.stats import McNemar, Proportion, mcnemar_exact, proportion
from contralto.testbed import worlds

BETA, ALPHA = 0.5, 0.1
BATCH = 100
MAX_NEW_TOKENS = 100
PROBLEM_SEED = 2026
LENGTHS = tuple(worlds.STEP_WEIGHTS)


class System(NamedTuple):
    """A way of decoding."""

    name: str
    beta: float | None = None
    """Contrast strength; 0 is the plausibility mask alone, None no processor at all."""
    temperature: float | None = None
    """Of sampling; None is greedy."""


AMATEUR, GREEDY, MASKED, CONTRASTIVE = "amateur alone", "greedy", "greedy, mask only", "contrastive"
SAMPLING, SAMPLING_MASKED, CONTRASTIVE_SAMPLING = "sampling", "sampling, mask only", "contrastive sampling"
SHARPENED = "sampling, mask, T = 2/3"
SYSTEMS = (
    System(AMATEUR),
    System(GREEDY),
    System(MASKED, beta=0.0),
    System(CONTRASTIVE, beta=BETA),
    System(SAMPLING, temperature=1.0),
    System(SAMPLING_MASKED, beta=0.0, temperature=1.0),
    System(SHARPENED, beta=0.0, temperature=1 / (1 + BETA)),  # what the factor 1 + beta does by itself
    System(CONTRASTIVE_SAMPLING, beta=BETA, temperature=1.0),
)
COMPARISONS = (
    (CONTRASTIVE, GREEDY),
    (CONTRASTIVE, MASKED),
    (CONTRASTIVE_SAMPLING, SAMPLING_MASKED),
    (CONTRASTIVE_SAMPLING, SHARPENED),
)


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


class Results(NamedTuple):
    problems: list[worlds.Problem]
    hits: dict[str, dict[str, list[bool]]]
    """By title of the pair and name of the system: which problems came out right."""
    examples: list[Example]
    cost: Cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--html", type=Path, default=Path("demo.html"), help="where the page goes (default demo.html)")
    parser.add_argument("--problems", type=int, default=400, help="held-out problems per model (default 400)")


def run(args: argparse.Namespace) -> None:
    """Decode, print the examples and the table, write the page."""
    if args.problems < 10:
        raise ValueError(f"--problems must be at least 10, not {args.problems}: fewer say nothing")
    from contralto.page import render  # asks for matplotlib, before any work is done

    started = time.perf_counter()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading, which takes no time here
    tokenizer = testbed.tokenizer()
    results = measure(args.problems, tokenizer)
    for number, example in enumerate(results.examples, 1):
        print(_example_text(number, example, tokenizer))
    print(_table_text(results))
    args.html.write_text(render(results, tokenizer), encoding="utf-8")
    print(f"\n{args.html} shows the same with plots. It took {time.perf_counter() - started:.0f} s.")


def measure(n: int, tokenizer: Any) -> Results:
    """Decode n held-out problems with every pair and system."""
    problems = list(islice(worlds.problems(PROBLEM_SEED, "test"), n))
    models = {name: testbed.load(name) for pair in PAIRS for name in (pair.expert, pair.amateur)}
    texts: dict[str, dict[str, list[str]]] = {pair.title: {} for pair in PAIRS}
    runs = [(pair, system) for pair in PAIRS for system in SYSTEMS]
    for pair, system in tqdm(runs, desc="decoding", unit="run", leave=False):
        model = models[pair.amateur if system.name == AMATEUR else pair.expert]
        processor = _processor(models[pair.amateur], system.beta)
        solutions = decode(model, tokenizer, problems, processor=processor, temperature=system.temperature)
        texts[pair.title][system.name] = solutions
    hits = {
        title: {name: [is_right(p, t) for p, t in zip(problems, said, strict=True)] for name, said in systems.items()}
        for title, systems in texts.items()
    }
    expert, amateur, *_ = models.values()
    examples = _examples(problems, texts[PAIRS[0].title], expert, amateur, tokenizer)
    return Results(problems, hits, examples, _cost(problems[:10], expert, amateur, tokenizer))


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


def accuracy_rows(results: Results) -> list[tuple[str, list[Proportion]]]:
    """The accuracy table: a row per system, a cell per pair."""
    return [(s.name, [proportion(results.hits[pair.title][s.name]) for pair in PAIRS]) for s in SYSTEMS]


def comparison_rows(results: Results) -> list[tuple[str, list[McNemar]]]:
    """The table of exact tests: a row per comparison, a cell per pair."""
    rows = []
    for better, worse in COMPARISONS:
        tests = [mcnemar_exact(results.hits[pair.title][worse], results.hits[pair.title][better]) for pair in PAIRS]
        rows.append((f"{better} over {worse}", tests))
    return rows


def word(token: int, tokenizer: Any) -> str:
    """A token as it is shown."""
    text: str = tokenizer.convert_ids_to_tokens(token)
    return text.removeprefix("▁")


def space(token: int, tokenizer: Any) -> str:
    """What stands before a token: a space, or nothing."""
    return " " if tokenizer.convert_ids_to_tokens(token).startswith("▁") else ""


def _processor(amateur: Any, beta: float | None) -> LogitsProcessor | None:
    return None if beta is None else ContrastiveDecodingLogitsProcessor(amateur, beta=beta, alpha=ALPHA)


def _examples(
    problems: Sequence[worlds.Problem], texts: dict[str, list[str]], expert: Any, amateur: Any, tokenizer: Any
) -> list[Example]:
    """The first three problems whose texts differ, whichever is right."""
    contrast = ContrastiveDecodingLogitsProcessor(amateur, beta=BETA, alpha=ALPHA)
    rows = zip(problems, texts[GREEDY], texts[CONTRASTIVE], strict=True)
    examples = []
    for problem, greedy, contrastive in islice((row for row in rows if row[1] != row[2]), 3):
        chat = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
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


def _table_text(results: Results) -> str:
    head = f"{'':<24}" + "".join(f"{pair.title:>23}" for pair in PAIRS)
    lines = [
        f"Held-out accuracy on {len(results.problems)} problems, beta {BETA}, alpha {ALPHA}, with 95% intervals.",
        head,
        *(f"{name:<24}" + "".join(f"{cell!s:>23}" for cell in cells) for name, cells in accuracy_rows(results)),
        "",
        "Exact McNemar tests on the same problems (only the first right / only the second right, p).",
    ]
    for name, tests in comparison_rows(results):
        cells = (f"+{test.won} / -{test.lost}, p {test.p:.1g}" for test in tests)
        lines += [name, f"{'':<24}" + "".join(f"{cell:>23}" for cell in cells)]
    cost = results.cost
    price = (
        f"Milliseconds per token at batch 1: greedy {cost.greedy:.2f}, amateur alone {cost.amateur:.2f}, contrastive "
        f"{cost.contrastive:.2f}, which is {cost.ratio:.2f} times the sum of the two."
    )
    return "\n".join([*lines, "", *textwrap.wrap(price, 110), "", *textwrap.wrap(f"How to read it. {READING}", 110)])
