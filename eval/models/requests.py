"""Requests of lm-eval as contralto's models answer them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["EvalRequest", "images_of"]


@dataclass(frozen=True)
class EvalRequest:
    """One request: a prompt to continue, or a continuation to score."""

    context: str
    arguments: tuple[Any, ...]
    """The arguments as lm-eval made them, the key in its cache; empty if the answer is not cached."""
    doc: Mapping[str, Any]
    seed: int
    """The seed of sampling, noise and transformations."""
    images: tuple[Any, ...] = ()
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continuation: str = ""
    tokens: tuple[Sequence[int], Sequence[int]] | None = None
    """The tokens of context and continuation, if the likelihood of the continuation is requested."""


def images_of(media: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """Return the images of a request.

    Args:
        media: The arguments of lm-eval's request after its texts.
    """
    return tuple(media[0].get("visual", ())) if media else ()
