"""Measure the cost of a preference-training step beside stock TRL: seconds, FLOPs, peak memory.

    python benchmarks/train_step.py                            all settings; writes benchmarks/results/train_step.md
    python benchmarks/train_step.py --device cuda --dtype bfloat16 --sizes 0.5B
    python benchmarks/train_step.py --sizes testbed --rounds 1 --steps 1 --no-write

A random Qwen2 is trained by LoRA on random pairs with the same weights, batches and options in every row: stock `DPOTrainer`; stock with
a precomputed reference; `PreferenceTrainer` in the same two ways, and with `prefix_sharing`. On a CPU stock TRL sends every position
through the head, on a GPU completion tokens alone: the rows "completion tokens only" do so on a CPU too, by TRL's own switch, which is set for
the step. A step is forward, reference, loss and backward of one batch, by the
trainers' own `compute_loss`; the optimizer is left out, since it is the same. Rounds visit all rows in turn, in one process; ratios are
taken within a round, and the table gives their median and the middle half. Losses are compared first. FLOPs are counted by
torch's `FlopCounterMode`, which is told of `addmm_`: it counts the product in place as nothing. Peak memory is that of a step alone, in a process of its own on a CPU (the resident set over that before
the step), the allocator's on a GPU.

The metrics that need the vocabulary are computed by stock TRL in every step; `PreferenceTrainer` computes them in steps that are
logged, by default every tenth. The rows "all metrics" are of a step that computes them, the others of one that does not.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from timing import named_versions
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.import_utils import is_liger_kernel_available
from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

from contralto import testbed
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.preference import PreferenceTrainer

RESULTS = Path(__file__).parent / "results" / "train_step.md"
SIZES = {
    "testbed": (64, 3, 128, 4, [192]),
    "50M": (512, 8, 1408, 8, [32_000, 152_000]),
    "0.5B": (896, 24, 4864, 14, [151_936]),
    "1.5B": (1536, 28, 8960, 12, [151_936]),
}
"""Hidden size, layers, intermediate size, heads, vocabularies."""
LENGTHS = ["192/64", "64/192"]
"""Prompt and completion."""


class Row(NamedTuple):
    """A trainer with its options: a row of the table."""

    compact: bool = False
    """Stock TRL sends completion tokens alone through the head, as on a GPU."""
    ours: bool = False
    kept: bool = False
    """The reference is precomputed."""
    shared: bool = False
    """`prefix_sharing`."""
    metrics: bool = False
    """Entropy, mean logits and accuracy in every step, as stock computes them."""
    liger: bool = False
    """Liger's layers (`use_liger_kernel`), where they are installed: TRL 1.16 has its own head beside them."""


ROWS = {
    "stock": Row(),
    "stock, reference kept": Row(kept=True),
    "stock, completion tokens only": Row(compact=True),
    "stock, completion tokens only, reference kept": Row(compact=True, kept=True),
    "stock, completion tokens only, Liger": Row(compact=True, liger=True),
    "ours, all metrics": Row(ours=True, metrics=True),
    "ours": Row(ours=True),
    "ours, prefix shared": Row(ours=True, shared=True),
    "ours, reference kept": Row(ours=True, kept=True),
    "ours, both, all metrics": Row(ours=True, kept=True, shared=True, metrics=True),
    "ours, both": Row(ours=True, kept=True, shared=True),
}
if not is_liger_kernel_available():
    ROWS = {name: row for name, row in ROWS.items() if not row.liger}
COLUMNS = [
    "model",
    "vocabulary",
    "prompt/completion",
    "row",
    "loss",
    "GFLOP",
    "peak MiB",
    "seconds",
    "of stock: seconds",
]
COLUMNS += ["FLOPs", "peak", "of completion tokens only: seconds"]


class Setting(NamedTuple):
    """The model, data and device that all rows share."""

    size: str
    vocabulary: int
    prompt: int
    completion: int
    pairs: int
    device: str
    dtype: str
    checkpointing: bool


class Cost(NamedTuple):
    """The cost of one step."""

    loss: float
    gflop: float
    peak: float
    """MiB."""


def random_model(shape: tuple[int, int, int, int, list[int]], vocabulary: int) -> Any:
    """Return a random Qwen2 of a shape of `SIZES`, always the same."""
    hidden, layers, intermediate, heads, _ = shape
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


