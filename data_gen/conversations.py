"""Prompts and answers of published preference data: messages are validated, and prompts that answers repeat are split off."""

# ruff: noqa: TRY004 (a wrong type in somebody's data or recipe is a ValueError like any other mistake in it)

from collections.abc import Mapping
from typing import Any

__all__ = ["TRANSCRIPT", "parse_content", "split_messages", "split_texts", "split_texts_to_messages"]

ROLES = ("system", "developer", "user", "assistant", "tool")
TRANSCRIPT = "\n\nHuman:"
"""The beginning of a transcript."""


def parse_content(value: Any, where: str) -> Any:
    """Return a text, or validated messages.

    Args:
        value: the value of a column.
        where: the beginning of errors.

    Raises:
        ValueError: the value is neither a text nor a list of messages.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where}: must be a string or a list of messages, not a {type(value).__name__}")
    if not value:
        raise ValueError(f"{where}: the list of messages is empty")
    return [_message(message, f"{where}, message {at}") for at, message in enumerate(value, 1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a validated message without its empty fields."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: a message is an object with role and content, not a {type(message).__name__}")
    if "from" in message and "role" not in message:
        raise ValueError(f"{where}: it has from and value (ShareGPT); rename them to role and content")
    if message.get("role") not in ROLES:
        raise ValueError(f"{where}: its role is {message.get('role')!r}, not one of {', '.join(ROLES)}")
    kept = {name: value for name, value in message.items() if value is not None}
    content = kept.get("content")
    if isinstance(content, list):
        content = _parts(content, where)
    if content is None and "tool_calls" not in kept:
        raise ValueError(f"{where}: it has no content")
    if not isinstance(content, str | list | None):
        raise ValueError(f"{where}: its content is a {type(content).__name__}, not a string or a list of parts")
    return kept | {"content": content}


def _parts(parts: list[Any], where: str) -> Any:
    """Return the parts of a content without their empty fields; parts of text alone become one text."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
            raise ValueError(f"{where}: a part of its content must have type text or image: {part!r:.80}")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: a text part of its content has no text")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [{"type": "text", "text": p["text"]} if p["type"] == "text" else {"type": "image"} for p in parts]


