"""Train an embedded expert with losses of pairs and of labels, and print what each changes: two small experiments.

    python benchmarks/loss_card.py unlearning --folder out --results benchmarks/results/unlearning.md
    python benchmarks/loss_card.py pairs --folder out --results benchmarks/results/losses.md

Stopped, a command goes on where it was: the folder keeps the outcome of every training.

*unlearning*: problems about one thing (coins) are to be forgotten, those about all others to be retained. Accuracies are of test problems,
none of which was trained on. Controls: the model before, `retain` alone, and both forgetting losses without `retain`.

*pairs*: right solutions against solutions that stop after two steps, the mistake of the corpus. The learning rate of each loss is the best of
`--rates` on dev problems, with the first seed; `sft` sees the chosen solutions alone. KTO gets the same pairs, taken apart.
"""

import argparse
import hashlib
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from timing import named_versions, publish
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from contralto import testbed
from contralto.align import PreferenceConfig, PreferenceTrainer, UnpairedConfig, UnpairedTrainer
from contralto.eval.stats import mcnemar_exact, proportion
from contralto.testbed import worlds
from contralto.testbed.measure import decode, is_right

EXPERT, THING, SEED = "expert-0", "coins", 2041
SHARED: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "use_cpu": True,
}
PAIRS_ALONE: dict[str, Any] = {"monitor_pairs": 0, "audit": "off", "head_metrics": "none", "report": False}
LOSSES: dict[str, dict[str, Any]] = {
    "sft": {},
    "sigmoid": {"beta": 0.1},
    "orpo": {"beta": 0.1},
    "dpop": {"beta": 0.3, "dpop_lambda": 50.0},
    "cal_dpo": {"beta": 0.1},
    "alphapo": {"beta": 2.5, "alphapo_alpha": 0.25, "simpo_gamma": 0.1},
    "simper": {},
    "kto": {"beta": 0.1},
}
"""Losses of pairs, and KTO, with their settings."""
UNLEARNING: dict[str, tuple[list[str], list[float]]] = {
    "retain alone": (["retain"], [1.0]),
    "npo": (["npo"], [1.0]),
    "npo, retain": (["npo", "retain"], [1.0, 1.0]),
    "npo, 30 retain": (["npo", "retain"], [1.0, 30.0]),
    "gradient_ascent": (["gradient_ascent"], [1.0]),
    "gradient_ascent, retain": (["gradient_ascent", "retain"], [1.0, 1.0]),
}
"""Losses, and their weights. NPO is of whole completions, of some 30 tokens, and `retain` a mean of tokens."""
RATE = 1e-4
"""That of the recipe `npo` for adapters."""


class Outcome(NamedTuple):
    """The measurements of a training."""

    first: list[bool]
    """Which problems are solved: in `pairs` all, in `unlearning` those to be forgotten."""
    second: list[bool]
    """In `unlearning` those to be retained."""
    logps: tuple[float, float]
    """Mean log-probabilities per token of held-out solutions: chosen and rejected, or to be forgotten and to be retained."""


