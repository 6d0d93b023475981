"""Sources of preference data: files, folders, saved data sets, data sets of the Hub."""

# ruff: noqa: TRY004 (a wrong type in somebody's data is a ValueError like any other mistake in it)

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from contralto.common.suggestions import did_you_mean

__all__ = ["IMAGES", "records"]

IMAGES = ("images", "rejected_images")
"""Columns that hold lists of images."""
BUILDERS = ("json", "parquet", "csv", "arrow")
"""Readers of `datasets` for files that hold rows."""


def records(
    source: Any, split: str, config: str | None = None, *, streaming: bool = False
) -> tuple[str, Iterable[Any]]:
    """Return a name for error messages, and the records of a source.

    Args:
        source: a JSONL, JSON or parquet file; a folder of files, or one of `save_to_disk`; a `datasets.Dataset`; a hub id.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        streaming: read data sets of the Hub as a stream.

    Raises:
        ValueError: the source does not exist, holds no rows that can be read, or has no such split.
    """
    from datasets import Dataset, DatasetDict, IterableDataset

    if isinstance(source, DatasetDict):
        return "the data set", _undecoded(_of_split(source, split, "the data set"))
    if isinstance(source, Dataset | IterableDataset):
        return "the data set", _undecoded(source)
    path, name = Path(source), str(source)
    if path.is_dir():
        return name, _folder(path, split, config)
    if path.suffix in (".jsonl", ".json", ".parquet") or path.exists():
        return name, _file(path)
    if path.suffix in (".csv", ".tsv", ".txt", ".gz", ".arrow") or name.count("/") > 1 or name.startswith("."):
        return name, _file(path)
    return name, _hub(name, split, config, streaming=streaming)


def _file(path: Path) -> Iterable[Any]:
    if path.suffix not in READERS:
        kind = f"not from {path.suffix}" if path.suffix else "and this name has no suffix"
        raise ValueError(f"{path}: preference pairs are read from .jsonl, .json and .parquet files, {kind}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    return READERS[path.suffix](path)


def _jsonl(path: Path) -> Iterator[Any]:
    """Yield one record per line; lines end at a line feed alone, since JSON may hold every other separator."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        lines = enumerate(file, 1)
        while True:
            try:
                at, line = next(lines, (0, ""))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 text: {error}") from error
            if not at:
                return
            try:
                yield _in_folder(json.loads(line.rstrip("\n")), path.parent)
            except json.JSONDecodeError as error:
                what = "an empty line" if not line.strip() else f"not JSON, column {error.colno}: {error.msg}"
                raise ValueError(f"{path}, row {at}: {what}; each line must contain one JSON object") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deeply
                raise ValueError(f"{path}, row {at}: not JSON: {error}") from error


def _json(path: Path) -> Iterable[Any]:
    """Return the records of a JSON file: a list, or one object per line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            return _jsonl(path)
        raise ValueError(f"{path}: not JSON: {error}") from error
    except (ValueError, RecursionError) as error:  # as above
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: contains a JSON {type(content).__name__}, not a list of rows")
    return (_in_folder(record, path.parent) for record in content)


def _parquet(path: Path) -> Iterable[Any]:
    from datasets import Dataset

    try:
        return _undecoded(Dataset.from_parquet(str(path)))
    except (ValueError, OSError) as error:  # of pyarrow
        raise ValueError(f"{path}: not a parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}


def _in_folder(record: Any, folder: Path) -> Any:
    """Return a record with paths of images relative to the folder of its file."""
    if not isinstance(record, dict):
        return record
    moved: dict[str, Any] = {}
    for name in (*IMAGES, "image", "chosen_images"):
        value = record.get(name)
        if isinstance(value, str):
            moved[name] = str(folder / value)
        elif isinstance(value, list):
            moved[name] = [str(folder / image) if isinstance(image, str) else image for image in value]
    return record | moved


def _folder(path: Path, split: str, config: str | None) -> Iterable[Any]:
    """Read a folder of `save_to_disk`, or the split of a folder of files that `load_dataset` would read."""
    from datasets import DatasetDict, load_dataset, load_dataset_builder, load_from_disk

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        stored = load_from_disk(str(path))
        return _undecoded(_of_split(stored, split, str(path)) if isinstance(stored, DatasetDict) else stored)
    try:
        builder = load_dataset_builder(str(path), config)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a script, which `datasets` runs no more
        raise ValueError(f"{path}: the folder contains no .parquet, .jsonl or .json file: {_line(error)}") from error
    if type(builder).__module__.split(".")[-1] not in BUILDERS:
        raise ValueError(f"{path}: the folder contains no .parquet, .jsonl or .json file")
    files = [Path(file) for file in _of_split(builder.config.data_files, split, str(path))]
    if all(file.suffix in READERS for file in files):
        return chain.from_iterable(_file(file) for file in files)
    try:
        return _undecoded(load_dataset(str(path), config, split=split))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {_line(error)}") from error


def _of_split(stored: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in stored:
        raise ValueError(
            f"{name}: there is no split {split!r}{did_you_mean(split, stored)}; it has {', '.join(map(str, stored))}"
        )
    return stored[split]


def _hub(name: str, split: str, config: str | None, *, streaming: bool) -> Iterable[Any]:
    from datasets import load_dataset

    try:
        return _undecoded(load_dataset(name, config, split=split, streaming=streaming))
    except (OSError, ValueError, RuntimeError) as error:
        text = f"{name}: neither a local file or folder nor a data set on the Hub: {_line(error)}"
        raise ValueError(text) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _undecoded(dataset: Any) -> Iterable[Any]:
    """Return a data set with images as their bytes, so that none is decoded to be encoded again."""
    from datasets import Image, List

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset  # type: ignore[no-any-return]
