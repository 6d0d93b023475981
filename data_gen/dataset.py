"""Preference rows in the one form that TRL reads without guessing, and a reader that brings published data sets into it.

A row has `prompt`, `chosen` and `rejected`, each a list of messages, or each a text; `images` if there are any; and columns that
say where it comes from. The form matters: many published sets hold a prompt as text beside answers as conversations, and on such rows
TRL 1.16 decides by the order of a set of strings, so that PYTHONHASHSEED decides which error ends the training.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's data or recipe is a ValueError like any other mistake in it)

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from contralto.data_gen.columns import stored, to_dataset
from contralto.data_gen.image_files import check_image
from contralto.data_gen.sources import IMAGES, records

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["as_row", "load_pairs", "stream_pairs", "template_options", "to_dataset"]

ROLES = ("system", "developer", "user", "assistant", "tool")
RESERVED = ("messages", "completion")
"""Columns by which TRL would recognise another kind of row; they are kept as `source_messages`, `source_completion`."""
HUMAN = "\n\nHuman:"
"""How a transcript begins."""
SYSTEM = ("system", "system_prompt")
"""Columns that hold the system's turn."""
PROMPT_PARTS = (*SYSTEM, "instruction", "input", "question", "query", "history", "context", "documents")
"""Columns that hold a part of the prompt in published data sets."""


# ---------------------------------------------------------------------------------------------------- published schemas


def load_pairs(
    source: Any, *, split: str = "train", config: str | None = None, conversations: bool = False
) -> "Dataset":
    """Read preference pairs in any published form, as rows that TRL's trainers take.

    | published form | `prompt` | `chosen`, `rejected` |
    |---|---|---|
    | TRL, explicit prompt | messages | messages of the assistant |
    | UltraFeedback-CLAIR, distilabel, DistiLLM-2, UltraFeedback-binarized | text | whole conversations |
    | implicit prompt | none | whole conversations, or texts: transcripts of `Human:` and `Assistant:`, or any that begin alike |
    | plain texts | text, or a transcript | texts |

    Rows of texts alone stay texts, which TRL trains on without a chat template; all others become conversations. So do texts
    beside images, since only messages say where an image stands.

    Args:
        source: a JSONL, JSON or parquet file; a folder of them, or one of `save_to_disk`; a `datasets.Dataset`; a hub id.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: make conversations of texts: the prompt is the user's turn, or those of a transcript, and the answers are
            the assistant's.

    Returns:
        A `Dataset` with `prompt`, `chosen`, `rejected`, as lists of messages or as texts; `images` if there are any, and all
        other columns. Columns named `messages` and `completion` become `source_messages` and `source_completion`: TRL would
        take them for another kind of data.

    Raises:
        ValueError: whatever is wrong, in one sentence with file, row (from 1) and column.

    Examples:
        >>> load_pairs("pairs.csv")
        Traceback (most recent call last):
            ...
        ValueError: pairs.csv: preference pairs are read from .jsonl, .json and .parquet files, not from .csv
    """
    name, found = records(source, split, config)
    rows = list(_rows(found, name, conversations=conversations))
    if not rows:
        raise ValueError(f"{name} has no rows")
    try:
        return to_dataset(rows)
    except ValueError as error:
        raise ValueError(f"{name}, {error}") from error


def stream_pairs(
    source: Any, *, split: str = "train", config: str | None = None, conversations: bool = False
) -> "IterableDataset":
    """Read the rows of `load_pairs` as a stream: each is read, and checked, when it is asked for.

    Args:
        source: as for `load_pairs`.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: make conversations of texts.

    Raises:
        ValueError: the source does not exist, or has no such split; whatever is wrong with a row, when it is read.
    """
    from datasets import Image, IterableDataset

    records(source, split, config, streaming=True)

    def rows() -> Iterator[dict[str, Any]]:
        name, found = records(source, split, config, streaming=True)
        for row in _rows(found, name, conversations=conversations):
            shown = {
                name: [Image().decode_example(stored(image)) for image in row[name]] for name in IMAGES if name in row
            }
            yield row | shown

    return IterableDataset.from_generator(rows)


