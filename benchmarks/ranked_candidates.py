"""Train the embedded experts on ranked candidates, BRIO and CoNT, and compare with likelihood alone.

    python benchmarks/ranked_candidates.py --folder out --results benchmarks/results/ranked_candidates.md

The candidates are the expert's own solutions of training problems by diverse beams, scored by a program: the right number at the end, and the
share of right steps. Settings were fixed before the test problems were decoded: `brio` has those released for CNN/DailyMail, `brio, XSum`
those for XSum, `cont` those of its recipe. Controls: the likelihood of the same right solutions alone, in as many steps, and in so many
that as many tokens are read. Test problems are solved greedily, by beam search, and after CoNT by its score of the same beams. Stopped, the
command goes on where it was.
"""

import argparse
import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from timing import named_versions, publish
from transformers.utils.logging import disable_progress_bar

from contralto import testbed
from contralto.align import BrioConfig, BrioTrainer, ContConfig, ContTrainer
from contralto.decoding import SequenceProjection, SimilarityReranker
from contralto.decoding.executors.diverse import ENDED
from contralto.eval.stats import mcnemar_exact, proportion
from contralto.testbed import worlds
from contralto.testbed.measure import decode, is_right

EXPERTS, SEED, CANDIDATES, BEAMS, NEW = ("expert-0", "expert-1", "expert-2"), 2041, 4, 4, 100
SHARED: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "learning_rate": 5e-4,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "use_cpu": True,
    "max_completion_length": NEW,
}
SCORER = "contralto.testbed.questions:score"
LIKELIHOOD = "likelihood"
SETTINGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    LIKELIHOOD: (BrioTrainer, BrioConfig, {"gamma": 0.0, "max_candidates": 2}),
    "likelihood, as many tokens": (BrioTrainer, BrioConfig, {"gamma": 0.0, "max_candidates": 2}),
    "brio": (BrioTrainer, BrioConfig, {"gamma": 100.0, "margin": 0.001, "length_alpha": 2.0}),
    "brio, XSum": (BrioTrainer, BrioConfig, {"gamma": 1.0, "margin": 0.1, "length_alpha": 0.6}),
    "cont": (ContTrainer, ContConfig, {"num_candidates": CANDIDATES, "diversity_penalty": 2.0, "scorer": SCORER}),
}
"""Trainer, configuration and options of each training."""
LONGER = {"likelihood, as many tokens": 1 + CANDIDATES}
"""How many times as many steps a training has."""

Outcome = dict[str, list[bool]]
"""Which test problems are solved, by the way of decoding."""


