"""Measure the effect of distillation on the testbed's student: equally tuned losses, three seeds, held-out problems.

    python benchmarks/distill_card.py --runs runs.jsonl    everything; writes the figures of testbed/DISTILL.md
    python benchmarks/distill_card.py --settings skew_kl gradual    these beside SFT
    python benchmarks/distill_card.py --prompts 48 --problems 60 --dev 40 --seeds 0 1 --rates 1e-3 --no-write

Stopped, the first command goes on where it was: `--runs` is a file that keeps every run as it ends.

The teacher is the expert, the student a third of its size; both write before every epoch, on the same prompts for every loss, as in
DistiLLM-2's algorithm 1. All losses have the same number of pairs, steps and rows, and each has the learning rate that was best for it on
dev problems with the first seed; nothing is chosen on what the tables report. A seed draws prompts, texts and their order.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import textwrap
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from datasets import Dataset
from timing import write_figures
from tqdm import tqdm
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from contralto import testbed
from contralto.align.trainers.distillation import DistillationPairTrainer
from contralto.align.trainers.distillation_config import DistillationConfig
from contralto.data_gen import pipeline
from contralto.data_gen import recipe as recipes
from contralto.data_gen.export import pair_rows
from contralto.data_gen.rows import read_rows
from contralto.data_gen.store import Store
from contralto.eval.stats import holm, mcnemar_exact, proportion
from contralto.testbed import worlds
from contralto.testbed.measure import decode, is_right

CARD = Path(testbed.__file__).parent.resolve() / "DISTILL.md"
SEED = 2031
"""Of dev and test problems, and the first of those of the prompts."""


class Setting(NamedTuple):
    """A loss, and the author of the teacher's texts."""

    name: str
    options: dict[str, Any]
    texts: str = "sampled"
    own: bool = True
    """True if the loss learns from the student's completions, so that these are generated every epoch."""


LOSSES = {
    "sft": Setting("SFT on the teacher's texts", {"loss_type": "sft"}, own=False),
    "forward_kl": Setting("forward KL", {"loss_type": "forward_kl"}, own=False),
    "reverse_kl": Setting("reverse KL", {"loss_type": "reverse_kl"}),
    "jsd": Setting("JSD (GKD)", {"loss_type": "jsd"}),
    "skew_kl": Setting("skew KL (DistiLLM)", {"loss_type": "skew_kl"}),
    "released": Setting("DistiLLM-2, released setting", {"loss_type": "distillm2", "curriculum": "released"}),
    "gradual": Setting(
        "DistiLLM-2, released, beta to 0.75", {"loss_type": "distillm2", "curriculum": "released_gradual"}
    ),
    "paper": Setting("DistiLLM-2, the paper's curriculum", {"loss_type": "distillm2"}),
    "kept": Setting("DistiLLM-2, the same with beta to 0.75", {"loss_type": "distillm2", "beta_max": 0.75}),
}
BY_CONTRAST = ("sft", "skew_kl", "kept")
SETTINGS = LOSSES | {
    f"{key}+contrast": LOSSES[key]._replace(name=f"{LOSSES[key].name}; texts by contrast", texts="contrasted")
    for key in BY_CONTRAST
}
ROLE = {"engine": "transformers", "batch_size": 128, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 96}
CONTRAST = {"method": "cd", "amateur": "testbed:amateur"}


class Run(NamedTuple):
    """A trained student on test problems."""

    dev: int
    """The number of dev problems that it solves."""
    right: list[bool]
    early: float
    """Share of the answers that stop after the second of more steps."""
    seconds: float
    """Of training and of the student's writing."""