def _rows(found: Any, name: str, *, conversations: bool) -> Iterator[dict[str, Any]]:
    """The rows of one data set, all of one kind."""
    first = None
    for at, record in enumerate(found, 1):
        row = as_row(record, where=f"{name}, row {at}", conversations=conversations)
        kind = "texts" if isinstance(row["prompt"], str) else "messages"
        first = first or kind
        if kind != first:
            raise ValueError(
                f"{name}, row {at}: it is made of {kind}, and the rows before it of {first}: bring them into one form, or make "
                "conversations of texts (conversations)"
            )
        yield row


# ------------------------------------------------------------------------------------------------------------- one row


def as_row(record: Any, *, where: str = "the row", conversations: bool = False) -> dict[str, Any]:
    """One record of any published form as a row; see `load_pairs`.

    Args:
        record: as it was read.
        where: what messages call it.
        conversations: make conversations of texts.

    Raises:
        ValueError: whatever is wrong, with the column.

    Examples:
        >>> row = as_row({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, conversations=True)
        >>> row["prompt"], row["rejected"]
        ([{'role': 'user', 'content': '2 + 2?'}], [{'role': 'assistant', 'content': '5'}])
        >>> as_row({"question": "2 + 2?", "chosen": "It is 4", "rejected": "It is 5"})
        Traceback (most recent call last):
            ...
        ValueError: the row, column prompt: it is missing, and question holds text: rename the column that is the prompt to prompt
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a row is a JSON object with chosen and rejected, not a {type(record).__name__}")
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            _missing(record, name, where)
    answers = {name: _said(record[name], f"{where}, column {name}") for name in ("chosen", "rejected")}
    prompt = None if record.get("prompt") is None else _said(record["prompt"], f"{where}, column prompt")
    if prompt is None:
        _check_prompt_is_inside(record, answers, where)
    kinds = [isinstance(answer, str) for answer in answers.values()]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{where}, column rejected: one of chosen and rejected is a text, the other a list of messages"
        )
    has_images = any(record.get(name) for name in (*IMAGES, "image"))
    if kinds[0] and not isinstance(prompt, list) and not conversations and not has_images:
        split: tuple[Any, Any, Any] = _as_texts(prompt, answers["chosen"], answers["rejected"], where)
    elif kinds[0]:
        split = _of_texts(prompt, answers["chosen"], answers["rejected"], where)
    else:
        split = _of_messages(prompt, answers["chosen"], answers["rejected"], where)
    row = dict(zip(("prompt", "chosen", "rejected"), split, strict=True))
    row["prompt"] = _with_parts(row["prompt"], record, where)
    others = {f"source_{k}" if k in RESERVED else k: v for k, v in record.items() if k not in (*row, *IMAGES, "image")}
    return row | _images(record, row, where) | others


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what TRL hands to the chat template beside a row's messages.

    Args:
        row: with `tools`, as a list or as JSON, and `chat_template_kwargs`, if it has any.

    Examples:
        >>> template_options({"tools": "[]", "chat_template_kwargs": {"enable_thinking": False}})
        {'tools': [], 'enable_thinking': False}
    """
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


def _missing(record: Mapping[str, Any], name: str, where: str) -> None:
    """Raise for a record without an answer."""
    if name in record:
        what = "is empty (null): drop such rows first"
        raise ValueError(f"{where}, column {name}: {what}; a preference row has chosen and rejected")
    has = f"the row has {', '.join(map(str, record)) or 'nothing'}"
    raise ValueError(
        f"{where}, column {name}: is missing; {has}; a preference row has chosen and rejected: rename the columns that hold them"
    )


def _check_prompt_is_inside(record: Mapping[str, Any], answers: Mapping[str, Any], where: str) -> None:
    """Raise for answers that do not say what they answer, where another column may hold it."""
    if all(_says_its_prompt(answer) for answer in answers.values()):
        return
    others = [name for name in record if name not in (*answers, "prompt", "id") and any(_texts(record[name]))]
    if others:
        rest = "" if len(others) == 1 else ", and drop those that are no part of it"
        verb = "holds" if len(others) == 1 else "hold"
        raise ValueError(
            f"{where}, column prompt: it is missing, and {', '.join(others)} {verb} text: rename the column that is the prompt to "
            f"prompt{rest}"
        )


