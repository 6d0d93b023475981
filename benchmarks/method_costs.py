"""Measure what every method of decoding costs over greedy search: forward passes, tokens read, and time.

    python benchmarks/method_costs.py --model SMOLLM2 --amateur PRUNED    writes benchmarks/results/method_costs.md
    python benchmarks/method_costs.py --batches 1 --tokens 12 --rounds 1 --no-write    the embedded models, to try it

Methods that read text decode with the model, those that read images with the testbed's LLaVA. Every method runs in each of its executors, with
its default parameters and the inputs that the command line makes. Each round runs greedy search and all methods one after the other on the same
prompts, with as many new tokens; ratios are taken within a round, and the table gives their medians and the middle half of the rounds. Passes
and tokens are counted in every model, as the difference between a long and a short run, so that the prompts do not count.

`python docs/generators/tables.py` copies the figures into docs/costs.md.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import parse_flags, publish, setting_lines, spread
from tqdm import tqdm
from transformers import AutoModelForTokenClassification, AutoTokenizer

from contralto.common.hub import from_pretrained
from contralto.decoding.inputs import DecodingBatch, Prompt, batch_of
from contralto.decoding.loading import Models, load_models
from contralto.decoding.methods import METHODS, DecodingConfig, Method, generate_kwargs
from contralto.decoding.methods.base import Critic
from contralto.testbed import scenes, worlds

RESULTS = Path(__file__).parent / "results" / "method_costs.md"
GREEDY = "none"
GATE = 0.9
CONTRAST_PROMPT = "Do the opposite of what is said here. {prompt}"
HEAD = ["method", "executor", "passes per token", "tokens read", "of other models"]
SMALL = {"start_layer": 1, "keep": 4}
"""Parameters that a model of 2 layers and 16 image tokens does not have at their defaults."""
STOCK = {"transformers": {"guidance_scale": 1.5}}
"""What transformers has itself: classifier-free guidance away from the prompt's last token, contralto's default too."""
COUNTED = ("passes", "read", "others")
SHORT = 4
"""New tokens of the run that is taken off the counts."""


class System(NamedTuple):
    """A method in an executor."""

    method: str
    executor: str
    config: DecodingConfig

    @property
    def gate(self) -> float | None:
        """The gate, if there is one."""
        return self.config.parameters.get("gate")

    @property
    def name(self) -> str:
        """The method, with its gate."""
        if self.method == GREEDY:
            return "greedy"
        return self.method if self.gate is None else f"{self.method}, gate {self.gate:g}"


class Figures(NamedTuple):
    """What a system cost at one size of the batch."""

    passes: float
    """Forward passes of the main model per new token."""
    read: float
    """Tokens of a text that the main model reads per new token."""
    others: float
    """Tokens of a text that the other models read per new token."""
    ratios: list[float]
    """Time over that of greedy search, by round."""


def systems(*, images: bool, amateur: str, critic: str) -> list[System]:
    """Greedy search, and every method of a kind in each of its executors, without a gate and with one."""
    found = []
    for name, method in METHODS.items():
        if not method.contrasts or method.reads_images != images:
            continue
        stock = (*STOCK,) if name == "cfg" else ()
        for executor in (*stock, *method.executors):
            options = {
                **_options(method, amateur=amateur, critic=critic),
                "executor": None if executor in STOCK else executor,
            }
            gates = (None, GATE) if "gate" in method.parameters() and not images and executor not in STOCK else (None,)
            found += [
                System(name, executor, DecodingConfig.from_options(method=name, gate=gate, **options)) for gate in gates
            ]
    return [System(GREEDY, "", DecodingConfig.from_options(method=GREEDY)), *found]


def _options(method: Method, *, amateur: str, critic: str) -> dict[str, Any]:
    """The models and the contrast prompt of a method."""
    options: dict[str, Any] = {
        name: critic if isinstance(kind, Critic) else amateur for name, kind in method.models.items()
    }
    if "prompt" in method.views and not method.contrast_prompt_optional:
        options["contrast_prompt"] = CONTRAST_PROMPT
    if method.reads_images:
        options |= {name: value for name, value in SMALL.items() if name in method.parameters()}
    return options


def text_prompts(count: int) -> list[Prompt]:
    """Word problems, each with the contrast prompt."""
    return [Prompt(each.question, contrast=CONTRAST_PROMPT) for each in islice(worlds.problems(2031, "test"), count)]


def image_prompts(count: int, folder: Path) -> list[Prompt]:
    """Questions about drawn scenes."""
    found = []
    for index, scene in enumerate(islice(scenes.scenes(2027, "test"), count)):
        file = folder / f"{index}.png"
        scene.image().save(file)
        found.append(Prompt("What is in the picture?", images=(str(file),), contrast=CONTRAST_PROMPT))
    return found


# ------------------------------------------------------------------------------------------------------------------ measurement


class Counts:
    """Counts the forward passes of a model, and the tokens of a text that it reads."""

    def __init__(self, model: Any) -> None:
        self.passes, self.tokens = 0, 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = next(
            value for value in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if value is not None
        )
        self.passes += 1
        self.tokens += ids.shape[0] * ids.shape[1]


def generate(models: Models, system: System, batch: DecodingBatch, tokens: int) -> float:
    """Return the processor seconds of a run of `generate()` with so many new tokens."""
    how = STOCK.get(system.executor) or generate_kwargs(system.config, batch)
    start = time.process_time()
    models.main.generate(
        **batch.inputs,
        **how,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=models.tokenizer.pad_token_id,
    )
    return time.process_time() - start


class Setting(NamedTuple):
    """Systems with their models, and prompts of one size of the batch."""

    systems: Sequence[System]
    models: Mapping[str, Models]
    """The models of each method."""
    counts: Mapping[str, tuple[Counts, list[Counts]]]
    """The counts of the main model, and of the others, of each method."""
    prompts: Sequence[Prompt]

    def batch(self, system: System) -> DecodingBatch:
        """Return the inputs of a system."""
        seeds = [*range(len(self.prompts))]
        return batch_of(self.prompts, self.models[system.method], system.config, seeds=seeds, raw=False)


def counted(setting: Setting, system: System, tokens: int) -> tuple[float, float, float]:
    """Return the passes, the tokens of the main model and those of the others, of a text and a new token."""
    main, others = setting.counts[system.method]
    found = []
    generate(setting.models[system.method], system, setting.batch(system), SHORT)  # what is checked once per model
    for length in (SHORT, tokens):
        before = main.passes, main.tokens, sum(each.tokens for each in others)
        generate(setting.models[system.method], system, setting.batch(system), length)
        after = main.passes, main.tokens, sum(each.tokens for each in others)
        found.append([b - a for a, b in zip(before, after, strict=True)])
    passes, *read = (b - a for a, b in zip(*found, strict=True))
    new, rows = tokens - SHORT, len(setting.prompts)
    return passes / new, *(each / (new * rows) for each in read)


def measured(setting: Setting, tokens: int, rounds: int, label: str) -> Iterator[tuple[System, Figures]]:
    """Every system in turn, round by round."""
    counts = [counted(setting, system, tokens) for system in setting.systems]  # warm-ups, too
    work = [(setting.models[each.method], each, setting.batch(each), tokens) for each in setting.systems]
    times = [[generate(*each) for each in work] for _ in tqdm(range(rounds), desc=label)]
    for place, system in enumerate(setting.systems):
        yield system, Figures(*counts[place], [each[place] / each[0] for each in times])


def load(made: Sequence[System], model: str, *, images: bool, dtype: str) -> Mapping[str, Models]:
    """Load the models of every method; the main model and every other model once."""
    main = load_models(model, made[0].config, with_images=images, dtype=dtype)
    known: dict[str, Any] = {}
    found: dict[str, Models] = {}
    for system in made:
        if system.method not in found:
            names = [*system.config.models.values()]
            if any(name not in known for name in names):
                others = load_models(model, system.config, with_images=images, dtype=dtype).branch_models
                known |= dict(zip(names, others, strict=True))
            found[system.method] = main._replace(branch_models=tuple(known[name] for name in names))
    return found


def lines_of(
    made: Sequence[System],
    models: Mapping[str, Models],
    prompts: Sequence[Prompt],
    args: argparse.Namespace,
    label: str,
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the lines of the table, and the same as data."""
    once = {id(model): Counts(model) for each in models.values() for model in (each.main, *each.branch_models)}
    counts = {
        name: (once[id(each.main)], [once[key] for key in {id(model) for model in each.branch_models}])
        for name, each in models.items()
    }
    data: list[dict[str, Any]] = []
    cells: dict[int, list[list[str]]] = {place: [] for place in range(len(made))}
    for batch in args.batches:
        setting = Setting(made, models, counts, prompts[:batch])
        for place, (system, figures) in enumerate(
            measured(setting, args.tokens, args.rounds, f"{label}, batch {batch}")
        ):
            own = {name: getattr(system, name) for name in ("method", "gate", "executor")}
            read = {name: round(getattr(figures, name), 2) for name in COUNTED}
            data.append({**own, **read, "batch": batch, "time": round(statistics.median(figures.ratios), 2)})
            cells[place].append([*(f"{value:.2f}" for value in read.values()), spread(figures.ratios)])
    return [_line(system, cells[place]) for place, system in enumerate(made)], data