def split_messages(
    prompt: Any, chosen: list[Any], rejected: list[Any], where: str
) -> tuple[list[Any], list[Any], list[Any]]:
    """Split conversations, which may repeat the prompt, into prompt and answers.

    Args:
        prompt: messages or a text; None if only the answers have it.
        chosen: messages of the better answer.
        rejected: messages of the worse answer.
        where: the beginning of errors.

    Raises:
        ValueError: the answers do not end with the assistant, or do not answer the same prompt.
    """
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != "assistant":
            raise ValueError(f"{where}, column {name}: its last message has role {answer[-1]['role']}, not assistant")
    prompt_messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    begin = [answer[0]["role"] == "assistant" for answer in (chosen, rejected)]
    if all(begin) and prompt_messages:
        return _check_last_role(prompt_messages, where), chosen, rejected
    if all(begin):
        raise ValueError(
            f"{where}, column prompt: it is missing, and chosen and rejected start with an assistant message"
        )
    shared = _shared(chosen, rejected)
    if any(begin) or not shared:
        raise ValueError(
            f"{where}, column rejected: its first message differs from that of chosen; both must answer the same prompt"
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if (role := answer[shared]["role"]) != "assistant":
            raise ValueError(
                f"{where}, column {name}: it first differs from the other answer at a message with role {role}, not assistant"
            )
    before = chosen[:shared]
    if prompt_messages and prompt_messages[-shared:] == before:
        before = prompt_messages
    elif prompt_messages and not _holds(before, prompt_messages, prompt):
        raise ValueError(f"{where}, column prompt: chosen and rejected do not start with it")
    return _check_last_role(before, where), chosen[shared:], rejected[shared:]


def _shared(chosen: list[Any], rejected: list[Any]) -> int:
    """Return the number of common messages at the beginning, without the last message of either."""
    most = min(len(chosen), len(rejected)) - 1
    return next((at for at in range(most) if chosen[at] != rejected[at]), most)


def _holds(before: list[Any], prompt_messages: list[Any], prompt: Any) -> bool:
    """Return True if the start of a conversation contains the prompt, as its last messages or as a text."""
    if isinstance(prompt, str):
        return any(m["content"] == prompt or str(m["content"]).strip() == prompt.strip() for m in before)
    return bool(before[-len(prompt_messages) :] == prompt_messages)


def _check_last_role(prompt: list[Any], where: str) -> list[Any]:
    """Return a prompt that ends with a message of the user or a tool."""
    if prompt[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{where}, column prompt: its last message has role {prompt[-1]['role']}, not user")
    return prompt


def split_texts(prompt: str | None, chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Return prompt and answers as texts, split as TRL splits them.

    Args:
        prompt: the prompt; None if only the answers have it.
        chosen: the better answer.
        rejected: the worse answer.
        where: the beginning of errors.

    Raises:
        ValueError: there is no prompt, and the answers have no common beginning.
    """
    return (prompt, chosen, rejected) if prompt is not None else _common_beginning(chosen, rejected, where)


def _common_beginning(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Split off the common beginning of two texts, where TRL's `extract_prompt` does.

    That is at the first character that differs, or at the space before it. If one text is the beginning of the other, TRL
    splits before the last character; here the last word is the answer.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), None)
    if at is None:
        return _implicit(chosen, rejected, where)
    at -= at > 0 and chosen[at - 1] == " "
    if not chosen[:at].strip():
        raise ValueError(
            f"{where}, column prompt: it is missing, and chosen and rejected do not start with the same words"
        )
    return chosen[:at], chosen[at:], rejected[at:]


def split_texts_to_messages(
    prompt: Any, chosen: str, rejected: str, where: str
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return prompt and answers of texts as messages.

    Args:
        prompt: messages or a text; None if only the answers have it.
        chosen: the better answer.
        rejected: the worse answer.
        where: the beginning of errors.

    Raises:
        ValueError: the prompt is missing or empty.
    """
    if prompt is None:
        prompt, chosen, rejected = _implicit(chosen, rejected, where)
    if isinstance(prompt, str):
        prompt = _transcript(prompt) or [{"role": "user", "content": prompt}]
    if not prompt[-1]["content"]:
        raise ValueError(f"{where}, column prompt: it is empty")
    good, bad = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return _check_last_role(prompt, where), good, bad


def _implicit(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Split off the common prompt of two texts: up to the last `Assistant:` of a transcript, or the common whole words."""
    turn = "\n\nAssistant:"
    if chosen.startswith(TRANSCRIPT):
        at = chosen.rfind(turn) + len(turn)
        if chosen[:at] != rejected[: rejected.rfind(turn) + len(turn)]:
            raise ValueError(
                f"{where}, column rejected: its transcript differs from that of chosen before the last Assistant:"
            )
        return chosen[:at], chosen[at:].strip(), rejected[at:].strip()
    pairs = enumerate(zip(chosen, rejected, strict=False))
    alike = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    at = chosen.rfind(" ", 0, alike)
    if not chosen[: max(at, 0)].strip():
        raise ValueError(
            f"{where}, column prompt: it is missing, and chosen and rejected do not start with the same words"
        )
    return chosen[:at], chosen[at + 1 :], rejected[at + 1 :]


def _transcript(text: str) -> list[dict[str, str]] | None:
    """Return the messages of a transcript of `\\n\\nHuman:` and `\\n\\nAssistant:`; None if the text is no transcript."""
    if not text.startswith(TRANSCRIPT):
        return None
    messages: list[dict[str, str]] = []
    for turn in text.replace(TRANSCRIPT, "\0user\0").replace("\n\nAssistant:", "\0assistant\0").split("\0")[1:]:
        if turn in ("user", "assistant"):
            messages.append({"role": turn, "content": ""})
        else:
            messages[-1]["content"] = turn.strip()
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
