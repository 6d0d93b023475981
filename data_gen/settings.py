"""Settings of strategies, checks and engines, checked against the signature of the function or class that takes them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from contralto.common.errors import raise_mistakes
from contralto.common.suggestions import did_you_mean

__all__ = ["check_call", "setting_names"]


def setting_names(function: Callable[..., Any], *, skip: int = 0) -> list[str]:
    """Return the names of the parameters that a recipe may set.

    Args:
        function: a function or a class.
        skip: leading parameters that are no settings, such as a strategy's row.

    Examples:
        >>> setting_names(lambda row, *, n=3, **others: None, skip=1)
        ['n']
    """
    return [parameter.name for parameter in _settings(function, skip)]


def check_call(
    function: Callable[..., Any],
    settings: Mapping[str, Any],
    where: str,
    *,
    skip: int = 0,
    extra: Sequence[str] | None = None,
    noun: str = "setting ",
    hint: str = "",
    near: Sequence[str] = (),
) -> None:
    """Reject unknown settings of a function, and missing required ones.

    Args:
        function: a function or a class. One with `**` parameters takes all settings, unless `extra` is given.
        settings: the settings by name.
        where: the beginning of the error, such as `check ches`.
        skip: leading parameters that are no settings.
        extra: the names that the function takes by its `**` parameters.
        noun: the word for a setting in the error, with a space.
        hint: the end of the error for an unknown setting.
        near: further names to suggest, which the place has beside the settings.

    Raises:
        ValueError: an unknown setting, or a missing one.

    Examples:
        >>> check_call(lambda rows, *, model: None, {"modle": "m"}, "check ches", skip=1)
        Traceback (most recent call last):
            ...
        ValueError: check ches has no setting 'modle' (did you mean 'model'?); it has model
    """
    parameters = inspect.signature(function).parameters.values()
    known = [*setting_names(function, skip=skip), *(extra or ())]
    takes_all = extra is None and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    unknown = [] if takes_all else [name for name in settings if name not in known]
    raise_mistakes(
        [
            f"{where} has no {noun}{name!r}{did_you_mean(name, [*known, *near])}; it has {', '.join(known) or 'none'}{hint}"
            for name in unknown
        ]
    )
    required = [parameter.name for parameter in _settings(function, skip) if parameter.default is parameter.empty]
    if missing := [name for name in required if name not in settings]:
        raise ValueError(f"{where} needs {', '.join(missing)}")


def _settings(function: Callable[..., Any], skip: int) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    return [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
