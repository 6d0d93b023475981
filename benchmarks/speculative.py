"""Measure the speed-up of speculative over plain contrastive decoding, by the acceptance rate of drafts.

    python benchmarks/speculative.py                         the testbed and random models; writes benchmarks/results/speculative.md
    python benchmarks/speculative.py --model SMOLLM2 --amateur PRUNED    beside them, a real model with several ways to draft
    python benchmarks/speculative.py --device cuda --dtype bfloat16 --sizes 1.5B 8B
    python benchmarks/speculative.py --sizes testbed --rounds 1 --seconds 0 --tokens 8 --no-write

Each round runs, one after the other and on the same prompt, generate() of the expert alone, plain contrastive decoding
(its loop), and speculative contrastive decoding. Times are those of whole calls, prompts of 64 tokens
included. Ratios are taken within a round; the table gives their medians and the middle half of the rounds.

The testbed's pair is a real one, and so are those of `--model`: drafted by an amateur, by the model's own first layers, and by
look-up in the prompt, with a gate and without. The others are random Llamas: the amateur has the first layers of its expert, and the
strength of the expert's later layers decides how much the two agree. Acceptance is the mean over all tokens of the
probability that a draft in their place is accepted.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import llama, parse_flags, publish, setting_lines, spread
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.common.hub import from_pretrained
from contralto.decoding import ContrastiveDecodingLogitsProcessor, EarlyExit, GatedLogitsProcessor
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
TABLE = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
GATE, LOOKUP = 0.9, 8
"""Of real models: a gate, and tokens of a draft from the prompt."""
REPEAT = "Repeat this text, word for word: {}"
ENOUGH = 0.5
"""Above this acceptance speculation is to gain."""
BOUND = 0.05
"""Nowhere is it to be slower than plain contrastive decoding by more."""

Prompter = Callable[[int], dict[str, Tensor]]


class Pair(NamedTuple):
    """An expert and an amateur, their prompts, and how the amateur drafts."""

    name: str
    expert: Any
    amateur: Any
    prompt: Prompter
    options: Mapping[str, Any] = {}
    """Of both ways of contrastive decoding, such as a gate."""
    drafting: Mapping[str, Any] = {}
    """Of speculation alone."""
    stops: bool = True
    """Whether texts end at the end token, or go on to the last token."""


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


def random_pair(size: str, strength: float, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
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


def problems(tokenizer: Any, device: str, request: str = "{}") -> Prompter:
    """Another of the testbed's problems for every round, in a request."""
    found = itertools.islice(worlds.problems(2027, "test"), 200)
    questions = [request.format(problem.question) for problem in found]

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


