"""The embedded testbed: synthetic worlds with known ground truth, and tiny models trained on them.

    expert = AutoModelForCausalLM.from_pretrained(testbed.path("expert"))
    vision = LlavaForConditionalGeneration.from_pretrained(testbed.path("vision-0"))

`worlds` makes problems, stories and four-way items; `scenes` draws pictures and asks about them. `MODELS` and
`VISION_MODELS` name the trained models; README.md and VISION.md beside this file are their cards: what they learned,
what they get right, and which effects the worlds build in. `python -m contralto.testbed train` trains them anew.
"""

from pathlib import Path
from typing import Any

from contralto.common.hub import from_pretrained
from contralto.common.suggestions import did_you_mean

__all__ = ["MODELS", "VISION_MODELS", "load", "path", "tokenizer"]

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
VISION_MODELS = {
    "vision-0": "a vision-language model (LLaVA), training seed 0",
    "vision-1": "the same, training seed 1",
    "vision-2": "the same, training seed 2",
    "vision-control": "the same, of annotators without bad habits",
}
ALIASES = {"expert": "expert-0"}


def path(name: str) -> Path:
    """Return the folder of an embedded model and its tokenizer or processor, for `from_pretrained`.

    Args:
        name: a key of `MODELS` or `VISION_MODELS`, or "expert" for "expert-0".

    Raises:
        ValueError: no such model.

    Examples:
        >>> path("expert").name
        'expert-0'
    """
    name = ALIASES.get(name, name)
    if name not in MODELS | VISION_MODELS:
        known = [*ALIASES, *MODELS, *VISION_MODELS]
        raise ValueError(f"the testbed has no model {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}")
    return Path(__file__).parent / ("models" if name in MODELS else "vision_models") / name


def load(name: str) -> Any:
    """Load an embedded model in float32, ready to generate.

    Args:
        name: see `path`.

    Raises:
        ValueError: no such model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if path(name).parent.name == "vision_models" else AutoModelForCausalLM
    return from_pretrained(kind, str(path(name)), dtype="float32")


def tokenizer() -> Any:
    """Load the tokenizer that all embedded language models share."""
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, str(path("expert")))
