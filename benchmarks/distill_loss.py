"""Measure the cost of distillation losses at the head, from hidden states to their gradient: in chunks, over whole logits, and TRL's.

    python benchmarks/distill_loss.py                    all settings; writes benchmarks/results/distill_loss.md
    python benchmarks/distill_loss.py --device cuda --dtype bfloat16 --tokens 2048 8192

Half of the tokens are the teacher's and get the skew KL, half the student's and get the skew reverse KL. The yardstick is the
straightforward implementation: both heads' logits, two log-softmaxes, the mixture, autograd. The second table has the divergences that
TRL's `DistillationTrainer` offers, by its own function, which is in chunks too (Triton on a GPU, torch on a CPU). Each round runs both, one after the
other; ratios are taken within a round, and the table gives their medians and the middle half of the rounds. Peak memory is what the
allocator holds at most beyond the inputs. The values and gradients of both are compared first.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from timing import named_versions, parse_flags, publish, setting_lines, spread
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from contralto.align.losses.chunked import Head, chunked_divergence

RESULTS = Path(__file__).parent / "results" / "distill_loss.md"
ALPHA = 0.1


class Problem(NamedTuple):
    """Hidden states `(N, H)` and heads of student and teacher."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


def problem(tokens: int, vocabulary: int, widths: tuple[int, int], trained: bool, device: str, dtype: str) -> Problem:
    """Return a random problem whose logits have about the spread of those of language models."""
    torch.manual_seed(0)
    how = {"device": device, "dtype": getattr(torch, dtype)}
    hidden, teacher_hidden = (torch.randn(tokens, width, **how) for width in widths)
    weight, teacher_weight = (3 * width**-0.5 * torch.randn(vocabulary, width, **how) for width in widths)
    return Problem(hidden.requires_grad_(), weight.requires_grad_(trained), teacher_hidden, teacher_weight)


def chunked(it: Problem) -> Tensor:
    """Return the loss computed in chunks, by contralto."""
    half, head, teacher = len(it.hidden) // 2, Head(it.weight), Head(it.teacher_weight)
    weights = torch.full_like(it.hidden[:, 0], 1 / half, dtype=torch.float32)
    kinds = {"skew_kl": half, "skew_reverse_kl": half}
    found = chunked_divergence(kinds, it.hidden, head, it.teacher_hidden, teacher, weights=weights, alpha=ALPHA)
    assert found.total is not None
    return found.total


def whole(it: Problem) -> Tensor:
    """Return the loss computed over whole logits."""
    with torch.no_grad():
        log_p = (it.teacher_hidden @ it.teacher_weight.t()).float().log_softmax(-1)
    log_q = (it.hidden @ it.weight.t()).float().log_softmax(-1)
    (log_p1, log_p2), (log_q1, log_q2) = log_p.chunk(2), log_q.chunk(2)
    p, q = log_p1.exp(), log_q2.exp()
    skl = p * (log_p1 - (ALPHA * p + (1 - ALPHA) * log_q1.exp()).log())
    srkl = q * (log_q2 - ((1 - ALPHA) * log_p2.exp() + ALPHA * q).log())
    return skl.sum(-1).mean() + srkl.sum(-1).mean()


OFFERED_BY_TRL = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
"""The divergences of TRL with its beta, the teacher's share of the mixture."""


def one_divergence(name: str, it: Problem) -> Tensor:
    """Return the mean of a divergence, computed in chunks by contralto."""
    weights = torch.full_like(it.hidden[:, 0], 1 / len(it.hidden), dtype=torch.float32)
    heads = Head(it.weight), Head(it.teacher_weight)
    found = chunked_divergence(name, it.hidden, heads[0], it.teacher_hidden, heads[1], weights=weights)
    assert found.total is not None
    return found.total


def of_trl(name: str, it: Problem) -> Tensor:
    """Return the mean of a divergence, computed by TRL."""
    beta = OFFERED_BY_TRL[name]
    values, _ = ChunkedDivergenceFunction.apply(  # type: ignore[no-untyped-call]
        it.hidden, it.weight, None, it.teacher_hidden, it.teacher_weight, None, beta
    )
    return values.mean()  # type: ignore[no-any-return]


