"""The user's own columns of rows, such as `id` and `topic`, in the rows of the data set that is made of them."""

import math
from collections.abc import Collection, Mapping
from datetime import date
from typing import Any

from contralto.common.texts import clean, short
from contralto.data_gen.preference_rows import PROMPT_PARTS, RESERVED

__all__ = ["kept_columns"]

READ = (*RESERVED, *PROMPT_PARTS, "chosen", "rejected", "image", "tools", "chat_template_kwargs")
"""Columns that training reads or rejects, so that a source's own may not have these names."""
MADE = ("id", "prompt", "images", "rejected_images")
"""Columns that the pair has from its row already."""
PREFIX = "source_"
DEEPEST = 16
"""Levels of lists and objects; what is nested more deeply becomes a string."""


def kept_columns(row: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """Return the columns of a row of the source that its pairs keep, as JSON values.

    A column keeps its name, unless the data set has a column of that name or training would read it: then it becomes `source_NAME`. Values
    that JSON does not hold, such as images and bytes, are left out. Nothing here fails: the answers have been paid for.

    Args:
        row: as `read_rows` returns it.
        taken: the names of the columns of the pair.

    Examples:
        >>> kept_columns({"id": "7", "prompt": [], "topic": "haste", "context": "c", "seed": 1}, ["seed"])
        {'topic': 'haste', 'source_context': 'c', 'source_seed': 1}
    """
    kept: dict[str, Any] = {}
    for name, value in row.items():
        if name in MADE:
            continue
        free = clean(str(name))
        free = PREFIX + free if free in READ or free in taken else free
        if free not in taken and free not in kept and (plain := _plain(value, 0)) is not _LEFT_OUT:
            kept[free] = plain
    return kept


_LEFT_OUT = object()


def _plain(value: Any, depth: int) -> Any:
    """Return a value as Arrow and JSON hold it; `_LEFT_OUT` if it is none."""
    if isinstance(value, Mapping | list | tuple):
        return _nested(value, depth)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, date):  # also a datetime
        return value.isoformat()
    if isinstance(value, str):
        return clean(value)
    return value if value is None or isinstance(value, bool) else _LEFT_OUT


def _nested(value: Any, depth: int) -> Any:
    if depth == DEEPEST:
        return short(str(value))
    if isinstance(value, Mapping):
        parts = {clean(str(name)): _plain(each, depth + 1) for name, each in value.items()}
        return _LEFT_OUT if any(each is _LEFT_OUT for each in parts.values()) else parts
    items = [_plain(each, depth + 1) for each in value]
    return _LEFT_OUT if any(each is _LEFT_OUT for each in items) else items
