"""Texts to fine-tune on: plain ones, conversations, prompts with completions, or the chosen halves of pairs, with or without images."""

# ruff: noqa: TRY004 (a wrong type in somebody's data is a ValueError like any other mistake in it)

from collections.abc import Mapping
from typing import Any

from contralto.common.column_names import rename_columns

__all__ = ["TEXT_COLUMNS", "load_texts"]

FORMS = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "prompt and chosen": ("prompt", "chosen"),
}
"""The forms of a row, by name: the columns that it needs. The first one that a row has is taken."""
PICTURES = ("image", "images")
TEXT_COLUMNS = ("text", "messages", *PICTURES)
"""Names to which columns can be mapped, beside those of pairs."""


def load_texts(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    conversations: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Any:
    """Return rows as `trl.SFTTrainer` reads them: `text`, `messages`, or `prompt` and `completion`; and `images` where there are any.

    Of pairs the chosen completion is taken. Rows whose text is empty are left out, as WikiText has many.

    Args:
        source: as for `contralto.data_gen.load_pairs`.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: make a conversation of prompt and completion, where they are texts.
        columns: columns under other names: `{"text": "article"}`.

    Raises:
        ValueError: there is no such source; a row has none of the forms, or another one than the first row; no row has text.

    Examples:
        >>> from datasets import Dataset
        >>> load_texts(Dataset.from_list([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}]))[0]
        {'prompt': '2 + 2 =', 'completion': ' 4'}
    """
    from datasets import Image, List

    from contralto.common.columns import as_dataset
    from contralto.data_gen.sources import records

    name, source_rows = records(source, split, config)
    rows, first = [], ""
    for at, record in enumerate(source_rows, 1):
        where = f"{name}, row {at}"
        row = rename_columns(record, columns or {}, where)
        form = _form(row, where)
        first = first or form
        if form != first:
            raise ValueError(f"{where}: it has {form}, and the rows before have {first}: bring them into one form")
        kept = _kept(row, form, where, conversations=conversations)
        if kept is not None:
            rows.append(kept)
    if not rows:
        raise ValueError(f"{name} has no row with text")
    has_images = any("images" in row for row in rows)
    pictures = {"images": ([row.get("images", []) for row in rows], List(Image()))} if has_images else {}
    return as_dataset(rows, known=pictures)


def _form(row: Any, where: str) -> str:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, not a {type(row).__name__}")
    found = next((form for form, needed in FORMS.items() if all(row.get(name) is not None for name in needed)), None)
    if found is None:
        raise ValueError(
            f"{where}: a row needs the columns {', or '.join(FORMS)}; it has {', '.join(map(str, row)) or 'none'} "
            "(--columns text=article reads others)"
        )
    return found


def _kept(row: Mapping[str, Any], form: str, where: str, *, conversations: bool) -> dict[str, Any] | None:
    """Return the columns that are read; None for a row without text."""
    from contralto.data_gen.columns import stored
    from contralto.data_gen.preference_rows import check_stored_image

    kept = {name: row[name] for name in FORMS[form]}
    if "chosen" in kept:
        kept["completion"] = kept.pop("chosen")
    for name, value in kept.items():
        is_messages = isinstance(value, list) and all(isinstance(each, Mapping) for each in value)
        if not (is_messages or (isinstance(value, str) and name != "messages")):
            wanted = "a list of messages" if name == "messages" else "a text or a list of messages"
            raise ValueError(f"{where}, column {name}: it must be {wanted}, not {value!r:.60}")
    if len({isinstance(value, str) for value in kept.values()}) > 1:
        raise ValueError(f"{where}: prompt and completion must both be texts, or both be messages")
    last = list(kept.values())[-1]
    if not (last.strip() if isinstance(last, str) else last):
        return None
    if conversations and isinstance(kept.get("prompt"), str):
        roles = {"prompt": "user", "completion": "assistant"}
        kept = {name: [{"role": roles[name], "content": value}] for name, value in kept.items()}
    images = row.get("images") if row.get("images") is not None else row.get("image")
    if images is None:
        return kept
    if any(isinstance(value, str) for value in kept.values()):
        raise ValueError(f"{where}: a row with images needs messages: give --conversations with prompt and completion")
    images = images if isinstance(images, list | tuple) else [images]
    for image in images:
        check_stored_image(image, f"{where}, column images")
    return kept | {"images": [stored(image) for image in images]}
