"""The spelling of an amateur that is the model itself, weakened: `self:layers=8`, `self:dropout=0.3`, `self:int8`.

It is written where the name of another model is expected, in every command, engine and configuration.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from contralto.decoding.methods.reference import Reference, load

__all__ = ["PREFIX", "VARIANTS", "VariantKind", "is_variant", "make_variant", "variant_options"]

PREFIX = "self:"


class VariantKind(NamedTuple):
    """A way to weaken a model."""

    make: Reference
    """Called with the model and the options, by name."""
    options: Mapping[str, type]
    """Types of its options; the first one is required, and names the kind."""
    description: str
    """A noun phrase for tables."""


VARIANTS = {
    "layers": VariantKind("contralto.decoding.branches:EarlyExit", {"layers": int}, "its first layers"),
    "dropout": VariantKind("contralto.decoding.branches:Dropout", {"rate": float, "seed": int}, "with dropout"),
    "int": VariantKind("contralto.decoding.branches:quantized_copy", {"bits": int}, "with weights of a few bits"),
}
"""The kinds by the word that begins them."""
FORMS = "self:layers=8, self:dropout=0.3 (or self:dropout=0.3,seed=1) or self:int8 (2 to 8)"


def is_variant(name: Any) -> bool:
    """Return whether the name of a model stands for the main model itself, weakened.

    Args:
        name: the value of an option for another model.

    Examples:
        >>> is_variant("self:int4"), is_variant("testbed:amateur")
        (True, False)
    """
    return isinstance(name, str) and name.startswith(PREFIX)


def variant_options(name: str) -> tuple[str, dict[str, Any]]:
    """Return the kind of a variant and its options.

    Args:
        name: such as `self:layers=8`.

    Raises:
        ValueError: no variant is spelled like that.

    Examples:
        >>> variant_options("self:dropout=0.3,seed=1")
        ('dropout', {'rate': 0.3, 'seed': 1})
        >>> variant_options("self:layer=8")
        Traceback (most recent call last):
            ...
        ValueError: the model itself as an amateur is spelled self:layers=8, self:dropout=0.3 (or self:dropout=0.3,seed=1) or self:int8 (2 to 8), not 'self:layer=8'
    """
    match = re.fullmatch(r"self:([a-z]+)=?([\d.e-]+)(?:,(.*))?", name)
    kind = VARIANTS.get(match[1]) if match else None
    try:
        if match is None or kind is None or (match[1] == "int") == ("=" in name.split(",")[0]):
            raise ValueError("no such kind")
        first, *others = kind.options
        pairs = [tuple(part.split("=", 1)) for part in (match[3] or "").split(",") if part]
        written = {first: match[2], **dict(pairs)}
        if set(written) - {first, *others} or len(written) != 1 + len(pairs):
            raise ValueError("unknown options, or an option twice")
        return match[1], {option: kind.options[option](value) for option, value in written.items()}
    except ValueError:
        raise ValueError(f"the model itself as an amateur is spelled {FORMS}, not {name!r}") from None


def make_variant(name: str, model: Any) -> Any:
    """Return a weakened variant of a model, as a branch takes it.

    Args:
        name: such as `self:layers=8`.
        model: the main model.

    Raises:
        ValueError: an invalid name, a value out of range, or a model whose layers cannot be found.

    Examples:
        >>> from contralto import testbed
        >>> make_variant("self:layers=2", testbed.load("expert")).description
        "the first 2 of the model's 3 layers"
    """
    kind, options = variant_options(name)
    return load(VARIANTS[kind].make)(model, **options)
