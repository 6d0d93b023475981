"""Read prompts from files: a prompt per line, or rows of JSON with messages, images, tools and contrast prompts.

| column | meaning |
|---|---|
| `prompt`, or `messages` | a text, or the messages of a conversation |
| `image`, `images` | paths seen from the file's folder, `data:` addresses, or objects with one of path, url, base64 |
| `contrast_prompt` | the text of the other branch in place of the prompt's; `{prompt}` stands for the prompt's text |
| `system` | a system message before the prompt |
| `tools`, `documents`, `chat_template_kwargs` | arguments of the chat template |

A column that only looks like one of these is rejected. All others, such as `id`, are copied to the output.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's file is a ValueError like any other mistake in it)

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from contralto.common.errors import during
from contralto.common.files import read_json_lines, read_lines, read_text
from contralto.common.messages import MEDIA, Content, check_messages, with_images
from contralto.common.texts import has_lone_surrogate
from contralto.decoding.inputs import Prompt

__all__ = ["prompt_of", "read_prompts"]

Image = Any
"""A path, the bytes of an image file, or a Pillow image."""
READ = ("prompt", "messages", "image", "images", "contrast_prompt", "system", "tools", "documents")
"""Columns that are read, besides `chat_template_kwargs`."""
SOURCES = ("path", "url", "base64", "image")
"""Keys under which a part of type image names its image."""
TEMPLATE_ARGUMENTS = (
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_tensors",
    "return_dict",
    "padding",
)
"""Arguments of a chat template that the command sets."""
REJECTED_WORDS = {*(name.removesuffix("s") for name in READ), "contrast", "conversation", "negative", "video", "audio"}
"""Last words of column names that are rejected: such a column would seem to have an effect, and would have none."""


def read_prompts(file: Path, default: Prompt, options: Sequence[str] = ()) -> list[Prompt]:
    """Read the prompts of a file.

    Args:
        file: `.jsonl` or `.json` with rows, or `.txt` or a name without suffix with a prompt per line; blank lines are skipped.
        default: images and contrast prompt of rows that have none.
        options: names of options of the command, which are rejected as columns.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file or a row is not valid; the message has file, line and column.
    """
    rows: Iterator[tuple[int, Any]]
    if file.suffix in (".txt", ""):
        return [default._replace(content=line) for line in read_lines(file) if line.strip()]
    if file.suffix in (".jsonl", ".ndjson"):
        rows = read_json_lines(file)
    elif file.suffix == ".json":
        rows = _array(file)
    else:
        raise ValueError(f"{file}: prompts are read from .txt, .jsonl and .json files, not from {file.suffix}")
    return [prompt_of(row, default, f"{file}:{number}", file.parent, options) for number, row in rows]


def _array(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON: {error.msg}, column {error.colno}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: a .json file of prompts holds a list of rows, not one {type(rows).__name__}")
    return enumerate(rows, 1)


def prompt_of(row: Any, default: Prompt, where: str, folder: Path, options: Sequence[str] = ()) -> Prompt:
    """Read one row.

    Args:
        row: the JSON value.
        default: see `read_prompts`.
        where: the place of the row, for messages.
        folder: the folder that paths of images are relative to.
        options: see `read_prompts`.

    Raises:
        ValueError: the row is not valid; the message has the column.

    Examples:
        >>> prompt_of({"prompt": "Why?", "id": 7}, Prompt(""), "prompts.jsonl:1", Path())[:2]
        ('Why?', ())
        >>> prompt_of({"prompt": "Why?", "image_path": "a.png"}, Prompt(""), "prompts.jsonl:1", Path())
        Traceback (most recent call last):
            ...
        ValueError: prompts.jsonl:1: column image_path is not read: rename it to image, or drop it
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row is a JSON object with prompt or messages, not a {type(row).__name__}")
    if has_lone_surrogate(row):
        raise ValueError(f"{where}: a string holds half of a surrogate pair, which no encoding can write")
    others = {name: value for name, value in row.items() if name not in (*READ, "chat_template_kwargs")}
    _check_others(others, where, options)
    content = _content(row, where)
    content, shown = _images_of(content, where, folder)
    images = _column_images(row, where, folder)
    if shown is not None and images:
        raise ValueError(f"{where}: messages bring their images, and there is a column of images as well")
    images = shown or images or list(default.images)
    _check_places(content, images, where)
    contrast = row.get("contrast_prompt")
    if contrast is not None and not isinstance(contrast, str):
        raise ValueError(f"{where}: column contrast_prompt must be a string, not a {type(contrast).__name__}")
    own = contrast is not None
    return Prompt(
        content,
        tuple(images),
        contrast if own else default.contrast,
        None if own or default.contrast is None else {**others, "prompt": ""},
        _template(row, where),
        others,
    )


