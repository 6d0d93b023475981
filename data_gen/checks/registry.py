"""Checks by name, their settings, and their application to the pairs of a data set."""

# ruff: noqa: TRY004 (a wrong type in a recipe is a ValueError like any other mistake in it)

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from contralto.common.errors import Mistakes
from contralto.common.registry import Registry
from contralto.data_gen.checks.base import CheckFunction, PairRows, columns_of
from contralto.data_gen.checks.contamination import contamination
from contralto.data_gen.checks.contrast import contrast, finish
from contralto.data_gen.checks.duplicates import duplicates
from contralto.data_gen.checks.filters import check_filter
from contralto.data_gen.checks.models import ches, image_similarity, reward
from contralto.data_gen.settings import check_call

__all__ = ["CHECKS", "annotate", "check_settings"]


def _check_entry(entry: Any) -> None:
    if not callable(entry):
        raise ValueError(f"a check must be a function of the pairs, not {entry!r}")


CHECKS: Registry[CheckFunction] = Registry("check", group="contralto.checks", check=_check_entry)
"""The checks by name. Packages add theirs by entry points of the group `contralto.checks`."""
for _check in (contrast, finish, duplicates, contamination, ches, reward, image_similarity):
    CHECKS.register(_check, name=_check.__name__)


def annotate(rows: PairRows, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pairs with the columns that checks write. Nothing is dropped.

    Args:
        rows: with `id`, and `prompt`, `chosen`, `rejected` as messages, in the order of the data set.
        settings: the checks by name, each with its settings.

    Raises:
        ValueError: there is no such check or setting, or a check rejects its settings or the pairs.

    Examples:
        >>> row = {"prompt": [], "chosen": [{"content": "It is 4."}], "rejected": [{"content": "It is 5."}]}
        >>> [checked] = annotate([row], {"contrast": {}})
        >>> checked["jaccard"], checked["levenshtein"], checked["length_ratio"], checked["no_op"]
        (0.5, 1, 1.0, False)
    """
    annotated = [dict(row) for row in rows]
    for name, options in settings.items():
        for column, values in _run(name, options, rows).items():
            for row, value in zip(annotated, values, strict=True):
                row[column] = value
    return annotated


def _run(name: str, options: Any, rows: PairRows) -> Mapping[str, list[Any]]:
    """Return the columns that a check writes.

    Raises:
        ValueError: there is no such check, or its settings are wrong.
    """
    check = CHECKS.get(name)
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"check {name}: its settings must be a mapping, such as {{}}, not {options!r}")
    check_call(check, options or {}, f"check {name}", skip=1)
    return check(rows, **(options or {}))


def check_settings(checks: Mapping[str, Any], filters: Mapping[str, Any]) -> None:
    """Validate the checks and filters of a recipe before any request is sent.

    Args:
        checks: settings by the name of the check.
        filters: conditions by column.

    Raises:
        ValueError: there is no such check or setting, a value is out of range, a file does not exist, a filter has another form,
            or it reads a column whose check is not named.

    Examples:
        >>> check_settings({"contrast": {}}, {"ln_ches": [None, 0]})
        Traceback (most recent call last):
            ...
        ValueError: filter ln_ches needs the output of the check ches: add that check
    """
    mistakes = Mistakes()
    for name, options in checks.items():
        with mistakes.collected():
            _run(name, options, [])
    known = [CHECKS[name] for name in checks if name in CHECKS.names()]
    for column, condition in filters.items():
        with mistakes.collected():
            check_filter(column, condition)
            if not any(column in columns_of(check) for check in known) and (needed := _writer_of(column)):
                raise ValueError(f"filter {column} needs the output of the check {needed}: add that check")
    mistakes.report()


def _writer_of(column: str) -> str | None:
    """Return the name of the check that alone writes a column."""
    for name in CHECKS.names():
        with suppress(ValueError):  # the entry point of a check that the recipe does not name may be broken
            if column in columns_of(CHECKS[name]):
                return name
    return None
