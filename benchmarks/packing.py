"""Measure a preference-training step in each layout of a batch: seconds, tokens computed, FLOPs.

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
gives their median and the range. Losses are compared first.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from timing import named_versions
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from train_step import IN_PLACE, _silently, random_model, step
from train_step import SIZES as STEP_SIZES

from contralto import testbed
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.packing import arrangement
from contralto.align.trainers.preference import PreferenceTrainer

RESULTS = Path(__file__).parent / "results" / "packing.md"
SIZES = {"10M": (256, 6, 704, 4, [8_000]), **STEP_SIZES}
"""Hidden size, layers, intermediate size, heads, vocabularies."""
PROMPT, COMPLETION = (71, 1.0), (169, 0.7)
"""Median and sigma of lognormal lengths."""
MANY = 64
"""Batches whose tokens are counted beside those that are computed."""
SIDES = ("chosen_ids", "rejected_ids")
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
    """The cost of a step of each batch, summed."""

    losses: list[float]
    tokens: int
    gflop: float


def rows_of(setting: Setting) -> Dataset:
    """Return tokenised pairs with random tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(median: float, sigma: float, limit: int) -> list[int]:
        length = round(median * float(torch.randn((), generator=generator).mul(sigma).exp()))
        return torch.randint(6, setting.vocabulary, (min(max(length, 2), limit),), generator=generator).tolist()

    rows = []
    for _ in range(setting.pairs * setting.batches):
        prompt = ids(setting.prompt, PROMPT[1], setting.max_length // 2)
        sides = {side: ids(*COMPLETION, setting.max_length - len(prompt)) for side in SIDES}
        rows.append({"prompt_ids": prompt, **sides, "chosen": "", "rejected": ""})
    return Dataset.from_list(rows)


def build(setting: Setting, row: str, folder: str, **more: Any) -> Any:
    """Return the trainer of a row, with more options; all have the same weights and data."""
    model = random_model(SIZES[setting.size], setting.vocabulary)
    model.to(getattr(torch, setting.dtype))
    model.set_attn_implementation(setting.attention)
    options: dict[str, Any] = ROWS[row] | more
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


def tokens_of(ids: Tensor, mask: Tensor, arrange: Any) -> int:
    """Return the tokens that a model computes for a batch, padding included."""
    return ids.numel() if arrange is None else int(arrange(ids, mask).inputs["input_ids"].numel())


def many_tokens(setting: Setting, batches: int) -> list[str]:
    """Return lines on the tokens of many batches, which no model has to compute for that."""
    rows = list(rows_of(setting._replace(batches=batches)))
    sums = dict.fromkeys(ROWS, 0)
    for start in range(0, len(rows), setting.pairs):
        pairs = rows[start : start + setting.pairs]
        sequences = [torch.tensor(row["prompt_ids"] + row[side]) for side in SIDES for row in pairs]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        for row in ROWS:
            sums[row] += tokens_of(ids, (ids > 0).long(), arrangement(options_of(setting, row), "sdpa"))
    shares = ", ".join(f"{row} {total / sums['padded']:.3f}" for row, total in sums.items())
    return [f"Tokens computed, of those of padded rows, in {batches} batches of {setting.pairs} pairs: {shares}."]


def options_of(setting: Setting, row: str) -> Any:
    """Return the options that select the layout of a row."""
    names = ("prefix_sharing", "padding_free", "packing")
    return SimpleNamespace(**dict.fromkeys(names, False) | {"pack_length": setting.pack_length} | ROWS[row])


def cost(trainer: Any, batches: list[Any]) -> Cost:
    """Return the cost of a row. The first step compares its layout with padded rows, and is not counted."""
    step(trainer, batches[0])
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        losses = [step(trainer, batch) for batch in batches]
    tokens = sum(tokens_of(batch["input_ids"], batch["attention_mask"], trainer.arrange) for batch in batches)
    return Cost(losses, tokens, counter.get_total_flops() / 1e9)


def measure(setting: Setting, rounds: int) -> tuple[dict[str, Cost], dict[str, list[float]]]:
    """Return the cost of every row, and the seconds of all batches, one number per round."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {row: build(setting, row, f"{folder}/{at}") for at, row in enumerate(ROWS)}
        batches = {row: batches_of(trainer, setting) for row, trainer in trainers.items()}
        costs = {row: cost(trainer, batches[row]) for row, trainer in trainers.items()}
        for row, trainer in trainers.items():
            if (trainer.arrange is None) != (not ROWS[row]):
                raise SystemExit(f"{row}: the layout is not in use")
        found: dict[str, list[float]] = {row: [] for row in ROWS}
        for _ in tqdm(range(rounds), desc="rounds"):
            for row, trainer in trainers.items():
                start = time.perf_counter()
                for batch in batches[row]:
                    step(trainer, batch)  # its loss is read, which waits for the device
                found[row].append(time.perf_counter() - start)
    return costs, found


def spread_of(values: list[float]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def table(costs: dict[str, Cost], times: dict[str, list[float]]) -> list[list[str]]:
    """Return the lines of the table."""
    lines = []
    for row, one in costs.items():
        ratios = [own / padded for own, padded in zip(times[row], times["padded"], strict=True)]
        loss = statistics.mean(one.losses)
        figures = [f"{loss:.6f}", f"{one.tokens:,}", f"{one.gflop:,.0f}"]
        figures += [
            f"{statistics.median(times[row]):.2f}",
            spread_of(ratios),
            f"{one.tokens / costs['padded'].tokens:.2f}",
        ]
        lines.append([row, *figures, spread_of([1 / ratio for ratio in ratios])])
    return lines


def main() -> None:
    """Measure all rows, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="10M", choices=SIZES)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--pairs", type=int, default=8, help="per batch (default 8)")
    parser.add_argument("--batches", type=int, default=1, help="per round (default 1)")
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
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    setting = Setting(*(getattr(args, name) for name in Setting._fields))
    costs, times = measure(setting, args.rounds)
    for losses in zip(*(one.losses for one in costs.values()), strict=True):
        if max(losses) - min(losses) > (1e-4 if args.dtype == "float32" else 3e-2) * max(1, *map(abs, losses)):
            raise SystemExit(f"{setting}: the rows do not agree on the loss: {losses}")
    lines = table(costs, times)
    text = "\n".join("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines])
    text = "\n".join([text, "", *many_tokens(setting, MANY)])
    print(text)
    if not args.no_write:
        command = " ".join(["python benchmarks/packing.py", *sys.argv[1:]])
        machine = f"CPU, {torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
        libraries = named_versions("contralto", "trl", "torch", "transformers", "peft")
        earlier = RESULTS.read_text() + "\n" if args.append else "# A preference-training step in each layout\n\n"
        RESULTS.write_text(f"{earlier}`{command}` on {machine}; {libraries}.\n\n{text}\n")


if __name__ == "__main__":
    main()
