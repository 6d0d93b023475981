"""Measure the cost of contrastive search relative to greedy search, in time and memory, now and in an earlier version.

    python benchmarks/contrastive_search.py             all settings; writes benchmarks/results/contrastive_search.md
    python benchmarks/contrastive_search.py --contexts 64 --ks 4 --rounds 1 --seconds 0 --tokens 4 --no-write
    python benchmarks/contrastive_search.py --device cuda --dtype bfloat16

Each round runs, one after the other, on the same prompt: greedy generate(); greedy generate() of k rows whose context is short,
which is what the products of k candidates cost; ContrastiveSearch with the tree and with replicas; and the algorithm that transformers had in its core, written anew below: each step repeats the cache k times,
reads k rows and selects one. The time of a token is the median gap between two steps, so that the prompt's forward does
not count. Ratios are taken within a round; the table gives their median and the range of the middle half of the rounds.
Memory is what the cache's tensors hold after a forward, at its largest.
"""

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from timing import Clock, parse_flags, spread
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from contralto import __version__
from contralto.decoding.executors.search import ContrastiveSearch

RESULTS = Path(__file__).parent / "results" / "contrastive_search.md"
ALPHA = 0.6
HEADS = {"9/9": 9, "9/3": 3}
"""Query heads / key-value heads, and the number of the latter."""
COLUMNS = (
    "| heads | context | k | greedy | k short rows | tree | replicas | former | tree / greedy | k short rows / greedy | former / tree "
    "| former / replicas |"
)
SHORT = 8
"""Context of the k rows of greedy search."""
EQUAL = 4
"""How many tokens of the three ways of contrastive search are compared."""
SPEEDUP = 4.0
"""How much faster than the former algorithm the tree should be at 2048 tokens and k = 8, on a CPU."""


class Round(NamedTuple):
    """Milliseconds per token of one round."""

    greedy: float
    rows: float
    tree: float
    replicas: float
    former: float


class Former:
    """Contrastive search as transformers had it in its core: k copies of the cache at every step."""

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **_: Any,
    ) -> Tensor:
        """One row, which is all that is timed."""
        output = model(input_ids, use_cache=True, output_hidden_states=True, logits_to_keep=1)
        cache, context, logits = output.past_key_values, output.hidden_states[-1], output.logits[:, -1]
        ended = torch.zeros(1, dtype=torch.bool)
        while not ended.all():
            p, candidates = logits.float().softmax(-1).topk(self.k)
            cache.batch_repeat_interleave(self.k)
            position = torch.full((self.k, 1), input_ids.shape[1], device=input_ids.device)
            output = model(
                candidates.view(-1, 1), past_key_values=cache, position_ids=position, output_hidden_states=True
            )
            hidden = output.hidden_states[-1]
            every = context.repeat_interleave(self.k, dim=0)
            cosines = (every / every.norm(dim=2, keepdim=True)) @ (hidden / hidden.norm(dim=2, keepdim=True)).mT
            choice = ((1 - ALPHA) * p.view(-1) - ALPHA * cosines.squeeze(-1).amax(-1)).argmax().view(1)
            cache.batch_select_indices(choice)
            context = torch.cat([context, hidden[choice]], dim=1)
            logits = output.logits[choice, -1]
            input_ids = torch.cat([input_ids, candidates[:, choice]], dim=1)
            ended = stopping_criteria(input_ids, None)
        return input_ids


def systems(k: int) -> dict[str, dict[str, Any]]:
    """What is compared, as arguments of generate(), in the order of `Round`."""
    return {
        "greedy": {},
        "tree": {"custom_generate": ContrastiveSearch(alpha=ALPHA, k=k, path="tree")},
        "replicas": {"custom_generate": ContrastiveSearch(alpha=ALPHA, k=k, path="replicate")},
        "former": {"custom_generate": Former(k)},
    }


