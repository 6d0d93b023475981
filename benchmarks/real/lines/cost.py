"""Measure the time of every method of decoding over that of greedy search, beside transformers' own guidance."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from contralto.common.files import read_text
from contralto.common.hub import from_pretrained
from contralto.decoding.inputs import DecodingBatch
from contralto.decoding.methods import METHODS, DecodingConfig, Method, generate_kwargs
from contralto.decoding.methods.base import Critic
from real.line import Context, Figure, Line, Section
from real.tables import table

GREEDY, TRANSFORMERS = "greedy", "transformers' own guidance"
GUIDANCE = 1.5
DTYPE = torch.bfloat16
"""The dtype in which SmolLM2 and its like are published, which `from_pretrained` keeps."""
Inputs = dict[str, Tensor]
Times = dict[str, list[float]]
"""Seconds of the wall clock and of processor time, by system."""


def run(context: Context) -> None:
    """Time all systems one after the other, round by round, at every batch size and length of the prompts.

    Args:
        context: The context of the line.
    """
    model = _model(context)
    for batch, length in _settings(context):
        inputs = _prompts(context, batch, length)
        systems = {**_builtin(inputs), **_methods(context, inputs)}
        keys = _keys(context, batch, length)
        if all(key in context.units() for key in keys):
            continue
        for system in systems.values():  # what is loaded or compiled once is no cost of a round
            _generate(context, model, inputs, system, tokens=2)
        context.units().fill(
            keys,
            lambda _, inputs=inputs, systems=systems: [_round(context, model, inputs, systems)],  # type: ignore[misc]
            title=f"batch {batch}, context {length}",
        )


def _settings(context: Context) -> list[tuple[int, int]]:
    return list(product(context.sizes["batches"], context.sizes["contexts"]))


def _keys(context: Context, batch: int, length: int) -> list[dict[str, Any]]:
    """Return the keys of the rounds; where a run takes a minute, there are fewer."""
    rounds = context.sizes["rounds"] if batch * length <= 1024 else context.sizes["rounds"] // 2 + 1
    roles = ("model", "amateur") if context.has("amateur") else ("model",)
    how = {"batch": batch, "length": length, "tokens": context.sizes["tokens"]}
    return [context.key(*roles, **how, dtype=str(DTYPE), round=i) for i in range(rounds)]


def _prompts(context: Context, batch: int, length: int) -> Inputs:
    """Return prompts of WikiText, one after the other."""
    text = read_text(context.file("wikitext", "wikitext2_test.txt"))
    ids = torch.tensor(context.tokenizer()(text[: 12 * batch * length])["input_ids"])
    if len(ids) < batch * length:
        raise ValueError(f"wikitext2_test.txt has {len(ids)} tokens, fewer than {batch} prompts of {length}")
    found = ids[: batch * length].reshape(batch, length)
    return {"input_ids": found, "attention_mask": torch.ones_like(found)}


def _second_half(inputs: Inputs) -> Inputs:
    """Return the contrast prompts: the second halves of the prompts."""
    return {name: value[:, value.shape[1] // 2 :] for name, value in inputs.items()}


System = Callable[[], Mapping[str, Any]]
"""Makes the keyword arguments of `generate()`, for one run."""


def _builtin(inputs: Inputs) -> dict[str, System]:
    other = _second_half(inputs)
    guidance = {
        "guidance_scale": GUIDANCE,
        "negative_prompt_ids": other["input_ids"],
        "negative_prompt_attention_mask": other["attention_mask"],
    }
    return {GREEDY: dict, TRANSFORMERS: lambda: guidance}


def _methods(context: Context, inputs: Inputs) -> dict[str, System]:
    """Return every method that reads text in each of its executors, if its models are given."""
    found: dict[str, System] = {}
    for name, method in METHODS.items():
        if method.contrasts and not method.reads_images and (not method.models or context.has("amateur")):
            for executor in method.executors:
                found[f"{name}, {executor}"] = _system(context, method, executor, inputs)
    return found


def _system(context: Context, method: Method, executor: str, inputs: Inputs) -> System:
    # All other models are the amateur: the anti-expert of proxy tuning has its size, and so may a critic have.
    others = tuple(
        _critic(context.path("amateur")) if isinstance(description, Critic) else _model(context, "amateur")
        for description in method.models.values()
    )
    options: dict[str, Any] = {name: context.path("amateur") for name in method.models}
    views = (_second_half(inputs),) if "prompt" in method.views else ()
    if views:
        options["contrast_prompt"] = "{prompt}"
    if "guidance_scale" in method.parameters():
        options["guidance_scale"] = GUIDANCE
    config = DecodingConfig.from_options(method=method.name, executor=executor, **options)
    return lambda: generate_kwargs(config, DecodingBatch(_model(context), others, inputs, views))


@cache
def _critic(path: str) -> Any:
    """Return a critic on the layers of a model. Its head is random: a trained one takes the same time."""
    torch.manual_seed(0)
    model = from_pretrained(AutoModelForTokenClassification, path, num_labels=1, dtype=DTYPE)
    return model.eval()


def _model(context: Context, role: str = "model") -> Any:
    return _in_bfloat16(context.path(role))


@cache
def _in_bfloat16(path: str) -> Any:
    return from_pretrained(AutoModelForCausalLM, path, dtype=DTYPE).eval()


def _round(context: Context, model: Any, inputs: Inputs, systems: Mapping[str, System]) -> Times:
    return {
        name: _generate(context, model, inputs, each, tokens=context.sizes["tokens"]) for name, each in systems.items()
    }


def _generate(context: Context, model: Any, inputs: Inputs, system: System, *, tokens: int) -> list[float]:
    """Return the seconds of a run, the prompt included: wall clock and processor."""
    how = dict(system())
    wall, cpu = time.perf_counter(), time.process_time()
    model.generate(
        **inputs,
        **how,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=context.tokenizer().pad_token_id,
    )
    return [round(time.perf_counter() - wall, 5), round(time.process_time() - cpu, 5)]


# ------------------------------------------------------------------------------------------------------------------ section


def render(context: Context) -> Section | None:
    """Return the section.

    Args:
        context: The context of the line.
    """
    settings = _settings(context)
    measured = {setting: context.units().of(_keys(context, *setting)) for setting in settings}
    made = {setting: rounds for setting, rounds in measured.items() if rounds}
    if len(made) < len(settings):
        return None
    figures: dict[str, Figure] = {}
    cells: dict[str, list[str]] = {}
    for (batch, length), rounds in made.items():
        for name in rounds[0]:
            wall, cpu = ([each[name][i] / each[GREEDY][i] for each in rounds] for i in (0, 1))
            if name == GREEDY:
                text = f"{statistics.median(each[name][0] for each in rounds):.2f} s"
            else:
                figure = Figure(statistics.median(wall), min(wall), max(wall))
                figures[f"{name}, batch {batch}, context {length}"] = figure
                text = f"{figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f}); {statistics.median(cpu):.2f}"
            cells.setdefault(name, []).append(text)
    head = ["method, executor", *(f"batch {batch}, context {length}" for batch, length in settings)]
    rows = table(head, [[name, *values] for name, values in cells.items()])
    return Section([*_intro(context), "", *rows], figures)


def _intro(context: Context) -> list[str]:
    counts = sorted({len(_keys(context, *setting)) for setting in _settings(context)})
    lines = [
        f"Seconds of `generate()` in bfloat16 for {context.sizes['tokens']} new tokens, the prompts of WikiText included, over those of greedy search: median (smallest to",
        f"largest) of {' or '.join(map(str, counts))} rounds, in each of which all systems run one after the other; then the ratio of processor time. Contrast",
        f"prompts are half as long as the prompts. Guidance is {GUIDANCE:g} in both implementations. Other parameters have their defaults.",
    ]
    lines.append(
        "Other processes had the second core, and the time of the same work varied by a third: read the ranges, not the medians."
    )
    if context.has("amateur"):
        lines.append(
            "Other models are the amateur; a critic has its layers and a head of random weights, which takes the time of a trained one."
        )
    else:
        lines.append("Not run yet: methods with other models, which need an amateur.")
    return lines


LINE = Line(
    name="cost",
    title="Cost",
    question="What does each method cost over greedy search, beside the guidance that transformers has?",
    order=90,
    needs=("model",),
    full={"batches": [1, 8], "contexts": [64, 1024], "rounds": 3, "tokens": 32},
    small={"batches": [1, 2], "contexts": [8, 16], "rounds": 2, "tokens": 4},
    revision=1,
    run=run,
    render=render,
    flags=("amateur", "data"),
)
