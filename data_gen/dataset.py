"""Convert published preference data to data sets in the explicit-prompt form of TRL.

A row has `prompt`, `chosen` and `rejected`, each a list of messages, or each a text; `images` if there are any; and the columns of its
source. The form matters: many published sets have a text as prompt and conversations as answers, and on such rows TRL 1.16 decides by
the order of a set of strings, so that PYTHONHASHSEED decides which error ends the training.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contralto.data_gen.columns import stored, to_dataset
from contralto.data_gen.preference_rows import as_row
from contralto.data_gen.published_forms import form_of, grouped_pairs, pairs_of, renamed
from contralto.data_gen.sources import IMAGES, records

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["load_pairs", "pair_records", "stream_pairs", "template_options", "to_dataset"]

logger = logging.getLogger(__name__)


def load_pairs(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    conversations: bool = False,
    needs_rejected: bool = True,
    columns: Mapping[str, str] | None = None,
) -> "Dataset":
    """Read preference pairs in any published form.

    | published form | `prompt` | `chosen`, `rejected` |
    |---|---|---|
    | TRL, explicit prompt | messages | messages of the assistant |
    | UltraFeedback-CLAIR, distilabel, DistiLLM-2, UltraFeedback-binarized | text | whole conversations |
    | implicit prompt | none | whole conversations, or texts: transcripts of `Human:` and `Assistant:`, or any with a common beginning |
    | plain texts | text, or a transcript | texts |

    Forms without `chosen` and `rejected` (scores, indices, labels, other names) are those of
    `contralto.data_gen.published_forms.PREFERENCE_FORMS`; a row is recognized by its columns. Rows without a preference, such as
    equal scores, make no pair, and a warning counts them.

    Rows of texts alone stay texts, which TRL trains on without a chat template; all others become conversations, also texts with
    images, since only messages have places for images.

    Args:
        source: a JSONL, JSON or parquet file; a folder of them, or one of `save_to_disk`; a `datasets.Dataset`; a hub id.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: turn texts into conversations: the prompt becomes a user message, or the messages of a transcript, and
            the answers become assistant messages.
        needs_rejected: reject rows without `rejected`; False puts the chosen answer in its place, for losses that do not read
            it, such as `forward_kl` of `contralto align`; rows of `prompt` and `completion` are read then, too, without those
            whose `label` is false.
        columns: columns under other names, by the names of `published_forms.COLUMN_NAMES`: `{"prompt": "question"}`.

    Returns:
        A `Dataset` with `prompt`, `chosen`, `rejected`, as lists of messages or as texts; `images` if there are any, and all
        other columns. Columns named `messages` and `completion` become `source_messages` and `source_completion`, since TRL
        would mistake them for another kind of data.

    Raises:
        ValueError: a mistake in the data; the message names file, row (from 1) and column.

    Examples:
        >>> load_pairs("pairs.csv")
        Traceback (most recent call last):
            ...
        ValueError: pairs.csv: preference pairs are read from .jsonl, .json and .parquet files, not from .csv
    """
    name, source_rows = records(source, split, config)
    rows = list(_rows(source_rows, name, columns or {}, conversations=conversations, needs_rejected=needs_rejected))
    if not rows:
        raise ValueError(f"{name} has no rows")
    try:
        return to_dataset(rows)
    except ValueError as error:
        raise ValueError(f"{name}, {error}") from error


def stream_pairs(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    conversations: bool = False,
    needs_rejected: bool = True,
    columns: Mapping[str, str] | None = None,
) -> "IterableDataset":
    """Read the rows of `load_pairs` as a stream: each is read and checked when it is needed.

    Args:
        source: as for `load_pairs`.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: turn texts into conversations.
        needs_rejected: as for `load_pairs`.
        columns: as for `load_pairs`.

    Raises:
        ValueError: the source does not exist, or has no such split; a mistake in a row, when it is read.
    """
    from datasets import Image, IterableDataset

    records(source, split, config, streaming=True)

    def rows() -> Iterator[dict[str, Any]]:
        name, source_rows = records(source, split, config, streaming=True)
        options = {"conversations": conversations, "needs_rejected": needs_rejected, "is_stream": True}
        for row in _rows(source_rows, name, columns or {}, **options):
            shown = {
                name: [Image().decode_example(stored(image)) for image in row[name]] for name in IMAGES if name in row
            }
            yield row | shown

    return IterableDataset.from_generator(rows)


def _rows(
    source_rows: Any,
    name: str,
    columns: Mapping[str, str],
    *,
    conversations: bool,
    needs_rejected: bool,
    is_stream: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one data set, all of them texts or all of them messages."""
    first = None
    options = {"is_stream": is_stream, "takes_completions": not needs_rejected}
    for where, record in pair_records(source_rows, name, columns, **options):
        row = as_row(record, where=where, conversations=conversations, needs_rejected=needs_rejected)
        kind = "texts" if isinstance(row["prompt"], str) else "messages"
        first = first or kind
        if kind != first:
            raise ValueError(
                f"{where}: it is made of {kind}, and the rows before it of {first}: bring them into one form, or make "
                "conversations of texts (conversations)"
            )
        yield row


