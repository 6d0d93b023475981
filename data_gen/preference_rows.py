"""Convert records of published preference data to rows of one form."""

# ruff: noqa: TRY004 (a wrong type in somebody's data or recipe is a ValueError like any other mistake in it)

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

from contralto.data_gen.conversations import (
    TRANSCRIPT,
    parse_content,
    split_messages,
    split_texts,
    split_texts_to_messages,
)
from contralto.data_gen.image_files import check_image
from contralto.data_gen.sources import IMAGES

__all__ = ["as_row", "check_stored_image"]

RESERVED = ("messages", "completion")
"""Columns by which TRL would recognize another kind of row; they are kept as `source_messages`, `source_completion`."""
SYSTEM = ("system", "system_prompt")
"""Columns that hold the system message."""
PROMPT_PARTS = (*SYSTEM, "instruction", "input", "question", "query", "history", "context", "documents")
"""Columns that hold a part of the prompt in published data sets."""
ANSWER_PARTS = ("prefix", "initial_reason_steps")
"""Columns that hold the beginning of both answers in published data sets, such as Math-Step-DPO-10K."""


def as_row(
    record: Any, *, where: str = "the row", conversations: bool = False, needs_rejected: bool = True
) -> dict[str, Any]:
    """Return a record of any published form as a row; `load_pairs` lists the forms.

    Args:
        record: the record, as it was read.
        where: the beginning of errors.
        conversations: turn texts into conversations.
        needs_rejected: reject a record without `rejected`; False puts the chosen answer in its place.

    Raises:
        ValueError: a mistake in the record; the message names the column.

    Examples:
        >>> row = as_row({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, conversations=True)
        >>> row["prompt"], row["rejected"]
        ([{'role': 'user', 'content': '2 + 2?'}], [{'role': 'assistant', 'content': '5'}])
        >>> as_row({"question": "2 + 2?", "chosen": "It is 4", "rejected": "It is 5"})
        Traceback (most recent call last):
            ...
        ValueError: the row, column prompt: it is missing, and question holds text: rename the column with the prompt to prompt
    """
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{where}: a row must be a JSON object with chosen and rejected, not a {type(record).__name__}"
        )
    if not needs_rejected and record.get("rejected") is None:
        record = _with_chosen_twice(record, where)
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            _missing(record, name, where)
    answers = {name: parse_content(record[name], f"{where}, column {name}") for name in ("chosen", "rejected")}
    prompt = None if record.get("prompt") is None else parse_content(record["prompt"], f"{where}, column prompt")
    if prompt is None:
        _check_prompt_is_inside(record, answers, where)
    kinds = [isinstance(answer, str) for answer in answers.values()]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{where}, column rejected: one of chosen and rejected is a string, the other a list of messages"
        )
    has_images = any(record.get(name) for name in (*IMAGES, "image"))
    if kinds[0] and not isinstance(prompt, list) and not conversations and not has_images:
        split: tuple[Any, Any, Any] = split_texts(prompt, answers["chosen"], answers["rejected"], where)
    elif kinds[0]:
        split = split_texts_to_messages(prompt, answers["chosen"], answers["rejected"], where)
    else:
        split = split_messages(prompt, answers["chosen"], answers["rejected"], where)
    row = dict(zip(("prompt", "chosen", "rejected"), split, strict=True))
    row["prompt"] = _with_parts(row["prompt"], record, where)
    _check_answer_parts(row, record, where)
    others = {f"source_{k}" if k in RESERVED else k: v for k, v in record.items() if k not in (*row, *IMAGES, "image")}
    return row | _images(record, row, where) | others


