"""Measure critic-guided decoding on the testbed: right answers to held-out problems, beside what could explain a gain.

    python benchmarks/critic_guidance.py --folder out                        everything; writes benchmarks/results/critic_guidance.md
    python benchmarks/critic_guidance.py --folder out --experts expert-0 --prompts 20 --problems 10 --no-write

Of each expert, `contralto critic` learns from its own sampled solutions of training problems whether a solution ends in the right number
after right steps. Then test problems are decoded. The controls: greedy search and sampling without a critic, the same critic as a judge
of finished texts (the best of n samples), and critics that have learned nothing: a head of random weights on the same layers.
Settings were fixed before the test problems were decoded. Stopped, the command goes on where it was.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timing import named_versions
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForTokenClassification, set_seed

from contralto import testbed
from contralto.align.critic import CriticConfig, make_critic
from contralto.align.critic.card import critic_table
from contralto.common.hub import from_pretrained
from contralto.decoding import CriticGuidedLogitsProcessor
from contralto.decoding.branches.values import values_of
from contralto.eval.stats import mcnemar_exact, proportion
from contralto.testbed import worlds
from contralto.testbed.measure import is_right
from contralto.testbed.questions import problems

RESULTS = Path(__file__).parent / "results" / "critic_guidance.md"
SEED, BATCH, NEW = 2041, 64, 100
CANDIDATES, SAMPLES = 10, 8
CRITIC = "critic, greedy"
LINES = {
    "greedy": "the expert's likeliest tokens",
    CRITIC: f"the {CANDIDATES} likeliest tokens, weighted by the critic",
    "untrained critic, greedy": "the same with a head of random weights",
    "sampling": "temperature 1",
    "critic, sampling": "temperature 1, weighted by the critic",
    f"best of {SAMPLES}": "samples, the one with the highest value of the critic at its end",
    f"best of {SAMPLES}, untrained": "samples, chosen by the head of random weights",
}


def train(expert: str, folder: Path, count: int) -> Any:
    """Return the trained critic of an expert with its figures."""
    prompts = folder / f"train_{count}.jsonl"
    rows = problems(count=count, seed=SEED, split="train")
    prompts.write_text("\n".join(json.dumps({name: row[name] for name in ("id", "prompt")}) for row in rows))
    return make_critic(
        CriticConfig(
            model=f"testbed:{expert}",
            output=str(folder / expert),
            prompts=str(prompts),
            scorer="contralto.testbed.questions:score",
            threshold=2,
            samples=8,
            learning_rate=3e-3,
            lam=1.0,
            epochs=3,
            batch_size=64,
            bf16=False,
        )
    )


class Decoder:
    """An expert and its tokenizer on problems of the test split."""

    def __init__(self, expert: str, chosen: Sequence[worlds.Problem]) -> None:
        self.model, self.tokenizer, self.problems = testbed.load(expert), testbed.tokenizer(), chosen

    def texts(self, *, critic: Any = None, seed: int | None = None) -> tuple[list[str], list[Tensor]]:
        """Return a solution of each problem and its tokens with the prompt; sampled if there is a seed."""
        found, rows = [], []
        for start in range(0, len(self.problems), BATCH):
            chats = [[{"role": "user", "content": p.question}] for p in self.problems[start : start + BATCH]]
            inputs = self.tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            search: dict[str, Any] = {"do_sample": False}
            if seed is not None:
                set_seed(1000 * seed + start)
                search = {"do_sample": True, "temperature": 1.0, "top_k": 0}
            if critic is not None:
                guided = CriticGuidedLogitsProcessor(critic, k=CANDIDATES, attention_mask=inputs["attention_mask"])
                search["logits_processor"] = [guided]
            output = self.model.generate(**inputs, max_new_tokens=NEW, **search)
            width = inputs["input_ids"].shape[1]
            found += self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            rows += [row[mask.argmax() :] for row, mask in zip(output, inputs["attention_mask"], strict=True)]
        return found, [_ended(row, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) for row in rows]

    def best(self, critic: Any, drawn: Sequence[tuple[list[str], list[Tensor]]]) -> list[str]:
        """Return for each problem the sample with the highest value at its end."""
        values = torch.stack([torch.tensor([float(_value(critic, row)) for row in rows]) for _, rows in drawn])
        return [drawn[int(at)][0][i] for i, at in enumerate(values.argmax(0))]


def _ended(row: Tensor, pad: int, end: int) -> Tensor:
    """Return a row without the padding after its end."""
    if pad != end:
        return row[: int((row != pad).nonzero()[-1]) + 1]
    ends = (row == end).nonzero()[:, 0]
    return row if not len(ends) else row[: int(ends[0]) + 1]


@torch.no_grad()
def _value(critic: Any, row: Tensor) -> Tensor:
    return values_of(critic, row[None], torch.ones_like(row[None]))[0, 0]


def random_head(critic: Path) -> Any:
    """Return the critic's layers with a head of random weights."""
    model = from_pretrained(AutoModelForTokenClassification, str(critic)).eval()
    torch.manual_seed(SEED)
    with torch.no_grad():
        model.score.weight.normal_()
        model.score.bias.zero_()
    return model


