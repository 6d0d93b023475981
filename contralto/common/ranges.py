"""Check ranges of numbers that several parts take."""

import math
from typing import Any

__all__ = ["check_positive", "check_share"]


def check_positive(name: str, value: float, hint: str = "") -> None:
    """Raise ValueError unless a number is finite and above 0.

    Args:
        name: the name of the parameter.
        value: its value.
        hint: what to do instead, without punctuation.

    Raises:
        ValueError: the number is not above 0, infinite or NaN.

    Examples:
        >>> check_positive("temperature", 0.0)
        Traceback (most recent call last):
            ...
        ValueError: temperature must be a finite number above 0, not 0.0
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, not {value}{f': {hint}' if hint else ''}")


def check_share(name: str, value: Any) -> float:
    """Return a share above 0 and at most 1, or raise ValueError for anything else.

    Args:
        name: the name of the parameter.
        value: a number, or a number in a string.

    Raises:
        ValueError: no number, or one out of range.

    Examples:
        >>> check_share("gamma", "0.5")
        0.5
        >>> check_share("gamma", 2)
        Traceback (most recent call last):
            ...
        ValueError: gamma must lie in (0, 1], not 2
    """
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(f"{name} must lie in (0, 1], not {value!r}")
    return share
