"""Measure repetition and validity of contrastive search, on the testbed's stories with three experts.

    python benchmarks/stories_card.py                  print the tables as Markdown
    python benchmarks/stories_card.py --stories 4 --alphas 0.3 --tokens 40

Each expert continues the first scene of a story by 120 tokens, with the end token suppressed. alpha is chosen on the
dev split, once for all experts: the most distinct scenes among the settings whose valid events are at least 0.99 and
whose well-formed scenes are at least 0.9 times those of greedy search. The test split is then measured once. A judge that was
trained with another seed scores the completions. Low repetition alone is no merit: a rule that forbids any 4-gram to come
twice has none of it.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from contralto import testbed
from contralto.decoding.executors.search import ContrastiveSearch
from contralto.testbed import worlds

JUDGES = {"expert-0": "expert-1", "expert-1": "expert-2", "expert-2": "expert-0"}
"""Who writes, and who judges."""
SEED, K, BATCH = 2027, 4, 20
HEAD = "| {} | 4-grams seen before | distinct scenes | scenes per text | valid events | perplexity |"
RULE = "|---|---|---|---|---|---|"


class Figures(NamedTuple):
    """The figures of one story."""

    repeated: float
    """Share of its 4-grams that came before in it."""
    distinct: float
    """Share of its scenes, a place and a thing, that are told for the first time."""
    scenes: float
    """How many scenes are well formed."""
    valid: float
    """Share of the told events that the corpus knows, a verb with its thing."""
    surprise: float
    """Mean negative log-probability of what was written, for the judge."""


def prompts(split: Any, count: int, tokenizer: Any) -> dict[str, Tensor]:
    """Return the first scenes of stories, tokenized and left-padded."""
    scenes = [story.scenes[0].text for story in islice(worlds.stories(SEED, split), count)]
    inputs: dict[str, Tensor] = tokenizer(scenes, return_tensors="pt", padding=True, padding_side="left")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def surprises(judge: Any, ids: Tensor, mask: Tensor, start: int, eos: int) -> list[float]:
    """Return the mean negative log-probability of each row's tokens from `start`, with the end token impossible."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = judge(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, start - 1 : -1]
    logits[..., eos] = -math.inf
    told = logits.log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)
    weight = mask[:, start:]
    return [float(x) for x in -(told.nan_to_num(neginf=0) * weight).sum(-1) / weight.sum(-1)]


