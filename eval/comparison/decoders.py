"""Decoders of a comparison as users write them: `cd beta=0.5 alpha=0.1`."""

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from contralto.decoding.methods import METHODS, DecodingConfig, option_names

__all__ = ["DecoderChoice", "parse_decoder"]

SHOWN_ANYWAY = {
    "score": "every method is scored both renormalised and raw",
    "masked": "every method with a mask is scored with and without it",
    "control": "the controls of every method are rows of their own",
    **dict.fromkeys(
        ("temperature", "top_k", "top_p", "min_p"), "every method is decoded both greedily and by sampling"
    ),
    "seed": "every sampled row has the seeds of the comparison",
}
"""The options of an evaluated decoder that a comparison sets itself, each with the reason."""


class DecoderChoice(NamedTuple):
    """A method to compare."""

    name: str
    """The method with the parameters that the user wrote."""
    options: dict[str, Any]
    """Arguments of `ContraltoLM.decoding_by`."""
    config: DecodingConfig


def parse_decoder(text: str, sources: Mapping[str, Any] | None = None) -> DecoderChoice:
    """Parse a method name and its options.

    Args:
        text: Such as "cd beta=0.5 alpha=0.1"; quotes as in a shell.
        sources: Other models and the contrast prompt, such as `{"amateur": "testbed:amateur"}`; a method takes those that it
            reads, unless the text names others.

    Raises:
        ValueError: There is no such method or option, a value is out of range, or a model or contrast prompt is missing.
        TypeError: A value has another type.

    Examples:
        >>> parse_decoder("vcd alpha=2").options
        {'method': 'vcd', 'alpha': 2}
        >>> parse_decoder("cd", {"amateur": "testbed:amateur"}).name
        'cd'
    """
    name, *pairs = shlex.split(text) or [""]
    if not name or "=" in name:
        raise ValueError(f"a decoder begins with its method, such as 'cd beta=0.5', not {text!r}")
    if name in METHODS and not METHODS[name].contrasts:
        raise ValueError(f"greedy decoding and sampling are compared anyway: leave {name!r} out")
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"the options of a decoder are of the form name=value, not {wrong[0]!r} in {text!r}")
    written = {key: _value(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    if shown := [key for key in written if key in SHOWN_ANYWAY and key not in option_names()]:
        raise ValueError(f"decoder {text!r}: leave {shown[0]} out, since {SHOWN_ANYWAY[shown[0]]}")
    options = {"method": name, **_sources_of(name, sources or {}, written), **written}
    try:
        config = DecodingConfig.from_options(**options)
        config.check_contrast_prompt()
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"decoder {text!r}: {error}") from None
    shown = [pair for pair in pairs if pair.split("=")[0] not in config.declaration.sources]
    return DecoderChoice(" ".join([name, *shown]), options, config)


def _sources_of(name: str, sources: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sources that a method reads; a model that the user wrote takes the place of `adapters_off`."""
    if name not in METHODS:
        return {}
    method = METHODS[name]
    own = {key: value for key, value in sources.items() if key in method.sources and value}
    if written.keys() & method.models.keys():
        own.pop("adapters_off", None)
    return own


def _value(text: str) -> Any:
    """Return a number or a truth value where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
