"""Measure what a gate saves: forward passes of the other branch, time, and whether the answers move.

    python benchmarks/gated.py                                       the testbed's pair; writes benchmarks/results/gated.md
    python benchmarks/gated.py --model SMOLLM2 --amateur PRUNED      beside it, a real model and an amateur

Answers: the testbed's problems, decoded greedily. Times, of the process, not of the wall: each round runs, one after the other and on the same prompt at
batch 1, greedy search, the methods, and the methods with each gate; ratios are taken within a round, and the table gives their medians and
the middle half of the rounds. The proposed gate is chosen on problems of the dev split, and reported on those of the test split.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import parse_flags, publish, setting_lines, spread
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto import testbed
from contralto.common.hub import from_pretrained
from contralto.decoding import (
    ClassifierFreeGuidanceLogitsProcessor,
    ContrastiveDecodingLogitsProcessor,
    GatedLogitsProcessor,
)
from contralto.eval.stats.proportions import holm, mcnemar_exact, proportion
from contralto.testbed import measure, worlds

RESULTS = Path(__file__).parent / "results" / "gated.md"
GATES = (0.5, 0.7, 0.9, 0.99)
SEED = 2031
GREEDY, PLAIN = "greedy", "no gate"
ANSWERS = ["decoding", "right", "95% interval", "only this, only without a gate", "Holm's p"]
TIMES = [
    "models",
    "method",
    "gate",
    "passes of the other branch saved",
    "time / no gate",
    "time / greedy",
    "same text",
    "rounds",
]
REAL = """The real pair is SmolLM2-135M-Instruct and an amateur of 10 of its 30 layers without any training (`contralto amateur smollm2
--layers 10 --output pruned`): a poor amateur, which says something about time and nothing about quality."""

Inputs = dict[str, Any]
Maker = Callable[[Inputs, Inputs], Any]
"""Makes the logits processor of a method from the inputs of the prompts and those of the contrast prompts."""


def chosen(split: worlds.Split, count: int) -> list[worlds.Problem]:
    """Problems of a split."""
    return list(itertools.islice(worlds.problems(SEED, split), count))


def answers(problems: Sequence[worlds.Problem], decodings: Sequence[str | float]) -> dict[str | float, list[bool]]:
    """For each decoding, which problems are solved: greedily, by contrast, and with gates."""
    expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
    found: dict[str | float, list[bool]] = {}
    for name in tqdm(decodings, desc="answers"):
        processor = None if name == GREEDY else ContrastiveDecodingLogitsProcessor(amateur)
        if isinstance(name, float):
            assert processor is not None
            processor = GatedLogitsProcessor(processor, gate=name)  # type: ignore[assignment]
        texts = measure.decode(expert, tokenizer, problems, processor=processor)
        found[name] = [measure.is_right(p, text) for p, text in zip(problems, texts, strict=True)]
    return found


def proposed(count: int) -> tuple[float | None, dict[str | float, list[bool]]]:
    """The lowest gate that solves at least as many problems of the dev split as the contrast without a gate."""
    right = answers(chosen("dev", count), (PLAIN, *GATES))
    good = [gate for gate in GATES if sum(right[gate]) >= sum(right[PLAIN])]
    return min(good, default=None), right


def answer_table(right: Mapping[str | float, list[bool]]) -> list[str]:
    """The table of the test split."""
    names = [name for name in right if name != PLAIN]
    tests = [mcnemar_exact(right[PLAIN], right[name]) for name in names]
    adjusted = dict(zip(names, holm([test.p for test in tests]), strict=True))
    lines = [f"| {' | '.join(ANSWERS)} |", "|---" * len(ANSWERS) + "|"]
    for name, hits in right.items():
        share = proportion(hits)
        label = f"gate {name:g}" if isinstance(name, float) else f"contrast, {name}" if name == PLAIN else name
        cells = ["-", "-"]
        if name != PLAIN:
            test = tests[names.index(name)]
            cells = [f"{test.won}, {test.lost}", f"{adjusted[name]:.2g}"]
        lines.append(f"| {' | '.join([label, f'{share.value:.3f}', f'{share.low:.3f} to {share.high:.3f}', *cells])} |")
    return lines


class Pair(NamedTuple):
    """A model with the prompts of each round, and its methods."""

    label: str
    model: Any
    prompts: list[tuple[Inputs, Inputs]]
    systems: "list[System]"
    tokens: int


class System(NamedTuple):
    """A method in an executor, with the gates that are tried."""

    name: str
    executor: str
    make: Maker
    gates: tuple[float, ...]


def systems(model: Any, amateur: Any) -> list[System]:
    """Contrastive decoding by another model, and a method whose branch is another prompt of the same model."""

    def guidance(_: Inputs, other: Inputs) -> Any:
        return ClassifierFreeGuidanceLogitsProcessor(model, other)

    return [
        System("cd", "loop", lambda _, __: ContrastiveDecodingLogitsProcessor(amateur), GATES),
        System("cfg", "loop", guidance, ()),
        System("cfg", "processor", guidance, GATES),
    ]


def prompts(tokenizer: Any, count: int) -> list[tuple[Inputs, Inputs]]:
    """Chat prompts, and contrast prompts: the question alone, without what it is about."""
    found = []
    for problem in chosen("test", count):
        texts = problem.question, problem.question.rsplit(". ", 1)[1]
        found.append(tuple(_chat(tokenizer, text) for text in texts))
    return found  # type: ignore[return-value]


def _chat(tokenizer: Any, text: str) -> Inputs:
    how: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return dict(tokenizer.apply_chat_template([{"role": "user", "content": text}], **how))


class Run(NamedTuple):
    """A call of generate()."""

    seconds: float
    tokens: list[int]
    saved: float
    """The share of the steps that needed no forward pass of the other branch."""


def run(pair: Pair, inputs: Inputs, processor: Any = None, *, executor: str = "loop", gate: float | None = None) -> Run:
    """Generate greedily, to the end token."""
    gated = processor if gate is None else GatedLogitsProcessor(processor, gate=gate)
    how: dict[str, Any] = {}
    if gated is not None:
        how = {"custom_generate": gated.loop()} if executor == "loop" else {"logits_processor": [gated]}
    start = time.process_time()
    output = pair.model.generate(**inputs, **how, max_new_tokens=pair.tokens, do_sample=False)
    seconds = time.process_time() - start
    saved = 0.0 if gate is None else gated.statistics.skipped / gated.statistics.steps
    return Run(seconds, output[0, inputs["input_ids"].shape[1] :].tolist(), saved)


Round = dict[tuple[str, str, float | None], Run]


def one_round(pair: Pair, inputs: Inputs, other: Inputs) -> Round:
    """Every system without a gate and with each of its gates."""
    made = [(each, gate) for each in pair.systems for gate in (None, *each.gates)]
    return {
        (each.name, each.executor, gate): run(pair, inputs, each.make(inputs, other), executor=each.executor, gate=gate)
        for each, gate in made
    }


def time_table(pair: Pair) -> list[str]:
    """The lines of a model: every system in turn, on one prompt after the other."""
    rounds: list[Round] = []
    greedy: list[Run] = []
    one_round(pair._replace(tokens=2), *pair.prompts[0])  # a warm-up
    for inputs, other in tqdm(pair.prompts, desc=pair.label):
        greedy.append(run(pair, inputs))
        rounds.append(one_round(pair, inputs, other))
    return [_line(pair, key, greedy, rounds) for key in rounds[0]]


def _line(pair: Pair, key: tuple[str, str, float | None], greedy: Sequence[Run], rounds: Sequence[Round]) -> str:
    """A line: times are those of a token, since texts may differ in length."""
    name, executor, gate = key
    own, without = [each[key] for each in rounds], [each[name, executor, None] for each in rounds]
    ratios = [[_per_token(a) / _per_token(b) for a, b in zip(own, others, strict=True)] for others in (without, greedy)]
    same = sum(a.tokens == b.tokens for a, b in zip(own, without, strict=True))
    if gate is None:
        cells = ["none", "-", "-", spread(ratios[1]), "-"]
    else:
        cells = [
            f"{gate:g}",
            f"{statistics.mean(each.saved for each in own):.0%}",
            *map(spread, ratios),
            f"{same} of {len(own)}",
        ]
    return f"| {' | '.join([pair.label, f'{name}, {executor}', *cells, str(len(own))])} |"


def _per_token(each: Run) -> float:
    return each.seconds / len(each.tokens)


def embedded(rounds: int) -> Pair:
    """The testbed's pair."""
    expert = testbed.load("expert")
    made = systems(expert, testbed.load("amateur"))
    return Pair("testbed", expert, prompts(testbed.tokenizer(), rounds), made, measure.MAX_NEW_TOKENS)


