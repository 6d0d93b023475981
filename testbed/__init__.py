"""The embedded testbed: text worlds whose truth is known, and tiny models that really learned them.

    expert = AutoModelForCausalLM.from_pretrained(testbed.path("expert"))

`worlds` makes problems, stories and four-way items; `MODELS` names the trained models; README.md beside this file is their
card: what they learned, what they get right, and which effects the worlds build in. `python -m contralto.testbed train`
trains them anew.
"""

from pathlib import Path
from typing import Any

__all__ = ["MODELS", "load", "path", "tokenizer"]

MODELS = {
    "expert-0": "the expert, training seed 0",
    "expert-1": "the expert, training seed 1",
    "expert-2": "the expert, training seed 2",
    "early": "an early checkpoint of expert-0",
    "amateur": "a model a tenth of the size, one layer, trained briefly",
    "student": "a model a third of the size, trained briefly",
    "control-expert": "the expert of the control world, without the shortcut",
    "control-amateur": "the amateur of the control world",
}
ALIASES = {"expert": "expert-0"}


def path(name: str) -> Path:
    """The folder of an embedded model and its tokenizer, for `from_pretrained`.

    Args:
        name: a key of `MODELS`, or "expert" for "expert-0".

    Raises:
        ValueError: no such model.

    Example:
        >>> path("expert").name
        'expert-0'
    """
    name = ALIASES.get(name, name)
    if name not in MODELS:
        raise ValueError(f"the testbed has no model {name!r}; it has {', '.join([*ALIASES, *MODELS])}")
    return Path(__file__).parent / "models" / name


def load(name: str) -> Any:
    """An embedded model in float32, ready to generate. For the names see `path`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path(name), dtype="float32")


def tokenizer() -> Any:
    """The tokenizer that all embedded models share."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path("expert"))
