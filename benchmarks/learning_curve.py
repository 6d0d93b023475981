"""Train a real model by stock TRL and by contralto, step for step on the same pairs: the losses, and the time.

    python benchmarks/learning_curve.py --model SMOLLM2 --data train.jsonl         200 steps; writes benchmarks/results/learning_curve.md
    python benchmarks/learning_curve.py --steps 3 --pairs 12 --no-write            an embedded model and its problems

DPO by LoRA in float32, with the options of TRL and the same seed, order of pairs and learning rate. A pair is a problem of GSM8K's training
set with its solution, and the same solution with another number at its end. Rows: stock `DPOTrainer`, with completion tokens alone through
the head, as on a GPU; `PreferenceTrainer` as it is; and with its prefixes shared and its reference kept. The rows run one after the other, in
one process, and again in the opposite order; the seconds are those of a whole training, which differ by what else the machine does.
"""

import argparse
import json
import random
import re
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from timing import named_versions, publish
from train_step import compaction
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.common.hub import from_pretrained
from contralto.testbed import worlds

RESULTS = Path(__file__).parent / "results" / "learning_curve.md"
ROWS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "contralto": {},
    "contralto, prefix shared, reference kept": {"prefix_sharing": True, "precompute_ref_log_probs": True},
}
"""The options of a row; None is stock TRL."""
SHOWN = 8
"""Steps of the table of losses."""


class Curve(NamedTuple):
    """What a training has logged."""

    losses: list[float]
    margins: list[float]
    seconds: float


def pairs(data: Path | None, count: int) -> Dataset:
    """Return problems, each with its solution and with one that ends in another number."""
    rng, rows = random.Random(0), []
    if data is None:
        drawn = islice(worlds.problems(0, "train"), count)
        solved = [(problem.question, problem.solution()) for problem in drawn]
    else:
        lines = islice(data.open(encoding="utf-8"), count)
        solved = [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    for question, solution in solved:
        wrong = re.sub(r"#### (\S+)$", lambda _: f"#### {rng.randint(1, 99)}", solution)
        sides = (("chosen", solution), ("rejected", wrong))
        answers = {side: [{"role": "assistant", "content": text}] for side, text in sides}
        rows.append({"prompt": [{"role": "user", "content": question}], **answers})
    return Dataset.from_list(rows)


def train(name: str, args: argparse.Namespace, data: Dataset, folder: str) -> Curve:
    """Train one row."""
    options = ROWS[name]
    kind, trainer_class = (DPOConfig, DPOTrainer) if options is None else (PreferenceConfig, PreferenceTrainer)
    own: dict[str, Any] = {"audit": "off", "monitor_pairs": 0, "head_metrics": "all"} if options is not None else {}
    if options and options.get("precompute_ref_log_probs"):
        own["reference_cache"] = f"{folder}/reference"
    set_seed(0)
    model = from_pretrained(AutoModelForCausalLM, args.model, dtype=torch.float32)
    config: Any = kind(
        folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        **own,
        **(options or {}),
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tokenizer = from_pretrained(AutoTokenizer, args.model)
    start = time.perf_counter()
    with compaction(options is None):
        trainer: Any = trainer_class(
            model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora
        )
        trainer.train()
    seconds = time.perf_counter() - start
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return Curve([line["loss"] for line in logged], [line["rewards/margins"] for line in logged], seconds)


def main() -> None:
    """Train all rows, and print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed:expert", help="folder or hub id")
    parser.add_argument("--data", type=Path, help="file of GSM8K (default: problems of the testbed)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=800, help="to draw batches from (default 800)")
    parser.add_argument("--batch", type=int, default=2, help="pairs per step (default 2)")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate (default 1e-4)")
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each row (default 2)")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    data, found = pairs(args.data, args.pairs), {name: list[Curve]() for name in ROWS}
    for number in range(args.rounds):
        for name in list(ROWS)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(train(name, args, data, folder))
    stock = found["stock"]
    lines = [
        "| row | seconds | of stock | largest difference of the loss | margin at the end |",
        "|---|---|---|---|---|",
    ]
    for name, curves in found.items():
        ratios = [own.seconds / other.seconds for own, other in zip(curves, stock, strict=True)]
        apart = max(abs(a - b) for a, b in zip(curves[0].losses, stock[0].losses, strict=True))
        cells = [name, " and ".join(f"{each.seconds:.0f}" for each in curves)]
        cells += [" and ".join(f"{ratio:.2f}" for ratio in ratios), f"{apart:.1e}", f"{curves[0].margins[-1]:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    steps = sorted({round(i * (args.steps - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    lines += ["", f"| step | {' | '.join(ROWS)} |", f"|---|{'---|' * len(ROWS)}"]
    for step in steps:
        lines.append(f"| {step + 1} | {' | '.join(f'{curves[0].losses[step]:.5f}' for curves in found.values())} |")
    about = f"`{args.model}`, {args.steps} steps of {args.batch} pairs, rate {args.rate:g}, float32, "
    about += (
        f"{torch.get_num_threads()} threads. {named_versions('contralto', 'trl', 'torch', 'transformers', 'peft')}."
    )
    title = "# The same training by stock TRL and by contralto"
    publish(
        [title, "", (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip(), "", *lines, "", about],
        None if args.no_write else RESULTS,
    )


if __name__ == "__main__":
    main()
