"""Convert names of options to command-line flags."""

from collections.abc import Iterator
from contextlib import contextmanager

from contralto.common.options import Option, OptionError

__all__ = ["as_flags", "errors_with_flags", "flag"]

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
