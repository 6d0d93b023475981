"""Rows of preference pairs as a `datasets.Dataset`, their images stored inside."""

import io
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contralto.common.columns import as_dataset
from contralto.data_gen.sources import IMAGES
from contralto.data_gen.types import Message

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["stored", "to_dataset"]

CONVERSATIONS = ("prompt", "chosen", "rejected", "completion")


def to_dataset(rows: Sequence[Mapping[str, Any]]) -> "Dataset":
    """Return rows of pairs or completions as a `datasets.Dataset` of one schema, with images stored inside.

    Args:
        rows: with `prompt`, and `chosen` and `rejected` or `completion`, all as messages or all as texts; images as paths, bytes or Pillow images.
            A column that a row lacks is None there.

    Raises:
        ValueError: there are no rows, or no type holds the values of a column.
    """
    from datasets import Image, List

    rows = _alike(rows)
    pictures = {
        name: ([[stored(image) for image in row.get(name) or ()] for row in rows], List(Image()))
        for name in IMAGES
        if any(name in row for row in rows)
    }
    return as_dataset(rows, known=pictures)


def _alike(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Convert the contents of all rows to lists of parts if one of them is a list, since templates expect one form."""
    if not any(isinstance(m["content"], list) for row in rows for name in _named(row) for m in _messages(row[name])):
        return rows
    return [{**row, **{name: [_in_parts(m) for m in row[name]] for name in _named(row)}} for row in rows]


def _named(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row that hold conversations."""
    return [name for name in CONVERSATIONS if name in row]


def _messages(value: Any) -> Sequence[Message]:
    return value if isinstance(value, list) else ()


def _in_parts(message: Message) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def stored(image: Any) -> dict[str, Any]:
    """Return an image's bytes: of its file as they are, of a Pillow image as PNG.

    Args:
        image: a path, a Pillow image, or a mapping with `bytes` or `path`, as `datasets` keeps images.
    """
    if isinstance(image, Mapping):
        return dict(image) if image.get("bytes") else {"bytes": Path(image["path"]).read_bytes(), "path": None}
    if isinstance(image, str | PathLike):
        return {"bytes": Path(image).read_bytes(), "path": None}
    png = io.BytesIO()
    image.save(png, format="PNG")
    return {"bytes": png.getvalue(), "path": None}
