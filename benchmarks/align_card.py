"""Measure the effect of alignment on the testbed's experts: make pairs, train losses, decode held-out problems.

    python benchmarks/align_card.py --folder out           everything; writes the tables into testbed/ALIGNMENT.md
    python benchmarks/align_card.py --experts expert-0 --pairs 64 --steps 10 --problems 40 --no-write

Stopped, the first command goes on where it was: the folder keeps pairs, and every training as it ends.

Of each expert, `contralto data run` makes pairs from its own samples on training problems, `contralto align` trains an adapter
on them, and test problems are decoded greedily. All settings have the same number of pairs, steps and rows, and each has the
learning rate that was best for the first expert on dev problems; nothing is chosen on what the tables report. `sft` sees the
chosen texts alone: what it reaches is no merit of the rejected ones.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from timing import UNTUNED, named_versions, write_figures
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from contralto import cli, testbed
from contralto.common.hub import with_adapter
from contralto.data_gen.checks.ches import score_rows
from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.eval.stats import mcnemar_exact, proportion
from contralto.testbed import worlds
from contralto.testbed.measure import decode, is_right

CARD = Path(testbed.__file__).parent.resolve() / "ALIGNMENT.md"
RATES = ("2e-5", "5e-5", "1e-4", "2e-4")
BATCH = 16
SEED = 2029
"""The seed of the problems."""
SIZES = ("pairs", "held_out", "steps", "dev", "problems")
STRATEGIES = ("clair", "on_policy_judge", "stronger_preferred")


class Setting(NamedTuple):
    """Pairs and a loss."""

    pairs: str
    recipe: str
    more: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Return the pairs and the loss."""
        loss = self.more[self.more.index("--loss_type") + 1] if "--loss_type" in self.more else self.recipe
        return f"{self.pairs}, {loss}"


SETTINGS = (
    Setting("clair", "apo_zero"),
    Setting("clair", "dpo"),
    Setting("clair", "cpo"),
    Setting("clair", "sparsepo"),
    Setting("clair", "dpo", ("--loss_type", "sft")),
    Setting("on_policy_judge", "dpo"),
    Setting("stronger_preferred", "dpo"),
)
FLAGS = {
    "use_peft": "true",
    "lora_r": "8",
    "lora_alpha": "16",
    "lora_target_modules": "all-linear",
    "beta": "0.1",
    "per_device_train_batch_size": str(BATCH),
    **UNTUNED,
    "monitor_pairs": "0",
    "head_metrics": "none",
}


