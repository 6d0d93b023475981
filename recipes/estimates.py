"""Estimate what a recipe takes before it is run: memory, time and money, on GPUs of one kind.

Times follow from sizes alone: a forward pass of N parameters takes 2 N operations per token, training 6 N, with LoRA 4 N; a token that is
written reads all weights once for its batch. They are right within a factor of about three, and say whether a run takes an hour or a week.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import yaml

from contralto.common.files import read_text
from contralto.recipes.papers import FOLDER, PaperRecipe
from contralto.recipes.steps import LOCAL, PLACEHOLDER, RecipeStep

__all__ = ["Need", "estimate", "parameters", "total"]

MAKES_MODELS = ("align", "amateur", "critic")
"""Commands whose output is a model of the size of the first one that they read."""
MEMORY = 80e9
"""Bytes of a GPU: an H100 or A100."""
OPERATIONS = 0.35 * 989e12
"""Operations per second in bfloat16: an H100 at the share of its peak that trainings reach."""
BANDWIDTH = 0.5 * 3.35e12
"""Bytes per second from its memory, at half of the peak."""
FULL, ADAPTER = 16, 2.2
"""Bytes per parameter: weights, gradients, two moments and a float32 copy; with LoRA the weights, and a little."""
COMPARED = 10
"""Decoders of a comparison with a method and its controls."""
BATCH = {"vllm": 128}
SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z0-9])")
WRITTEN = 400
"""Tokens of an answer where nothing says how many."""


class Need(NamedTuple):
    """The memory and time that a command needs."""

    memory: float
    """Bytes of all GPUs together."""
    hours: float
    """Hours of one GPU; NaN where the size of the data is not known."""
    unknown: tuple[str, ...] = ()
    """Models and data whose sizes are not known."""

    @property
    def gpus(self) -> int:
        """Return how many GPUs hold it."""
        return max(1, math.ceil(self.memory / MEMORY))


@cache
def _sizes() -> dict[str, dict[str, Any]]:
    sizes: dict[str, dict[str, Any]] = yaml.safe_load(read_text(FOLDER / "sizes.yaml"))
    return sizes


def parameters(name: str) -> float | None:
    """Return the number of parameters of a model, by its name; None if it does not say.

    Args:
        name: of a model of the hub.

    Examples:
        >>> parameters("Qwen/Qwen2.5-1.5B-Instruct"), parameters("openai-community/gpt2-xl"), parameters("tuned")
        (1500000000.0, 1600000000.0, None)
    """
    if name in _sizes()["models"]:
        return float(_sizes()["models"][name]) * 1e9
    found = SIZE.search(name.rpartition("/")[2])
    return float(found[1]) * 1e9 if found else None


def estimate(recipe: PaperRecipe, steps: Sequence[RecipeStep]) -> list[Need]:
    """Estimate every command of a recipe.

    Args:
        recipe: the paper, with the sizes of what the user brings.
        steps: its commands. One that reads what an earlier one made has the models and rows of that one.

    Examples:
        >>> from contralto.recipes.papers import find
        >>> from contralto.recipes.steps import steps_of
        >>> simpo = find("simpo")
        >>> need = estimate(simpo, steps_of(simpo.hub, simpo.hub_files))[0]
        >>> need.gpus, 1 < need.hours < 30
        (2, True)
    """
    known: dict[str, Any] = {**_sizes()["datasets"], **_sizes()["tasks"], **recipe.sizes}
    weights: dict[str, float] = {}
    needs = []
    for step in steps:
        models = [weights.get(name.partition("/")[0], parameters(name)) for name in step.models if name[:5] != "self:"]
        rows = [known.get(name) or known.get(name.partition("/")[0]) for name in step.data]
        unknown = [name for name, size in zip(step.models, models, strict=False) if size is None]
        unknown += [
            name for name, size in zip(step.data, rows, strict=True) if not size and not PLACEHOLDER.fullmatch(name)
        ]
        sizes = [size for size in models if size is not None]
        needs.append(_need(step, sizes, [size for size in rows if size], unknown))
        for made in step.made:
            weights |= {made: sizes[0]} if sizes and step.name in MAKES_MODELS else {}
            known |= {made: _made(step, rows[0])} if rows and rows[0] else {}
    return needs


def _made(step: RecipeStep, rows: Mapping[str, float]) -> Mapping[str, float]:
    """Return the size of what a command makes of its rows: a pair has two answers."""
    return {"rows": rows["rows"], "tokens": rows["tokens"] + 2 * WRITTEN} if step.name == "data" else rows


def _need(
    step: RecipeStep, models: Sequence[float], data: Sequence[Mapping[str, float]], unknown: Iterable[str]
) -> Need:
    if not models:
        return Need(0.0, 0.0 if step.name == "python" else math.nan, tuple(unknown))
    if step.name == "align":
        return _training(step, models, next(iter(data), None), tuple(unknown))
    memory = 2.4 * sum(models)
    if not data and step.name == "generate" and not step.data:
        data = [{"rows": 1, "tokens": 100}]
    if not data:
        return Need(memory, math.nan, tuple(unknown))
    passes = {"compare": COMPARED, "data": 2}.get(step.name, 1) * Need(memory, 0.0).gpus
    batch = BATCH["vllm"] if step.name == "data" else int(step.option("batch_size", "8"))
    seconds = 0.0
    for rows in data:
        new = rows.get("new", int(step.option("max_new_tokens", str(WRITTEN))))
        reading = 2 * sum(models) * rows["rows"] * rows["tokens"] / OPERATIONS
        seconds += reading + 2 * sum(models) / BANDWIDTH * new * math.ceil(rows["rows"] / batch)
    return Need(memory, passes * seconds / 3600, tuple(unknown))


def _training(
    step: RecipeStep, models: Sequence[float], rows: Mapping[str, float] | None, unknown: tuple[str, ...]
) -> Need:
    """Estimate a training: the first model learns, and a reference or a teacher reads with it."""
    from contralto.align.recipe_files import find_recipe, read_recipe

    options = read_recipe(str(find_recipe(step.words[2])))
    has_adapter = "--use_peft" in step.words or bool(options.get("use_peft"))
    trained, others = models[0], sum(models[1:])
    memory = (ADAPTER if has_adapter else FULL + 2) * trained + 2 * others
    if rows is None:
        return Need(1.2 * memory, math.nan, unknown)
    epochs = float(step.option("num_train_epochs", str(options.get("num_train_epochs", 3))))
    rounds = float(step.option("rounds", "1"))
    operations = ((4 if has_adapter else 6) + 2) * trained + 2 * others
    return Need(1.2 * memory, operations * rows["rows"] * rows["tokens"] * epochs * rounds / OPERATIONS / 3600, unknown)


def total(needs: Sequence[Need]) -> Need:
    """Return what all commands take, one after the other.

    Args:
        needs: of the commands.
    """
    hours = sum(need.hours for need in needs if not math.isnan(need.hours))
    unknown = dict.fromkeys(name for need in needs for name in need.unknown if not name.startswith(LOCAL))
    return Need(max(need.memory for need in needs), hours, tuple(unknown))
