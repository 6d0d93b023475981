"""Convert published preference data to data sets in the explicit-prompt form of TRL.

A row has `prompt`, `chosen` and `rejected`, each a list of messages, or each a text; `images` if there are any; and the columns of its
source. The form matters: many published sets have a text as prompt and conversations as answers, and on such rows TRL 1.16 decides by
the order of a set of strings, so that PYTHONHASHSEED decides which error ends the training.
"""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from contralto.data_gen.columns import stored, to_dataset
from contralto.data_gen.preference_rows import as_row
from contralto.data_gen.sources import IMAGES, records

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["load_pairs", "stream_pairs", "template_options", "to_dataset"]


def load_pairs(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    conversations: bool = False,
    needs_rejected: bool = True,
) -> "Dataset":
    """Read preference pairs in any published form.

    | published form | `prompt` | `chosen`, `rejected` |
    |---|---|---|
    | TRL, explicit prompt | messages | messages of the assistant |
    | UltraFeedback-CLAIR, distilabel, DistiLLM-2, UltraFeedback-binarized | text | whole conversations |
    | implicit prompt | none | whole conversations, or texts: transcripts of `Human:` and `Assistant:`, or any with a common beginning |
    | plain texts | text, or a transcript | texts |

    Rows of texts alone stay texts, which TRL trains on without a chat template; all others become conversations, also texts with
    images, since only messages have places for images.

    Args:
        source: a JSONL, JSON or parquet file; a folder of them, or one of `save_to_disk`; a `datasets.Dataset`; a hub id.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: turn texts into conversations: the prompt becomes a user message, or the messages of a transcript, and
            the answers become assistant messages.
        needs_rejected: reject rows without `rejected`; False puts the chosen answer in its place, for losses that do not read
            it, such as `forward_kl` of `contralto align`.

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
    rows = list(_rows(source_rows, name, conversations=conversations, needs_rejected=needs_rejected))
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
) -> "IterableDataset":
    """Read the rows of `load_pairs` as a stream: each is read and checked when it is needed.

    Args:
        source: as for `load_pairs`.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: turn texts into conversations.
        needs_rejected: as for `load_pairs`.

    Raises:
        ValueError: the source does not exist, or has no such split; a mistake in a row, when it is read.
    """
    from datasets import Image, IterableDataset

    records(source, split, config, streaming=True)

    def rows() -> Iterator[dict[str, Any]]:
        name, source_rows = records(source, split, config, streaming=True)
        for row in _rows(source_rows, name, conversations=conversations, needs_rejected=needs_rejected):
            shown = {
                name: [Image().decode_example(stored(image)) for image in row[name]] for name in IMAGES if name in row
            }
            yield row | shown

    return IterableDataset.from_generator(rows)


def _rows(source_rows: Any, name: str, *, conversations: bool, needs_rejected: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of one data set, all of them texts or all of them messages."""
    first = None
    for at, record in enumerate(source_rows, 1):
        row = as_row(record, where=f"{name}, row {at}", conversations=conversations, needs_rejected=needs_rejected)
        kind = "texts" if isinstance(row["prompt"], str) else "messages"
        first = first or kind
        if kind != first:
            raise ValueError(
                f"{name}, row {at}: it is made of {kind}, and the rows before it of {first}: bring them into one form, or make "
                "conversations of texts (conversations)"
            )
        yield row


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
