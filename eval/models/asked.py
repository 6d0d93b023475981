"""The generation options of a request (lm-eval's `generation_kwargs`), checked before anything is answered.

Read from lm_eval 0.4.13: `normalize_gen_kwargs`, `handle_stop_sequences`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from contralto.eval.models.decoder import SAMPLING

__all__ = ["Asked", "read_options"]

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names of lm-eval for the number of new tokens, the first one first."""
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


class Asked(NamedTuple):
    """The generation options of a request."""

    stop: list[str]
    """The stop strings, the text of the end token among them."""
    length: int
    """The number of new tokens."""
    sampling: dict[str, Any]
    """`temperature` (0: greedy), `top_k`, `top_p`, `min_p`."""
    more: dict[str, Any]
    """Further arguments of `generate()`."""


def read_options(gen_kwargs: Any, *, default: int, eos: str) -> Asked:
    """Read the generation options of a request.

    Args:
        gen_kwargs: `generation_kwargs` of the task, or `--gen_kwargs`.
        default: the number of new tokens where the options do not say.
        eos: the text of the end token.

    Returns:
        The options as this package uses them.

    Raises:
        TypeError: no mapping.
        ValueError: an option of another type or outside its range, sampling without a temperature, or an option that the
            evaluated model sets itself.

    Examples:
        >>> asked = read_options({"until": "\\n", "do_sample": True, "temperature": 0.7}, default=256, eos="</s>")
        >>> asked.stop, asked.length, asked.sampling["temperature"]
        (['\\n', '</s>'], 256, 0.7)
        >>> read_options({"until": None}, default=256, eos="</s>")
        Traceback (most recent call last):
            ...
        ValueError: the task's generation option until must be a string or a list of strings, not None: leave it out for none
    """
    if not isinstance(gen_kwargs, Mapping):
        raise TypeError(f"the task's generation options must be names with values, not {gen_kwargs!r}")
    given = dict(gen_kwargs)
    _check_until(given)
    _check_lengths(given)
    _check_sampling(given)
    _check_others(given)
    kwargs = normalize_gen_kwargs(given, default)
    stop = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
    length = kwargs.pop("max_gen_toks")
    sampling = {name: kwargs.pop(name, off) for name, off in SAMPLING.items()}
    if not kwargs.pop("do_sample", False):
        sampling = dict(SAMPLING)
    return Asked(stop, length, sampling, dict(kwargs))


def _check_until(given: Mapping[str, Any]) -> None:
    until = given.get("until", [])
    strings = [until] if isinstance(until, str) else until
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise _wrong("until", "a string or a list of strings", until, ": leave it out for none")


def _check_lengths(given: Mapping[str, Any]) -> None:
    for name in (*LENGTHS, "max_length"):
        value = given.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _wrong(name, "a whole number above 0", value)


def _check_sampling(given: Mapping[str, Any]) -> None:
    for name, (low, high) in NUMBERS.items():
        value = given.get(name, low)
        kind = int if name == "top_k" else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or value == math.inf:
            limit = "at least 0" if high == math.inf else "from 0 to 1"
            raise _wrong(name, f"a {'whole ' * (kind is int)}number {limit}", value)
    if given.get("top_p", 1.0) == 0:
        raise _wrong("top_p", "a number above 0", given["top_p"])
    if not isinstance(given.get("do_sample"), bool | None):
        raise _wrong("do_sample", "true or false", given["do_sample"])
    if given.get("do_sample") and not given.get("temperature"):
        raise ValueError(
            "the task samples (do_sample) and names no temperature above 0: give one, such as temperature=1"
        )


def _check_others(given: Mapping[str, Any]) -> None:
    if named := [name for name in RESERVED if name in given]:
        raise ValueError(
            f"the generation option {named[0]} is set by the evaluated model itself, not by the task: leave it out"
        )
    if given.get("num_return_sequences", 1) != 1:
        raise _wrong("num_return_sequences", "1, since a request has one answer", given["num_return_sequences"])


def _wrong(name: str, wanted: str, value: Any, hint: str = "") -> ValueError:
    return ValueError(f"the task's generation option {name} must be {wanted}, not {value!r}{hint}")
