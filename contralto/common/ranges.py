"""Check ranges of numbers that several parts take."""

import math

__all__ = ["check_positive"]


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
