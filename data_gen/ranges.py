"""Range checks for the numbers and texts of a recipe: YAML has NaN, infinity, and strings in place of numbers."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["check_batch", "check_number", "check_texts"]


def check_number(
    name: str, value: Any, *, least: float = 0, above: float | None = None, most: float, whole: bool = False
) -> None:
    """Require a finite number in a range.

    Args:
        name: the name of the option, for the error.
        value: the value.
        least: the least value, unless `above` is given.
        above: a number that the value must exceed.
        most: the greatest value.
        whole: whether only integers are allowed.

    Raises:
        ValueError: the value is no such number.

    Examples:
        >>> check_number("concurrency", 10**9, least=1, most=10_000, whole=True)
        Traceback (most recent call last):
            ...
        ValueError: concurrency must be at most 10,000, not 1000000000
        >>> check_number("temperature", float("nan"), most=100)
        Traceback (most recent call last):
            ...
        ValueError: temperature must be a number, not nan
    """
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"{name} must be a {'whole ' * whole}number, not {value!r:.80}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be above {above:,}, not {value!r:.80}")
    if above is None and value < least:
        raise ValueError(f"{name} must be at least {least:,}, not {value!r:.80}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, not {value!r:.80}")


def check_batch(batch_size: Any, max_length: Any = None) -> None:
    """Require a plausible batch size and maximal length of texts.

    Args:
        batch_size: rows of a batch.
        max_length: tokens of a text; None is no limit.

    Raises:
        ValueError: one of them is no such number.
    """
    check_number("batch_size", batch_size, least=1, most=65_536, whole=True)
    if max_length is not None:
        check_number("max_length", max_length, least=1, most=2**31 - 1, whole=True)


def check_texts(options: Mapping[str, Any], where: str, *names: str) -> None:
    """Require non-empty strings.

    Args:
        options: options by name.
        where: the beginning of errors.
        names: the names of the options; options that are missing are not checked.

    Raises:
        ValueError: one of them is not a non-empty string.

    Examples:
        >>> check_texts({"output": None}, "recipe.yaml", "output")
        Traceback (most recent call last):
            ...
        ValueError: recipe.yaml: output must be a string, not None
    """
    for name in names:
        if name in options and not (isinstance(options[name], str) and options[name]):
            raise ValueError(f"{where}: {name} must be a string, not {options[name]!r:.80}")