def _line(system: System, cells: Sequence[Sequence[str]]) -> str:
    """A line, with one count for all sizes of the batch where they agree."""
    *read, times = zip(*cells, strict=True)
    counts = ["; ".join(dict.fromkeys(values)) for values in read]
    return f"| {' | '.join([system.name, system.executor or '-', *counts, *times])} |"


# ---------------------------------------------------------------------------------------------------------------------- command


def make_critic(amateur: str, folder: Path) -> str:
    """Save a critic on the layers of a model. Its head is random: a trained one takes the same time."""
    torch.manual_seed(0)
    from_pretrained(AutoModelForTokenClassification, amateur, num_labels=1).save_pretrained(folder)
    from_pretrained(AutoTokenizer, amateur).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="testbed:expert", help="for text: a folder or a hub id (default testbed:expert)"
    )
    parser.add_argument("--amateur", default="testbed:amateur", help="every other model, and the layers of the critic")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens (default 32)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parse_flags(parser)
    count = max(args.batches)
    with tempfile.TemporaryDirectory() as folder:
        critic = make_critic(args.amateur, Path(folder) / "critic")
        text = systems(images=False, amateur=args.amateur, critic=critic)
        found = [
            lines_of(text, load(text, args.model, images=False, dtype=args.dtype), text_prompts(count), args, "text")
        ]
        seen = systems(images=True, amateur=args.amateur, critic=critic)
        pictures = image_prompts(count, Path(folder))
        found.append(
            lines_of(seen, load(seen, "testbed:vision-0", images=True, dtype=args.dtype), pictures, args, "images")
        )
    publish(_page(args, *found), None if args.no_write else RESULTS)


