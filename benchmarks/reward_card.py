"""Train an embedded expert by GRPO with constrained and with contrastive rewards: two small experiments, with their controls.

    python benchmarks/reward_card.py constrained --folder out --results benchmarks/results/constrained_rewards.md
    python benchmarks/reward_card.py contrastive --folder out --results benchmarks/results/contrastive_rewards.md

Stopped, a command goes on where it was: the folder keeps the outcome of every training. Accuracies are of test problems, decoded greedily;
none was trained on. Settings were fixed before test problems were decoded, after trials on dev problems of whether a run learns at all.

*constrained*: The proxy reward is the number of steps that a solution writes, in fifths. Experts often stop too early, so that more steps mean
more right answers, up to the steps that problems have; beyond them every further step is wrong. It is maximised, held at the mean
number of steps of the training problems (0.62), and held where the search finds most right answers of training problems. Controls:
a stronger KL term in place of a constraint, and right answers as the reward, which the proxy stands for.

*contrastive*: The reward is 1 for a right answer. It is taken as it is, and in contrast to four answers of the untrained expert to the same
problem, through a sigmoid. Control: the reward times 0.24, which is what the sigmoid leaves of a difference of 1, without baselines.
"""

import argparse
import logging
import re
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import LoraConfig
from real.units import Units
from timing import named_versions, publish
from tqdm import tqdm
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from contralto import testbed
from contralto.align import RewardsConfig, RewardsTrainer, ThresholdSearch
from contralto.eval.stats import mcnemar_exact, proportion
from contralto.testbed import worlds
from contralto.testbed.measure import decode, is_right
from contralto.testbed.questions import problem_of

EXPERT, SEED = "expert-0", 2041
SHARED: dict[str, Any] = {
    "scale_rewards": "none",
    "num_generations": 8,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 100,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
}
STEP = re.compile(r"(?:=|so) -?\d+")
SCALE = 0.24
"""sigmoid(1 - b) - sigmoid(-b) of the mean reward b of the baselines: between .231 and .245."""


def _text(completion: Any) -> str:
    return str(completion[0]["content"]) if isinstance(completion, list) else str(completion)


