"""Helpers of the benchmarks: a timer for steps of generate(), random models, a description of the machine."""

import argparse
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

from contralto.common.versions import versions


class Clock(StoppingCriteria):
    """Notes when each step ends, and stops nothing."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def gaps(self) -> list[float]:
        """Milliseconds between steps; the first gap is a warm-up and left out."""
        return [1000 * (b - a) for a, b in zip(self.ticks[1:], self.ticks[2:], strict=False)]


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the flags of the machine and of the output to those of a benchmark, parse the command line, and set the threads."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--no-write", action="store_true", help="only print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def llama(hidden: int, layers: int, intermediate: int, vocabulary: int = 32000, *, tied: bool = True) -> Any:
    """A random Llama; its head is its embedding if `tied`."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


def gaps(model: Any, prompts: Tensor, tokens: int, **how: Any) -> list[float]:
    """The times of single steps of a greedy generate(), in milliseconds; `how` goes to generate()."""
    clock = Clock()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens + 2,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[clock],
        **how,
    )
    return clock.gaps


def prompts_of(batch: int, context: int, device: str) -> Tensor:
    """Random prompts of tokens that every model knows."""
    return torch.randint(10, 140, (batch, context), generator=torch.Generator().manual_seed(0)).to(device)


def spread(ratios: list[float]) -> str:
    """The median, and the range of the middle half."""
    ratios, quarter = sorted(ratios), len(ratios) // 4
    return f"{statistics.median(ratios):.2f} ({ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})"


def publish(lines: list[str], results: Path | None) -> None:
    """Print a table, and write it into a file, if one is given."""
    text = "\n".join(lines) + "\n"
    print(text)
    if results is not None:
        results.write_text(text)


def write_figures(card: Path, script: str, text: str) -> None:
    """Put figures into a card, between the comments that say which script made them."""
    begin, end = f"<!-- figures: made by benchmarks/{script}.py -->\n", "<!-- end of figures -->\n"
    before, rest = card.read_text().split(begin)
    card.write_text(f"{before}{begin}{text}{end}{rest.split(end)[1]}")


def setting_lines(tokens: int, device: str, threads: int) -> list[str]:
    """Where the figures were measured, and with what."""
    machine = (
        torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU, {threads} threads"
    )
    return [
        f"{tokens} tokens per run; {machine}.",
        f"{named_versions('contralto', 'torch', 'transformers')}, Python {platform.python_version()}",
    ]


def named_versions(*names: str) -> str:
    """Return the versions of packages, each after its name."""
    known = versions()
    return ", ".join(f"{name} {known[name]}" for name in names)


UNTUNED = {
    "gradient_accumulation_steps": "1",
    "lr_scheduler_type": "constant",
    "warmup_steps": "0",
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "use_cpu": "true",
    "gradient_checkpointing": "false",
    "disable_tqdm": "true",
}
"""Options of `contralto align` in which the trainings of all cards agree, whatever their recipes say."""