def _check_others(columns: Mapping[str, Any], where: str, options: Sequence[str]) -> None:
    for name, value in columns.items():
        last = name.lower().replace("-", "_").split("_")
        if value is not None and name in options:
            raise ValueError(
                f"{where}: column {name} is not supported here: set --{name.replace('_', '-')} for all rows"
            )
        medium = {"image", "images", "video", "videos", "audio", "audios"} & set(last)
        source = last[-1] in (*SOURCES, *(f"{each}s" for each in SOURCES), "file", "files", "bytes", "data")
        if value is not None and (last[-1].removesuffix("s") in REJECTED_WORDS or (medium and source)):
            close = next((read for read in READ if read in last), None)
            what = f"rename it to {close}, or drop it" if close else f"there are {', '.join(READ)}; drop it otherwise"
            raise ValueError(f"{where}: column {name} is not read: {what}")


def _content(row: Mapping[str, Any], where: str) -> Content:
    """Return the prompt or the messages, with the system message before them."""
    given = {name: row[name] for name in ("messages", "prompt") if row.get(name) is not None}
    if not given:
        has = ", ".join(name for name in row if row[name] is not None)
        raise ValueError(f"{where}: a row needs a prompt or messages, and has only {has or 'nothing'}")
    if len(given) == 2:
        raise ValueError(f"{where}: a row has a prompt or messages, and this one has both")
    ((name, content),) = given.items()
    if name == "messages" or isinstance(content, list):
        check_messages(content, where)
    elif not isinstance(content, str):
        raise ValueError(
            f"{where}: column prompt must be a string or a list of messages, not a {type(content).__name__}"
        )
    system = row.get("system")
    if system is None:
        return content  # type: ignore[no-any-return]
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if not isinstance(system, str) or any(message["role"] == "system" for message in messages):
        raise ValueError(
            f"{where}: column system must be a string, and the messages may not have a system message of their own"
        )
    return [{"role": "system", "content": system}, *messages]


def _template(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the further arguments of the chat template."""
    kwargs = row.get("chat_template_kwargs")
    kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs or {}
    if not isinstance(kwargs, dict) or set(kwargs) & set(TEMPLATE_ARGUMENTS):
        raise ValueError(
            f"{where}: column chat_template_kwargs must be an object without {', '.join(TEMPLATE_ARGUMENTS)}"
        )
    for name in ("tools", "documents"):
        if row.get(name):
            value = json.loads(row[name]) if isinstance(row[name], str) else row[name]
            if not isinstance(value, list):
                raise ValueError(f"{where}: column {name} must be a list, not a {type(value).__name__}")
            kwargs = {**kwargs, name: value}
    return kwargs


# ----------------------------------------------------------------------------------------------------------------- images


def _column_images(row: Mapping[str, Any], where: str, folder: Path) -> list[Image]:
    given = {name: row[name] for name in ("image", "images") if row.get(name)}
    if len(given) == 2:
        raise ValueError(f"{where}: a row has the column image or images, and this one has both")
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        return [_source(each, f"{where}, column {name}", folder) for each in values]
    return []


def _images_of(content: Content, where: str, folder: Path) -> tuple[Content, list[Image] | None]:
    """Return the messages with bare placeholders for images, and their images; None if they have none."""
    if isinstance(content, str):
        return content, None
    images: list[Image] = []
    messages = []
    for number, message in enumerate(content, 1):
        parts = message.get("content")
        if isinstance(parts, list):
            for part in parts:
                if part["type"] in MEDIA and (source := _named_in(part)) is not None:
                    images.append(_source(source, f"{where}, message {number}", folder))
            parts = [{"type": "image"} if part["type"] in MEDIA else part for part in parts]
            message = {**message, "content": parts}
        messages.append(message)
    return messages, images or None


def _named_in(part: Mapping[str, Any]) -> Any:
    """Return the source of the image of a part; None for a placeholder alone."""
    if part["type"] == "image_url":
        return part.get("image_url")
    return {name: part[name] for name in SOURCES if part.get(name) is not None} or None


def _source(value: Any, where: str, folder: Path) -> Image:
    """Return the path or the bytes of an image."""
    if isinstance(value, Mapping):
        given = {name: each for name, each in value.items() if name in SOURCES and each is not None}
        if len(given) != 1:
            raise ValueError(f"{where}: an image has one of {', '.join(SOURCES)}, not {', '.join(given) or 'none'}")
        ((name, value),) = given.items()
        if name == "base64":
            return _bytes(value, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: an image is a path or an object with a path, not a {type(value).__name__}")
    parts = urlsplit(value)
    if parts.scheme == "data":
        return _bytes(value.partition(",")[2], where)
    if parts.scheme in ("http", "https"):
        raise ValueError(f"{where}: images are read from files, not from {parts.scheme}: download {value} first")
    return unquote(parts.path) if parts.scheme == "file" else str(folder / value)


def _bytes(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"{where}: not an image in base64: {error}") from error


def _check_places(content: Content, images: Sequence[Image], where: str) -> None:
    """Raise ValueError unless the messages have one placeholder per image."""
    if isinstance(content, str):
        return
    with during(where):
        with_images(content, len(images))
