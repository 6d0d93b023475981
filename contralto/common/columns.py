"""Data sets whose columns keep every value as it was read.

Arrow gives all values of a column one type. Objects with different keys become one object with all keys, and missing ones are null:
`{"city": "Oslo"}` beside `{"x": 4}` reads `{"city": "Oslo", "x": None}`, which a chat template writes out as an argument of a tool
call. `datasets` has a type for such values, `Json`, which its JSON reader uses and `Dataset.from_list` does not by default. Here
every place without a common type becomes `Json`, whatever the source of the rows.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["as_dataset", "column"]


def as_dataset(
    rows: Sequence[Mapping[str, Any]], *, known: Mapping[str, tuple[list[Any], Any]] | None = None
) -> "Dataset":
    """Return rows as a `datasets.Dataset` that returns every value unchanged.

    Args:
        rows: a column that a row lacks is None there; `chat_template_kwargs` is empty, since TRL unpacks it.
        known: columns whose values and features are known, by name; they come last.

    Raises:
        ValueError: there are no rows, or no type holds the values of a column.

    Examples:
        >>> as_dataset([{"arguments": {"city": "Oslo"}}, {"arguments": {"x": 4}, "n": 1}])[0]
        {'arguments': {'city': 'Oslo'}, 'n': None}
    """
    from datasets import Dataset, Features

    if not rows:
        raise ValueError("a data set needs at least one row, and there is none")
    typed: dict[str, tuple[list[Any], Any]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in (known or {})):
        empty: Any = {} if name == "chat_template_kwargs" else None
        values = [row.get(name) for row in rows]
        try:
            typed[name] = column([empty if value is None else value for value in values])
        except ValueError as error:
            raise ValueError(f"column {name}: {error}") from error
    typed |= known or {}
    features = Features({name: feature for name, (_, feature) in typed.items()})
    return Dataset.from_dict({name: values for name, (values, _) in typed.items()}, features=features)


def column(values: Sequence[Any]) -> tuple[list[Any], Any]:
    """Return values for `Dataset.from_dict`, and the feature that holds them unchanged.

    As `load_dataset("json")` of datasets 5.2 does: objects with different keys, and values of types that do not mix, are stored
    as JSON; everything else has the type that Arrow infers. Numbers mix: integers beside fractions become fractions.

    Args:
        values: one per row; None for a row without one.

    Returns:
        The values, those of `Json` features written as JSON, and the feature.

    Raises:
        ValueError: neither Arrow nor JSON holds a value.

    Examples:
        >>> column([{"city": "Oslo"}, {"x": 4}])
        (['{"city": "Oslo"}', '{"x": 4}'], Json(decode=True))
        >>> column([[1, 2], None])
        ([[1, 2], None], List(Value('int64')))
    """
    from datasets import Json

    present = [value for value in values if value is not None]
    if present and all(isinstance(value, Mapping) for value in present):
        return _objects(values, present)
    if present and all(isinstance(value, list | tuple) for value in present):
        return _lists(values, present)
    if not any(isinstance(value, Mapping | list | tuple) for value in present):
        feature = _scalar(present)
        if feature is not None:
            return list(values), feature
    return [_written(value) for value in values], Json()


def _objects(values: Sequence[Any], present: Sequence[Mapping[str, Any]]) -> tuple[list[Any], Any]:
    """Return objects as structs if all have the same keys, else as JSON."""
    from datasets import Json

    names = list(present[0])
    if not names or any(set(value) != set(names) for value in present):
        return [_written(value) for value in values], Json()
    parts = {name: column([None if value is None else value[name] for value in values]) for name in names}
    rows = zip(*(held for held, _ in parts.values()), strict=True)
    held = [
        None if value is None else dict(zip(names, row, strict=True)) for value, row in zip(values, rows, strict=True)
    ]
    return held, {name: feature for name, (_, feature) in parts.items()}


def _lists(values: Sequence[Any], present: Sequence[Sequence[Any]]) -> tuple[list[Any], Any]:
    """Return lists, whose elements have one type."""
    from datasets import List

    held, feature = column([element for value in present for element in value])
    elements = iter(held)
    return [None if value is None else [next(elements) for _ in value] for value in values], List(feature)


def _scalar(values: Sequence[Any]) -> Any:
    """Return the feature of values that are neither lists nor objects; None if they have no common one."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets import Value
    from datasets.features.features import generate_from_arrow_type

    kinds = {type(value) for value in values}
    if not kinds:
        return Value("null")
    if len(kinds) > 1 and not kinds <= {int, float}:
        return None
    if kinds == {int, float}:
        return Value("float64")
    try:
        return generate_from_arrow_type(pa.array(values).type)
    except (TypeError, ValueError, OverflowError):  # of pyarrow
        return None


def _written(value: Any) -> str | None:
    """Return a value as JSON that `Json` reads back unchanged."""
    from datasets import Json

    if value is None:
        return None
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        Json().decode_example(text)
    except (TypeError, ValueError) as error:  # such as infinity, a lone surrogate, an integer beyond 64 bits
        raise ValueError(f"a value that JSON does not hold ({error}): {value!r:.80}") from error
    return text