def right(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 for a completion that ends in the right number."""
    return [
        float(is_right(problem_of(_text(prompt)), _text(completion)))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def steps(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The number of steps that a completion writes, in fifths."""
    return [len(STEP.findall(_text(completion))) / 5 for completion in completions]


def scaled(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """`right` times `SCALE`."""
    return [SCALE * value for value in right(prompts, completions, **columns)]


class System(NamedTuple):
    """Rewards, and the options of a training."""

    rewards: tuple[Any, ...]
    options: dict[str, Any]


def _constraint(value: str, **options: Any) -> dict[str, Any]:
    return {"constraints": [f"steps={value}"], "equality_constraints": True, "beta": 0.2, **options}


PARTS = {
    "constrained": {
        "steps, maximised": System((steps,), {"beta": 0.02}),
        "steps, maximised, strong KL": System((steps,), {"beta": 0.2}),
        "steps, held at 0.62": System((steps,), _constraint("0.62")),
        "steps, held where the search finds": System(
            (steps, right), _constraint("0.3..1.1", search_objective="right", search_steps=16)
        ),
        "right answers, maximised": System((right,), {"beta": 0.02}),
    },
    "contrastive": {
        "as it is": System((right,), {"beta": 0.02}),
        f"times {SCALE}": System((scaled,), {"beta": 0.02}),
        "by contrast": System((right,), {"beta": 0.02, "contrast": "sigmoid"}),
        "by contrast, temperature 0.25": System(
            (right,), {"beta": 0.02, "contrast": "sigmoid", "contrast_temperature": 0.25}
        ),
    },
}
CONTROLS = {"constrained": "steps, maximised", "contrastive": "as it is"}
"""The system that the others are tested against, beside the untrained expert."""


class Bench:
    """The problems, and the outcomes of trainings in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.tokenizer = args, testbed.tokenizer()
        self.train = list(islice(worlds.problems(SEED, "train"), args.rows))
        self.test = list(islice(worlds.problems(SEED, args.split), args.problems))
        self.units = Units(args.folder / f"{args.part}.jsonl", {})

    def key(self, title: str, seed: int) -> dict[str, Any]:
        """Return what determines an outcome."""
        sizes = {name: getattr(self.args, name) for name in ("rows", "steps", "batch", "problems", "rate", "split")}
        return {"system": title, "seed": seed, **sizes}

    def rows(self) -> Dataset:
        """Return prompts with four sampled answers of the untrained expert each."""
        model, chats = testbed.load(EXPERT), [[{"role": "user", "content": each.question}] for each in self.train]
        drawn = decode(model, self.tokenizer, [each for each in self.train for _ in range(4)], temperature=1.0)
        return Dataset.from_list(
            [
                {
                    "prompt": chat,
                    "baselines": [[{"role": "assistant", "content": text}] for text in drawn[4 * i : 4 * i + 4]],
                }
                for i, chat in enumerate(chats)
            ]
        )

    def trained(self, system: System, rows: Dataset, seed: int) -> Any:
        """Return the expert with the adapter that a training leaves, and what the training was held at."""
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        with tempfile.TemporaryDirectory(dir=self.args.folder) as out:
            sizes = {"max_steps": self.args.steps, "per_device_train_batch_size": self.args.batch}
            args = RewardsConfig(out, seed=seed, learning_rate=self.args.rate, **{**SHARED, **sizes, **system.options})
            trainer = RewardsTrainer(
                str(testbed.path(EXPERT)), args, list(system.rewards), train_dataset=rows, peft_config=lora
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            held = trainer.held.best["steps"] if isinstance(trainer.held, ThresholdSearch) else None
            return trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().eval(), held

    def measure(self, model: Any, held: float | None = None) -> dict[str, Any]:
        """Return which test problems are solved, the proxy reward of each, and the threshold."""
        texts = decode(model, self.tokenizer, self.test)
        hits = [is_right(problem, text) for problem, text in zip(self.test, texts, strict=True)]
        return {"hits": hits, "steps": steps([], texts), "held": held}


def table(bench: Bench) -> list[str]:
    """Train what has no outcome yet, and return the table."""
    systems = PARTS[bench.args.part]
    jobs = [(title, seed) for title in systems for seed in range(bench.args.seeds)]
    before = bench.key("before", 0)
    if before not in bench.units:
        bench.units.add(before, bench.measure(testbed.load(EXPERT)))
    rows = bench.rows()
    for title, seed in tqdm(jobs, desc=bench.args.part):
        if (key := bench.key(title, seed)) not in bench.units:
            bench.units.add(key, bench.measure(*bench.trained(systems[title], rows, seed)))
    control = CONTROLS[bench.args.part]
    head = ("reward", "seed", f"right of {len(bench.test)}", "steps / 5", "threshold", "over before", f"over {control}")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, seed in [("before", 0), *jobs]:
        found = bench.units[bench.key(title, seed)]
        tests = [
            mcnemar_exact(bench.units[bench.key(*other)]["hits"], found["hits"])
            for other in (("before", 0), (control, seed))
        ]
        over = [f"+{test.won} / -{test.lost}, {test.p:.1g}" for test in tests]
        held = f"{found['held']:.2f}" if found["held"] is not None else ""
        shown = (str(proportion(found["hits"])), f"{statistics.mean(found['steps']):.2f}", held)
        lines.append(f"| {' | '.join((title, str(seed) if title != 'before' else '', *shown, *over))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the outcomes of trainings")
    parser.add_argument("--rows", type=int, default=256, help="training problems (default 256)")
    parser.add_argument("--steps", type=int, default=80, help="steps of each training (default 80)")
    parser.add_argument(
        "--batch", type=int, default=32, help="completions per step, eight of each problem (default 32)"
    )
    parser.add_argument("--problems", type=int, default=300, help="problems of the evaluation (default 300)")
    parser.add_argument("--split", choices=["dev", "test"], default="test", help="dev for trials (default test)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each setting (default 1)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default 1e-3)")
    parser.add_argument("--results", type=Path, help="file for the table")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    lines = table(Bench(args))
    text = (__doc__ or "").split(f"*{args.part}*: ")[1].split("\n\n")[0].strip()
    about = (
        f"{args.rows} problems, {args.steps} steps of {args.batch} completions, LoRA of rank 8 on {EXPERT}, learning rate {args.rate:g}. "
        "Tests are exact McNemar's."
    )
    versions = named_versions("contralto", "torch", "transformers", "trl", "peft")
    publish([f"# {args.part.capitalize()} rewards", "", text, "", *lines, "", f"{about} {versions}"], args.results)


if __name__ == "__main__":
    main()
