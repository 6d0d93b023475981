"""The generation options of a request (lm-eval's `generation_kwargs`).

Read from lm_eval 0.4.13: `normalize_gen_kwargs`, `handle_stop_sequences`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from contralto.eval.models.decoder import SAMPLING

__all__ = ["GenerationOptions", "read_options"]

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm-eval's names for the number of new tokens, the one that it normalizes to first."""
NUMBERS = {"temperature": (0.0, math.inf), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "top_k": (0, math.inf)}
"""The ranges of the options of sampling."""
RESERVED = (
    "attention_mask",
    "custom_generate",
    "eos_token_id",
    "input_ids",
    "inputs",
    "logits_processor",
    "pad_token_id",
    "return_dict_in_generate",
    "stop_strings",
    "stopping_criteria",
    "streamer",
)
"""Arguments of `generate()` that the evaluated model sets itself."""


class GenerationOptions(NamedTuple):
    """The generation options of a request."""

    stop: list[str]
    """The stop strings, the text of the end token among them."""
    length: int
    """The number of new tokens."""
    sampling: dict[str, Any]
    """`temperature` (0: greedy), `top_k`, `top_p`, `min_p`."""
    other: dict[str, Any]
    """Further arguments of `generate()`."""


def read_options(gen_kwargs: Any, *, default: int, eos: str) -> GenerationOptions:
    """Check the generation options of a request and normalize their names.

    Args:
        gen_kwargs: `generation_kwargs` of the task, or `--gen_kwargs`.
        default: The number of new tokens if the options do not set it.
        eos: The text of the end token.

    Returns:
        The options.

    Raises:
        TypeError: The options are not a mapping.
        ValueError: An option has another type or is out of range, sampling has no temperature, or the evaluated model sets the
            option itself.

    Examples:
        >>> options = read_options({"until": "\\n", "do_sample": True, "temperature": 0.7}, default=256, eos="</s>")
        >>> options.stop, options.length, options.sampling["temperature"]
        (['\\n', '</s>'], 256, 0.7)
        >>> read_options({"until": None}, default=256, eos="</s>")
        Traceback (most recent call last):
            ...
        ValueError: the task's generation option until must be a string or a list of strings, not None: leave it out for none
    """
    if not isinstance(gen_kwargs, Mapping):
        raise TypeError(f"the task's generation options must be names with values, not {gen_kwargs!r}")
    options = dict(gen_kwargs)
    for check in (_check_until, _check_lengths, _check_sampling, _check_others):
        check(options)
    kwargs = normalize_gen_kwargs(options, default)
    stop = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
    length = kwargs.pop("max_gen_toks")
    sampling = {name: kwargs.pop(name, off) for name, off in SAMPLING.items()}
    if not kwargs.pop("do_sample", False):
        sampling = dict(SAMPLING)
    return GenerationOptions(stop, length, sampling, dict(kwargs))


def _check_until(options: Mapping[str, Any]) -> None:
    until = options.get("until", [])
    strings = [until] if isinstance(until, str) else until
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise _wrong("until", "a string or a list of strings", until, ": leave it out for none")


def _check_lengths(options: Mapping[str, Any]) -> None:
    for name in (*LENGTHS, "max_length"):
        value = options.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _wrong(name, "a whole number above 0", value)


def _check_sampling(options: Mapping[str, Any]) -> None:
    for name, (low, high) in NUMBERS.items():
        value = options.get(name, low)
        kind = int if name == "top_k" else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or value == math.inf:
            limit = "at least 0" if high == math.inf else "from 0 to 1"
            raise _wrong(name, f"a {'whole ' * (kind is int)}number {limit}", value)
    if options.get("top_p", 1.0) == 0:
        raise _wrong("top_p", "a number above 0", options["top_p"])
    if not isinstance(options.get("do_sample"), bool | None):
        raise _wrong("do_sample", "true or false", options["do_sample"])
    if options.get("do_sample") and not options.get("temperature"):
        raise ValueError(
            "the task samples (do_sample) and names no temperature above 0: give one, such as temperature=1"
        )


def _check_others(options: Mapping[str, Any]) -> None:
    if named := [name for name in RESERVED if name in options]:
        raise ValueError(
            f"the generation option {named[0]} is set by the evaluated model itself, not by the task: leave it out"
        )
    if options.get("num_return_sequences", 1) != 1:
        raise _wrong("num_return_sequences", "1, since a request has one answer", options["num_return_sequences"])


def _wrong(name: str, expected: str, value: Any, hint: str = "") -> ValueError:
    return ValueError(f"the task's generation option {name} must be {expected}, not {value!r}{hint}")
