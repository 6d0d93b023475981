"""Convert names of options to command-line flags, and add flags for the fields of settings."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from contralto.common.options import Option, OptionError

__all__ = ["add_fields", "add_making_flags", "as_flags", "errors_with_flags", "flag"]

SPELLED = {
    "sampling": "sample",
    "timeout": "contrast_timeout",
    "body": "contrast_max_body",
    "waiting": "contrast_waiting",
}
"""Flags that are not called as the option of the library."""


def flag(name: str) -> str:
    """Return the flag of an option.

    Args:
        name: its name in Python.

    Examples:
        >>> flag("noise_step")
        '--noise-step'
    """
    return f"--{SPELLED.get(name, name).replace('_', '-')}"


def as_flags(error: OptionError) -> str:
    """Return the message of an error with flags in place of options.

    Args:
        error: raised by the library.

    Examples:
        >>> as_flags(OptionError("{method} has no {name}", method=Option("method", "vcd"), name=Option("kappa")))
        '--method vcd has no --kappa'
    """
    return error.spelled(_spell)


def _spell(option: Option) -> str:
    return flag(option.name) if option.value in (None, True) else f"{flag(option.name)} {option.value}"


@contextmanager
def errors_with_flags() -> Iterator[None]:
    """Re-raise errors about options with flags in their messages, within a command that has these flags.

    Raises:
        ValueError: in place of an `OptionError`.
    """
    try:
        yield
    except OptionError as error:
        raise ValueError(as_flags(error)) from error


def add_fields(
    parser: argparse.ArgumentParser, config: Any, texts: Mapping[str, str], kinds: Mapping[str, type]
) -> None:
    """Add a flag for each described field of a dataclass, with the field's default.

    Args:
        parser: the parser of the command.
        config: the dataclass.
        texts: the help by the name of the field.
        kinds: types of fields whose default does not show them.
    """
    defaults = {field.name: field.default for field in fields(config)}
    for name, text in texts.items():
        default = defaults[name]
        kind = kinds.get(name) or (str if default is None else type(default))
        parser.add_argument(flag(name), type=kind, default=default, help=text)


def add_making_flags(parser: argparse.ArgumentParser) -> None:
    """Add the switches of commands that write texts with a model and train on them.

    Args:
        parser: the parser of the command.
    """
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="write and train in bfloat16 (default: where the machine multiplies it in hardware)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
