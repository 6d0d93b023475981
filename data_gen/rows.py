"""Rows of a recipe: prompts with images and further columns, from files, data sets or functions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contralto.common.column_names import rename_columns
from contralto.common.errors import during
from contralto.common.files import read_json_lines, read_lines
from contralto.data_gen.functions import find_function
from contralto.data_gen.image_files import images_of, placed, with_located
from contralto.data_gen.preference_rows import as_row
from contralto.data_gen.sources import records
from contralto.data_gen.types import digest

__all__ = ["RowSource", "read_rows"]


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """The source of the rows of a recipe.

    Args:
        source: a file (.jsonl, .json, .csv, .parquet, .txt with a prompt per line), a data set's folder or hub id, or
            `module:function`, called with `arguments`, for rows that are computed.
        prompt: the column with the prompt, a text or messages.
        columns: columns under other names, such as `{chosen: better_answer}`; a name with dots is a field of an object.
        pairs: read preference pairs of any published form, with `chosen` and `rejected`, for strategies that use them.
        id: the column with a unique id; default: `id`, and if there is none, the id is a hash of the row.
        images: the column with the images; default: `images` or `image`, if there is one.
        image_folder: the folder below which all images must lie, and relative to which they are named; default: that of the recipe.
        split: the split of a data set.
        name: the configuration of a data set.
        limit: the largest number of rows; None is all.
        arguments: keyword arguments of a function.
    """

    source: str
    prompt: str = "prompt"
    columns: Mapping[str, str] = field(default_factory=dict)
    pairs: bool = False
    id: str | None = None
    images: str | None = None
    image_folder: str | None = None
    split: str = "train"
    name: str | None = None
    limit: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def read_rows(source: RowSource, *, folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a recipe in their order, each with `id`, `prompt` as messages, `images`, and its other columns.

    Args:
        source: the source of the rows.
        folder: the folder of the recipe, relative to which files and modules are named.

    Raises:
        OSError: there is no such file or data set.
        ValueError: a row has no prompt, two rows have the same id, or there are no rows; file, row and column are named.
    """
    read: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(_pairs(source, folder) if source.pairs else _mapped(source, folder), 1):
        if source.limit is not None and number > source.limit:
            break
        read.append(_row(source, row, number, seen, folder))
    if not read:
        raise ValueError(f"{source.source} contains no rows")
    return read


def _mapped(source: RowSource, folder: Path) -> Iterator[Any]:
    """Yield the records with columns under the names by which they are read."""
    for number, record in enumerate(_records(source, folder), 1):
        yield rename_columns(record, source.columns, f"{source.source}, row {number}")


