"""Measure the cost of a contrastive completion in vLLM, relative to plain completions and to the loop in transformers.

    python benchmarks/vllm_pairs.py                          50M parameters on a CPU; writes benchmarks/results/vllm_pairs.md
    python benchmarks/vllm_pairs.py --sizes 0.5B 8B --dtype bfloat16 --samples 1 32 128 256 --tokens 256      on a GPU

Context-aware decoding with a second prompt half as long as the first; every text is as long as asked for. Each round runs, one
after the other: plain greedy texts in vLLM, the same number of texts by contrast in vLLM (`generate_pairs`, two requests each), and
the same number by the loop in transformers: as one batch, which all texts must be there for, and one text after the other, as they
would be served. Tokens are those of the useful texts. Ratios are taken within a round. A contrasted text is two rows, so 0.5 of
plain is the limit where the machine is busy.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stacked_branches import SIZES
from timing import llama, prompts_of, publish, setting_lines, spread
from tqdm import tqdm

from contralto import testbed
from contralto.decoding import ContextAwareDecodingLogitsProcessor

RESULTS = Path(__file__).parent / "results" / "vllm_pairs.md"
ALPHA = 0.5


class Round(NamedTuple):
    """Useful tokens per second."""

    plain: float
    paired: float
    loop: float
    alone: float
    """The loop with one text at a time."""


def rounds(llm: Any, model: Any, samples: int, args: argparse.Namespace) -> Iterator[Round]:
    """The systems in turn, so many times; other prompts each time, so that no cache of prefixes helps."""
    for i in range(args.rounds):
        torch.manual_seed(i)
        prompts = (prompts_of(samples, args.context, "cpu") + i * 17) % 120 + 10
        rest = prompts[:, : args.context // 2]
        seconds = [
            _plain(llm, prompts.tolist(), args.tokens),
            _paired(llm, prompts.tolist(), rest.tolist(), args.tokens),
            _loop(model, prompts.to(args.device), rest.to(args.device), args.tokens),
        ]
        alone = args.tokens / _loop(model, prompts[:1].to(args.device), rest[:1].to(args.device), args.tokens)
        plain, paired, loop = (samples * args.tokens / each for each in seconds)
        yield Round(plain, paired, loop, alone)


def _plain(llm: Any, prompts: list[list[int]], tokens: int) -> float:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return time.perf_counter() - start


def _paired(llm: Any, prompts: list[list[int]], others: list[list[int]], tokens: int) -> float:
    from contralto.decoding.vllm import generate_pairs

    start = time.perf_counter()
    outputs = generate_pairs(
        llm,
        list(zip(prompts, others, strict=True)),
        max_tokens=tokens,
        logprobs=False,
        use_tqdm=False,
        sampling={"ignore_eos": True, "detokenize": False},
        method="cad",
        alpha=ALPHA,
    )
    seconds = time.perf_counter() - start
    assert all(len(output.tokens) == tokens and not output.desyncs for output in outputs)
    return seconds


def _loop(model: Any, prompts: torch.Tensor, others: torch.Tensor, tokens: int) -> float:
    inputs = {"input_ids": others, "attention_mask": torch.ones_like(others)}
    method = ContextAwareDecodingLogitsProcessor(model, inputs, alpha=ALPHA)
    how: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    start = time.perf_counter()
    model.generate(prompts, attention_mask=torch.ones_like(prompts), custom_generate=method.loop(), **how)
    if prompts.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(size: str, samples: int, found: list[Round]) -> str:
    """A line of the table."""
    speeds = [f"{statistics.median(column):.0f}" for column in zip(*found, strict=True)]
    ratios = [
        [each.paired / each.plain for each in found],
        [each.paired / each.loop for each in found],
        [each.paired / each.alone for each in found],
    ]
    return " | ".join([f"| {size}", str(samples), *speeds, *map(spread, ratios), f"{len(found)} |"])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["50M"])
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 8, 32], help="texts at a time")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--memory", type=float, default=0.5, help="share of a GPU's memory for vLLM; the loop has the rest"
    )
    parser.add_argument("--no-write", action="store_true", help="only print")
    args = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from contralto.decoding.vllm import make_llm

    lines = [
        "# What a text by contrast costs in vLLM",
        "",
        "Useful tokens per second, greedy, medians; in brackets the range of the middle half of the rounds. `plain` and `paired` are vLLM, `loop` is this",
        "package's loop in transformers with all texts as one batch, `alone` the same with one text at a time. A contrasted text is two",
        "rows: half of plain is the limit. Targets: at least 0.45 of plain, and at least 5 times the loop with 32 texts on a CPU.",
        "",
        "| model | texts at a time | plain | paired | loop | alone | paired / plain | paired / loop | paired / alone | rounds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in args.sizes:
        torch.manual_seed(0)
        model = llama(*SIZES[size]).to(dtype=getattr(torch, args.dtype))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            testbed.tokenizer().save_pretrained(folder)
            length = args.context + args.tokens + 1
            more = {} if args.device == "cpu" else {"gpu_memory_utilization": args.memory}
            llm = make_llm(
                folder,
                dtype=args.dtype,
                max_model_len=-(-length // 32) * 32,
                max_num_seqs=2 * max(args.samples),
                max_num_batched_tokens=max(2048, 2 * args.context * max(args.samples)),
                enable_prefix_caching=False,
                **more,
            )
            model = model.to(args.device)
            for samples in tqdm(args.samples, unit="setting", desc=size):
                warm = argparse.Namespace(**{**vars(args), "rounds": 1, "tokens": 4})
                list(rounds(llm, model, samples, warm))
                lines.append(row(size, samples, list(rounds(llm, model, samples, args))))
                print(lines[-1], flush=True)
            llm.llm_engine.engine_core.shutdown()
        del llm, model
        gc.collect()
    import vllm

    lines += [
        "",
        *setting_lines(args.tokens, args.device, torch.get_num_threads()),
        f"vLLM {vllm.__version__}; random Llamas, {args.dtype}; prompts of {args.context} tokens, the others of half as many. "
        + "Command: `python benchmarks/vllm_pairs.py`.",
    ]
    publish(lines, None if args.no_write else RESULTS)


if __name__ == "__main__":
    main()
