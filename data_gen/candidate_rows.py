"""Read prompts with references and scored candidates, for training that ranks whole answers (BRIO, CoNT)."""

# ruff: noqa: TRY004 (a wrong type in somebody's data is a ValueError like any other mistake in it)

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from contralto.common.column_names import rename_columns
from contralto.data_gen.conversations import parse_content
from contralto.data_gen.sources import records
from contralto.data_gen.templates import content_text

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["candidate_row", "load_candidates"]

REFERENCES = ("reference", "completion", "chosen")
"""Columns of the answer that is imitated; the first that a row has counts."""
CANDIDATES = ("candidates", "responses")
"""Columns of the answers that are ranked."""


def load_candidates(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    conversations: bool = False,
    columns: Mapping[str, str] | None = None,
    needs_candidates: bool = True,
) -> "Dataset":
    """Return rows of a prompt, a reference, candidates and their scores, with all other columns, which scorers may read.

    Args:
        source: as for `contralto.data_gen.load_pairs`.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: make a conversation of each prompt that is a text: it becomes the user's turn.
        columns: columns under other names: `{"reference": "highlights"}`.
        needs_candidates: reject rows without candidates and scores; False leaves both columns out.

    Raises:
        ValueError: there is no such source; a mistake in a row; some prompts are texts and some are messages.
    """
    from datasets import Dataset

    name, source_rows = records(source, split, config)
    rows = []
    for at, record in enumerate(source_rows, 1):
        where = f"{name}, row {at}"
        renamed = rename_columns(record, columns or {}, where)
        rows.append(candidate_row(renamed, where=where, conversations=conversations, needs_candidates=needs_candidates))
    if not rows:
        raise ValueError(f"{name} has no rows")
    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        raise ValueError(f"{name}: some prompts are texts and some are messages: bring them into one form")
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])


def candidate_row(
    record: Any, *, where: str = "the row", conversations: bool = False, needs_candidates: bool = True
) -> dict[str, Any]:
    """Return a record as a row of `prompt`, `reference` (a text, or None), `candidates` (texts) and `scores`, and its other columns.

    The reference is the column `reference`, or else `completion`, or else `chosen`; the candidates are `candidates`, or else `responses`.

    Args:
        record: the record, as it was read.
        where: the beginning of errors.
        conversations: turn a text into a conversation.
        needs_candidates: see `load_candidates`.

    Raises:
        ValueError: a mistake in the record; the message names the column.

    Examples:
        >>> candidate_row({"prompt": "2 + 2?", "responses": ["4", "5"], "scores": [1, 0], "chosen": "4"})
        {'prompt': '2 + 2?', 'reference': '4', 'candidates': ['4', '5'], 'scores': [1.0, 0.0]}
        >>> candidate_row({"prompt": "2 + 2?", "candidates": ["4", "5"], "scores": [1]})
        Traceback (most recent call last):
            ...
        ValueError: the row, column scores: it must hold one finite number for each of the 2 candidates, not [1]
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, not a {type(record).__name__}")
    if record.get("images") or record.get("image"):
        raise ValueError(f"{where}, column images: candidates are read without images: drop the column")
    if record.get("prompt") is None:
        raise ValueError(f"{where}, column prompt: it is missing; a row needs prompt, reference, candidates and scores")
    prompt = parse_content(record["prompt"], f"{where}, column prompt")
    if isinstance(prompt, str) and conversations:
        prompt = [{"role": "user", "content": prompt}]
    of_reference = next((name for name in REFERENCES if record.get(name) is not None), None)
    reference = None if of_reference is None else _text(record[of_reference], f"{where}, column {of_reference}")
    row = {"prompt": prompt, "reference": reference}
    if needs_candidates:
        row |= _candidates(record, where)
    read = {"prompt", *REFERENCES, *CANDIDATES, "rejected", "scores"}
    return row | {name: value for name, value in record.items() if name not in read}


def _candidates(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the candidates and scores of a record."""
    name = next((each for each in CANDIDATES if record.get(each) is not None), "candidates")
    values = record.get(name)
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{where}, column {name}: it must be a list of at least two answers, not {values!r:.60}")
    texts = [_text(value, f"{where}, column {name}") for value in values]
    scores = record.get("scores")
    if not isinstance(scores, list) or len(scores) != len(texts) or not all(map(_is_number, scores)):
        raise ValueError(
            f"{where}, column scores: it must hold one finite number for each of the {len(texts)} candidates, not {scores!r:.60}"
        )
    return {"candidates": texts, "scores": [float(score) for score in scores]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(value: Any, where: str) -> str:
    """Return an answer as a text: as it is, or the content of the one message that it is."""
    content = parse_content(value, where)
    if isinstance(content, list):
        if len(content) > 1:
            raise ValueError(f"{where}: an answer must be a text or one message, not {len(content)} messages")
        content = content_text(content[-1]["content"])
    if not content:
        raise ValueError(f"{where}: it is empty: drop such rows")
    return str(content)