def llama(heads: str, device: str, dtype: str) -> Any:
    """A random Llama of some 50 million parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=576,
        num_hidden_layers=9,
        num_attention_heads=9,
        num_key_value_heads=HEADS[heads],
        intermediate_size=1536,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval().to(device=device, dtype=getattr(torch, dtype))


def generate(model: Any, prompt: Tensor, tokens: int, **how: Any) -> Tensor:
    """Write so many tokens."""
    text: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **how,
    )
    return text


def gap(model: Any, prompt: Tensor, tokens: int, **how: Any) -> float:
    """Milliseconds per token."""
    clock = Clock()
    generate(model, prompt, tokens + 2, stopping_criteria=[clock], **how)
    return statistics.median(clock.gaps)


def rounds(model: Any, prompt: Tensor, k: int, tokens: int, count: int, seconds: float = 0) -> Iterator[Round]:
    """The four systems in turn, at least `count` times and for at least so many seconds."""
    end = time.perf_counter() + seconds
    for done in itertools.count():
        if done >= count and time.perf_counter() > end:
            return
        times = {name: gap(model, prompt, tokens, **how) for name, how in systems(k).items()}
        yield Round(rows=gap(model, prompt[:, -SHORT:].expand(k, -1), tokens), **times)


def cache_bytes(model: Any, prompt: Tensor, how: dict[str, Any]) -> int:
    """The most that the cache holds after a forward, over four tokens."""
    held: list[int] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        tensors = [states for layer in output.past_key_values.layers for states in (layer.keys, layer.values)]
        held.append(sum(states.untyped_storage().nbytes() for states in tensors))

    hook = model.register_forward_hook(note, with_kwargs=True)
    generate(model, prompt, 4, **how)
    hook.remove()
    return max(held)


def time_row(heads: str, context: int, k: int, found: list[Round]) -> str:
    """A line of the table of times."""
    medians = " | ".join(f"{statistics.median(column):.1f}" for column in zip(*found, strict=True))
    beyond = spread([each.tree / each.greedy for each in found])
    faster = spread([each.former / each.tree for each in found])
    fallback = spread([each.former / each.replicas for each in found])
    floor = f"{statistics.median(each.rows / each.greedy for each in found):.2f}"
    return f"| {heads} | {context} | {k} | {medians} | {beyond} | {floor} | {faster} | {fallback} |"


def memory_row(model: Any, heads: str, prompt: Tensor, k: int) -> str:
    """A line of the table of memory."""
    held = {name: cache_bytes(model, prompt, how) for name, how in systems(k).items() if name != "replicas"}
    config, context = model.config, prompt.shape[1]
    per_token = held["greedy"] / (context + 3)  # the last of four tokens is not read
    hidden = context * config.hidden_size * 4
    mebibytes = " | ".join(f"{held[name] / 2**20:.2f}" for name in ("greedy", "tree", "former"))
    more = " | ".join(f"{held[name] / per_token - context - 3:+.0f}" for name in ("tree", "former"))
    return f"| {heads} | {context} | {k} | {mebibytes} | {more} | {hidden / 2**20:.2f} |"


def check_equal(model: Any, prompt: Tensor, k: int) -> str:
    """Whether the three ways of contrastive search write the same tokens."""
    texts = [generate(model, prompt, EQUAL, **how) for name, how in systems(k).items() if name != "greedy"]
    return "yes" if all(torch.equal(text, texts[0]) for text in texts) else "no"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 2048])
    parser.add_argument("--ks", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--tokens", type=int, default=8, help="generated per run")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many per setting")
    parser.add_argument("--seconds", type=float, default=5, help="at least so long per setting")
    args = parse_flags(parser)
    times, memory, equal, counts = [], [], [], []
    models = {heads: llama(heads, args.device, args.dtype) for heads in args.heads}
    for heads, context, k in tqdm(list(itertools.product(args.heads, args.contexts, args.ks)), unit="setting"):
        prompt = torch.randint(10, 31000, (1, context), generator=torch.Generator().manual_seed(0)).to(args.device)
        equal.append(check_equal(models[heads], prompt, k))  # a warm-up as well
        found = list(rounds(models[heads], prompt, k, args.tokens, args.rounds, args.seconds))
        times.append(time_row(heads, context, k, found))
        counts.append(str(len(found)))
        memory.append(memory_row(models[heads], heads, prompt, k))
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU"
    text = "\n".join(
        [
            "# What contrastive search costs",
            "",
            "Milliseconds per token, batch 1, medians; ratios with the range of the middle half of the rounds. Greedy",
            "search, `ContrastiveSearch` with the tree and with replicas, and the algorithm that transformers had in",
            "its core (the cache repeated k times at every step), in turn in the same round.",
            f"Target: on a CPU, the tree at least {SPEEDUP:.0f} times as fast as the former at 2048 tokens and k = 8.",
            "With fewer heads of keys and values (9/3) the former copies a third as much. `k short rows` is greedy search of k rows",
            f"with a context of {SHORT} tokens: what the products of k tokens cost, below which no way to read k candidates gets.",
            "",
            COLUMNS,
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
            *times,
            "",
            f"Rounds per line: {', '.join(counts)}.",
            "",
            "The cache after a forward, at its largest over four tokens, in MiB, and in tokens beyond greedy's. Beside",
            "it the tree keeps the text's hidden states in float32 (last column, MiB; up to a quarter more after",
            "growing), as the former algorithm kept them in the model's precision.",
            "",
            "| heads | context | k | greedy | tree | former | tree, more | former, more | hidden states |",
            "|---|---|---|---|---|---|---|---|---|",
            *memory,
            "",
            f"Tokens equal in all three ways of contrastive search, {EQUAL} tokens per setting: {', '.join(equal)}.",
            "Heads: query heads / key-value heads of a random Llama of "
            + " or ".join(f"{model.num_parameters() / 1e6:.0f}M ({heads})" for heads, model in models.items())
            + " parameters.",
            f"{args.tokens} tokens per run; {device}, {args.dtype}, {args.threads} threads.",
            f"contralto {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
            + platform.python_version(),
            "Command: `python benchmarks/contrastive_search.py`.",
        ]
    )
    print(text)
    if not args.no_write:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
