"""Measure the speed-up of speculative over plain contrastive decoding, by the acceptance rate of drafts.

    python benchmarks/speculative.py                         all settings; writes benchmarks/results/speculative.md
    python benchmarks/speculative.py --device cuda --dtype bfloat16 --sizes 1.5B 8B
    python benchmarks/speculative.py --sizes testbed --rounds 1 --seconds 0 --tokens 8 --no-write

Each round runs, one after the other and on the same prompt, generate() of the expert alone, plain contrastive decoding
(the logits processor), and speculative contrastive decoding. Times are those of whole calls, prompts of 64 tokens
included. Ratios are taken within a round; the table gives their medians and the middle half of the rounds.

The testbed's pair is a real one. The others are random Llamas: the amateur has the first layers of its expert, and the
strength of the expert's later layers decides how much the two agree. Acceptance is the mean over all tokens of the
probability that a draft in their place is accepted.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import llama, parse_flags, publish, setting_lines, spread
from torch import Tensor
from tqdm import tqdm

from contralto import testbed
from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.decoding.executors.speculative import SpeculativeContrastiveDecoding
from contralto.testbed import worlds

RESULTS = Path(__file__).parent / "results" / "speculative.md"
SIZES = {
    "50M": (576, 12, 1536, 8000, 2),
    "1.5B": (1536, 28, 8960, 151936, 4),
    "8B": (4096, 36, 12288, 151936, 6),
}
"""Hidden size, layers, intermediate size, vocabulary, layers of the amateur."""
STRENGTHS = [0.0, 0.01, 0.03, 0.06, 0.12, 0.25, 0.6]
"""Of the layers that the amateur lacks: 0 and it is the expert, as far as the text goes."""
HEAD_STD = 0.2
"""Of the head's weights: sharp enough that the likeliest token has about 0.4 of the probability."""
COLUMNS = ["models", "how", "acceptance", "drafts kept", "tokens per expert forward", "expert", "plain", "speculative"]
COLUMNS += ["speculative / plain", "speculative / expert", "rounds"]
ENOUGH = 0.5
"""Above this acceptance speculation is to gain."""

Prompter = Callable[[int], dict[str, Tensor]]


class Round(NamedTuple):
    """Tokens per second of one round, and what the speculative call did."""

    expert: float
    plain: float
    speculative: float
    acceptance: float
    kept: float
    """Share of the drafted tokens that were kept."""
    per_forward: float
    """Tokens per forward of the expert."""


class Found(NamedTuple):
    """A line of the table."""

    models: str
    how: str
    acceptance: float
    against_plain: float
    against_expert: float
    text: str


