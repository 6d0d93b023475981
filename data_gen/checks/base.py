"""The protocol of checks: functions of all pairs of a data set that return new columns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from contralto.data_gen.templates import content_text

__all__ = ["CheckFunction", "Columns", "PairRows", "answer_text", "columns_of", "writes"]

PairRows = Sequence[Mapping[str, Any]]
"""The pairs of a data set, with `id`, and `prompt`, `chosen`, `rejected` as messages, in their order."""
Columns = dict[str, list[Any]]
"""New columns by name, with one value per pair."""
CheckFunction = Callable[..., Columns]
"""A function of `PairRows` and keyword-only settings. It checks its settings before it reads a row, and is called with no rows to do so."""


def writes(*columns: str) -> Callable[[CheckFunction], CheckFunction]:
    """Return a decorator that declares the columns which only this check writes.

    A filter on one of them is an error if the recipe does not name the check.

    Args:
        columns: the names of the columns.
    """

    def declare(check: CheckFunction) -> CheckFunction:
        check.columns = columns  # type: ignore[attr-defined]
        return check

    return declare


def columns_of(check: CheckFunction) -> tuple[str, ...]:
    """Return the columns that a check has declared with `writes`.

    Args:
        check: the function.
    """
    return getattr(check, "columns", ())


def answer_text(row: Mapping[str, Any], name: str) -> str:
    """Return the text of an answer, all of its turns.

    Args:
        row: a pair.
        name: `chosen` or `rejected`.
    """
    return "\n\n".join(content_text(message.get("content") or "") for message in row[name])
