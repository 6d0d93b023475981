"""Errors about options that the library and the command line spell in their own way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Option", "OptionError"]


@dataclass(frozen=True)
class Option:
    """An option in the message of an error.

    Args:
        name: its name in Python.
        value: its value, if the message says it.

    Examples:
        >>> str(Option("method", "cd")), str(Option("noise_step"))
        ("method='cd'", 'noise_step')
    """

    name: str
    value: Any = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


class OptionError(ValueError):
    """An invalid option, or options that exclude each other.

    Args:
        template: the message, with names of `parts` in braces.
        parts: an `Option`, several, or any other value.

    Examples:
        >>> error = OptionError("{method} has no {name}", method=Option("method", "vcd"), name=Option("noise_step"))
        >>> str(error)
        "method='vcd' has no noise_step"
        >>> error.spelled(lambda option: option.name.upper())
        'METHOD has no NOISE_STEP'
    """

    def __init__(self, template: str, **parts: Any) -> None:
        self.template, self.parts = template, parts
        super().__init__(self.spelled(str))

    def spelled(self, spell: Callable[[Option], str]) -> str:
        """Return the message.

        Args:
            spell: returns what an option is called.
        """
        return self.template.format(**{name: _spelled(part, spell) for name, part in self.parts.items()})

    def within(self, place: str) -> "OptionError":
        """Return the same error with the failed action before its message.

        Args:
            place: the beginning of the message.
        """
        return OptionError("{place}: " + self.template, **{**self.parts, "place": place})


def _spelled(part: Any, spell: Callable[[Option], str]) -> Any:
    if isinstance(part, Option):
        return spell(part)
    if isinstance(part, list | tuple):
        return ", ".join(str(_spelled(each, spell)) for each in part)
    return part  # numbers keep their format