def build(setting: Setting, row: str, folder: str) -> Any:
    """Return the trainer of a row; all rows of a setting have the same weights and data."""
    model = random_model(SIZES[setting.size], setting.vocabulary)
    model.to(torch.bfloat16 if setting.dtype == "bfloat16" else torch.float32)
    compact, ours, kept, shared, metrics, liger = ROWS[row]
    kind: Any = PreferenceConfig if ours else DPOConfig
    options: dict[str, Any] = {"reference_cache": f"{folder}/reference"} if ours and kept else {}
    options |= {"audit": "off", "monitor_pairs": 0, "prefix_sharing": shared} if ours else {"use_liger_kernel": liger}
    options |= {"head_metrics": "all"} if metrics else {}
    args = kind(
        folder,
        per_device_train_batch_size=setting.pairs,
        precompute_ref_log_probs=kept,
        gradient_checkpointing=setting.checkpointing,
        bf16=setting.dtype != "float32",
        use_cpu=setting.device == "cpu",
        max_steps=100,
        max_length=None,
        beta=0.1,
        report_to="none",
        **options,
    )
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tokenizer = testbed.tokenizer()
    trainer_class: Any = PreferenceTrainer if ours else DPOTrainer
    with compaction(compact):
        trainer = _silently(trainer_class, model, args, _rows(setting), tokenizer, lora)
    trainer.compact = compact
    return trainer


@contextlib.contextmanager
def compaction(switched_on: bool) -> Iterator[None]:
    """Let stock TRL send completion tokens alone through the head, as it does where it has Triton.

    The switch is `_use_triton` as `trl.trainer.utils` looks it up (TRL 1.16). The kernels look it up in a module of their own, and
    stay what they are on the device.

    Args:
        switched_on: False changes nothing.
    """
    switch = mock.patch("trl.trainer.utils._use_triton", return_value=True)
    with switch if switched_on else contextlib.nullcontext():
        yield


def _flops_in_place(_total: Any, a: Any, b: Any, **_: Any) -> int:
    """Return the FLOPs of `total.addmm_(a, b)` from the shapes."""
    return int(2 * a[0] * a[1] * b[1])


IN_PLACE = {torch.ops.aten.addmm_: _flops_in_place}
"""For `FlopCounterMode`, which does not know the operation."""


def _silently(
    trainer_class: Any, model: Any, args: Any, rows: Dataset, tokenizer: PreTrainedTokenizerFast, lora: Any
) -> Any:
    """Return a trainer of rows that are tokenised already."""

    class Trainer(trainer_class):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    return Trainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def _rows(setting: Setting) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(6, setting.vocabulary, (length,), generator=generator).tolist()

    names = {"prompt_ids": setting.prompt, "chosen_ids": setting.completion, "rejected_ids": setting.completion}
    rows = [{name: ids(length) for name, length in names.items()} for _ in range(setting.pairs)]
    return Dataset.from_list([row | {"chosen": "", "rejected": ""} for row in rows])


def batch_of(trainer: Any) -> Any:
    """Return the first batch, on the device."""
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def step(trainer: Any, batch: Any) -> float:
    """Run forward, reference, loss and backward."""
    trainer.model.train()
    trainer.model.zero_grad()
    with trainer.accelerator.autocast(), compaction(trainer.compact):
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss.item())


