"""Chat messages and contrast prompts, parsed in the same way for every command, engine and evaluation.

A contrast prompt takes the place of the text of the last message that is not the assistant's. So it stands inside that turn: system
messages, earlier turns, images, and an answer that has been begun stay as they are, and the chat template is rendered around it once.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's messages is a ValueError like any other mistake in them)

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Content", "begins_answer", "check_messages", "contrasted", "fill", "flattened", "text_of", "with_images"]

Content = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""
MEDIA = ("image", "image_url")
"""The types of parts that show an image."""


def check_messages(messages: Any, where: str) -> None:
    """Reject a value that is not a conversation of texts and images.

    Args:
        messages: a list of messages, each with a role and a content: a text, or a list of parts of type text or image.
        where: what the error message calls it.

    Raises:
        ValueError: anything else; the message is named by its number.

    Examples:
        >>> check_messages([{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}], "prompts.jsonl:3")
        Traceback (most recent call last):
            ...
        ValueError: prompts.jsonl:3, message 1: a part of type 'video' cannot be read: text and image can
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list of at least one message, not {_short(messages)}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}, message {number}: a message has a role and a content, not {_short(message)}")
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                _check_part(part, f"{where}, message {number}")
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(
                f"{where}, message {number}: content must be a string or a list of parts such as {{'type': 'text', 'text': '...'}}, not {_short(content)}"
            )


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is None:
        raise ValueError(f"{where}: a part of the content has a type, text or image, and this one is {_short(part)}")
    if kind not in ("text", *MEDIA):
        raise ValueError(f"{where}: a part of type {kind!r} cannot be read: text and image can")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{where}: a part of type text needs a text, not {_short(part.get('text'))}")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def text_of(content: Content) -> str:
    """Return the question of a prompt: its text, or that of the last message that is not the assistant's.

    Args:
        content: a text or a conversation.

    Examples:
        >>> text_of([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}])
        'Why?'
    """
    return content if isinstance(content, str) else _text(content[_asking(content)]["content"])


def _asking(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the index of the last message that is not the assistant's."""
    return next((i for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] != "assistant"), 0)


def _text(content: Any) -> str:
    if not isinstance(content, list):
        return content or ""
    texts = [part["text"] for part in content if part["type"] == "text"]
    return ("" if len(texts) == len(content) else " ").join(texts)


def flattened(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write contents of text parts as texts, as templates of text models expect them.

    Args:
        messages: a conversation without images.
    """
    return [{**m, "content": _text(m["content"])} if isinstance(m.get("content"), list) else {**m} for m in messages]


def with_images(messages: Sequence[Mapping[str, Any]], count: int, *, own: bool = False) -> list[dict[str, Any]]:
    """Return a conversation in which every image has its place, a part `{"type": "image"}`.

    Images that the messages do not place stand before the text of the user's first turn.

    Args:
        messages: the conversation.
        count: the number of its images.
        own: leave parts of type `image_url`, which hold their image, to the reader of the messages.

    Raises:
        ValueError: there are places in the messages, but not as many as images; without `own`, a part of type `image_url`.

    Examples:
        >>> with_images([{"role": "user", "content": "Why?"}], 1)
        [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'Why?'}]}]
        >>> with_images([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}], 2)
        Traceback (most recent call last):
            ...
        ValueError: 2 images for 1 places in the messages: give each image a part of type image, or leave all of these parts out
    """
    placed = [dict(message) for message in messages]
    contents = [message.get("content") for message in placed]
    kinds = [part.get("type") for parts in contents if isinstance(parts, list) for part in parts]
    if "image_url" in kinds and not own:
        raise ValueError(
            "a part of type image_url is not read here: give its image in images, and a part of type image"
        )
    places = kinds.count("image")
    if places and places != count:
        raise ValueError(
            f"{count} images for {places} places in the messages: give each image a part of type image, or leave all of these "
            "parts out"
        )
    if count and not places:
        first = next((message for message in placed if message["role"] == "user"), placed[-1])
        content = first["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        first["content"] = [{"type": "image"}] * count + parts
    return placed


def begins_answer(content: Content) -> bool:
    """Return whether the prompt ends with the beginning of an answer, which the model continues.

    Args:
        content: a text or a conversation.
    """
    return not isinstance(content, str) and bool(content[-1]["role"] == "assistant")


def contrasted(content: Content, template: str, fields: Mapping[str, Any] | None = None) -> Content:
    """Return a prompt as another branch reads it.

    Args:
        content: the prompt.
        template: a text in place of the prompt's; `{prompt}` in it is the prompt's text.
        fields: see `fill`.

    Raises:
        ValueError: as of `fill`.

    Examples:
        >>> contrasted([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], "No. {prompt}")
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'No. Why?'}]
    """
    text = fill(template, text_of(content), fields)
    if isinstance(content, str):
        return text
    at, messages = _asking(content), list(content)
    parts = messages[at]["content"]
    images = [part for part in parts if part["type"] != "text"] if isinstance(parts, list) else []
    new_content: Any = [*images, {"type": "text", "text": text}] if images else text
    messages[at] = {**messages[at], "content": new_content}
    return messages


def fill(template: str, prompt: str, fields: Mapping[str, Any] | None = None) -> str:
    """Fill the names in braces of a contrast prompt.

    Args:
        template: the contrast prompt.
        prompt: what `{prompt}` stands for.
        fields: what the other names stand for; None: only `{prompt}` is a name, other braces are text.

    Raises:
        ValueError: a name that is not among the fields.

    Examples:
        >>> fill("{prompt} {x}", "Why?"), fill("{question} {prompt}", "Why?", {"question": "What?"})
        ('Why? {x}', 'What? Why?')
    """

    def value(match: re.Match[str]) -> str:
        """Return what a name in braces stands for."""
        name = match[1]
        if name == "prompt":
            return prompt
        if fields is None:
            return match[0]
        if name not in fields:
            has = ", ".join(dict.fromkeys(["prompt", *fields]))
            raise ValueError(f"contrast_prompt has {{{name}}}, and the documents have no such field: they have {has}")
        return str(fields[name])

    return re.sub(r"\{(\w+)\}", value, template)
