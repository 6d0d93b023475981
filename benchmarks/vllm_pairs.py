"""Measure the cost of a contrastive completion in vLLM, relative to plain completions and to the loop in transformers.

    python benchmarks/vllm_pairs.py                          50M parameters on a CPU; writes benchmarks/results/vllm_pairs.md
    python benchmarks/vllm_pairs.py --model MODEL --amateur AMATEUR          beside it, a real model, and an amateur of it
    python benchmarks/vllm_pairs.py --sizes 0.5B 8B --dtype bfloat16 --samples 1 32 128 256 --tokens 256      on a GPU

`pairs`: context-aware decoding with a second prompt half as long as the first, two requests of one model (`generate_pairs`). `amateur`:
contrastive decoding with another model, which runs in the logits processor (`AmateurContrast`). Every text is as long as asked for. Each round
runs, one after the other: plain greedy texts in vLLM, the same number of texts by contrast in vLLM, and the same number by the loop in
transformers: as one batch, which all texts must be there for, and one text after the other, as they would be served. Tokens are those of
the useful texts. Ratios are taken within a round. A pair is two rows, so 0.5 of plain is the limit where the machine is busy.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stacked_branches import SIZES
from timing import llama, prompts_of, publish, setting_lines, spread
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from contralto import testbed
from contralto.common.hub import from_pretrained
from contralto.decoding import ContextAwareDecodingLogitsProcessor, ContrastiveDecodingLogitsProcessor

RESULTS = Path(__file__).parent / "results" / "vllm_pairs.md"
ALPHA, BETA = 0.5, 0.5
TEXTS = list[list[int]]


class Pairs:
    """Two requests for each text: a prompt, and its first half."""

    name = "pairs"

    def engine(self, folder: str, **options: Any) -> Any:
        """Return vLLM with the processor and the scheduler of pairs."""
        from contralto.decoding.vllm import make_llm

        return make_llm(folder, **options)

    def texts(self, llm: Any, prompts: TEXTS, tokens: int) -> TEXTS:
        """Return the texts of prompts."""
        from contralto.decoding.vllm import generate_pairs

        outputs = generate_pairs(
            llm,
            [(ids, ids[: len(ids) // 2]) for ids in prompts],
            max_tokens=tokens,
            logprobs=False,
            use_tqdm=False,
            sampling={"ignore_eos": True, "detokenize": False},
            method="cad",
            alpha=ALPHA,
        )
        assert not any(output.desyncs for output in outputs)
        return [output.tokens for output in outputs]

    def method(self, model: Any, prompts: torch.Tensor) -> Any:
        """Return the method in transformers."""
        others = prompts[:, : prompts.shape[1] // 2]
        inputs = {"input_ids": others, "attention_mask": torch.ones_like(others)}
        return ContextAwareDecodingLogitsProcessor(model, inputs, alpha=ALPHA)


class Amateur:
    """One request for each text; another model runs beside vLLM's.

    Args:
        folder: the amateur's.
        dtype: its number format.
        device: where it runs in transformers.
    """

    name = "amateur"

    def __init__(self, folder: str, dtype: str, device: str) -> None:
        self._settings = {"model": folder, "dtype": dtype}
        model: Any = from_pretrained(AutoModelForCausalLM, folder, dtype=dtype)
        self._amateur = model.to(device).eval()

    def engine(self, folder: str, **options: Any) -> Any:
        """Return vLLM with the amateur in its logits processor."""
        from contralto.decoding.vllm import make_llm

        return make_llm(folder, amateur=self._settings, **options)

    def texts(self, llm: Any, prompts: TEXTS, tokens: int) -> TEXTS:
        """Return the texts of prompts."""
        return _generated(llm, prompts, tokens, {"contrast_method": "cd", "contrast_beta": BETA})

    def method(self, model: Any, prompts: torch.Tensor) -> Any:
        """Return the method in transformers."""
        return ContrastiveDecodingLogitsProcessor(self._amateur, beta=BETA)


class Round(NamedTuple):
    """Useful tokens per second, and texts of vLLM that are those of the loop."""

    plain: float
    contrast: float
    loop: float
    alone: float
    """The loop with one text at a time."""
    equal: int


def rounds(contrast: Pairs | Amateur, llm: Any, model: Any, samples: int, args: argparse.Namespace) -> Iterator[Round]:
    """The systems in turn, so many times; other prompts each time, so that no cache of prefixes helps."""
    for i in range(args.rounds):
        torch.manual_seed(i)
        prompts = (prompts_of(samples, args.context, "cpu") + i * 17) % 120 + 10
        clock = time.process_time if args.processor_time else time.perf_counter
        plain, _ = _timed(clock, _generated, llm, prompts.tolist(), args.tokens)
        contrasted, texts = _timed(clock, contrast.texts, llm, prompts.tolist(), args.tokens)
        loop, others = _timed(clock, _loop, contrast, model, prompts.to(args.device), args.tokens)
        alone, _ = _timed(clock, _loop, contrast, model, prompts[:1].to(args.device), args.tokens)
        assert all(len(text) == args.tokens for text in texts)
        made = samples * args.tokens
        yield Round(
            made / plain, made / contrasted, made / loop, args.tokens / alone, sum(map(list.__eq__, texts, others))
        )


def _timed(clock: Callable[[], float], function: Any, *arguments: Any) -> tuple[float, TEXTS]:
    """Return the seconds of a call, and its texts."""
    start = clock()
    texts = function(*arguments)
    return clock() - start, texts


def _generated(llm: Any, prompts: TEXTS, tokens: int, extra: Mapping[str, Any] | None = None) -> TEXTS:
    """Return texts of vLLM, one request each."""
    from vllm import SamplingParams

    how = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
    params = SamplingParams(**how, extra_args=dict(extra) if extra else None)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _loop(contrast: Pairs | Amateur, model: Any, prompts: torch.Tensor, tokens: int) -> TEXTS:
    """Return texts of transformers, as one batch."""
    how: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    method = contrast.method(model, prompts)
    output = model.generate(prompts, attention_mask=torch.ones_like(prompts), custom_generate=method.loop(), **how)
    texts: TEXTS = output[:, prompts.shape[1] :].tolist()
    return texts


def row(name: str, contrast: Pairs | Amateur, samples: int, found: list[Round]) -> str:
    """A line of the table."""
    speeds = [f"{statistics.median(column):.0f}" for column in zip(*(each[:4] for each in found), strict=True)]
    ratios = [
        [each.contrast / each.plain for each in found],
        [each.contrast / each.loop for each in found],
        [each.contrast / each.alone for each in found],
    ]
    equal = f"{sum(each.equal for each in found)} of {samples * len(found)}"
    cells = [name, contrast.name, str(samples), *speeds, *map(spread, ratios), equal, str(len(found))]
    return f"| {' | '.join(cells)} |"


class Subject(NamedTuple):
    """A model, and what it is measured with."""

    name: str
    folder: str
    contrasts: list[Pairs | Amateur]


@contextmanager
def random_model(size: str) -> Iterator[Subject]:
    """A random Llama, in a folder of its own."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        llama(*SIZES[size]).save_pretrained(folder)
        testbed.tokenizer().save_pretrained(folder)
        yield Subject(size, folder, [Pairs()])