def rounds(pair: Pair, count: int, seconds: float, how: dict[str, Any]) -> Iterator[Round]:
    """The three systems in turn, at least `count` times and for at least so many seconds."""
    plain: Any = ContrastiveDecodingLogitsProcessor(pair.amateur)
    if gate := pair.options.get("gate"):
        plain = GatedLogitsProcessor(plain, gate=gate)
    speculative = SpeculativeContrastiveDecoding(pair.amateur, **pair.options, **pair.drafting)
    end = time.perf_counter() + seconds
    for done in itertools.count():
        if done >= count and time.perf_counter() > end:
            return
        inputs = pair.prompt(done)
        speeds = (
            speed(pair.expert, inputs, done, **how),
            speed(pair.expert, inputs, done, custom_generate=plain.loop(), **how),
            speed(pair.expert, inputs, done, custom_generate=speculative, **how),
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


def _pairs(args: argparse.Namespace) -> Iterator[Pair]:
    """The pairs of a run, one after the other, since not all fit into memory."""
    for size in args.sizes:
        if size == "testbed":
            expert, amateur = (testbed.load(name).to(args.device) for name in ("expert", "amateur"))
            yield Pair(size, expert, amateur, problems(testbed.tokenizer(), args.device))
            continue
        for strength in args.strengths:
            models = random_pair(size, strength, args.device, getattr(torch, args.dtype))
            prompt = random_prompts(SIZES[size][3], args.device)
            yield Pair(f"{size}, {strength}", *models, prompt, stops=False)


def real_pairs(model: str, amateur: str, device: str, dtype: torch.dtype) -> Iterator[Pair]:
    """A real model with the drafts of an amateur, of its own first layers, and of its prompt."""
    expert, other = (
        from_pretrained(AutoModelForCausalLM, name, dtype=dtype).eval().to(device) for name in (model, amateur)
    )
    tokenizer, layers = from_pretrained(AutoTokenizer, model), expert.config.num_hidden_layers // 3
    name, ask, copy = Path(model).name, problems(tokenizer, device), problems(tokenizer, device, REPEAT)
    lookup = {"prompt_lookup_num_tokens": LOOKUP}
    yield Pair(f"{name}, amateur", expert, other, ask)
    yield Pair(f"{name}, amateur, gate {GATE:g}", expert, other, ask, {"gate": GATE})
    yield Pair(f"{name}, first {layers} layers", expert, EarlyExit(expert, layers=layers), ask)
    yield Pair(f"{name}, amateur, look-up", expert, other, ask, {}, lookup)
    yield Pair(f"{name}, amateur, look-up, copying", expert, other, copy, {}, lookup)
    yield Pair(f"{name}, amateur, look-up, copying, gate {GATE:g}", expert, other, copy, {"gate": GATE}, lookup)


def _measured(pairs: Iterator[Pair], args: argparse.Namespace) -> list[Found]:
    """The lines of a table."""
    found: list[Found] = []
    for pair in tqdm(pairs, unit="pair"):
        for way in args.ways:
            how = {"do_sample": way == "sampling", "max_new_tokens": args.tokens, "pad_token_id": 0, "top_k": 0}
            how |= {} if pair.stops else {"eos_token_id": None}
            list(rounds(pair, 1, 0, how | {"max_new_tokens": 4}))  # warm-up
            found.append(summary(pair.name, way, list(rounds(pair, args.rounds, args.seconds, how))))
    return found


def _real_section(args: argparse.Namespace) -> list[str]:
    """The section of a real model."""
    found = _measured(real_pairs(args.model, args.amateur, args.device, getattr(torch, args.dtype)), args)
    met = sum(each.against_plain >= 1 / (1 + BOUND) for each in found)
    gained = sum(each.against_expert > 1 for each in found)
    return [
        "",
        "## A real model",
        "",
        f"{Path(args.model).name} on word problems, with {Path(args.amateur).name} as the amateur. *first layers*: the model's own, as",
        f"amateur and for drafts. *look-up*: drafts of up to {LOOKUP} tokens from the text itself, too. *copying* asks to repeat the problem.",
        "",
        *TABLE,
        *(each.text for each in found),
        "",
        f"Aim: at most {BOUND:.0%} slower than plain contrastive decoding: met by {met} of {len(found)}. Faster than the expert alone: {gained}.",
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", choices=["testbed", *SIZES], default=["testbed", "50M"])
    parser.add_argument("--strengths", nargs="+", type=float, default=STRENGTHS)
    parser.add_argument("--ways", nargs="+", choices=["greedy", "sampling"], default=["greedy", "sampling"])
    parser.add_argument("--tokens", type=int, default=48, help="generated per run, at most")
    parser.add_argument("--rounds", type=int, default=4, help="at least so many per setting")
    parser.add_argument("--seconds", type=float, default=15, help="at least so long per setting")
    parser.add_argument("--model", help="a real model: a folder or a hub id")
    parser.add_argument("--amateur", help="its amateur")
    args = parse_flags(parser)
    lines = [
        "# What speculative contrastive decoding gains",
        "",
        "Tokens per second, medians, batch 1. Speculative against plain contrastive decoding (its loop) and against the expert alone,",
        "each measured in turn in the same round; ratios above 1 are gains, with the middle half of the rounds.",
    ]
    if args.sizes:
        found = _measured(_pairs(args), args)
        lines += ["", "## Figures", "", *TABLE, *(each.text for each in found), *verdict(found)]
        lines += [
            "",
            "testbed: the trained pair, 0.17M and 0.02M parameters, on its own problems. The rest: random",
            "Llamas, named by the size of the expert and the strength of the layers that its amateur lacks; the amateurs of 50M,",
            "1.5B and 8B have 2 of 12, 4 of 28 and 6 of 36 layers. Sampling is at temperature 1 without top-k.",
        ]
    if args.model:
        lines += _real_section(args)
    lines += ["", "## Setting", "", *setting_lines(args.tokens, args.device, args.threads), f"Weights in {args.dtype}."]
    real = " --model smollm2 --amateur pruned" if args.model else ""
    lines += [f"Command: `python benchmarks/speculative.py{real}`."]
    publish(lines, None if args.no_write else RESULTS)


if __name__ == "__main__":
    main()
