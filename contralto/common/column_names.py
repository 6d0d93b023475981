"""Read rows whose columns have other names: `prompt=question chosen=good`."""

# ruff: noqa: TRY004 (a wrong type in somebody's data is a ValueError like any other mistake in it)

from collections.abc import Mapping, Sequence
from typing import Any

from contralto.common.suggestions import did_you_mean

__all__ = ["column_names", "rename_columns"]


def column_names(words: Sequence[str], known: Sequence[str] | None, where: str = "columns") -> dict[str, str]:
    """Return the names of the columns that a user maps, by the names under which they are read.

    Args:
        words: `NAME=COLUMN` each; `COLUMN` may have dots, for a field of an object or an index of a list: `answers.0.text`.
        known: the names that can be mapped; None is all.
        where: the option, for errors.

    Raises:
        ValueError: a word has another form, a name is unknown or given twice.

    Examples:
        >>> column_names(["prompt=question", "chosen=answers.0"], ["prompt", "chosen"])
        {'prompt': 'question', 'chosen': 'answers.0'}
        >>> column_names(["promt=question"], ["prompt", "chosen"])
        Traceback (most recent call last):
            ...
        ValueError: columns: there is no column 'promt' to map (did you mean 'prompt'?); there are prompt, chosen
    """
    names: dict[str, str] = {}
    for word in words:
        name, equals, column = word.partition("=")
        if not equals or not column:
            raise ValueError(f"{where}: must be NAME=COLUMN, such as prompt=question, not {word!r}")
        if known is not None and name not in known:
            raise ValueError(
                f"{where}: there is no column {name!r} to map{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
        if name in names:
            raise ValueError(f"{where}: {name} is given twice")
        names[name] = column
    return names


def rename_columns(record: Any, names: Mapping[str, str], where: str) -> Any:
    """Return a record with its columns under the names by which they are read.

    A column that already has the name of a mapped one is replaced, and kept as `source_NAME`.

    Args:
        record: the record.
        names: as `column_names` returns them.
        where: the beginning of errors.

    Raises:
        ValueError: the record is no object, or lacks a column.

    Examples:
        >>> rename_columns({"question": "2 + 2?", "answers": ["4", "5"]}, {"prompt": "question", "chosen": "answers.0"}, "row 1")
        {'answers': ['4', '5'], 'prompt': '2 + 2?', 'chosen': '4'}
    """
    if not names:
        return record
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, not a {type(record).__name__}")
    mapped = {name: _value(record, column, f"{where}, column {name}") for name, column in names.items()}
    moved = {column for column in names.values() if column in record}
    kept = {f"source_{k}" if k in mapped else k: v for k, v in record.items() if k not in moved}
    return {**kept, **mapped}


def _value(record: Mapping[str, Any], column: str, where: str) -> Any:
    """Return the value of a column, or of a field inside it."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(
                f"{where}: there is no column {column!r}{did_you_mean(column, record)}; the row has {', '.join(map(str, record))}"
            )
    return value