def _pairs(source: RowSource, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield preference pairs with their prompts as messages."""
    from contralto.data_gen.dataset import pair_records

    file = folder / source.source
    name, rows = records(file if file.exists() else source.source, source.split, source.name)
    for where, record in pair_records(rows, name, source.columns):
        yield as_row(record, where=where, conversations=True)


def _records(source: RowSource, folder: Path) -> Iterator[dict[str, Any]]:
    file = folder / source.source
    if ":" in source.source and not file.exists():
        yield from find_function(source.source, folder=folder)(**source.arguments)
    elif file.suffix == ".jsonl":
        yield from (row for _, row in read_json_lines(file))
    elif file.suffix == ".txt":
        yield from ({source.prompt: line} for line in read_lines(file) if line.strip())
    else:
        yield from _dataset(source, file, folder)


def _dataset(source: RowSource, file: Path, folder: Path) -> Iterator[dict[str, Any]]:
    import datasets

    folders = [_image_folder(source, folder)]
    if file.suffix in (".json", ".csv", ".parquet"):
        if not file.exists():
            raise FileNotFoundError(f"there is no file {file}")
        kind = file.suffix.removeprefix(".")
        with during(str(file)):
            records = datasets.load_dataset(kind, data_files=str(file), split="train")
    elif (file / "dataset_info.json").exists() or (file / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(file))
        records = saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
    else:
        name = str(file) if file.is_dir() else source.source
        with during(name):
            records = datasets.load_dataset(name, source.name, split=source.split)
        folders += [file] if file.is_dir() else [Path(datasets.config.HF_CACHE_HOME)]  # where it was downloaded to
    yield from with_located(records, folders=folders, where=source.source)


def _image_folder(source: RowSource, folder: Path) -> Path:
    return folder if source.image_folder is None else folder / source.image_folder


def _row(source: RowSource, row: Any, number: int, seen: dict[str, int], folder: Path) -> dict[str, Any]:
    where = f"{source.source}, row {number}"
    if type(row) is not dict:
        raise ValueError(f"{where} is not a mapping of columns: {str(row)[:80]!r}")
    prompt = _prompt(row.get(source.prompt), f"{where}, column {source.prompt!r}", row)
    prompt, pictures = _pictures(source, row, prompt, where, [_image_folder(source, folder)])
    named = source.id or ("id" if row.get("id") is not None else None)
    if named and row.get(named) is None:
        raise ValueError(f"{where} has no id in column {named!r}; it has {', '.join(row)}")
    name = str(row[named]).encode("utf-8", "backslashreplace").decode() if named else digest(_as_texts(row))[:16]
    seen[name] = seen.get(name, 0) + 1
    if seen[name] > 1:
        if named:
            raise ValueError(f"{where}: the id {name!r} occurs twice, but ids must be unique")
        name = f"{name}-{seen[name]}"  # the same row again
    kept = {key: value for key, value in row.items() if key not in (source.prompt, _image_column(source, row), named)}
    return {**kept, **pictures, "id": name, "prompt": prompt}


def _image_column(source: RowSource, row: Mapping[str, Any]) -> str | None:
    return source.images or next((name for name in ("images", "image") if name in row), None)


def _pictures(
    source: RowSource, row: Mapping[str, Any], prompt: Sequence[Mapping[str, Any]], where: str, folders: Sequence[Path]
) -> tuple[list[dict[str, Any]], dict[str, tuple[Any, ...]]]:
    """Return the prompt without the images in its parts, and the columns of images, all of them checked."""
    column = _image_column(source, row)
    if source.images and source.images not in row:
        raise ValueError(f"{where} has no column {source.images!r}; it has {', '.join(row)}")
    kept, images = placed(prompt, folders=folders, where=f"{where}, column {source.prompt!r}")
    read = {"images": column, "rejected_images": "rejected_images" if "rejected_images" in row else None}
    columns = {
        name: images_of(row[of], folders=folders, where=f"{where}, column {of!r}") for name, of in read.items() if of
    }
    if images and columns.get("images"):
        raise ValueError(f"{where} has images in its messages and in column {column!r}: leave one of them out")
    return kept, {"images": (), **columns, **({"images": images} if images else {})}


def _prompt(value: Any, where: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a prompt; a text becomes one message of the user."""
    if value is None:
        raise ValueError(f"{where} is missing; the row has {', '.join(row) or 'nothing'}")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a string or a list of messages, not {str(value)[:80]!r}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}: a message must have a role and a content, not {str(message)[:80]!r}")
    if not any(str(message["content"]).strip() for message in value):
        raise ValueError(f"{where} is empty")
    return [dict(message) for message in value]


def _as_texts(row: Mapping[str, Any]) -> list[str]:
    """Return a row as texts, whose hash is its id; images are represented by their pixels."""
    return [f"{name}={_digest_of(value)}" for name, value in sorted(row.items())]


def _digest_of(value: Any) -> str:
    """Return a hash of a column's value of any type."""
    if hasattr(value, "tobytes"):
        return digest([str(getattr(value, "size", "")), value.tobytes().hex()])
    if isinstance(value, list | tuple):
        return digest([_digest_of(each) for each in value])
    return digest(str(value))