def _with_chosen_twice(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a record with its chosen answer as the rejected one, too.

    Raises:
        ValueError: there is no answer, or it does not say where its prompt ends: the beginning of two equal texts is no prompt.
    """
    if record.get("chosen") is None:
        _missing(record, "chosen", where)
    if record.get("prompt") is None and not _begins_with_prompt(
        parse_content(record["chosen"], f"{where}, column chosen")
    ):
        raise ValueError(
            f"{where}, column prompt: it is missing; a row without rejected needs a prompt, or a conversation in chosen"
        )
    return {**record, "rejected": record["chosen"]}


def _missing(record: Mapping[str, Any], name: str, where: str) -> None:
    """Raise ValueError for a record without an answer."""
    if name in record:
        what = "it is empty (null): drop such rows first"
        raise ValueError(f"{where}, column {name}: {what}; a preference row needs chosen and rejected")
    has = f"the row has {', '.join(map(str, record)) or 'nothing'}"
    raise ValueError(
        f"{where}, column {name}: it is missing; {has}; a preference row needs chosen and rejected: rename the columns that contain them"
    )


def _check_prompt_is_inside(record: Mapping[str, Any], answers: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for answers without their prompt, if another column may hold it."""
    if all(_begins_with_prompt(answer) for answer in answers.values()):
        return
    others = [name for name in record if name not in (*answers, "prompt", "id") and any(_texts(record[name]))]
    if others:
        rest = "" if len(others) == 1 else ", and drop those that are not part of it"
        verb = "holds" if len(others) == 1 else "hold"
        raise ValueError(
            f"{where}, column prompt: it is missing, and {', '.join(others)} {verb} text: rename the column with the prompt to "
            f"prompt{rest}"
        )


def _begins_with_prompt(answer: Any) -> bool:
    """Return True if an answer begins with its prompt: a conversation, or a transcript."""
    if isinstance(answer, str):
        return answer.startswith(TRANSCRIPT)
    return bool(answer[0]["role"] != "assistant")


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value, at any depth, that are not empty."""
    if isinstance(value, str):
        yield from [value.strip()] if value.strip() else []
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _with_parts(prompt: Any, record: Mapping[str, Any], where: str) -> Any:
    """Return the prompt with the system message of a column; other parts of the prompt must be in it already.

    Raises:
        ValueError: a column holds a part of the prompt that would not be trained on.
    """
    included = "\n".join(_texts(prompt))
    left = [
        name for name in PROMPT_PARTS if name in record and any(text not in included for text in _texts(record[name]))
    ]
    system = [name for name in left if name in SYSTEM and isinstance(record[name], str)]
    if left and left == system[:1] and isinstance(prompt, list) and prompt[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": record[left[0]]}, *prompt]
    if left:
        advice = "move it into prompt" + (
            ", or convert strings to conversations (conversations)" if left == system[:1] else ""
        )
        if isinstance(prompt, list) and left == system[:1]:
            advice = "keep one of the two system messages"
        raise ValueError(
            f"{where}, column {left[0]}: it contains a part of the prompt that is not in the column prompt, so training would ignore it: "
            f"{advice}, or drop the column"
        )
    return prompt


def _check_answer_parts(row: Mapping[str, Any], record: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a column holds the beginning of both answers, and the row does not."""
    prompt, chosen, rejected = ("\n".join(_texts(row[name])) for name in ("prompt", "chosen", "rejected"))
    for name in ANSWER_PARTS:
        for text in _texts(record.get(name)):
            if text not in prompt and not (text in chosen and text in rejected):
                raise ValueError(
                    f"{where}, column {name}: it contains the beginning of the answers, which is neither in prompt nor in chosen and "
                    "rejected, so training would ignore it: put it before both answers, or drop the column"
                )


def _images(record: Mapping[str, Any], row: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """Return the columns of images, checked, if the record has them."""
    found = {name: record[name] for name in IMAGES if record.get(name) is not None}
    if record.get("image") is not None:
        found["images"] = [record["image"]]
    for name, images in found.items():
        if not isinstance(images, list):
            raise ValueError(f"{where}, column {name}: it is a {type(images).__name__}, not a list of images")
        for at, image in enumerate(images, 1):
            check_stored_image(image, f"{where}, column {name}, image {at}")
    for name in ("chosen", "rejected"):
        places = _places(row["prompt"]) + _places(row[name])
        if places and places != len(found.get("images", ())):
            raise ValueError(
                f"{where}, column images: {len(found.get('images', ()))} images for {places} image placeholders in prompt and {name}"
            )
    return found


def _places(value: Any) -> int:
    """Return the number of image parts in messages."""
    contents = [m["content"] for m in value if isinstance(m, Mapping)]
    return sum(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def check_stored_image(image: Any, where: str) -> None:
    """Reject what is no image: neither a path of one, nor its bytes, nor a Pillow image.

    Args:
        image: the image, as a row holds it.
        where: its place, for the message.

    Raises:
        ValueError: it is of another type, or there is no such file or image.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str | PathLike | bytes):
        raise ValueError(f"{where}: must be a path or an image, not a {type(image).__name__}")
    check_image(image, where)