def figures(ids: Sequence[int], text: str, surprise: float) -> Figures:
    """Return the figures of a whole story, from its tokens and its text."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    story = worlds.telling(text)
    return Figures(
        repeated=1 - len(set(grams)) / len(grams),
        distinct=story.distinct,
        scenes=len(story.scenes),
        valid=story.valid,
        surprise=surprise,
    )


def write(name: str, inputs: dict[str, Tensor], tokens: int, **how: Any) -> list[Figures]:
    """Continue all prompts by an expert, and score the stories by its judge."""
    writer, judge, tokenizer = testbed.load(name), testbed.load(JUDGES[name]), testbed.tokenizer()
    found, eos = [], tokenizer.eos_token_id
    torch.manual_seed(0)
    for first in range(0, len(inputs["input_ids"]), BATCH):
        batch = {key: value[first : first + BATCH] for key, value in inputs.items()}
        output = writer.generate(**batch, max_new_tokens=tokens, suppress_tokens=[eos], **how)
        start = batch["input_ids"].shape[1]
        mask = torch.cat([batch["attention_mask"], torch.ones_like(output[:, start:])], dim=1)
        for ids, seen, surprise in zip(output, mask, surprises(judge, output, mask, start, eos), strict=True):
            own = ids[seen == 1]
            found.append(figures(own.tolist(), tokenizer.decode(own, skip_special_tokens=True), surprise))
    return found


def corpus(name: str, split: Any, count: int) -> list[Figures]:
    """Return the figures of the corpus' own stories, scored by the judge of an expert."""
    judge, tokenizer = testbed.load(JUDGES[name]), testbed.tokenizer()
    found = []
    for story in islice(worlds.stories(SEED, split), count):
        start = len(tokenizer(story.scenes[0].text)["input_ids"])
        ids = tokenizer(story.text, return_tensors="pt")["input_ids"]
        (surprise,) = surprises(judge, ids, torch.ones_like(ids), start, tokenizer.eos_token_id)
        found.append(figures(ids[0].tolist(), story.text, surprise))
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean over stories and its 95% interval, normal approximation."""
    mean = statistics.mean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def difference(title: str, one: Sequence[Sequence[Figures]], other: Sequence[Sequence[Figures]]) -> str:
    """Format the difference of two decoders, story by story, averaged over experts; perplexity as a ratio."""
    cells = []
    for i, name in enumerate(Figures._fields):
        pairs = zip(zip(*one, strict=True), zip(*other, strict=True), strict=True)
        gaps = [statistics.mean(x[i] - y[i] for x, y in zip(*pair, strict=True)) for pair in pairs]
        cells.append(
            "x {:.2f} [{:.2f}, {:.2f}]".format(*map(math.exp, interval(gaps)))
            if name == "surprise"
            else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval(gaps))
        )
    return f"| {title} | " + " | ".join(cells) + " |"


def line(title: str, found: Sequence[Figures]) -> str:
    """Format a line of a table: means with intervals, the last as a perplexity."""
    cells = []
    for name, column in zip(Figures._fields, zip(*found, strict=True), strict=True):
        found_interval = interval(column)
        if name == "surprise":
            found_interval = (math.exp(found_interval[0]), math.exp(found_interval[1]), math.exp(found_interval[2]))
        mean, low, high = found_interval
        if name in ("repeated", "distinct", "valid"):
            low, high = max(low, 0), min(high, 1)
        places = 1 if name == "scenes" else 2
        cells.append(f"{mean:.{places}f} [{low:.{places}f}, {high:.{places}f}]")
    return f"| {title} | " + " | ".join(cells) + " |"


def mean(found: Sequence[Figures], name: str) -> float:
    """Return the mean of one figure."""
    values: list[float] = [getattr(each, name) for each in found]
    return statistics.mean(values)


def choose(alphas: Sequence[float], count: int, tokens: int) -> tuple[float, list[str]]:
    """Return the best alpha on the dev split, and the table that shows it, all experts together."""
    inputs = prompts("dev", count, testbed.tokenizer())
    greedy = [each for name in JUDGES for each in write(name, inputs, tokens, do_sample=False)]
    lines, allowed = [line("greedy", greedy)], {}
    for alpha in tqdm(alphas, desc="dev"):
        how = {"do_sample": False, "custom_generate": ContrastiveSearch(alpha=alpha, k=K)}
        found = [each for name in JUDGES for each in write(name, inputs, tokens, **how)]
        lines.append(line(f"alpha {alpha}", found))
        if mean(found, "valid") >= 0.99 and mean(found, "scenes") >= 0.9 * mean(greedy, "scenes"):
            allowed[alpha] = mean(found, "distinct")
    best = max(allowed, key=lambda alpha: allowed[alpha]) if allowed else min(alphas)
    return best, [HEAD.format(f"contrastive search, k {K}"), RULE, *lines]


def test(alpha: float, count: int, tokens: int) -> list[str]:
    """Return the table of every decoder on the test split, by expert."""
    inputs = prompts("test", count, testbed.tokenizer())
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "greedy, no 4-gram twice": {"do_sample": False, "no_repeat_ngram_size": 4},
        "nucleus 0.95": {"do_sample": True, "top_p": 0.95, "top_k": 0},
        f"contrastive search, k {K}, alpha {alpha}": {
            "do_sample": False,
            "custom_generate": ContrastiveSearch(alpha=alpha, k=K),
        },
    }
    lines = [HEAD.format("expert, decoding"), RULE]
    told: dict[str, list[list[Figures]]] = {way: [] for way in ways}
    for name in tqdm(JUDGES, desc="test"):
        for way, how in ways.items():
            told[way].append(write(name, inputs, tokens, **how))
            lines.append(line(f"{name}, {way}", told[way][-1]))
        lines.append(line(f"(the corpus, judge {JUDGES[name]})", corpus(name, "test", count)))
    search = told.pop(next(reversed(told)))
    lines += [
        "",
        "The same stories told by contrastive search, less those told otherwise (mean of the three experts):",
        "",
    ]
    lines += [HEAD.format("contrastive search less"), RULE]
    return lines + [difference(way, search, others) for way, others in told.items()]


def main() -> None:
    """Choose alpha, measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=100, help="of each split")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.2, 0.3, 0.4, 0.5, 0.6])
    args = parser.parse_args()
    alpha, dev = choose(args.alphas, args.stories, args.tokens)
    told = f"{args.tokens} tokens after the first scene, no end token; means with 95% intervals"
    print("### Stories by contrastive search, and by other ways\n")
    print(f"Choosing alpha: {args.stories} stories of the dev split, three experts, {told}. Chosen: {alpha}.\n")
    print("\n".join(dev))
    print(f"\nOn {args.stories} stories of the test split, {told} over the stories.")
    print("Perplexity under another expert: " + ", ".join(f"{w} is judged by {j}" for w, j in JUDGES.items()) + ".\n")
    print("\n".join(test(alpha, args.stories, args.tokens)))


if __name__ == "__main__":
    main()
