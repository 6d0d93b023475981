"""Measure the figures of the testbed's model card.

    python benchmarks/testbed_card.py                      measure the embedded models, write the tables into testbed/README.md
    python benchmarks/testbed_card.py --models DIR         measure newly trained models instead, and compare with the card

All figures are on test problems and items that no training text holds, the same for every model. Nothing is tuned here: beta is
reported as a grid around the paper's 0.5.
"""

import argparse
import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import write_figures
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from contralto import testbed
from contralto.common.hub import from_pretrained
from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.decoding.rules import contrastive_decoding
from contralto.eval.stats import mcnemar_exact, proportion
from contralto.testbed import worlds
from contralto.testbed.measure import decode, is_right

CARD = Path(testbed.__file__).parent.resolve() / "README.md"
EXPERTS = ("expert-0", "expert-1", "expert-2")
CONTRASTS = [(e, a) for e in EXPERTS for a in ("amateur", "early")] + [("control-expert", "control-amateur")]
BETAS = (0.25, 0.5, 1.0)
T_95_DF_2 = 4.303


class Figure(NamedTuple):
    """A measured share with its interval, kept by name so that another training can be compared with it."""

    value: float
    low: float
    high: float


class Bench:
    """The models of a folder, the held-out problems and items, and every figure measured so far."""

    def __init__(self, folder: Path, problems: int, items: int, stories: int) -> None:
        self.folder, self.tokenizer = folder, testbed.tokenizer()
        self.problems = list(islice(worlds.problems(2027, "test"), problems))
        self.items = list(islice(worlds.items(2027, "test"), items))
        self.stories = list(islice(worlds.stories(2027, "test"), stories))
        self.solutions: dict[tuple[str, str | None, float], list[str]] = {}
        self.figures: dict[str, Figure] = {}
        self.models: dict[str, Any] = {}

    def model(self, name: str) -> Any:
        """Return a model of the folder, loaded once."""
        if name not in self.models:
            self.models[name] = from_pretrained(AutoModelForCausalLM, str(self.folder / name))
        return self.models[name]

    def solve(self, name: str, amateur: str | None = None, beta: float = 0.5) -> list[str]:
        """Return greedy solutions of all problems, with or without contrast; decoded once."""
        if (name, amateur, beta) not in self.solutions:
            processor = ContrastiveDecodingLogitsProcessor(self.model(amateur), beta=beta) if amateur else None
            texts = decode(self.model(name), self.tokenizer, self.problems, processor=processor)
            self.solutions[name, amateur, beta] = texts
        return self.solutions[name, amateur, beta]

    def hits(self, texts: Sequence[str]) -> list[bool]:
        """Return whether each completion solves its problem."""
        return [is_right(p, t) for p, t in zip(self.problems, texts, strict=True)]

    def note(self, name: str, hits: Sequence[bool]) -> str:
        """Record a share with its interval under a name, and return it as text."""
        share = proportion(hits)
        self.figures[name] = Figure(share.value, share.low, share.high)
        return str(share)

    def choices(self, name: str, amateur: str | None = None, beta: float = 0.5) -> list[bool]:
        """Return whether each four-way item comes out right, by the summed log-probabilities or contrastive scores of its endings."""
        return [self._choose(item, name, amateur, beta) == item.label for item in self.items]

    @torch.no_grad()
    def _choose(self, item: worlds.Item, name: str, amateur: str | None, beta: float) -> int:
        ids = torch.tensor([self.tokenizer(item.context + ending)["input_ids"] for ending in item.endings])
        start = len(self.tokenizer(item.context)["input_ids"])
        scores = self.model(name)(ids).logits[:, start - 1 : -1].log_softmax(-1)
        if amateur:
            contrast = self.model(amateur)(ids).logits[:, start - 1 : -1]
            scores = contrastive_decoding(scores, contrast, beta=beta, alpha=0)
        return int(_sum(scores, ids[:, start:]).argmax())


def _sum(scores: Tensor, ids: Tensor) -> Tensor:
    return scores.gather(-1, ids[..., None]).squeeze(-1).sum(-1)