class Bench:
    """Problems, texts and students of a run, in a folder."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args, self.tokenizer = folder, args, testbed.tokenizer()
        self.problems = {
            split: list(islice(worlds.problems(SEED, split), count))  # type: ignore[arg-type]
            for split, count in (("dev", args.dev), ("test", args.problems))
        }
        self.store = Store(folder / "answers.sqlite")
        self.teacher = testbed.load("expert")
        self.rates: dict[str, float] = {}
        self.count = 0
        lines = args.runs.read_text().splitlines() if args.runs and args.runs.exists() else []
        self.kept = {each["key"]: Run(**each["run"]) for each in map(json.loads, lines)}

    # ------------------------------------------------------------------------------------------------------------ the texts

    def pairs(self, seed: int, epoch: int, student: str, texts: str) -> Dataset:
        """Return the pairs of teacher and student on the prompts of a seed; recorded completions are used again."""
        teacher = ROLE | {"model": "testbed:expert"} | (CONTRAST if texts == "contrasted" else {})
        source = {"source": "contralto.testbed.questions:problems"}
        source |= {"arguments": {"count": self.args.prompts, "seed": SEED + 1 + seed}}  # type: ignore[dict-item]
        sampling = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 96}
        said = {
            "rows": source,
            "strategies": [{"use": "teacher_student", **sampling}],
            "roles": {"teacher": teacher, "student": ROLE | {"model": student}},
            "seed": 100 * seed + epoch,
        }
        path = self.folder / "texts.yaml"
        path.write_text(yaml.safe_dump(said))
        recipe = recipes.load_recipe(path)
        rows = read_rows(recipe.rows, folder=self.folder)
        pipeline.run(recipe, rows, self.store, is_shown=False)
        found = [row for result in pipeline.replay(recipe, rows, self.store) for row in pair_rows(result)]
        return Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in found])

    # --------------------------------------------------------------------------------------------------------- the students

    def train(self, setting: Setting, seed: int, rate: float) -> tuple[Any, float]:
        """Return a student after all epochs, and the seconds of training and generation."""
        model, student, seconds = testbed.load(self.args.student), f"testbed:{self.args.student}", 0.0
        for epoch in range(1, self.args.epochs + 1):
            if epoch == 1 or not setting.own:
                data = self.pairs(seed, epoch, f"testbed:{self.args.student}", setting.texts)
                start = time.perf_counter()
            else:
                start = time.perf_counter()
                data = self.pairs(seed, epoch, student, setting.texts)
            self._epoch(model, setting, data, seed, rate, epoch)
            self.count += 1
            student = str(self.folder / f"student-{self.count}")
            model.save_pretrained(student)
            self.tokenizer.save_pretrained(student)
            seconds += time.perf_counter() - start
        return model.eval(), seconds

    def _epoch(self, model: Any, setting: Setting, data: Dataset, seed: int, rate: float, epoch: int) -> None:
        moment = {"first_epoch": epoch, "all_epochs": self.args.epochs}
        options = setting.options | (moment if setting.options["loss_type"] == "distillm2" else {})
        args = DistillationConfig(
            str(self.folder / "out"),
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            num_train_epochs=1,
            per_device_train_batch_size=self.args.batch,
            seed=seed,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **options,
        )
        teacher = None if setting.options["loss_type"] == "sft" else self.teacher
        how = {"train_dataset": data, "processing_class": self.tokenizer}
        trainer = DistillationPairTrainer(model, teacher, args=args, **how)
        trainer.remove_callback(PrinterCallback)  # its dictionaries tear the bar
        trainer.train()

    def hits(self, texts: Sequence[str], split: str) -> list[bool]:
        """Return which problems the completions solve."""
        return [is_right(p, t) for p, t in zip(self.problems[split], texts, strict=True)]

    def measure(self, model: Any, seconds: float = 0.0) -> Run:
        """Return the measurements of a student on the problems."""
        dev, texts = (decode(model, self.tokenizer, self.problems[split]) for split in ("dev", "test"))
        right = self.hits(texts, "test")
        early = [
            worlds.answer(text) == problem.totals[2] and not is_right
            for problem, text, is_right in zip(self.problems["test"], texts, right, strict=True)
            if len(problem.steps) > 2
        ]
        return Run(sum(self.hits(dev, "dev")), right, statistics.mean(early), seconds)

    def run(self, setting: Setting, seed: int, rate: float) -> Run:
        """Return the measurements of a trained student, from the record of an earlier run if there is one."""
        size = {name: getattr(self.args, name) for name in ("student", "prompts", "epochs", "batch", "dev", "problems")}
        key = json.dumps([setting.name, seed, rate, size])
        if key not in self.kept:
            self.kept[key] = self.measure(*self.train(setting, seed, rate))
            if self.args.runs:
                with self.args.runs.open("a") as file:
                    file.write(json.dumps({"key": key, "run": self.kept[key]._asdict()}) + "\n")
        return self.kept[key]

    def all(self) -> dict[str, list[Run]]:
        """Measure every setting under every seed, at the rate that is best on dev problems with the first, the lower of equals."""
        found: dict[str, list[Run]] = {}
        first, *others = self.args.seeds
        settings = [SETTINGS[key] for key in dict.fromkeys(["sft", *self.args.settings])]
        with tqdm(total=len(settings) * (len(self.args.rates) + len(others)), unit="run") as bar:
            for setting in settings:
                tried = {}
                for rate in sorted(self.args.rates):
                    tried[rate] = self.run(setting, first, rate)
                    bar.update()
                best = self.rates[setting.name] = max(tried, key=lambda rate: (tried[rate].dev, -rate))
                found[setting.name] = [tried[best]]
                for seed in others:
                    found[setting.name].append(self.run(setting, seed, best))
                    bar.update()
        return found


# --------------------------------------------------------------------------------------------------------------- tables


def main_table(bench: Bench, found: dict[str, list[Run]]) -> list[str]:
    """Return a table of the share of problems solved, and of exact tests against SFT, seed by seed."""
    lines = [
        f"| learned by | rate | solved of {bench.args.problems}, mean | by seed | over SFT: won / lost, p by seed | stopped early | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    base, tests = found[SETTINGS["sft"].name], []
    for name, runs in found.items():
        shares = [statistics.mean(run.right) for run in runs]
        cells = []
        for first, second in zip(base, runs, strict=True):
            if second is not first:
                test = mcnemar_exact(first.right, second.right)
                tests.append((name, test))
                cells.append(f"+{test.won} / -{test.lost}, {test.p:.1g}")
        early, seconds = statistics.mean(run.early for run in runs), statistics.mean(run.seconds for run in runs)
        by_seed = ", ".join(f"{share:.3f}" for share in shares)
        lines.append(
            f"| {name} | {bench.rates[name]:g} | {statistics.mean(shares):.3f} | {by_seed} | {'; '.join(cells)} | {early:.2f} "
            f"| {seconds:.0f} |"
        )
    return [*lines, "", *_conclusion(tests)]


def _conclusion(tests: Sequence[tuple[str, Any]]) -> list[str]:
    """Return the differences to SFT that remain after Holm's correction for all tests of the table."""
    adjusted = holm([test.p for _, test in tests])
    better = [name for (name, test), p in zip(tests, adjusted, strict=True) if p < 0.05 and test.won > test.lost]
    worse = [name for (name, test), p in zip(tests, adjusted, strict=True) if p < 0.05 and test.won < test.lost]
    said = [f"Of the {len(tests)} tests against SFT, after Holm's correction for all of them:"]
    for word, names in (("better", better), ("worse", worse)):
        told = ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names)) or "none"
        said.append(f"- {word} at the level of 0.05 (number of seeds): {told}")
    return said