def step(loss: Callable[[Problem], Tensor], it: Problem) -> tuple[float, list[Tensor]]:
    """Run one forward and backward; return the loss and the gradients."""
    leaves = [leaf for leaf in (it.hidden, it.weight) if leaf.requires_grad]
    value = loss(it)
    return value.item(), list(torch.autograd.grad(value, leaves))


def seconds(loss: Callable[[Problem], Tensor], it: Problem) -> float:
    """Return the time of a loss with its gradients."""
    start = time.perf_counter()
    step(loss, it)  # reads the value, which waits for a GPU; so does the next line
    if it.hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(loss: Callable[[Problem], Tensor], it: Problem) -> int:
    """Return the peak memory beyond the inputs, in bytes."""
    if it.hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, it)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(loss, it)
    events = profiler.profiler.kineto_results.events()
    changes = [int(event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def check(it: Problem, mine_of: Callable[[Problem], Tensor], theirs_of: Callable[[Problem], Tensor]) -> None:
    """Raise an error unless both implementations compute the same."""
    (value, mine), (expected, theirs) = step(mine_of, it), step(theirs_of, it)
    loose = it.hidden.dtype != torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2 if loose else 1e-4, atol=0)
    for a, b in zip(mine, theirs, strict=True):
        error = ((a - b).float().norm() / b.float().norm()).item()
        if error > (3e-2 if loose else 1e-3):
            raise ValueError(f"the gradients differ by {error:.1%}, which is more than rounding")


def row(args: argparse.Namespace, tokens: int, trained: bool, name: str = "") -> str:
    """Return a line of the first table, or of the second one for the name of a divergence."""
    it = problem(tokens, args.vocabulary, tuple(args.widths), trained, args.device, args.dtype)
    both = [functools.partial(each, name) for each in (one_divergence, of_trl)] if name else [chunked, whole]
    check(it, *both)  # and warm up
    memory = [peak(loss, it) for loss in both]
    rounds = [tuple(seconds(loss, it) for loss in both) for _ in range(args.rounds)]
    times = (f"{statistics.median(column):.3f}" for column in zip(*rounds, strict=True))
    size = [f"{2**-20 * bytes_:.0f}" for bytes_ in memory]
    cells = [name] if name else []
    cells += [str(tokens), "trained" if trained else "frozen", *size, f"{memory[0] / memory[1]:.2f}", *times]
    return f"| {' | '.join(cells)} | {spread([a / b for a, b in rounds])} |"


def main() -> None:
    """Measure all settings, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--widths", nargs=2, type=int, default=[896, 1536], help="of student and teacher")
    parser.add_argument("--heads", nargs="+", choices=["frozen", "trained"], default=["frozen", "trained"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parse_flags(parser)
    lines = [
        "# What losses of distillation cost at the head",
        "",
        f"Skew KL and skew reverse KL (DistiLLM-2), from hidden states to their gradient, vocabulary {args.vocabulary}, widths "
        + f"{args.widths[0]} (student) and {args.widths[1]} (teacher), {args.dtype}. In chunks as contralto does it, and over",
        "whole logits as written down. A frozen head is that of LoRA. Medians; in brackets the middle half of the rounds.",
        "",
        "| tokens | head | MiB chunked | MiB whole | chunked / whole | s chunked | s whole | chunked / whole |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tokens, head in tqdm(list(itertools.product(args.tokens, args.heads)), unit="setting"):
        lines.append(row(args, tokens, head == "trained"))
    lines += [
        "",
        "## Beside TRL's own function",
        "",
        "| divergence | tokens | head | MiB ours | MiB TRL | ours / TRL | s ours | s TRL | ours / TRL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, tokens, head in tqdm(list(itertools.product(OFFERED_BY_TRL, args.tokens, args.heads)), unit="setting"):
        lines.append(row(args, tokens, head == "trained", name))
    lines += ["", *setting_lines(max(args.tokens), args.device, args.threads)]
    lines += [f"{args.rounds} rounds; {named_versions('trl')}. Command: `python benchmarks/distill_loss.py`."]
    publish(lines, None if args.no_write else RESULTS)


if __name__ == "__main__":
    main()
