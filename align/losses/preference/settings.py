"""The ranges of the losses' settings, by the paper's letter."""

import math
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["check_setting", "check_settings"]


class _Range(NamedTuple):
    contains: Callable[[float], bool]
    words: str


_POSITIVE = _Range(lambda x: 0 < x < math.inf, "be a finite number above 0")
_WEIGHT = _Range(lambda x: 0 <= x < math.inf, "be a finite number of at least 0")
_RANGES = {
    "beta": _POSITIVE,
    "tau": _POSITIVE,
    "scale": _POSITIVE,
    "epsilon": _Range(lambda x: 0 < x < 0.5, "lie in (0, 0.5), such as EXO's 1e-3"),
    "label_smoothing": _Range(lambda x: 0 <= x < 0.5, "lie in [0, 0.5)"),
    "alpha": _WEIGHT,
    "gamma": _WEIGHT,
    "eta": _WEIGHT,
    "lambda_u": _WEIGHT,
    "lambda_d": _WEIGHT,
    "penalty": _WEIGHT,
    "delta": _WEIGHT,
    "desirable_weight": _WEIGHT,
    "undesirable_weight": _WEIGHT,
    "qcrd_beta": _WEIGHT,
    "qcrd_delta": _WEIGHT,
}


def check_settings(**settings: float) -> None:
    """Raise ValueError unless every setting lies in the range of its letter.

    Args:
        settings: values by letter.

    Raises:
        ValueError: a value is out of range.
    """
    for letter, value in settings.items():
        check_setting(letter, letter, value)


def check_setting(option: str, letter: str, value: float) -> None:
    """Raise ValueError unless a value lies in the range of its letter; other letters are checked by their losses.

    Args:
        option: the name of the option in the message.
        letter: the letter of the setting.
        value: the value.

    Raises:
        ValueError: the value is out of range.
    """
    if letter in _RANGES and not _RANGES[letter].contains(value):
        raise ValueError(f"{option} must {_RANGES[letter].words}, not {value}")