def real(model: str, amateur: str, dtype: str, rounds: int, tokens: int) -> Pair:
    """A model and an amateur by name."""
    loaded = [
        from_pretrained(AutoModelForCausalLM, name, dtype=getattr(torch, dtype)).eval() for name in (model, amateur)
    ]
    return Pair(
        Path(model).name, loaded[0], prompts(from_pretrained(AutoTokenizer, model), rounds), systems(*loaded), tokens
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a real model: a folder or a hub id")
    parser.add_argument("--amateur", help="its amateur")
    parser.add_argument("--problems", type=int, default=500, help="of the test split (default 500)")
    parser.add_argument("--dev-problems", type=int, default=300, help="of the dev split (default 300)")
    parser.add_argument("--rounds", type=int, default=12, help="of the testbed's pair (default 12)")
    parser.add_argument("--real-rounds", type=int, default=4, help="of the real model (default 4)")
    parser.add_argument("--tokens", type=int, default=32, help="of the real model (default 32)")
    args = parse_flags(parser)
    gate, dev = proposed(args.dev_problems)
    right = answers(chosen("test", args.problems), (GREEDY, PLAIN, *GATES))
    pairs = [embedded(args.rounds)]
    if args.model:
        pairs.append(real(args.model, args.amateur, args.dtype, args.real_rounds, args.tokens))
    times = [line for pair in pairs for line in time_table(pair)]
    publish(
        [*_head(args, gate, dev), *answer_table(right), "", *_timing(args, times)], None if args.no_write else RESULTS
    )


def _head(args: argparse.Namespace, gate: float | None, dev: Mapping[str | float, list[bool]]) -> list[str]:
    best = "none of these" if gate is None else f"{gate:g}"
    shares = ", ".join(f"{name if name == PLAIN else f'gate {name:g}'} {sum(hits)}" for name, hits in dev.items())
    return [
        "# What a gate saves",
        "",
        "With a gate the contrast is left out where the main model's largest probability is at least the gate (docs/guides/gate.md).",
        "",
        "## Answers",
        "",
        f"{args.problems} test problems of the testbed's arithmetic world, greedy; `cd` of the testbed's expert against its amateur, beta 0.5,",
        "alpha 0.1. In the fourth column stand the problems that the line alone solves, and those that the contrast without a gate alone",
        "solves; then the exact McNemar test between the two, adjusted for the lines of the table.",
        "",
        f"Right of {args.dev_problems} problems of the dev split: {shares}. The lowest gate that solves as many there: {best}.",
        "",
    ]


def _timing(args: argparse.Namespace, times: Sequence[str]) -> list[str]:
    command = "python benchmarks/gated.py" + (" --model smollm2 --amateur pruned" if args.model else "")
    return [
        "## Time",
        "",
        "Batch 1, greedy, the prompts of the problems in a chat template. `cfg`, against the last sentence of the prompt alone, stands for every",
        "method whose branch is another prompt of the same model: its loop reads both in one forward pass, where a gate saves nothing; as a logits",
        "processor the other prompt has passes of its own. Processor time of a token, prompts included; in brackets the middle half of the rounds.",
        "Same text: rounds in which the gate changed no token.",
        "",
        f"| {' | '.join(TIMES)} |",
        "|---" * len(TIMES) + "|",
        *times,
        "",
        f"Up to {measure.MAX_NEW_TOKENS} tokens of the testbed's pair and {args.tokens} of a real model, whose weights are in {args.dtype}.",
        *setting_lines(args.tokens, args.device, args.threads),
        *([REAL] if args.model else []),
        f"Command: `{command}`.",
    ]


if __name__ == "__main__":
    main()