def _says_its_prompt(answer: Any) -> bool:
    """Whether an answer marks the prompt that it begins with: a conversation, or a transcript."""
    if isinstance(answer, str):
        return answer.startswith(HUMAN)
    return bool(answer[0]["role"] != "assistant")


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, at any depth, that are not empty."""
    if isinstance(value, str):
        yield from [value.strip()] if value.strip() else []
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _with_parts(prompt: Any, record: Mapping[str, Any], where: str) -> Any:
    """The prompt with the system's turn of a column; whatever else a prompt's column holds must be in it already.

    Raises:
        ValueError: a column holds a part of the prompt that would not be trained on.
    """
    told = "\n".join(_texts(prompt))
    left = [name for name in PROMPT_PARTS if name in record and any(text not in told for text in _texts(record[name]))]
    system = [name for name in left if name in SYSTEM and isinstance(record[name], str)]
    if left and left == system[:1] and isinstance(prompt, list) and prompt[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": record[left[0]]}, *prompt]
    if left:
        how = "put it into prompt" + (", or make conversations of texts (conversations)" if left == system[:1] else "")
        if isinstance(prompt, list) and left == system[:1]:
            how = "keep one of the two system turns"
        raise ValueError(
            f"{where}, column {left[0]}: it holds a part of the prompt that prompt does not hold, so it would not be trained on: "
            f"{how}, or drop the column"
        )
    return prompt


def _said(value: Any, where: str) -> Any:
    """A text, or checked messages."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where}: neither a text nor a list of messages, but a {type(value).__name__}")
    if not value:
        raise ValueError(f"{where}: the list of messages is empty")
    return [_message(message, f"{where}, message {at}") for at, message in enumerate(value, 1)]


def _message(message: Any, where: str) -> dict[str, Any]:
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
        raise ValueError(f"{where}: its content is a {type(content).__name__}, not a text or a list of parts")
    return kept | {"content": content}


def _parts(parts: list[Any], where: str) -> Any:
    """Parts without their empty fields; texts alone become one text."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
            raise ValueError(f"{where}: a part of its content is neither of type text nor of type image: {part!r:.80}")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: a text part of its content has no text")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [{"type": "text", "text": p["text"]} if p["type"] == "text" else {"type": "image"} for p in parts]


def _of_messages(
    prompt: Any, chosen: list[Any], rejected: list[Any], where: str
) -> tuple[list[Any], list[Any], list[Any]]:
    """Prompt and answers of conversations, which may repeat the prompt."""
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != "assistant":
            raise ValueError(
                f"{where}, column {name}: it ends with a turn of the {answer[-1]['role']}, not of the assistant"
            )
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    begin = [answer[0]["role"] == "assistant" for answer in (chosen, rejected)]
    if all(begin) and asked:
        return _ends_asking(asked, where), chosen, rejected
    if all(begin):
        raise ValueError(
            f"{where}, column prompt: it is missing, and chosen and rejected begin with the assistant's turn"
        )
    shared = _shared(chosen, rejected)
    if any(begin) or not shared:
        raise ValueError(
            f"{where}, column rejected: it begins with another turn than chosen; both answer the same prompt"
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if (role := answer[shared]["role"]) != "assistant":
            raise ValueError(f"{where}, column {name}: it parts from the other answer at a turn of the {role}")
    before = chosen[:shared]
    if asked and asked[-shared:] == before:
        before = asked
    elif asked and not _holds(before, asked, prompt):
        raise ValueError(f"{where}, column prompt: it is not what chosen and rejected begin with")
    return _ends_asking(before, where), chosen[shared:], rejected[shared:]


def _shared(chosen: list[Any], rejected: list[Any]) -> int:
    """How many turns both begin with, the last turn of either left out."""
    most = min(len(chosen), len(rejected)) - 1
    return next((at for at in range(most) if chosen[at] != rejected[at]), most)


def _holds(before: list[Any], asked: list[Any], prompt: Any) -> bool:
    """Whether the conversation's beginning has the prompt: as its last turns, or as the text of one."""
    if isinstance(prompt, str):
        return any(m["content"] == prompt or str(m["content"]).strip() == prompt.strip() for m in before)
    return bool(before[-len(asked) :] == asked)