class Bench:
    """The data, and the outcomes in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.tokenizer = args, testbed.tokenizer()
        args.folder.mkdir(parents=True, exist_ok=True)
        train = islice(worlds.problems(SEED, "train"), args.rows)
        self.rows = Dataset.from_list(
            [{"prompt": [{"role": "user", "content": p.question}], "reference": p.solution()} for p in train]
        )
        self.test = list(islice(worlds.problems(SEED, "test"), args.problems))

    def outcome(self, expert: str, title: str) -> Outcome:
        """Return the outcome of a training, from the folder if it is there."""
        sizes = (expert, title, self.args.rows, self.args.steps, self.args.batch, self.args.problems)
        kept = self.args.folder / f"{hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]}.json"
        if not kept.exists():
            made = self.measure(testbed.load(expert), None) if title == "before" else self.train(expert, title)
            unfinished = kept.with_suffix(".part")
            unfinished.write_text(json.dumps(made))
            unfinished.replace(kept)
        found: Outcome = json.loads(kept.read_text())
        print(expert, title, {name: sum(hits) for name, hits in found.items()}, flush=True)
        return found

    def train(self, expert: str, title: str) -> Outcome:
        """Train, and return the outcome."""
        trainer, config, options = SETTINGS[title]
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        with tempfile.TemporaryDirectory(dir=self.args.folder) as out:
            sizes = {
                "max_steps": self.args.steps * LONGER.get(title, 1),
                "per_device_train_batch_size": self.args.batch,
            }
            args = config(out, seed=EXPERTS.index(expert), **SHARED | sizes | options)
            rows = self.candidates(expert) if trainer is BrioTrainer else self.rows
            one = trainer(str(testbed.path(expert)), args=args, train_dataset=rows, peft_config=lora)
            one.train()
            projection = one.projection if trainer is ContTrainer else None
            with one.without_extra():
                model = one.accelerator.unwrap_model(one.model).merge_and_unload().eval()
        return self.measure(model, projection)

    def candidates(self, expert: str) -> Dataset:
        """Return the rows with the candidates of an expert, which it writes once."""
        path = self.args.folder / f"{expert}-{self.args.rows}.jsonl"
        if not path.exists():
            own = {"num_candidates": CANDIDATES, "scorer": SCORER, "per_device_eval_batch_size": 32}
            args = BrioConfig(str(self.args.folder / f"{expert}-candidates"), **SHARED | own)
            one = BrioTrainer(str(testbed.path(expert)), args=args, train_dataset=self.rows)
            columns = ["prompt", "reference", "candidates", "scores"]
            written: Any = one.train_dataset
            written.select_columns(columns).to_json(path)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return Dataset.from_list(rows)

    def measure(self, model: Any, projection: SequenceProjection | None) -> Outcome:
        """Return which test problems a model solves, greedily, by beams, and by CoNT's score of the beams."""
        greedy = decode(model, self.tokenizer, self.test)
        found = {"greedy": [is_right(p, text) for p, text in zip(self.test, greedy, strict=True)], "beams": []}
        if projection is not None:
            found["reranked"] = []
        own = SequenceProjection(model.config.hidden_size) if projection is None else projection
        reranker = SimilarityReranker(model, own)
        for start in range(0, len(self.test), 25):
            problems = self.test[start : start + 25]
            result = reranker(self.prompts(problems), num_beams=BEAMS, max_new_tokens=NEW)
            ranks = {"beams": result.log_probs, "reranked": result.scores}
            for name in found.keys() & ranks.keys():
                best = result.candidates[torch.arange(len(problems)), ranks[name].argmax(-1)]
                texts = [self.text(ids) for ids in best.tolist()]
                found[name] += [is_right(p, text) for p, text in zip(problems, texts, strict=True)]
        return found

    def prompts(self, problems: Sequence[worlds.Problem]) -> Any:
        """Return problems as the model reads them."""
        chats = [[{"role": "user", "content": problem.question}] for problem in problems]
        return self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )

    def text(self, ids: Sequence[int]) -> str:
        """Return a candidate as text."""
        return str(self.tokenizer.decode([token for token in ids if token != ENDED], skip_special_tokens=True))


def table(bench: Bench) -> list[str]:
    """Return the table: each expert, and all of them together."""
    titles = ["before", *SETTINGS]
    found = {title: [bench.outcome(expert, title) for expert in bench.args.experts] for title in titles}
    head = ("training", "decoding", *bench.args.experts, "all", f"over {LIKELIHOOD}", "over as many tokens")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title in titles:
        for way in found[title][0]:
            hits = [outcome[way] for outcome in found[title]]
            shares = [f"{sum(each) / len(each):.3f}" for each in hits]
            cells = [title, way, *shares, str(proportion(_joined(hits)))]
            for control in (LIKELIHOOD, *LONGER):
                of_control = [outcome["beams" if way == "reranked" else way] for outcome in found[control]]
                test = mcnemar_exact(_joined(of_control), _joined(hits))
                cells.append("" if title == control else f"+{test.won} / -{test.lost}, {test.p:.1g}")
            lines.append(f"| {' | '.join(cells)} |")
    reranked = [_joined([outcome[way] for outcome in found["cont"]]) for way in ("beams", "reranked")]
    test = mcnemar_exact(*reranked)
    return [
        *lines,
        "",
        f"CoNT's score against beam search of the same model: +{test.won} / -{test.lost}, p {test.p:.1g}.",
    ]


def _joined(hits: Sequence[Sequence[bool]]) -> list[bool]:
    return [hit for each in hits for hit in each]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps candidates and the outcomes of trainings")
    parser.add_argument("--experts", nargs="+", default=list(EXPERTS), choices=EXPERTS, help="experts (default: all)")
    parser.add_argument("--rows", type=int, default=48, help="training problems (default 48)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each training (default 12)")
    parser.add_argument("--batch", type=int, default=4, help="prompts per step (default 4)")
    parser.add_argument("--problems", type=int, default=60, help="test problems (default 60)")
    parser.add_argument("--results", type=Path, help="file for the table")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    lines = table(Bench(args))
    about = f"{args.rows} prompts, {args.steps} steps of {args.batch}, {CANDIDATES} candidates, {BEAMS} beams, LoRA of rank 8."
    versions = named_versions("contralto", "torch", "transformers", "trl", "peft")
    text = (__doc__ or "").split("\n\n")[2].strip()
    publish(["# Ranked candidates", "", text, "", "## Figures", "", *lines, "", f"{about} {versions}"], args.results)


if __name__ == "__main__":
    main()
