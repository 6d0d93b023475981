"""Filters drop pairs by the columns that checks have written."""

# ruff: noqa: TRY004 (a wrong type in a recipe is a ValueError like any other mistake in it)

import math
from collections.abc import Callable, Mapping
from typing import Any

from contralto.data_gen.checks.base import PairRows

__all__ = ["check_filter", "select"]


def select(rows: PairRows, filters: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], str]]]:
    """Split pairs into those that pass every filter and the others, each with the first reason.

    Args:
        rows: pairs with the columns of the checks.
        filters: by column: a value (null: the column is empty); a list of values; a band `[low, high]`, both included, null
            for an open end; or `{lowest: share}`, `{highest: share}` of the pairs that have a number there. A pair without a
            value in the column passes only where null is allowed.

    Returns:
        The pairs that are kept, in order, and those that are dropped, each with a reason that names the column.

    Raises:
        ValueError: a filter has another form, or no pair has its column.

    Examples:
        >>> kept, dropped = select([{"id": "a", "levenshtein": 3}, {"id": "b", "levenshtein": 900}], {"levenshtein": [1, 800]})
        >>> [row["id"] for row in kept], [reason for _, reason in dropped]
        (['a'], ['levenshtein above 800'])
    """
    tests = {column: _test(rows, column, condition) for column, condition in filters.items()}
    kept: list[dict[str, Any]] = []
    dropped: list[tuple[dict[str, Any], str]] = []
    for row in map(dict, rows):
        reason = next((why for column, test in tests.items() if (why := test(row.get(column)))), None)
        if reason:
            dropped.append((row, reason))
        else:
            kept.append(row)
    return kept, dropped


def _test(rows: PairRows, column: str, condition: Any) -> Callable[[Any], str | None]:
    """Return a function that maps a value to the reason to drop it, or to None."""
    check_filter(column, condition)
    if rows and not any(column in row for row in rows):
        known = ", ".join(sorted({name for row in rows for name in row}))
        raise ValueError(f"filter {column}: no row has this column; the columns are {known}")
    if isinstance(condition, Mapping):
        ((which, share),) = condition.items()
        numbers = sorted((row[column] for row in rows if row.get(column) is not None), reverse=which == "highest")
        if not numbers:
            return lambda value: f"{column} is not known"
        last = numbers[max(1, math.ceil(share * len(numbers))) - 1]
        low, high = (None, last) if which == "lowest" else (last, None)
        return _band(column, low, high, outside=f"{column} not among the {which} {share:g}")
    if _is_band(condition):
        return _band(column, *condition)
    allowed = condition if isinstance(condition, list) else [condition]
    return lambda value: None if value in allowed else f"{column} is {'not known' if value is None else value}"


def _band(column: str, low: float | None, high: float | None, outside: str = "") -> Callable[[Any], str | None]:
    """Return the test of a band of numbers; `outside` replaces its reasons."""

    def reason(value: Any) -> str | None:
        if value is None:
            return f"{column} is not known"
        if not isinstance(value, int | float):
            raise ValueError(f"filter {column}: a band needs numbers, but a row has {value!r}")
        if low is not None and value < low:
            return outside or f"{column} below {low:g}"
        return outside or f"{column} above {high:g}" if high is not None and value > high else None

    return reason


def _is_band(condition: Any) -> bool:
    """Return True for a list of two numbers, or a number and null; every other list is a choice of values."""
    if not isinstance(condition, list) or len(condition) != 2 or condition == [None, None]:
        return False
    return all(end is None or (isinstance(end, int | float) and not isinstance(end, bool)) for end in condition)


def check_filter(column: str, condition: Any) -> None:
    """Reject a filter of a form that `select` does not know.

    Args:
        column: the column that it reads.
        condition: the filter, as the recipe has it.

    Raises:
        ValueError: it has another form, or keeps nothing.
    """
    allowed = "a value, a list of values, a band [low, high], or {lowest: share}"
    if isinstance(condition, Mapping):
        if list(condition) not in (["lowest"], ["highest"]):
            raise ValueError(f"filter {column} must be {allowed}, not {dict(condition)!r}")
        ((which, share),) = condition.items()
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"filter {column}: {which} must be a fraction in (0, 1], not {share!r}")
    elif isinstance(condition, list):
        if not condition or condition == [None, None]:
            raise ValueError(f"filter {column} must be {allowed}, not {condition!r}: it would keep no row, or all rows")
        if _is_band(condition) and None not in condition and condition[0] > condition[1]:
            raise ValueError(
                f"filter {column}: the band {condition!r} is empty, because its low end is above its high end"
            )
    elif not isinstance(condition, str | int | float | bool | None):
        raise ValueError(f"filter {column} must be {allowed}, not {condition!r}")