class Change(NamedTuple):
    """The change of the log-probabilities of pairs by training."""

    chosen: float
    """Mean change of log pi(chosen)."""
    rejected: float
    displaced: float
    """Share of the pairs whose chosen text became less likely."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Capture the output of a command, and print it if the command fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except BaseException:
        print(said.getvalue()[-4000:])
        raise


def command(*argv: str) -> None:
    """Run a command of contralto in this process."""
    with quiet():
        status = cli.main([*argv, "--debug"] if argv[0] != "align" else list(argv))
        if status:
            raise RuntimeError(f"contralto {' '.join(argv)} failed")


class Bench:
    """The data, adapters and answers of a run, in a folder."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args, self.tokenizer = folder, args, testbed.tokenizer()
        self.problems = {
            split: list(islice(worlds.problems(SEED, split), count))  # type: ignore[arg-type]
            for split, count in (("dev", args.dev), ("test", args.problems))
        }

    # ------------------------------------------------------------------------------------------------------------ the pairs

    def pairs(self, expert: str, strategy: str, split: str = "train") -> Path:
        """Return the pairs of an expert, a file of JSONL, which the first call makes."""
        made = self.folder / f"{expert}-{split}"
        if not (made / "dataset").exists():
            self._generate(expert, split, made)
        kept = made / f"{strategy}.jsonl"
        if not kept.exists():
            lines = (made / "dataset" / "data" / "train.jsonl").read_text().splitlines()
            wanted = [line for line in lines if json.loads(line)["strategy"] == strategy]
            count = self.args.pairs if split == "train" else self.args.held_out
            if len(wanted) < count:
                raise ValueError(f"{expert}: {len(wanted)} pairs by {strategy}, and {count} are wanted")
            kept.write_text("\n".join(wanted[:count]) + "\n")
        return kept

    def _generate(self, expert: str, split: str, made: Path) -> None:
        count = 4 * (self.args.pairs if split == "train" else self.args.held_out)
        model = {"engine": "transformers", "model": f"testbed:{expert}", "batch_size": 64, "max_new_tokens": 96}
        recipe = {
            "output": str(made),
            "rows": {
                "source": "contralto.testbed.questions:problems",
                "arguments": {"count": count, "seed": SEED + 1, "split": split},
            },
            "strategies": list(STRATEGIES),
            "roles": {
                "target": model | {"temperature": 1.0},
                "stronger": model | {"method": "cd", "amateur": "testbed:amateur", "temperature": 0.0},
                "reviser": {"engine": "function", "use": "contralto.testbed.questions:revise"},
                "judge": {"engine": "function", "use": "contralto.testbed.questions:judge"},
            },
            "checks": {"contrast": {}},
            "filters": {"no_op": False},
        }
        path = self.folder / f"{expert}-{split}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        command("data", "run", str(path))

    # --------------------------------------------------------------------------------------------------------- the adapters

    def train(self, expert: str, pairs: Path, recipe: str, *more: str) -> Any:
        """Return an aligned expert."""
        flags = [word for name, value in FLAGS.items() for word in (f"--{name}", value)]
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            names = ["--model_name_or_path", f"testbed:{expert}", "--dataset_name", str(pairs), "--output_dir", out]
            command("align", recipe, *names, *flags, "--max_steps", str(self.args.steps), *more)
            return with_adapter(testbed.load(expert), out).merge_and_unload().eval()

    # ---------------------------------------------------------------------------------------------------------- the measures

    def solve(self, model: Any, split: str, amateur: bool = False) -> list[str]:
        """Return greedy solutions, with or without contrast."""
        by = ContrastiveDecodingLogitsProcessor(testbed.load("amateur")) if amateur else None
        return decode(model, self.tokenizer, self.problems[split], processor=by)

    def hits(self, texts: Sequence[str], split: str = "test") -> list[bool]:
        """Return which problems the completions solve."""
        return [is_right(p, t) for p, t in zip(self.problems[split], texts, strict=True)]

    def change(self, model: Any, expert: str, pairs: Path) -> Change:
        """Return the change of log-probabilities on the pairs of a file."""
        rows = [json.loads(line) for line in pairs.read_text().splitlines()]
        found = {side: self._logps(model, rows, side) - self._logps(testbed.load(expert), rows, side) for side in SIDES}
        chosen, rejected = (found[side] for side in SIDES)
        return Change(float(chosen.mean()), float(rejected.mean()), float((chosen < 0).double().mean()))

    @torch.inference_mode()
    def _logps(self, model: Any, rows: Sequence[Any], side: str) -> Tensor:
        return torch.stack([self._row_logps(model, row["prompt"], row[side][0]["content"]).sum() for row in rows])

    def _row_logps(self, model: Any, prompt: Any, text: str) -> Tensor:
        """Return the log-probabilities `(T,)` of a completion's tokens and its end."""
        ids, start = self._ids(prompt, text)
        logps = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        said: Tensor = logps.gather(-1, ids[start:, None]).squeeze(-1)
        return said

    def _ids(self, prompt: Any, text: str) -> tuple[Tensor, int]:
        shown = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        start = len(self.tokenizer(shown, add_special_tokens=False)["input_ids"])
        whole = self.tokenizer(f"{shown} {text}", add_special_tokens=False)["input_ids"]
        return torch.tensor([*whole, self.tokenizer.eos_token_id]), start

    @torch.inference_mode()
    def divergence(self, model: Any, expert: str, texts: Sequence[str]) -> float:
        """Return KL(aligned || expert) on the aligned model's own greedy completions: sum over tokens, mean over completions."""
        found = []
        for problem, text in zip(self.problems["test"], texts, strict=True):
            ids, start = self._ids([{"role": "user", "content": problem.question}], text)
            new, old = (m(ids[None]).logits[0, start - 1 : -1].log_softmax(-1) for m in (model, testbed.load(expert)))
            found.append(float((new.exp() * (new - old)).sum()))
        return statistics.mean(found)


SIDES = ("chosen", "rejected")


# ---------------------------------------------------------------------------------------------------------------- jobs


class Job(NamedTuple):
    """A training, and what is measured of it."""

    expert: str
    setting: Setting
    rate: str
    split: str = "test"
    """`dev` measures the accuracy on dev problems alone."""
    subset: str = ""
    """The training pairs: all, `low` for the half of lowest ln-CHES, `half` for every other one."""


class Outcome(NamedTuple):
    """The measurements of a training."""

    texts: list[str]
    both: list[str]
    """With contrast."""
    divergence: float
    change: Change
    """On held-out pairs; of a subset of the training pairs on these."""


