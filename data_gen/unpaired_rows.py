"""Read completions with a label, for KTO and for unlearning, from TRL's unpaired form and from pairs."""

# ruff: noqa: TRY004 (a wrong type in somebody's data is a ValueError like any other mistake in it)

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from contralto.data_gen.conversations import parse_content
from contralto.data_gen.dataset import pair_records
from contralto.data_gen.preference_rows import as_row
from contralto.data_gen.published_forms import renamed
from contralto.data_gen.sources import IMAGES, records

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["load_unpaired", "stream_unpaired", "unpaired_rows"]

PAIR = ("chosen", "rejected")


def load_unpaired(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    conversations: bool = False,
    columns: Mapping[str, str] | None = None,
) -> "Dataset":
    """Read rows of a prompt, a completion and a label.

    A row of the source has these three columns, as in TRL's unpaired form, or is a pair in any form of `load_pairs`, which becomes two
    rows: its chosen completion with the label true, its rejected one with false. Pairs cannot be mixed with the other form.

    Args:
        source: a JSONL, JSON or parquet file; a folder of them, or one of `save_to_disk`; a `datasets.Dataset`; a hub id.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: turn texts into conversations: the prompt becomes a user message, the completion an assistant message.
        columns: columns under other names, as for `load_pairs`.

    Returns:
        A `Dataset` with `prompt` and `completion`, both texts or both lists of messages, `label`, and all other columns.

    Raises:
        ValueError: a mistake in the data; the message names file, row (from 1) and column.
    """
    from datasets import Dataset

    name, source_rows = records(source, split, config)
    rows = list(_rows(_read(source_rows, name, columns or {}), conversations=conversations))
    if not rows:
        raise ValueError(f"{name} has no rows")
    return Dataset.from_list(rows)


def stream_unpaired(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    conversations: bool = False,
    columns: Mapping[str, str] | None = None,
) -> "IterableDataset":
    """Read the rows of `load_unpaired` as a stream: each is read and checked when it is needed.

    Args:
        source: as for `load_unpaired`.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: turn texts into conversations.
        columns: as for `load_unpaired`.

    Raises:
        ValueError: the source does not exist, or has no such split; a mistake in a row, when it is read.
    """
    from datasets import IterableDataset

    records(source, split, config, streaming=True)

    def rows() -> Iterator[dict[str, Any]]:
        name, source_rows = records(source, split, config, streaming=True)
        read = _read(source_rows, name, columns or {}, is_stream=True)
        yield from _rows(read, conversations=conversations)

    return IterableDataset.from_generator(rows)


def _read(
    source_rows: Iterable[Any], name: str, columns: Mapping[str, str], *, is_stream: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield records with their completions or pairs, each with the beginning of errors; pairs of any published form."""
    records_left = iter(source_rows)
    start = list(islice(records_left, 1))
    rows = chain(start, records_left)
    first = renamed(start[0], columns, f"{name}, row 1") if start else None
    if not isinstance(first, Mapping) or "completion" in first:
        for at, record in enumerate(rows, 1):
            where = f"{name}, row {at}"
            yield where, renamed(record, columns, where)
    else:
        yield from pair_records(rows, name, columns, is_stream=is_stream)


def _rows(read: Iterable[tuple[str, Any]], *, conversations: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of one data set, all of one form."""
    first = None
    for where, record in read:
        rows = unpaired_rows(record, where=where, conversations=conversations)
        kind = "pairs" if len(rows) > 1 else "single completions"
        form = f"{kind} of {'texts' if isinstance(rows[0]['prompt'], str) else 'messages'}"
        first = first or form
        if form != first:
            raise ValueError(f"{where}: the rows from here are {form}, those before {first}: bring them into one form")
        yield from rows


def unpaired_rows(record: Any, *, where: str = "the row", conversations: bool = False) -> list[dict[str, Any]]:
    """Return a record as rows of a prompt, a completion and a label: one row, or the two of a pair.

    Args:
        record: the record, as it was read.
        where: the beginning of errors.
        conversations: turn texts into conversations.

    Raises:
        ValueError: a mistake in the record; the message names the column.

    Examples:
        >>> unpaired_rows({"prompt": "2 + 2?", "completion": " 4", "label": True})
        [{'prompt': '2 + 2?', 'completion': ' 4', 'label': True}]
        >>> [row["label"] for row in unpaired_rows({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})]
        [True, False]
        >>> unpaired_rows({"prompt": "2 + 2?", "completion": "4", "label": "good"})
        Traceback (most recent call last):
            ...
        ValueError: the row, column label: it must be true (desirable, to be retained) or false (undesirable, to be forgotten), not 'good'
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, not a {type(record).__name__}")
    if images := [name for name in (*IMAGES, "image") if record.get(name)]:
        raise ValueError(
            f"{where}, column {images[0]}: completions with labels are read without images: drop the column"
        )
    if "completion" not in record and set(PAIR) <= record.keys():
        pair = as_row(record, where=where, conversations=conversations)
        others = {name: value for name, value in pair.items() if name not in ("prompt", *PAIR, "label")}
        return [
            {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen", **others} for name in PAIR
        ]
    return [_single(record, where, conversations=conversations)]


def _single(record: Mapping[str, Any], where: str, *, conversations: bool) -> dict[str, Any]:
    """Return a row of TRL's unpaired form."""
    for name in ("prompt", "completion", "label"):
        if record.get(name) is None:
            raise ValueError(
                f"{where}, column {name}: it is missing; a row needs prompt, completion and label, or prompt, chosen and rejected"
            )
    prompt, completion = (parse_content(record[name], f"{where}, column {name}") for name in ("prompt", "completion"))
    label = record["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise ValueError(
            f"{where}, column label: it must be true (desirable, to be retained) or false (undesirable, to be forgotten), not {label!r}"
        )
    if conversations and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str) and isinstance(prompt, list):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(completion, list) and isinstance(prompt, str):
        raise ValueError(f"{where}, column prompt: it is a string, and completion a list of messages")
    _check_roles(prompt, completion, where)
    others = {name: value for name, value in record.items() if name not in ("prompt", "completion", "label", *PAIR)}
    return {"prompt": prompt, "completion": completion, "label": bool(label), **others}


def _check_roles(prompt: Any, completion: Any, where: str) -> None:
    """Raise ValueError unless a completion is an answer to a prompt, and not empty."""
    if not completion or (isinstance(completion, list) and not any(each["content"] for each in completion)):
        raise ValueError(f"{where}, column completion: it is empty: drop such rows")
    if isinstance(prompt, str):
        return
    if prompt[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{where}, column prompt: its last message has role {prompt[-1]['role']}, not user")
    if completion[0]["role"] != "assistant":
        raise ValueError(f"{where}, column completion: it begins with role {completion[0]['role']}, not assistant")