@contextmanager
def real_model(args: argparse.Namespace) -> Iterator[Subject]:
    """The model that was asked for, and its amateur."""
    contrasts: list[Pairs | Amateur] = [Pairs()]
    if args.amateur:
        contrasts.append(Amateur(args.amateur, args.dtype, args.device))
    yield Subject(Path(args.model).name, args.model, contrasts)


def measured(subject: Subject, args: argparse.Namespace) -> Iterator[str]:
    """The lines of a model: an engine for each contrast, and for each number of texts a warm-up and the rounds."""
    model: Any = from_pretrained(AutoModelForCausalLM, subject.folder, dtype=args.dtype)
    model = model.to(args.device).eval()
    for contrast in subject.contrasts:
        llm = contrast.engine(
            subject.folder,
            dtype=args.dtype,
            max_model_len=-(-(args.context + args.tokens + 1) // 32) * 32,
            max_num_seqs=2 * max(args.samples),
            max_num_batched_tokens=max(2048, 2 * args.context * max(args.samples)),
            enable_prefix_caching=False,
            **({} if args.device == "cpu" else {"gpu_memory_utilization": args.memory}),
        )
        for samples in tqdm(args.samples, unit="setting", desc=f"{subject.name} {contrast.name}"):
            warm = argparse.Namespace(**{**vars(args), "rounds": 1, "tokens": 4})
            list(rounds(contrast, llm, model, samples, warm))
            line = row(subject.name, contrast, samples, list(rounds(contrast, llm, model, samples, args)))
            print(line, flush=True)
            yield line
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


COLUMNS = [
    "model",
    "contrast",
    "texts at a time",
    "plain",
    "contrast",
    "loop",
    "alone",
    "contrast / plain",
    "contrast / loop",
    "contrast / alone",
    "texts equal to the loop's",
    "rounds",
]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["50M"], help="random models")
    parser.add_argument("--model", help="a folder with a real model, which is measured too")
    parser.add_argument("--amateur", help="a folder with an amateur of it")
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 8, 32], help="texts at a time")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--memory", type=float, default=0.5, help="share of a GPU's memory for vLLM; the loop has the rest"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure the time of the process on a CPU, one thread: for a machine that has other work",
    )
    parser.add_argument("--no-write", action="store_true", help="only print")
    args = parser.parse_args()
    if args.amateur and not args.model:
        parser.error("--amateur needs --model")
    if args.processor_time and args.device != "cpu":
        parser.error("--processor-time needs --device cpu")
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    if args.processor_time:
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        torch.set_num_threads(1)
    lines = [
        "# What a text by contrast costs in vLLM",
        "",
        "Useful tokens per second, greedy, medians; in brackets the range of the middle half of the rounds. `plain` and `contrast` are vLLM,",
        "`loop` is this package's loop in transformers with all texts as one batch, `alone` the same with one text at a time. `pairs`: `cad`,",
        "two requests of one model, so that half of plain is the limit. `amateur`: `cd` with another model, which transformers runs in vLLM's",
        "logits processor. Targets for pairs: at least 0.45 of plain, and at least 5 times the loop with 32 texts on a CPU.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    load = os.getloadavg()[0]
    for subject in [*map(random_model, args.sizes), *([real_model(args)] if args.model else [])]:
        with subject as found:
            lines += measured(found, args)
    import vllm

    named = {args.model: "MODEL", args.amateur: "AMATEUR"}
    command = " ".join(["python benchmarks/vllm_pairs.py", *(named.get(each, each) for each in sys.argv[1:])])
    lines += [
        "",
        *setting_lines(args.tokens, args.device, torch.get_num_threads()),
        f"vLLM {vllm.__version__}; {args.dtype}; sizes are random Llamas; prompts of {args.context} random tokens, the others of half as many.",
        f"{'Processor time of the process' if args.processor_time else 'Time of the wall'}. Load average of the machine at the start: {load:.1f}. Command: `{command}`.",
    ]
    publish(lines, None if args.no_write else RESULTS)


if __name__ == "__main__":
    main()