def decode(expert: str, critic: Path, count: int) -> dict[str, list[bool]]:
    """Return for each line which problems were solved."""
    chosen = list(islice(worlds.problems(SEED, "test"), count))
    decoder, guide = Decoder(expert, chosen), from_pretrained(AutoModelForTokenClassification, str(critic)).eval()
    untrained = random_head(critic)
    drawn = [decoder.texts(seed=seed) for seed in tqdm(range(SAMPLES), desc=f"{expert}, samples")]
    answers = {
        "greedy": decoder.texts()[0],
        CRITIC: decoder.texts(critic=guide)[0],
        "untrained critic, greedy": decoder.texts(critic=untrained)[0],
        "sampling": drawn[0][0],
        "critic, sampling": decoder.texts(critic=guide, seed=0)[0],
        f"best of {SAMPLES}": decoder.best(guide, drawn),
        f"best of {SAMPLES}, untrained": decoder.best(untrained, drawn),
    }
    return {name: [is_right(p, text) for p, text in zip(chosen, texts, strict=True)] for name, texts in answers.items()}


def table(right: dict[str, list[bool]]) -> list[str]:
    """Return the lines of an expert."""
    lines = ["| decoding | right | 95% interval | critic alone, line alone, p |", "|---|---|---|---|"]
    for name, hits in right.items():
        share = proportion(hits)
        cell = "-"
        if name != CRITIC:
            test = mcnemar_exact(hits, right[CRITIC])
            cell = f"{test.won}, {test.lost}, {test.p:.2g}"
        lines.append(f"| {name} | {share.value:.3f} | {share.low:.3f} to {share.high:.3f} | {cell} |")
    return lines


def main() -> None:
    """Train, decode and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="critics and answers, which a second run reuses")
    parser.add_argument("--experts", nargs="+", default=["expert-0", "expert-1", "expert-2"])
    parser.add_argument("--prompts", type=int, default=400, help="training problems (default 400), 8 samples of each")
    parser.add_argument("--problems", type=int, default=300, help="test problems (default 300)")
    parser.add_argument("--no-write", action="store_true", help="print, and leave the results file alone")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for expert in args.experts:
        made = train(expert, args.folder, args.prompts)
        path = args.folder / f"{expert}_{args.problems}.json"
        if not path.is_file():
            path.write_text(json.dumps(decode(expert, made.folder, args.problems)))
        right = json.loads(path.read_text())
        parts += ["", f"## {expert}", "", *table(right), "", f"The critic, {made.texts:,} training texts:", ""]
        parts.append(critic_table(made.figures))
    text = "\n".join([*head(args), *parts, ""])
    print(text)
    if not args.no_write:
        RESULTS.write_text(text)


def head(args: argparse.Namespace) -> list[str]:
    """Return the beginning of the page."""
    return [
        "# What a critic gains",
        "",
        f"{args.problems} test problems of the testbed's arithmetic world. A critic learned from 8 sampled solutions of {args.prompts} training",
        "problems by Monte-Carlo returns of a program's verdict: the right number after right steps. In the last column stand the problems that",
        "the greedily decoded critic alone solves, those that the line alone solves, and the exact McNemar test. The mistakes of the experts are",
        "built into their corpus (testbed/README.md): a gain says that the method does what it claims, not that it helps a large model.",
        "",
        *(f"- {name}: {what}" for name, what in LINES.items()),
        "",
        "Greedy decoding by the critic keeps the expert's arithmetic and corrects where it stops. Samples at temperature 1 also calculate",
        "wrongly, which this critic hardly sees in its values: that is what limits the best of the samples and the sampled critic.",
        "",
        f"A critic costs a second model; best of {SAMPLES} costs {SAMPLES} texts. {named_versions('torch', 'transformers')}.",
        f"Experts: {', '.join(args.experts)}, one training of a critic each.",
        f"Command: `python benchmarks/critic_guidance.py --folder out --experts {' '.join(args.experts)} --problems {args.problems}`.",
    ]


if __name__ == "__main__":
    main()