def work(bench: Bench, job: Job) -> Outcome:
    """Train and measure in a process of its own, or read the record of an earlier run."""
    name = hashlib.sha256(repr(job).encode()).hexdigest()[:16]
    kept = bench.folder / f"{job.expert}-{name}.json"
    if kept.exists():
        found = Outcome(*json.loads(kept.read_text()))
        return found._replace(change=Change(*found.change))
    outcome = _work(bench, job)
    unfinished = kept.with_suffix(".part")
    unfinished.write_text(json.dumps(outcome))
    unfinished.replace(kept)
    return outcome


def _work(bench: Bench, job: Job) -> Outcome:
    torch.set_num_threads(1)
    pairs = bench.pairs(job.expert, job.setting.pairs)
    if job.subset:
        pairs = pairs.with_stem(f"{pairs.stem}-{job.subset}")
    model = bench.train(job.expert, pairs, job.setting.recipe, *job.setting.more, "--learning_rate", job.rate)
    texts = bench.solve(model, job.split)
    if job.split == "dev":
        return Outcome(texts, [], 0.0, Change(0.0, 0.0, 0.0))
    watched = pairs if job.subset else bench.pairs(job.expert, job.setting.pairs, "test")
    both = [] if job.subset else bench.solve(model, "test", amateur=True)
    return Outcome(texts, both, bench.divergence(model, job.expert, texts), bench.change(model, job.expert, watched))