class Bench:
    """The data, and the outcomes in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.tokenizer = args, testbed.tokenizer()
        args.folder.mkdir(parents=True, exist_ok=True)
        self.train = list(islice(worlds.problems(SEED, "train"), 40 * args.rows))
        self.dev = list(islice(worlds.problems(SEED, "dev"), args.problems // 2))
        self.test = list(islice(worlds.problems(SEED, "test"), 40 * args.problems))

    def run(self, title: str, model_of: Any, measure: Any) -> Outcome:
        """Return the outcome of a training, from the folder if it is there."""
        sizes = (self.args.part, self.args.rows, self.args.steps, self.args.problems)
        kept = self.args.folder / f"{hashlib.sha256(repr((title, sizes)).encode()).hexdigest()[:16]}.json"
        if not kept.exists():
            outcome = measure(model_of())
            unfinished = kept.with_suffix(".part")
            unfinished.write_text(json.dumps(outcome))
            unfinished.replace(kept)
        found = Outcome(*json.loads(kept.read_text()))
        print(
            title,
            f"{statistics.mean(found.first):.3f}",
            found.second and f"{statistics.mean(found.second):.3f}",
            found.logps,
        )
        return found

    def adapted(self, trainer: Any, config: Any, rows: Dataset, seed: int, **options: Any) -> Any:
        """Return the expert with an adapter that a trainer has trained."""
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        with tempfile.TemporaryDirectory(dir=self.args.folder) as out:
            sizes = {"max_steps": self.args.steps, "per_device_train_batch_size": self.args.batch}
            args = config(out, seed=seed, **SHARED, **sizes, **options)
            one = trainer(str(testbed.path(EXPERT)), args=args, train_dataset=rows, peft_config=lora)
            one.train()
            return one.accelerator.unwrap_model(one.model).merge_and_unload().eval()

    def solved(self, model: Any, problems: Sequence[worlds.Problem]) -> list[bool]:
        """Return which problems a model solves greedily."""
        texts = decode(model, self.tokenizer, problems)
        return [is_right(problem, text) for problem, text in zip(problems, texts, strict=True)]

    @torch.inference_mode()
    def logp(self, model: Any, problems: Sequence[worlds.Problem], stop_after: int | None = None) -> float:
        """Return the mean log-probability per token of solutions."""
        found: list[Tensor] = []
        for problem in problems:
            chat = [{"role": "user", "content": problem.question}]
            shown = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            start = len(self.tokenizer(shown, add_special_tokens=False)["input_ids"])
            text = f"{shown} {problem.solution(stop_after=stop_after)}"
            ids = torch.tensor(
                [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
            )
            logps = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
            found.append(logps.gather(-1, ids[start:, None]).squeeze(-1))
        return float(torch.cat(found).mean())


def messages(problem: worlds.Problem, stop_after: int | None = None) -> tuple[list[Any], list[Any]]:
    """Return a problem and its solution as messages."""
    prompt = [{"role": "user", "content": problem.question}]
    return prompt, [{"role": "assistant", "content": problem.solution(stop_after=stop_after)}]


# --------------------------------------------------------------------------------------------------------- unlearning


def unlearning(bench: Bench) -> list[str]:
    """Return the table of the unlearning."""
    args = bench.args
    by_label = {label: [p for p in bench.train if (p.thing == THING) != label][: args.rows] for label in (False, True)}
    rows = [
        {"prompt": messages(p)[0], "completion": messages(p)[1], "label": label}
        for label, problems in by_label.items()
        for p in problems
    ]
    tests = [[p for p in bench.test if (p.thing == THING) == forget][: args.problems] for forget in (True, False)]

    def measure(model: Any) -> Outcome:
        hits = [bench.solved(model, problems) for problems in tests]
        logps = [bench.logp(model, problems[:50]) for problems in tests]
        return Outcome(hits[0], hits[1], (logps[0], logps[1]))

    shown = (f"{THING}: right of {len(tests[0])}", f"others: right of {len(tests[1])}")
    head = ("losses", "seed", *shown, "others, over before", f"{THING}: log p", "others: log p")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    before = bench.run("before", lambda: testbed.load(EXPERT), measure)
    lines.append(_unlearning_line("before", "", before, before))
    for title, (losses, weights) in UNLEARNING.items():
        read = UnpairedConfig("unused", loss_type=losses, report_to="none", use_cpu=True).objective.labels
        data = Dataset.from_list([row for row in rows if row["label"] in read])
        for seed in range(args.seeds):

            def train(
                losses: list[str] = losses, weights: list[float] = weights, data: Dataset = data, seed: int = seed
            ) -> Any:
                options: dict[str, Any] = {"loss_type": losses, "loss_weights": weights, "learning_rate": RATE}
                return bench.adapted(UnpairedTrainer, UnpairedConfig, data, seed, **options)

            outcome = bench.run(f"{title}, seed {seed}", train, measure)
            lines.append(_unlearning_line(title, str(seed), outcome, before))
    return lines


def _unlearning_line(title: str, seed: str, outcome: Outcome, before: Outcome) -> str:
    test = mcnemar_exact(before.second, outcome.second)
    return (
        f"| {title} | {seed} | {_share(outcome.first)} | {_share(outcome.second)} | +{test.won} / -{test.lost}, {test.p:.1g} | "
        f"{outcome.logps[0]:.3f} | {outcome.logps[1]:.3f} |"
    )


# -------------------------------------------------------------------------------------------------------------- pairs


def pairs(bench: Bench) -> list[str]:
    """Return the table of the losses of pairs."""
    args = bench.args
    long = [p for p in bench.train if len(p.steps) > 2][: args.rows]
    rows = Dataset.from_list(
        [{"prompt": messages(p)[0], "chosen": messages(p)[1], "rejected": messages(p, 2)[1]} for p in long]
    )
    test = bench.test[: args.problems]
    held_out = [p for p in bench.test if len(p.steps) > 2][:50]

    def measure(model: Any, problems: Sequence[worlds.Problem] = test) -> Outcome:
        return Outcome(bench.solved(model, problems), [], (bench.logp(model, held_out), bench.logp(model, held_out, 2)))

    def train(name: str, rate: float, seed: int) -> Any:
        if name == "kto":
            options: dict[str, Any] = {"loss_type": name, "learning_rate": rate, **LOSSES[name]}
            return bench.adapted(UnpairedTrainer, UnpairedConfig, rows, seed, **options)
        options = {"loss_type": [name], "learning_rate": rate, **LOSSES[name], **PAIRS_ALONE}
        return bench.adapted(PreferenceTrainer, PreferenceConfig, rows, seed, **options)

    outcomes: dict[str, list[tuple[float, Outcome]]] = {
        "before": [(0.0, bench.run("before", lambda: testbed.load(EXPERT), measure))]
    }
    for name in tqdm(LOSSES, desc="losses"):
        rate = args.rates[0]
        if len(args.rates) > 1:
            tuned = [
                bench.run(f"{name}, {r}, dev", lambda n=name, r=r: train(n, r, 0), lambda m: measure(m, bench.dev))
                for r in args.rates
            ]
            right = [sum(outcome.first) for outcome in tuned]
            rate = args.rates[right.index(max(right))]
        outcomes[name] = [
            (rate, bench.run(f"{name}, {rate}, seed {seed}", lambda n=name, r=rate, s=seed: train(n, r, s), measure))
            for seed in range(args.seeds)
        ]
    head = (
        "loss",
        "rate",
        "seed",
        f"right of {len(test)}",
        "over before",
        "over sft",
        "chosen: log p",
        "rejected: log p",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, of_seeds in outcomes.items():
        for seed, (rate, outcome) in enumerate(of_seeds):
            controls = [outcomes["before"][0][1], outcomes["sft"][min(seed, len(outcomes["sft"]) - 1)][1]]
            tests = [mcnemar_exact(control.first, outcome.first) for control in controls]
            over = " | ".join(f"+{each.won} / -{each.lost}, {each.p:.1g}" for each in tests)
            cells = (name, f"{rate:g}" if rate else "", str(seed) if rate else "", _share(outcome.first), over)
            lines.append(f"| {' | '.join(cells)} | {outcome.logps[0]:.3f} | {outcome.logps[1]:.3f} |")
    return lines


def _share(hits: Sequence[bool]) -> str:
    return str(proportion(hits))


PARTS = {"unlearning": unlearning, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the outcomes of trainings")
    parser.add_argument("--rows", type=int, default=160, help="pairs, or rows of each label (default 160)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each training (default 40)")
    parser.add_argument("--batch", type=int, default=8, help="pairs or rows per step (default 8)")
    parser.add_argument("--problems", type=int, default=200, help="test problems of each kind (default 200)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each setting (default 2)")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 2e-4], help="learning rates of pairs")
    parser.add_argument("--results", type=Path, help="file for the table")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    lines = PARTS[args.part](Bench(args))
    text = (__doc__ or "").split(f"*{args.part}*: ")[1].split("\n\n")[0].strip()
    title = text[0].upper() + text[1:]
    if args.part == "pairs" and len(args.rates) == 1:
        title = title.replace(
            "the best of\n`--rates` on dev problems, with the first seed", f"{args.rates[0]:g}, not tuned"
        )
    about = f"{args.rows} rows, {args.steps} steps of {args.batch}, LoRA of rank 8 on {EXPERT}."
    versions = named_versions("contralto", "torch", "transformers", "trl", "peft")
    publish([f"# {args.part.capitalize()}", "", title, "", *lines, "", f"{about} {versions}"], args.results)


if __name__ == "__main__":
    main()