def pair(size: str, strength: float, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A random expert, and the amateur that its first layers make."""
    hidden, layers, intermediate, vocabulary, few = SIZES[size]
    torch.manual_seed(0)

    with torch.device(device):
        expert, amateur = (
            llama(hidden, depth, intermediate, vocabulary, tied=False).to(dtype) for depth in (layers, few)
        )
    torch.nn.init.normal_(expert.lm_head.weight, std=HEAD_STD)
    with torch.no_grad():
        for layer in expert.model.layers[few:]:
            layer.self_attn.o_proj.weight.mul_(strength)
            layer.mlp.down_proj.weight.mul_(strength)
    amateur.load_state_dict(expert.state_dict(), strict=False)
    return expert, amateur


def random_prompts(vocabulary: int, device: str) -> Prompter:
    """Another random prompt for every round."""

    def prompt(index: int) -> dict[str, Tensor]:
        ids = torch.randint(10, vocabulary, (1, 64), generator=torch.Generator().manual_seed(index)).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return prompt


def problems(device: str) -> Prompter:
    """Another of the testbed's problems for every round."""
    tokenizer = testbed.tokenizer()
    questions = [problem.question for problem in itertools.islice(worlds.problems(2027, "test"), 200)]

    def prompt(index: int) -> dict[str, Tensor]:
        chat = [{"role": "user", "content": questions[index % len(questions)]}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        return dict(inputs.to(device))

    return prompt


def speed(expert: Any, inputs: dict[str, Tensor], seed: int, **how: Any) -> float:
    """Tokens per second of a call."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = expert.generate(**inputs, **how)
    if output.is_cuda:
        torch.cuda.synchronize()
    return float((output.shape[1] - inputs["input_ids"].shape[1]) / (time.perf_counter() - start))


def rounds(
    models: tuple[Any, Any], prompt: Prompter, count: int, seconds: float, how: dict[str, Any]
) -> Iterator[Round]:
    """The three systems in turn, at least `count` times and for at least so many seconds."""
    expert, amateur = models
    plain, speculative = ContrastiveDecodingLogitsProcessor(amateur), SpeculativeContrastiveDecoding(amateur)
    end = time.perf_counter() + seconds
    for done in itertools.count():
        if done >= count and time.perf_counter() > end:
            return
        inputs = prompt(done)
        speeds = (
            speed(expert, inputs, done, **how),
            speed(expert, inputs, done, logits_processor=[plain], **how),
            speed(expert, inputs, done, custom_generate=speculative, **how),
        )
        did = speculative.statistics
        kept = did.accepted / max(did.drafted, 1)
        yield Round(*speeds, did.acceptance, kept, did.tokens / did.expert_forwards)


def summary(models: str, how: str, found: list[Round]) -> Found:
    """What the rounds of a setting come to."""
    expert, plain, speculative = (statistics.median(column) for column in list(zip(*found, strict=True))[:3])
    acceptance, kept, per_forward = (statistics.mean(column) for column in list(zip(*found, strict=True))[3:])
    against = [[r.speculative / r.plain for r in found], [r.speculative / r.expert for r in found]]
    medians = [statistics.median(each) for each in against]
    cells = [models, how, f"{acceptance:.2f}", f"{kept:.2f}", f"{per_forward:.2f}"]
    cells += [f"{value:.1f}" for value in (expert, plain, speculative)]
    cells += [spread(ratios) for ratios in against]
    text = f"| {' | '.join([*cells, str(len(found))])} |"
    return Found(models, how, acceptance, medians[0], medians[1], text)


def verdict(found: list[Found]) -> list[str]:
    """Whether the target is met, and where speculation loses."""
    due = [each for each in found if each.acceptance > ENOUGH]
    late = [each for each in due if each.against_plain <= 1]
    lines = [
        f"Target: faster than plain contrastive decoding wherever acceptance exceeds {ENOUGH}: "
        + ("met in " if not late else f"missed in {len(late)} of ")
        + f"{'all ' if not late else ''}{len(due)} such settings.",
    ]
    for name, field in (("plain contrastive decoding", "against_plain"), ("the expert alone", "against_expert")):
        lost = sorted((each for each in found if getattr(each, field) < 1), key=lambda each: each.acceptance)
        places = [f"{e.models} {e.how}, acceptance {e.acceptance:.2f}: {getattr(e, field):.2f}" for e in lost]
        lines.append(f"Slower than {name}: " + ("; ".join(places) if places else "nowhere in this table") + ".")
    return ["", *lines]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=["testbed", *SIZES], default=["testbed", "50M"])
    parser.add_argument("--strengths", nargs="+", type=float, default=STRENGTHS)
    parser.add_argument("--ways", nargs="+", choices=["greedy", "sampling"], default=["greedy", "sampling"])
    parser.add_argument("--tokens", type=int, default=48, help="generated per run, at most")
    parser.add_argument("--rounds", type=int, default=4, help="at least so many per setting")
    parser.add_argument("--seconds", type=float, default=15, help="at least so long per setting")
    args = parse_flags(parser)
    lines = [
        "# What speculative contrastive decoding gains",
        "",
        "Tokens per second, medians, batch 1. Speculative against plain contrastive decoding and against the expert alone,",
        "each measured in turn in the same round; ratios above 1 are gains, with the middle half of the rounds.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    found: list[Found] = []
    for size in args.sizes:
        for strength in tqdm(args.strengths if size != "testbed" else [None], desc=size, unit="pair"):
            if strength is None:
                models = testbed.load("expert").to(args.device), testbed.load("amateur").to(args.device)
                name, prompt = "testbed", problems(args.device)
            else:
                models = pair(size, strength, args.device, getattr(torch, args.dtype))
                name, prompt = f"{size}, {strength}", random_prompts(SIZES[size][3], args.device)
            for way in args.ways:
                how = {"do_sample": way == "sampling", "max_new_tokens": args.tokens, "pad_token_id": 0, "top_k": 0}
                how |= {} if strength is None else {"eos_token_id": None}
                list(rounds(models, prompt, 1, 0, how | {"max_new_tokens": 4}))  # warm-up
                found.append(summary(name, way, list(rounds(models, prompt, args.rounds, args.seconds, how))))
            del models
    lines += [each.text for each in found]
    lines += verdict(found)
    lines += ["", *setting_lines(args.tokens, args.device, args.threads)]
    lines += [
        f"Weights in {args.dtype}. testbed: the trained pair, 0.17M and 0.02M parameters, on its own problems. The rest: random",
        "Llamas, named by the size of the expert and the strength of the layers that its amateur lacks; the amateurs of 50M,",
        "1.5B and 8B have 2 of 12, 4 of 28 and 6 of 36 layers. Sampling is at temperature 1 without top-k.",
        "Command: `python benchmarks/speculative.py`.",
    ]
    publish(lines, None if args.no_write else RESULTS)


if __name__ == "__main__":
    main()