def prepare(bench: Bench, expert: str) -> None:
    """Make an expert's pairs, in a process of its own."""
    torch.set_num_threads(1)
    for split in ("train", "test"):
        for strategy in STRATEGIES:
            bench.pairs(expert, strategy, split)
    whole = bench.pairs(expert, DISPLACING.pairs)
    lines = whole.read_text().splitlines()
    with quiet():
        scores = score_rows(testbed.load(expert), bench.tokenizer, [json.loads(line) for line in lines]).ln_ches
    low = sorted(scores.argsort()[: len(lines) // 2].tolist())
    for name, kept in {"all": lines, "low": [lines[i] for i in low], "half": lines[::2]}.items():
        whole.with_stem(f"{whole.stem}-{name}").write_text("\n".join(kept) + "\n")


def tune(bench: Bench, pool: Any) -> dict[str, str]:
    """Return for every setting the learning rate that is best for the first expert on dev problems, the lower of equals."""
    jobs = [Job(bench.args.experts[0], setting, rate, "dev") for setting in SETTINGS for rate in RATES]
    right: dict[str, list[int]] = {}
    found = pool.map(work, [bench] * len(jobs), jobs)
    for job, outcome in zip(jobs, tqdm(found, desc="learning rates", total=len(jobs)), strict=True):
        right.setdefault(job.setting.title, []).append(sum(bench.hits(outcome.texts, "dev")))
    return {title: RATES[counts.index(max(counts))] for title, counts in right.items()}


# --------------------------------------------------------------------------------------------------------------- tables


def main_tables(bench: Bench, rates: dict[str, str], pool: Any) -> list[str]:
    """Return the table of every setting on every expert, then by the length of the problems."""
    count = len(bench.problems["test"])
    heads = [
        "expert",
        "aligned by",
        "rate",
        f"right of {count}",
        "over nothing",
        "over sft",
        "KL",
        "chosen",
        "rejected",
    ]
    heads += ["displaced", "with contrast"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    jobs = [Job(expert, setting, rates[setting.title]) for expert in bench.args.experts for setting in SETTINGS]
    found = pool.map(work, [bench] * len(jobs), jobs)
    outcomes = dict(zip(jobs, tqdm(found, desc="trainings", total=len(jobs)), strict=True))
    answers: dict[str, list[list[str]]] = {}
    for expert in bench.args.experts:
        plain = testbed.load(expert)
        texts = {"nothing": bench.solve(plain, "test"), "nothing, contrast": bench.solve(plain, "test", amateur=True)}
        own = {job.setting.title: outcome for job, outcome in outcomes.items() if job.expert == expert}
        texts |= {title: outcome.texts for title, outcome in own.items()}
        hits = {name: bench.hits(said) for name, said in texts.items()}
        for name, right in hits.items():
            answers.setdefault(name, []).append(texts[name])
            versus = [_test(hits[base], right) if name != base else "" for base in ("nothing", "clair, sft")]
            cells = [expert, name, rates.get(name, ""), _share(right), *versus, *_cells(bench, own.get(name))]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_steps_table(bench, answers)]


def _cells(bench: Bench, outcome: Outcome | None) -> list[str]:
    if outcome is None:
        return [""] * 5
    change = outcome.change
    with_contrast = statistics.mean(bench.hits(outcome.both))
    shown = [f"{change.chosen:+.2f}", f"{change.rejected:+.2f}", f"{change.displaced:.0%}", f"{with_contrast:.3f}"]
    return [f"{outcome.divergence:.2f}", *shown]


def _share(right: Sequence[bool]) -> str:
    share = proportion(right)
    return f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"


def _test(first: Sequence[bool], second: Sequence[bool]) -> str:
    found = mcnemar_exact(first, second)
    return f"+{found.won} / -{found.lost}, {found.p:.1g}"


def _steps_table(bench: Bench, answers: dict[str, list[list[str]]]) -> list[str]:
    """Return the accuracy by the length of the problem, over all experts."""
    problems = bench.problems["test"]
    lengths = sorted({len(problem.steps) for problem in problems})
    lines = [f"| aligned by | {' | '.join(f'{n} steps' for n in lengths)} |", "|---|" + "---|" * len(lengths)]
    for name, several in answers.items():
        right: dict[int, list[bool]] = {n: [] for n in lengths}
        for texts in several:
            for problem, text in zip(problems, texts, strict=True):
                right[len(problem.steps)].append(is_right(problem, text))
        lines.append(f"| {name} | {' | '.join(f'{statistics.mean(right[n]):.3f}' for n in lengths)} |")
    return lines


DISPLACING, RATE = Setting("clair", "dpo"), "2e-4"
"""Where chosen texts fall."""


def displacement_table(bench: Bench, pool: Any) -> list[str]:
    """Return the table of likelihood displacement on training pairs, and of remedies."""
    lines = [
        "| expert | loss | pairs | chosen | rejected | displaced | KL | right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds = {"all": "all", "low": "the half of lowest ln-CHES", "half": "every other one"}
    ways = [*((DISPLACING, kind) for kind in kinds), (DISPLACING._replace(recipe="apo_zero"), "all")]
    jobs = [Job(expert, setting, RATE, subset=kind) for expert in bench.args.experts for setting, kind in ways]
    found = pool.map(work, [bench] * len(jobs), jobs)
    for job, outcome in zip(jobs, tqdm(found, desc="displacement", total=len(jobs)), strict=True):
        change = outcome.change
        cells = [job.expert, job.setting.recipe, kinds[job.subset], f"{change.chosen:+.2f}", f"{change.rejected:+.2f}"]
        cells += [f"{change.displaced:.0%}", f"{outcome.divergence:.2f}", _share(bench.hits(outcome.texts))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Train, measure, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", default=["expert-0", "expert-1", "expert-2"])
    parser.add_argument("--pairs", type=int, default=320, help="to train on")
    parser.add_argument("--held-out", type=int, default=100, help="pairs whose log-probabilities are followed")
    parser.add_argument("--steps", type=int, default=80, help=f"of {BATCH} pairs")
    parser.add_argument("--dev", type=int, default=200, help="problems to choose the learning rate on")
    parser.add_argument("--problems", type=int, default=400, help="test problems")
    parser.add_argument(
        "--folder", type=Path, help="keep pairs and trainings here, and go on with those that are there"
    )
    parser.add_argument("--no-write", action="store_true", help="only print the tables")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing, pool_of(os.cpu_count() or 1) as pool:
        bench = Bench(Path(passing) if args.folder is None else _folder(args), args)
        list(tqdm(pool.map(prepare, [bench] * len(args.experts), args.experts), desc="pairs", total=len(args.experts)))
        rates = tune(bench, pool)
        tables = [*main_tables(bench, rates, pool), "", *displacement_table(bench, pool)]
    tables.append(
        f"\n{args.pairs} pairs, {args.steps} steps of {BATCH}, rank 8. {named_versions('contralto', 'torch', 'transformers', 'trl', 'peft')}"
    )
    text = "\n".join(tables) + "\n"
    print(text)
    if not args.no_write:
        write_figures(CARD, "align_card", text)


def _folder(args: argparse.Namespace) -> Path:
    """Return the folder of the run; raise an error if it holds results of other sizes."""
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    sizes, about = {name: getattr(args, name) for name in SIZES}, folder / "sizes.json"
    if not about.exists():
        about.write_text(json.dumps(sizes))
    if json.loads(about.read_text()) != sizes:
        raise SystemExit(f"{folder} holds trainings of other sizes: {about.read_text()}; give another --folder")
    return folder


def pool_of(size: int) -> ProcessPoolExecutor:
    """Return processes without progress bars and warnings."""
    return ProcessPoolExecutor(size, get_context("spawn"), initializer=hush)


def hush() -> None:
    """Switch off progress bars of loading and warnings of libraries."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    main()
