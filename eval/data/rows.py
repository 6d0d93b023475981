"""Rows of local JSON and JSON Lines files, checked one by one, and their images."""

import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from contralto.common.files import decode, lines_of, read_text
from contralto.decoding.pictures import open_image

__all__ = ["Document", "check_text_fields", "dataset", "image", "rows_of"]

Document = dict[str, Any]
"""A document of a task, as lm-eval passes it to the functions of the task."""


def rows_of(path: Path, check: Callable[[Document], str | None]) -> list[Document]:
    """Read and check the rows of a file of JSON Lines, or of one JSON array.

    Args:
        path: The file; one whose name ends in `.gz` is decompressed.
        check: Returns an error message for an invalid row, else None.

    Returns:
        The rows, in the order of the file.

    Raises:
        ValueError: The file is missing, empty, not JSON or not compressed by gzip, or `check` returns a message; the error names the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    text = _decompressed(path) if path.suffix == ".gz" else read_text(path)
    numbered = list(_array(path, text) if text.lstrip().startswith("[") else _lines(path, text))
    if not numbered:
        raise ValueError(f"{path} has no rows")
    for where, row in numbered:
        wrong = check(row) if isinstance(row, dict) else f"a row must be a JSON object, not {row!r}"
        if wrong:
            raise ValueError(f"{path}, {where}: {wrong}")
    return [row for _, row in numbered]


def _decompressed(path: Path) -> str:
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole file compressed by gzip: {error}") from error
    return decode(content, str(path))


def _array(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        return [(f"row {number}", row) for number, row in enumerate(json.loads(text), 1)]
    except ValueError as error:
        raise ValueError(f"{path} begins like a JSON array but is none: {error}") from error


def _lines(path: Path, text: str) -> list[tuple[str, Any]]:
    numbered = []
    for number, line in enumerate(lines_of(text), 1):
        try:
            numbered += [(f"line {number}", json.loads(line))] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    return numbered


def dataset(splits: Mapping[str, Sequence[Document]]) -> Any:
    """Convert rows to the data set that lm-eval reads.

    Args:
        splits: The rows of each split.

    Returns:
        A `datasets.DatasetDict`.
    """
    from datasets import Dataset, DatasetDict

    from contralto.common.columns import as_dataset
    from contralto.eval.data.mapped import MappedOnce

    made = {split: as_dataset(rows) if rows else Dataset.from_list([]) for split, rows in splits.items()}
    return DatasetDict({split: MappedOnce.of(data) for split, data in made.items()})


@cache
def image(path: Path) -> Any:
    """Open an image in RGB.

    lm-eval holds the images of all requests in memory at once; the cache keeps one object per file, however many questions ask
    about it.

    Args:
        path: The file.

    Raises:
        ValueError: The file is not an image.
    """
    return open_image(path)


def check_text_fields(row: Document, *fields: str) -> str | None:
    """Return an error message if a field of a row is not a string; None if all are.

    Args:
        row: The row.
        fields: The names of its text fields.
    """
    for field in fields:
        if not isinstance(row.get(field), str):
            return f"the field {field} must be a string, not {row.get(field)!r}"
    return None
