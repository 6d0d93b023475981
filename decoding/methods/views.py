"""Views: other inputs of the same model, for the branches of methods that need no other model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from contralto.decoding.methods.reference import Reference

__all__ = ["VIEWS", "Extra", "View"]


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A parameter that is not one of the rule.

    Args:
        of: the callable whose signature has its default, its type and its description.
        name: its name there; None if it is the same.
        convert: makes a value of what users write; None for numbers and truth values.
        least: the smallest value that is valid; None if there is no such bound.
        is_new: whether descriptions leave it out while it is None, so that files of earlier versions keep their keys.
    """

    of: Reference
    name: str | None = None
    convert: Callable[[Any], Any] | None = None
    least: int | None = None
    is_new: bool = False


@dataclass(frozen=True, kw_only=True)
class View:
    """Inputs that a model reads in place of the prompt.

    Args:
        description: a noun phrase for tables.
        reads_image: whether it is made of the images of the prompt, so that every prompt needs one.
        is_seeded: whether it depends on a seed.
        parameters: parameters of methods with this view, each of a function of pixels that checks its range.
    """

    description: str
    reads_image: bool
    is_seeded: bool
    parameters: Mapping[str, Extra]


VIEWS = {
    "noised": View(
        description="the prompt with a noised image",
        reads_image=True,
        is_seeded=True,
        parameters={"noise_step": Extra(of="contralto.decoding.images:diffusion_noise", name="step")},
    ),
    "transformed": View(
        description="the prompt with a randomly transformed image",
        reads_image=True,
        is_seeded=True,
        parameters={},
    ),
    "blind": View(
        description="the prompt without its images",
        reads_image=True,
        is_seeded=False,
        parameters={},
    ),
    "prompt": View(
        description="the contrast prompt",
        reads_image=False,
        is_seeded=False,
        parameters={},
    ),
    "shown": View(
        description="the prompt itself, read in another way",
        reads_image=True,
        is_seeded=False,
        parameters={},
    ),
}
"""Every view, by name. `contralto.decoding.inputs` makes them."""
