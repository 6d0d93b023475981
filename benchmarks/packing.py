"""Measure a preference-training step in each layout of a batch: seconds, tokens computed, FLOPs, peak memory.

    python benchmarks/packing.py                               writes benchmarks/results/packing.md
    python benchmarks/packing.py --device cuda --dtype bfloat16 --size 0.5B --attention flex_attention --pack-length 4096
    python benchmarks/packing.py --size testbed --pairs 4 --batches 1 --rounds 1 --no-write

Lengths are like those of UltraFeedback (binarized), of which Wang & Hegde (2024, arXiv 2410.20305, code release) report the median of
all tokens of a pair, 409, and of prompt over completion, .42: here a prompt has a lognormal length with median 71 and sigma 1.0, a
completion one with median 169 and sigma .7, both rounded, and a sequence is cut at `--max-length`, the prompt at half of that. The two
sigmas are ours: nothing is known of the spread. Prompts of other data sets are longer: `--prompt` sets the median.

A random Qwen2 is trained by LoRA on random tokens by `PreferenceTrainer`, with the same weights and batches in every row of the table. A
step is forward, reference, loss and backward of one batch, by the trainer's own `compute_loss`; the optimizer is left out, since it is
the same. Rounds visit all rows in turn, in one process; ratios are taken within a round, over the sum of the batches, and the table
gives their median and the middle half. Losses are compared first. Peak memory is that of all batches, in a process of its own on a CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from timing import named_versions
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from train_step import IN_PLACE, _peak, _silently, step
from train_step import SIZES as STEP_SIZES
from transformers import Qwen2Config, Qwen2ForCausalLM

from contralto import testbed
from contralto.align.trainers.batches import PairBatch
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.preference import PreferenceTrainer

RESULTS = Path(__file__).parent / "results" / "packing.md"
SIZES = {"10M": (256, 6, 704, 4, [8_000]), **STEP_SIZES}
"""Hidden size, layers, intermediate size, heads, vocabularies."""
PROMPT, COMPLETION = (71, 1.0), (169, 0.7)
"""Median and sigma of lognormal lengths."""
ROWS: dict[str, dict[str, bool]] = {
    "padded": {},
    "prefix_sharing": {"prefix_sharing": True},
    "padding_free": {"padding_free": True},
    "packing": {"packing": True},
    "packing, prefix_sharing": {"packing": True, "prefix_sharing": True},
}
"""The options of a row of the table."""
COLUMNS = [
    "row",
    "loss",
    "tokens computed",
    "GFLOP",
    "peak MiB",
    "seconds",
    "of padded: seconds",
    "tokens",
    "times as fast",
]


class Setting(NamedTuple):
    """The model, data and device that all rows share."""

    size: str
    vocabulary: int
    pairs: int
    batches: int
    prompt: float
    max_length: int
    pack_length: int | None
    attention: str
    device: str
    dtype: str
    checkpointing: bool


class Cost(NamedTuple):
    """The cost of one step of each batch, summed but for the peak."""

    losses: list[float]
    tokens: int
    gflop: float
    peak: float
    """MiB."""


def rows_of(setting: Setting) -> Dataset:
    """Return tokenised pairs with random tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(median: float, sigma: float, limit: int) -> list[int]:
        length = round(median * float(torch.randn((), generator=generator).mul(sigma).exp()))
        return torch.randint(6, setting.vocabulary, (min(max(length, 2), limit),), generator=generator).tolist()

    rows = []
    for _ in range(setting.pairs * setting.batches):
        prompt = ids(setting.prompt, PROMPT[1], setting.max_length // 2)
        sides = {f"{side}_ids": ids(*COMPLETION, setting.max_length - len(prompt)) for side in ("chosen", "rejected")}
        rows.append({"prompt_ids": prompt, **sides, "chosen": "", "rejected": ""})
    return Dataset.from_list(rows)


def build(setting: Setting, row: str, folder: str) -> Any:
    """Return the trainer of a row; all have the same weights and data."""
    hidden, layers, intermediate, heads, _ = SIZES[setting.size]
    torch.manual_seed(0)
    model_config = Qwen2Config(
        vocab_size=setting.vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model: Any = Qwen2ForCausalLM(model_config)
    model.to(getattr(torch, setting.dtype))
    model.set_attn_implementation(setting.attention)
    options = ROWS[row]
    args = PreferenceConfig(
        folder,
        per_device_train_batch_size=setting.pairs,
        gradient_checkpointing=setting.checkpointing,
        bf16=setting.dtype == "bfloat16",
        use_cpu=setting.device == "cpu",
        train_sampling_strategy="sequential",
        max_steps=100,
        max_length=setting.max_length,
        pack_length=setting.pack_length if options.get("packing") else None,
        beta=0.1,
        report_to="none",
        audit="off",
        monitor_pairs=0,
        head_metrics="none",
        **options,
    )
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = _silently(PreferenceTrainer, model, args, rows_of(setting), testbed.tokenizer(), lora)
    trainer.compact = False
    return trainer


def batches_of(trainer: Any, setting: Setting) -> list[Any]:
    """Return all batches, on the device."""
    loader = iter(trainer.get_train_dataloader())
    return [trainer._prepare_inputs(next(loader)) for _ in range(setting.batches)]


def tokens_of(trainer: Any, batch: Any) -> int:
    """Return the tokens that a model computes for a batch, padding included."""
    made = PairBatch.of(batch, trainer.arrange)
    return int((made.inputs if made.layout is None else made.layout.inputs)["input_ids"].numel())


def cost(setting: Setting, row: str) -> Cost:
    """Return the cost of a row, measured in this process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(setting, row, folder)
        batches = batches_of(trainer, setting)
        step(trainer, batches[0])  # the layout is compared with padded rows in the first step
        with _peak(setting.device) as peak:
            losses = [step(trainer, batch) for batch in batches]
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            for batch in batches:
                step(trainer, batch)
        assert (trainer.arrange is None) == (row == "padded"), "the layout is in use"
        tokens = sum(tokens_of(trainer, batch) for batch in batches)
    return Cost(losses, tokens, counter.get_total_flops() / 1e9, peak[0] / 2**20)


def cost_apart(setting: Setting, row: str) -> Cost:
    """Return `cost` from a process of its own, so that no row uses memory that another one has left."""
    words = [sys.executable, __file__, "--one", json.dumps([*setting, row])]
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | quiet).stdout
    return Cost(*json.loads(out.splitlines()[-1]))


def seconds(setting: Setting, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of all batches by row, one number per round."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {row: build(setting, row, f"{folder}/{at}") for at, row in enumerate(ROWS)}
        batches = {row: batches_of(trainer, setting) for row, trainer in trainers.items()}
        for row, trainer in trainers.items():  # warm
            step(trainer, batches[row][0])
        found: dict[str, list[float]] = {row: [] for row in ROWS}
        for _ in tqdm(range(rounds), desc="rounds"):
            for row, trainer in trainers.items():
                start = time.perf_counter()
                for batch in batches[row]:
                    step(trainer, batch)  # its loss is read, which waits for the device
                found[row].append(time.perf_counter() - start)
    return found


def middle(values: list[float]) -> str:
    """Return the median and the middle half."""
    values, quarter = sorted(values), len(values) // 4
    return f"{statistics.median(values):.2f} [{values[quarter]:.2f}, {values[-1 - quarter]:.2f}]"


def table(costs: dict[str, Cost], times: dict[str, list[float]]) -> list[list[str]]:
    """Return the lines of the table."""
    lines = []
    for row, one in costs.items():
        ratios = [own / padded for own, padded in zip(times[row], times["padded"], strict=True)]
        loss = statistics.mean(one.losses)
        figures = [f"{loss:.6f}", f"{one.tokens:,}", f"{one.gflop:,.0f}", f"{one.peak:,.0f}"]
        figures += [
            f"{statistics.median(times[row]):.2f}",
            middle(ratios),
            f"{one.tokens / costs['padded'].tokens:.2f}",
        ]
        lines.append([row, *figures, middle([1 / ratio for ratio in ratios])])
    return lines


def main() -> None:
    """Measure all rows, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="10M", choices=SIZES)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--pairs", type=int, default=8, help="per batch (default 8)")
    parser.add_argument("--batches", type=int, default=2, help="per round (default 2)")
    parser.add_argument("--prompt", type=float, default=PROMPT[0], help="median tokens of a prompt")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--pack-length", type=int, help="of rows (default: the longest pair or sequence of a batch)")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
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
    setting = Setting(*(getattr(args, name) for name in Setting._fields))
    costs = {row: cost_apart(setting, row) for row in ROWS}
    for losses in zip(*(one.losses for one in costs.values()), strict=True):
        if max(losses) - min(losses) > (1e-4 if args.dtype == "float32" else 3e-2) * max(1, *map(abs, losses)):
            raise SystemExit(f"{setting}: the rows do not agree on the loss: {losses}")
    lines = table(costs, seconds(setting, args.rounds))
    text = "\n".join("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines])
    print(text)
    if not args.no_write:
        command = " ".join(["python benchmarks/packing.py", *sys.argv[1:]])
        machine = f"CPU, {torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
        libraries = named_versions("contralto", "trl", "torch", "transformers", "peft")
        earlier = RESULTS.read_text() + "\n" if args.append else "# A preference-training step in each layout\n\n"
        RESULTS.write_text(f"{earlier}`{command}` on {machine}; {libraries}.\n\n{text}\n")


if __name__ == "__main__":
    main()
