"""Measure proxy tuning: does the difference that tuning makes to a small model repair a larger one, which is never trained?

    python benchmarks/proxy_tuning.py                                       writes benchmarks/results/proxy_tuning.md
    python benchmarks/proxy_tuning.py --experts expert-0 --rows 32 --steps 2 --problems 20 --dev 10 --no-write

The testbed's student is tuned with TRL on whole solutions of training problems; its corpus, like that of the experts, has solutions that stop too
early. The logits of the tuned student less those of the untuned one are added to an expert's. Controls: a student tuned on as many solutions of
the corpus, with the mistake; and the expert tuned itself, on the same rows. Learning rates are those with the most dev problems right, with the
first expert.
"""

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from timing import named_versions, publish
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from contralto import testbed
from contralto.decoding import ProxyTuningLogitsProcessor
from contralto.eval.stats.proportions import holm, mcnemar_exact, proportion
from contralto.testbed import worlds
from contralto.testbed.measure import decode, is_right

RESULTS = Path(__file__).parent / "results" / "proxy_tuning.md"
SEED = 2057
STUDENT = "student"
RATES = (3e-4, 1e-3, 3e-3)
HEAD = ["expert", "decoding", "right", "95% interval", "only this, only greedy", "Holm's p"]


def rows(count: int, *, whole: bool) -> list[dict[str, Any]]:
    """Training rows: problems with whole solutions, or with those of the corpus."""
    if whole:
        solved = ((each.question, each.solution()) for each in worlds.problems(SEED, "train"))
    else:
        solved = ((each.prompt, each.text) for each in worlds.corpus(SEED) if each.prompt)
    return [
        {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answer}]}
        for asked, answer in itertools.islice(solved, count)
    ]


def tuned(name: str, data: Sequence[dict[str, Any]], steps: int, rate: float) -> Any:
    """Return a model of the testbed, tuned with TRL."""
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=rate,
            lr_scheduler_type="linear",
            completion_only_loss=True,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            logging_strategy="no",
        )
        model = testbed.load(name)
        trainer = SFTTrainer(
            model, config, train_dataset=datasets.Dataset.from_list([*data]), processing_class=testbed.tokenizer()
        )
        trainer.train()
    return model.eval()


class Bench:
    """Problems of both splits, and what solves them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.tokenizer = args, testbed.tokenizer()
        self.problems = {
            split: [*itertools.islice(worlds.problems(SEED, split), count)]  # type: ignore[arg-type]
            for split, count in (("dev", args.dev), ("test", args.problems))
        }
        self.data = {whole: rows(args.rows, whole=whole) for whole in (True, False)}

    def solved(self, model: Any, split: str, processor: Any = None) -> list[bool]:
        """Return which problems a model solves greedily."""
        texts = decode(model, self.tokenizer, self.problems[split], processor=processor)
        return [is_right(p, text) for p, text in zip(self.problems[split], texts, strict=True)]

    def by_proxy(self, expert: str, small: Any, split: str) -> list[bool]:
        """Return which problems an expert solves with the difference between a tuned student and the student."""
        proxy = ProxyTuningLogitsProcessor(small, testbed.load(STUDENT))
        return self.solved(testbed.load(expert), split, proxy)

    def best(self, name: str, whole: bool, expert: str | None) -> tuple[Any, float]:
        """Return the tuned model with the most dev problems right, by proxy of an expert or by itself, and its rate."""
        found = []
        for rate in tqdm(RATES, desc=f"rates of {name}"):
            model = tuned(name, self.data[whole], self.args.steps, rate)
            hits = self.by_proxy(expert, model, "dev") if expert else self.solved(model, "dev")
            found.append((sum(hits), -rate, model))
        _, rate, model = max(found, key=lambda each: each[:2])
        return model, -rate


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", default=["expert-0", "expert-1", "expert-2"])
    parser.add_argument("--rows", type=int, default=640, help="training rows")
    parser.add_argument("--steps", type=int, default=80, help="of 16 rows")
    parser.add_argument("--problems", type=int, default=400, help="of the test split")
    parser.add_argument("--dev", type=int, default=200, help="of the dev split")
    parser.add_argument("--no-write", action="store_true", help="only print")
    args = parser.parse_args()
    torch.manual_seed(0)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    bench, first = Bench(args), args.experts[0]
    small, rate = bench.best(STUDENT, True, first)
    corpus = tuned(STUDENT, bench.data[False], args.steps, rate)
    _, large_rate = bench.best(first, True, None)
    alone = {"the student, untuned": testbed.load(STUDENT), "the student, tuned": small}
    lines = [f"| - | {name} | {_share(bench.solved(model, 'test'))} | - | - |" for name, model in alone.items()]
    found: list[tuple[str, str, list[bool], list[bool]]] = []
    for expert in args.experts:
        greedy = bench.solved(testbed.load(expert), "test")
        found.append((expert, "greedy", greedy, greedy))
        found.append((expert, "proxy tuning", bench.by_proxy(expert, small, "test"), greedy))
        found.append(
            (expert, "proxy tuning, a student tuned on the corpus", bench.by_proxy(expert, corpus, "test"), greedy)
        )
        large = tuned(expert, bench.data[True], args.steps, large_rate)
        found.append((expert, "tuned itself", bench.solved(large, "test"), greedy))
    publish([*_head(args, rate, large_rate), *lines, *_rows(found), *_foot(args)], None if args.no_write else RESULTS)


def _share(hits: Sequence[bool]) -> str:
    share = proportion(hits)
    return f"{share.value:.3f} | {share.low:.3f} to {share.high:.3f}"


def _rows(found: Sequence[tuple[str, str, list[bool], list[bool]]]) -> list[str]:
    tests = [mcnemar_exact(greedy, hits) for _, _, hits, greedy in found]
    compared = [place for place, each in enumerate(found) if each[1] != "greedy"]
    adjusted = dict(zip(compared, holm([tests[place].p for place in compared]), strict=True))
    lines = []
    for place, (expert, name, hits, _) in enumerate(found):
        won = f"{tests[place].won}, {tests[place].lost} | {adjusted[place]:.2g}" if place in adjusted else "- | -"
        lines.append(f"| {expert} | {name} | {_share(hits)} | {won} |")
    return lines


def _head(args: argparse.Namespace, rate: float, large_rate: float) -> list[str]:
    return [
        "# Proxy tuning",
        "",
        f"{args.problems} test problems of the testbed's arithmetic world, greedy. Added to the logits of an expert: those of the student tuned on {args.rows} whole",
        "solutions, less those of the student before. The experts and the student learned from a corpus in which long solutions often stop too",
        "early: a gain says that the method carries over what was tuned, not that it helps a large model. Controls: the same with a student tuned",
        "on as many solutions of the corpus, and the expert tuned itself on the whole ones.",
        f"{args.steps} steps of 16 rows, rates {rate:g} (student) and {large_rate:g} (expert), the best of {', '.join(f'{each:g}' for each in RATES)} on dev problems.",
        "",
        "## Figures",
        "",
        f"| {' | '.join(HEAD)} |",
        "|---" * len(HEAD) + "|",
    ]


def _foot(args: argparse.Namespace) -> list[str]:
    return [
        "",
        "One training of the student for all experts, one of each expert. McNemar's exact tests against greedy decoding, adjusted for the table.",
        named_versions("contralto", "torch", "transformers", "trl"),
        "Command: `python benchmarks/proxy_tuning.py`.",
    ]


if __name__ == "__main__":
    main()