def pair_records(
    source_rows: Iterable[Any],
    name: str,
    columns: Mapping[str, str],
    *,
    is_stream: bool = False,
    takes_completions: bool = False,
) -> Iterator[tuple[str, Any]]:
    """Yield the pairs of a data set as records with `chosen` and `rejected`, each with the beginning of errors.

    Args:
        source_rows: the records as they were read.
        name: of the data set.
        columns: columns under other names.
        is_stream: group neighbouring records alone, for forms with one answer a row.
        takes_completions: read a `completion` as the chosen answer of a record without a rejected one, unless its `label` is false.

    Raises:
        ValueError: a record cannot be read, or no record makes a pair.
    """
    numbered = ((f"{name}, row {at}", record) for at, record in enumerate(source_rows, 1))
    folder = Path(name).parent if Path(name).is_file() else None
    mapped: Iterator[tuple[str, Any]] = (
        (where, renamed(record, columns, where, folder=folder)) for where, record in numbered
    )
    if takes_completions:
        mapped = _with_completions_chosen(mapped)
    start = next(mapped, None)
    if start is None:
        return
    form = form_of(start[1], start[0])
    rows = chain([start], mapped)
    if form is not None and form.is_grouped:
        made: Iterable[tuple[str, Sequence[Any]]] = grouped_pairs(rows, form, is_stream=is_stream)
    else:
        made = ((where, _pairs_of(record, where)) for where, record in rows)
    without = total = 0
    for where, pairs in made:
        total += 1
        without += not pairs
        yield from ((where, pair) for pair in pairs)
    if without == total:
        raise ValueError(f"{name}: no row makes a pair: in each the answers have equal scores, or all the same label")
    if without:
        logger.warning(
            "%s: %d of %d prompts make no pair: their answers have equal scores or labels", name, without, total
        )


def _with_completions_chosen(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield records, those of a prompt and a completion as pairs of the completion with itself; completions to avoid are left out.

    Both answers are set, since other columns, such as `answers`, would make a record without `rejected` one of another form.
    """
    for where, record in rows:
        if not isinstance(record, Mapping) or record.get("completion") is None or "chosen" in record:
            yield where, record
        elif record.get("label", True):
            others = {name: value for name, value in record.items() if name not in ("completion", "label")}
            yield where, {**others, "chosen": record["completion"], "rejected": record["completion"]}


def _pairs_of(record: Any, where: str) -> Sequence[Any]:
    """Return the pairs of a record; one that has `chosen` and `rejected` is its own."""
    form = form_of(record, where)
    if form is None:
        return [record]
    if form.is_grouped:
        raise ValueError(f"{where}: it is of the form {form.name}, and the rows before it are not")
    return pairs_of(record, form, where)


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the chat template that TRL takes from a row.

    Args:
        row: with `tools`, as a list or as JSON, and `chat_template_kwargs`, if it has them.

    Examples:
        >>> template_options({"tools": "[]", "chat_template_kwargs": {"enable_thinking": False}})
        {'tools': [], 'enable_thinking': False}
    """
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}