def alone_table(bench: Bench) -> list[str]:
    """Return a table of teacher and student without distillation."""
    lines = ["| model | parameters | problems solved | stopped early |", "|---|---|---|---|"]
    for name in ("expert", bench.args.student):
        model = testbed.load(name)
        run = bench.measure(model)
        lines.append(f"| {name} | {model.num_parameters():,} | {proportion(run.right)} | {run.early:.2f} |")
    return lines


def page(bench: Bench, found: dict[str, list[Run]]) -> str:
    """Return the figures of the card."""
    args = bench.args
    steps = args.epochs * -(-args.prompts // args.batch)
    about = (
        f"`python benchmarks/distill_card.py`: the expert teaches the {args.student}, all weights, {args.epochs} epochs of "
        f"{args.prompts} problems of the training split, {steps} steps of {args.batch} pairs, AdamW, temperature 0.8. Before each epoch "
        f"both write anew. Each loss has the best of the rates {', '.join(f'{rate:g}' for rate in sorted(args.rates))} on {args.dev} dev "
        "problems. Test problems are solved greedily; tests are exact McNemar tests on the same problems. Stopped early is the shortcut "
        "of the corpus, which the teacher has learned too: the share of the longer problems that are answered with the total after the "
        "second step. Texts by contrast are the teacher's by contrastive decoding (beta 0.5); the divergences still are to its plain "
        "distribution. One student, one teacher: the seeds vary prompts, texts and order. Seconds are of training and of the student's "
        "writing, on the machine at hand, and compare within this table alone."
    )
    tables = [*alone_table(bench), "", *main_table(bench, found)]
    return "\n".join([textwrap.fill(about, 120), "", *tables, ""])


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="student", choices=["student", "amateur", "early"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="beside sft")
    parser.add_argument("--prompts", type=int, default=1600, help="of every epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="pairs per step")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5e-4, 4e-4, 1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dev", type=int, default=200, help="problems to choose the rate on")
    parser.add_argument("--problems", type=int, default=400, help="test problems")
    parser.add_argument(
        "--runs", type=Path, help="keep every run in this file (JSONL), and take from it those that are there"
    )
    parser.add_argument("--no-write", action="store_true", help="only print")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.disable(logging.WARNING)
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args)
        found = bench.all()
        text = page(bench, found)
    print(text)
    if not args.no_write:
        write_figures(CARD, "distill_card", text)


if __name__ == "__main__":
    main()