def cost(setting: Setting, row: str) -> Cost:
    """Return loss, FLOPs and peak memory of a row, measured in this process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(setting, row, folder)
        batch = batch_of(trainer)
        with _peak(setting.device) as peak:
            loss = step(trainer, batch)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            step(trainer, batch)
    return Cost(loss, counter.get_total_flops() / 1e9, peak[0] / 2**20)


@contextlib.contextmanager
def _peak(device: str) -> Iterator[list[float]]:
    """Return the peak memory of a step beyond the memory before it, in bytes."""
    found = [0.0]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found[0] = torch.cuda.max_memory_allocated() - before
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield found
    done.set()
    watcher.join()


def cost_apart(setting: Setting, row: str) -> Cost:
    """Return `cost` from a process of its own, so that no row uses memory that another one has left."""
    words = [sys.executable, __file__, "--one", json.dumps([*setting, row])]
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | quiet).stdout
    return Cost(*json.loads(out.splitlines()[-1]))


def seconds(setting: Setting, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds of a step by row, one number per round."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {row: build(setting, row, f"{folder}/{at}") for at, row in enumerate(ROWS)}
        batches = {row: batch_of(trainer) for row, trainer in trainers.items()}
        for row, trainer in trainers.items():  # warm
            step(trainer, batches[row])
        found: dict[str, list[float]] = {row: [] for row in ROWS}
        for _ in tqdm(range(rounds), desc=f"{setting.size} {setting.vocabulary} {setting.prompt}/{setting.completion}"):
            for row, trainer in trainers.items():
                start = time.perf_counter()
                for _ in range(steps):
                    step(trainer, batches[row])
                if setting.device != "cpu":
                    torch.cuda.synchronize()
                found[row].append((time.perf_counter() - start) / steps)
    return found


def table(setting: Setting, costs: dict[str, Cost], times: dict[str, list[float]]) -> list[list[str]]:
    """Return the lines of a setting."""
    stock = costs["stock"]
    lines = []
    for row in ROWS:
        one = costs[row]
        lines.append(
            [
                setting.size,
                f"{setting.vocabulary:,}",
                f"{setting.prompt}/{setting.completion}",
                row,
                f"{one.loss:.6f}",
                f"{one.gflop:.3g}",
                f"{one.peak:.0f}",
                f"{statistics.median(times[row]):.2f}",
                _ratio(times[row], times["stock"]),
                f"{one.gflop / stock.gflop:.2f}",
                f"{one.peak / stock.peak:.2f}",
                _ratio(times[row], times["stock, completion tokens only"]),
            ]
        )
    return lines


def _ratio(own: list[float], other: list[float]) -> str:
    """Return the median of ratios within rounds, and their middle half."""
    ratios = sorted(a / b for a, b in zip(own, other, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def _head(device: str, *, again: bool) -> list[str]:
    command = " ".join(["python benchmarks/train_step.py", *sys.argv[1:]])
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    libraries = named_versions("contralto", "trl", "torch", "transformers", "peft")
    where = machine if device == "cpu" else torch.cuda.get_device_name()
    title = [] if again else ["# A preference-training step beside stock TRL", ""]
    return [*title, f"`{command}` on {where}; {libraries}."]


def main() -> None:
    """Measure all settings, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["50M"], choices=SIZES)
    parser.add_argument(
        "--vocabularies", nargs="+", type=int, help="of the sizes' those that are wanted (default: all)"
    )
    parser.add_argument("--lengths", nargs="+", default=LENGTHS, choices=LENGTHS, help="tokens of prompt/completion")
    parser.add_argument("--pairs", type=int, default=4, help="per batch (default 4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="per round and row (default 2)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "autocast", "bfloat16"],
        help="autocast has weights in float32 and products in bfloat16, TRL's default; bfloat16 has both in it",
    )
    parser.add_argument("--checkpointing", action="store_true", help="checkpoint activations, as TRL does by default")
    parser.add_argument("--append", action="store_true", help="to the results of earlier settings")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one:
        *words, row = json.loads(args.one)
        print(json.dumps(cost(Setting(*words), row)))
        return
    lines: list[list[str]] = []
    for size in args.sizes:
        for vocabulary in args.vocabularies or SIZES[size][-1]:
            for prompt, completion in (map(int, lengths.split("/")) for lengths in args.lengths):
                options = (args.pairs, args.device, args.dtype, args.checkpointing)
                setting = Setting(size, vocabulary, prompt, completion, *options)
                costs = {row: cost_apart(setting, row) for row in ROWS}
                losses = [one.loss for one in costs.values()]
                if max(losses) - min(losses) > (1e-4 if args.dtype == "float32" else 3e-2) * max(1, *map(abs, losses)):
                    raise SystemExit(f"{setting}: the rows do not agree on the loss: {losses}")
                lines += table(setting, costs, seconds(setting, args.rounds, args.steps))
    text = "\n".join("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines])
    print(text)
    if not args.no_write:
        earlier = RESULTS.read_text() + "\n" if args.append else ""
        RESULTS.write_text(earlier + "\n".join([*_head(args.device, again=args.append), "", text, ""]))


if __name__ == "__main__":
    main()