def _ends_asking(prompt: list[Any], where: str) -> list[Any]:
    if prompt[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{where}, column prompt: it ends with a turn of the {prompt[-1]['role']}, not of the user")
    return prompt


def _as_texts(prompt: str | None, chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Prompt and answers as TRL reads texts."""
    return (prompt, chosen, rejected) if prompt is not None else _begun_alike(chosen, rejected, where)


def _begun_alike(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """The prompt that two texts begin with, cut where TRL's `extract_prompt` cuts it.

    That is at the first character that differs, or at the space before it. Where one text is the beginning of the other, TRL
    cuts before the last character; here the last word is left.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), None)
    if at is None:
        return _implicit(chosen, rejected, where)
    at -= at > 0 and chosen[at - 1] == " "
    if not chosen[:at].strip():
        raise ValueError(
            f"{where}, column prompt: it is missing, and chosen and rejected do not begin with the same words"
        )
    return chosen[:at], chosen[at:], rejected[at:]


def _of_texts(prompt: Any, chosen: str, rejected: str, where: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Prompt and answers of texts."""
    if prompt is None:
        prompt, chosen, rejected = _implicit(chosen, rejected, where)
    if isinstance(prompt, str):
        prompt = _transcript(prompt) or [{"role": "user", "content": prompt}]
    if not prompt[-1]["content"]:
        raise ValueError(f"{where}, column prompt: it is empty")
    good, bad = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return _ends_asking(prompt, where), good, bad


def _implicit(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """The prompt that two texts begin with: up to the last `Assistant:` of a transcript, or as many whole words as are alike."""
    turn = "\n\nAssistant:"
    if chosen.startswith(HUMAN):
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
            f"{where}, column prompt: it is missing, and chosen and rejected do not begin with the same words"
        )
    return chosen[:at], chosen[at + 1 :], rejected[at + 1 :]


def _transcript(text: str) -> list[dict[str, str]] | None:
    """The messages of a transcript of `\\n\\nHuman:` and `\\n\\nAssistant:`; None if it is none."""
    if not text.startswith(HUMAN):
        return None
    messages: list[dict[str, str]] = []
    for turn in text.replace(HUMAN, "\0user\0").replace("\n\nAssistant:", "\0assistant\0").split("\0")[1:]:
        if turn in ("user", "assistant"):
            messages.append({"role": turn, "content": ""})
        else:
            messages[-1]["content"] = turn.strip()
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages


def _images(record: Mapping[str, Any], row: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """The columns of images, checked, if the record has them."""
    found = {name: record[name] for name in IMAGES if record.get(name) is not None}
    if record.get("image") is not None:
        found["images"] = [record["image"]]
    for name, images in found.items():
        if not isinstance(images, list):
            raise ValueError(f"{where}, column {name}: it holds a {type(images).__name__}, not a list of images")
        for at, image in enumerate(images, 1):
            _check_image(image, f"{where}, column {name}, image {at}")
    for name in ("chosen", "rejected"):
        places = _places(row["prompt"]) + _places(row[name])
        if places and places != len(found.get("images", ())):
            raise ValueError(
                f"{where}, column images: {len(found.get('images', ()))} images for {places} places in prompt and {name}"
            )
    return found


def _places(value: Any) -> int:
    """Return the number of image parts in messages."""
    contents = [m["content"] for m in value if isinstance(m, Mapping)]
    return sum(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def _check_image(image: Any, where: str) -> None:
    from PIL import Image

    if isinstance(image, Image.Image):
        return
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str | PathLike | bytes):
        raise ValueError(f"{where}: neither a path nor an image, but a {type(image).__name__}")
    check_image(image, where)