def kind(problem: worlds.Problem, text: str) -> str:
    """Classify a solution: right, stopped early, wrong arithmetic, other steps, or no answer."""
    if worlds.answer(text) is None:
        return "no answer"
    if is_right(problem, text):
        return "right"
    steps_written = re.findall(r"([a-z]+) (\d+)[:,]", text)
    steps = [(verb, str(operand)) for verb, operand in problem.steps]
    if steps_written == steps:
        return "arithmetic"
    return "stopped early" if steps_written == steps[: len(steps_written)] else "other steps"


def models_table(bench: Bench) -> list[str]:
    """Return the table of every model alone, greedy."""
    lines = ["| model | parameters | problems solved | stopped early | wrong arithmetic | other | four-way items |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name in tqdm(testbed.MODELS, desc="alone"):
        texts = bench.solve(name)
        kinds = Counter(kind(p, t) for p, t in zip(bench.problems, texts, strict=True))
        solved = bench.note(f"{name}: problems", bench.hits(texts))
        chosen = bench.note(f"{name}: items", bench.choices(name))
        other = kinds["other steps"] + kinds["no answer"]
        lines.append(
            f"| {name} | {bench.model(name).num_parameters():,} | {solved} | {kinds['stopped early']} | "
            f"{kinds['arithmetic']} | {other} | {chosen} |"
        )
    return lines


def steps_table(bench: Bench) -> list[str]:
    """Return the table of solved shares by the number of steps, greedy and contrastive."""
    lengths = sorted(worlds.STEP_WEIGHTS)
    lines = ["| model | decoding | " + " | ".join(f"{n} step{'s' * (n > 1)}" for n in lengths) + " |"]
    lines += ["|---|---|" + "---|" * len(lengths)]
    for expert, amateur in CONTRASTS:
        if amateur == "early":
            continue
        for title, texts in (("greedy", bench.solve(expert)), ("contrastive", bench.solve(expert, amateur))):
            hits = list(zip(bench.problems, bench.hits(texts), strict=True))
            cells = [statistics.mean(hit for p, hit in hits if len(p.steps) == n) for n in lengths]
            lines.append(f"| {expert} | {title} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return lines


def contrast_table(bench: Bench) -> list[str]:
    """Return the table of contrastive decoding and scoring against the plain model, on the same problems and items."""
    lines = ["| expert | amateur | beta | problems solved | won / lost, p | four-way items | won / lost, p |"]
    lines += ["|---|---|---|---|---|---|---|"]
    plain = {e: (bench.hits(bench.solve(e)), bench.choices(e)) for e in dict(CONTRASTS)}
    for expert, amateur in tqdm(CONTRASTS, desc="contrasts"):
        for beta in BETAS:
            hits, right = bench.hits(bench.solve(expert, amateur, beta)), bench.choices(expert, amateur, beta)
            name = f"{expert} - {amateur}, beta {beta}"
            tests = [mcnemar_exact(*each) for each in ((plain[expert][0], hits), (plain[expert][1], right))]
            split = [f"+{test.won} / -{test.lost}, {test.p:.1g}" for test in tests]
            solved, chosen = bench.note(f"{name}: problems", hits), bench.note(f"{name}: items", right)
            lines.append(f"| {expert} | {amateur} | {beta} | {solved} | {split[0]} | {chosen} | {split[1]} |")
    return lines


def prediction_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of three shares, and the 95% prediction interval of a fourth (Student's t, 2 degrees of freedom)."""
    mean, spread = statistics.mean(values), T_95_DF_2 * statistics.stdev(values) * (1 + 1 / len(values)) ** 0.5
    return mean, max(0.0, mean - spread), min(1.0, mean + spread)


def expectation_table(bench: Bench) -> list[str]:
    """Return the table of what a new training of the expert should give: 95% prediction intervals over the three seeds."""
    measures = ["{}: problems", "{}: items", "{} - amateur, beta 0.5: problems", "{} - amateur, beta 0.5: items"]
    titles = ["problems, greedy", "four-way items, plain", "problems, contrastive", "four-way items, contrastive"]
    lines = ["| expert, beta 0.5 | mean of three seeds | a new training should give |", "|---|---|---|"]
    for measure, title in zip(measures, titles, strict=True):
        values = [bench.figures[measure.format(e)].value for e in EXPERTS]
        mean, low, high = prediction_interval(values)
        for expert in EXPERTS:
            bench.figures[measure.format(expert)] = Figure(bench.figures[measure.format(expert)].value, low, high)
        lines.append(f"| {title} | {mean:.3f} | {low:.3f} to {high:.3f} |")
    return lines


def stories_table(bench: Bench, tokens: int = 120) -> list[str]:
    """Return the table of repetition and validity of stories."""
    lines = ["| expert-0 writes on | 4-grams seen before | distinct scenes | valid events |", "|---|---|---|---|"]
    prompts = [bench.tokenizer(story.scenes[0].text, return_tensors="pt") for story in bench.stories]
    model, never_end = bench.model("expert-0"), {"suppress_tokens": [bench.tokenizer.eos_token_id]}
    torch.manual_seed(0)
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "nucleus 0.95": {"do_sample": True, "top_p": 0.95, "top_k": 0},
    }
    texts = {
        way: [model.generate(**p, max_new_tokens=tokens, **never_end, **how)[0] for p in prompts]
        for way, how in ways.items()
    }
    texts["(the corpus)"] = [
        bench.tokenizer(story.text, return_tensors="pt")["input_ids"][0] for story in bench.stories
    ]
    for way, rows in texts.items():
        found = [_story_figures(row.tolist(), bench.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        repeated, distinct, valid = (statistics.mean(column) for column in zip(*found, strict=True))
        lines.append(f"| {way} | {repeated:.2f} | {distinct:.2f} | {valid:.2f} |")
    return lines


def _story_figures(ids: list[int], text: str) -> tuple[float, float, float]:
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    story = worlds.telling(text)
    return 1 - len(set(grams)) / len(grams), story.distinct, story.valid


def measure(bench: Bench) -> str:
    """Return all tables as Markdown."""
    sections = {
        f"Each model alone, greedy ({len(bench.problems)} problems, {len(bench.items)} items; 95% intervals, Wilson)": models_table,
        "By the number of steps (beta 0.5)": steps_table,
        "Against an amateur (exact McNemar tests against the plain expert)": contrast_table,
        "What a new training should give (95% prediction interval over the seeds)": expectation_table,
        "Stories, 120 tokens after the first scene, no end token": stories_table,
    }
    return "\n".join("\n".join([f"### {title}", "", *table(bench), ""]) for title, table in sections.items())


def compare(figures: Mapping[str, Figure], card: str) -> bool:
    """Print every figure beside the card's interval, and return True if all lie inside."""
    (kept,) = re.findall(r"<!-- intervals (.*?) -->", card)
    inside = True
    for name, (value, low, high) in json.loads(kept).items():
        new = figures[name].value
        inside &= low <= new <= high
        print(
            f"{'ok  ' if low <= new <= high else 'OUT '} {name:<55} {new:.3f}  card {value:.3f} [{low:.3f}, {high:.3f}]"
        )
    return inside


def write_or_compare(text: str, figures: Mapping[str, Figure], card: Path, script: str, *, compares: bool) -> None:
    """Write measured figures into their card, or print them beside its intervals, and exit with 1 if one lies outside."""
    if compares:
        print(text)
        raise SystemExit(0 if compare(figures, card.read_text()) else 1)
    intervals = json.dumps({name: [round(x, 4) for x in figure] for name, figure in figures.items()})
    write_figures(card, script, f"\n{text}\n<!-- intervals {intervals} -->\n")


def main() -> None:
    """Measure, and write the card or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="a folder that `python -m contralto.testbed train` filled")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--stories", type=int, default=40)
    args = parser.parse_args()
    bench = Bench(args.models or CARD.parent / "models", args.problems, args.items, args.stories)
    write_or_compare(measure(bench), bench.figures, CARD, "testbed_card", compares=bool(args.models))


if __name__ == "__main__":
    main()