def _page(args: argparse.Namespace, *found: tuple[list[str], list[dict[str, Any]]]) -> list[str]:
    names = [Path(name).name for name in (args.model, args.amateur)]
    head = [*HEAD, *(f"time / greedy, batch {batch}" for batch in args.batches)]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    (text, text_data), (images, image_data) = found
    return [
        "# What methods cost",
        "",
        "Forward passes of the model per new token, tokens of a text that it and that other models read per new token (prompts are left out), and",
        f"processor time of `generate()`, prompts included, over that of greedy search: the median, and the middle half, of {args.rounds} rounds. Where the batch",
        "changes a count, both are given.",
        "",
        f"## Text: {names[0]}",
        "",
        f"Word problems in the chat template. Every other model is {names[1]}; a critic has its layers and a head of random weights. The other prompt of",
        "cid, cad and cfg is a sentence longer than the prompt, but for cfg without one, which reads the last token.",
        "",
        *table,
        *text,
        "",
        "## Images: the testbed's LLaVA",
        "",
        "0.17M parameters: nearly all of a step is Python, so that the times say what a method adds in calls, not what it costs on a large model.",
        "",
        *table,
        *images,
        "",
        *setting_lines(args.tokens, args.device, args.threads),
        f"Weights in {args.dtype}. Command: `python benchmarks/method_costs.py --model {names[0]} --amateur {names[1]} --tokens {args.tokens} --rounds {args.rounds}`.",
        "",
        f"<!-- figures {json.dumps([*text_data, *image_data])} -->",
    ]


if __name__ == "__main__":
    main()
