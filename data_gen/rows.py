"""Preference rows in the one form that TRL reads without guessing, and a reader that brings published data sets into it.

A row has `prompt`, `chosen` and `rejected`, each a list of messages; `images` if there are any; and columns that say where it
comes from. The form matters: many published sets hold a prompt as text beside answers as conversations, and on such rows
TRL 1.16 decides by the order of a set of strings, so that PYTHONHASHSEED decides which error ends the training.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's data or recipe is a ValueError like any other mistake in it)

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contralto.data_gen.requests import Message

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["as_row", "load_pairs", "to_dataset"]

ROLES = ("system", "developer", "user", "assistant", "tool")
RESERVED = ("messages", "completion")
"""Columns by which TRL would recognise another kind of row; they are kept as `source_messages`, `source_completion`."""
IMAGES = ("images", "rejected_images")


# -------------------------------------------------------------------------------------------------------- rows to columns


def to_dataset(rows: Sequence[Mapping[str, Any]]) -> "Dataset":
    """Rows as a `datasets.Dataset` of one schema: a column that a row does not have is None there, images are stored inside.

    Args:
        rows: with `prompt`, `chosen`, `rejected` as messages; of one strategy or of several; images as paths, bytes or Pillow images.

    Raises:
        ValueError: no rows, or a column of values that no common type holds.
    """
    from datasets import Dataset, Features, Image, List

    if not rows:
        raise ValueError("a data set needs at least one row, and there is none")
    rows = _alike(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    pictures = {
        name: [[_stored(i) for i in found or ()] for found in columns.pop(name)] for name in IMAGES if name in columns
    }
    for name, values in columns.items():
        _check_type(name, values)
    dataset = Dataset.from_dict(columns)
    if not pictures:
        return dataset
    features = Features({**dataset.features, **{name: List(Image()) for name in pictures}})
    return Dataset.from_dict({**columns, **pictures}, features=features)


def _alike(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """All contents as lists of parts, if one of them is: a column has one type."""
    conversations = ("prompt", "chosen", "rejected")
    if not any(isinstance(m["content"], list) for row in rows for name in conversations for m in row[name]):
        return rows
    return [{**row, **{name: [_in_parts(message) for message in row[name]] for name in conversations}} for row in rows]


def _in_parts(message: Message) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def _check_type(name: str, values: Sequence[Any]) -> None:
    from datasets import Dataset

    try:
        Dataset.from_dict({name: values})
    except (ValueError, TypeError) as error:  # of pyarrow
        first = {type(value).__name__: at for at, value in reversed(list(enumerate(values, 1)))}
        kinds = ", ".join(f"{kind} in row {at}" for kind, at in sorted(first.items(), key=lambda item: item[1]))
        raise ValueError(f"column {name} mixes values that no common type holds ({kinds}): {error}") from error


def _stored(image: Any) -> dict[str, Any]:
    """An image's bytes: of its file as they are, of a Pillow image as PNG."""
    if isinstance(image, Mapping):
        return dict(image) if image.get("bytes") else {"bytes": Path(image["path"]).read_bytes(), "path": None}
    if isinstance(image, str | PathLike):
        return {"bytes": Path(image).read_bytes(), "path": None}
    png = io.BytesIO()
    image.save(png, format="PNG")
    return {"bytes": png.getvalue(), "path": None}


# ---------------------------------------------------------------------------------------------------- published schemas


def load_pairs(source: Any, *, split: str = "train") -> "Dataset":
    """Read preference pairs in any published form, as rows that TRL's trainers take.

    | published form | `prompt` | `chosen`, `rejected` |
    |---|---|---|
    | TRL, explicit prompt | messages | messages of the assistant |
    | UltraFeedback-CLAIR, distilabel, DistiLLM-2, UltraFeedback-binarized | text | whole conversations |
    | implicit prompt | none | whole conversations, or texts: transcripts of `Human:` and `Assistant:`, or any that begin alike |
    | plain texts | text, or a transcript | texts |

    Args:
        source: a JSONL, JSON or parquet file; a folder of them, or one of `save_to_disk`; a `datasets.Dataset`; a hub id.
        split: which, if there are several.

    Returns:
        A `Dataset` with `prompt`, `chosen`, `rejected` as lists of messages, `images` if there are any, and all other columns.
        Columns named `messages` and `completion` become `source_messages` and `source_completion`: TRL would take them for
        another kind of data.

    Raises:
        ValueError: whatever is wrong, in one sentence with file, row (from 1) and column.

    Example:
        >>> load_pairs("pairs.csv")
        Traceback (most recent call last):
            ...
        ValueError: pairs.csv: preference pairs are read from .jsonl, .json and .parquet files, not from .csv
    """
    name, records = _open(source, split)
    rows = [as_row(record, where=f"{name}, row {at}") for at, record in enumerate(records, 1)]
    if not rows:
        raise ValueError(f"{name} has no rows")
    try:
        return to_dataset(rows)
    except ValueError as error:
        raise ValueError(f"{name}, {error}") from error


def _open(source: Any, split: str) -> tuple[str, Iterable[Any]]:
    """A name for messages, and the records as they are."""
    from datasets import Dataset, DatasetDict

    if isinstance(source, DatasetDict):
        return "the data set", _undecoded(_of_split(source, split, "the data set"))
    if isinstance(source, Dataset):
        return "the data set", _undecoded(source)
    path = Path(source)
    if path.is_dir():
        return str(source), _folder(path, split)
    if path.suffix in (".jsonl", ".json", ".parquet") or path.exists():
        return str(source), _file(path)
    if (
        path.suffix in (".csv", ".tsv", ".txt", ".gz", ".arrow")
        or str(source).count("/") > 1
        or str(source).startswith(".")
    ):
        return str(source), _file(path)
    return str(source), _hub(str(source), split)


def _file(path: Path) -> Iterable[Any]:
    readers: dict[str, Callable[[Path], Iterable[Any]]] = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if path.suffix not in readers:
        kind = f"not from {path.suffix}" if path.suffix else "and this name has no suffix"
        raise ValueError(f"{path}: preference pairs are read from .jsonl, .json and .parquet files, {kind}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    return readers[path.suffix](path)


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        try:
            lines = file.readlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text in UTF-8: {error}") from error
    for at, line in enumerate(lines, 1):
        try:
            yield _in_folder(json.loads(line.rstrip("\n")), path.parent)
        except json.JSONDecodeError as error:
            what = "an empty line" if not line.strip() else f"not JSON, column {error.colno}: {error.msg}"
            raise ValueError(f"{path}, row {at}: {what}; each line holds one JSON object") from error


def _json(path: Path) -> Iterator[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds a JSON {type(records).__name__}, not a list of rows")
    return (_in_folder(record, path.parent) for record in records)


def _parquet(path: Path) -> Iterable[Any]:
    from datasets import Dataset

    try:
        return _undecoded(Dataset.from_parquet(str(path)))
    except (ValueError, OSError) as error:  # of pyarrow
        raise ValueError(f"{path}: not a parquet file: {error}") from error


def _in_folder(record: Any, folder: Path) -> Any:
    """Paths of images as seen from the file's folder."""
    if not isinstance(record, dict):
        return record
    moved: dict[str, Any] = {}
    for name in (*IMAGES, "image"):
        found = record.get(name)
        if isinstance(found, str):
            moved[name] = str(folder / found)
        elif isinstance(found, list):
            moved[name] = [str(folder / image) if isinstance(image, str) else image for image in found]
    return record | moved


def _folder(path: Path, split: str) -> Iterable[Any]:
    """A folder of `save_to_disk`, or of files whose names begin with the split's, or all its files where none does."""
    from datasets import DatasetDict, load_from_disk

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        stored = load_from_disk(str(path))
        return _undecoded(_of_split(stored, split, str(path)) if isinstance(stored, DatasetDict) else stored)
    for suffix in (".parquet", ".jsonl", ".json"):
        if files := sorted(file for file in path.rglob(f"*{suffix}") if file.name != "dataset_infos.json"):
            of_split = [file for file in files if file.name.startswith(split)] or files
            return (record for file in of_split for record in _file(file))
    raise ValueError(f"{path}: the folder holds no .parquet, .jsonl or .json file")


def _of_split(stored: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in stored:
        raise ValueError(f"{name}: there is no split {split!r}; it has {', '.join(stored)}")
    return stored[split]


def _hub(name: str, split: str) -> Iterable[Any]:
    from datasets import load_dataset

    try:
        return _undecoded(load_dataset(name, split=split))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: neither a file or folder here nor a data set of the Hub: {error}") from error


def _undecoded(dataset: Any) -> Iterable[Any]:
    """Images as their bytes: nothing is decoded to be encoded again."""
    from datasets import Image, List

    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------- one row


def as_row(record: Any, *, where: str = "the row") -> dict[str, Any]:
    """One record of any published form as a row; see `load_pairs`.

    Args:
        record: as it was read.
        where: what messages call it.

    Raises:
        ValueError: whatever is wrong, with the column.

    Example:
        >>> row = as_row({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
        >>> row["prompt"], row["rejected"]
        ([{'role': 'user', 'content': '2 + 2?'}], [{'role': 'assistant', 'content': '5'}])
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a row is a JSON object with chosen and rejected, not a {type(record).__name__}")
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            what = "is empty (null): drop such rows first" if name in record else "is missing"
            raise ValueError(f"{where}, column {name}: {what}; a preference row has chosen and rejected")
    answers = {name: _said(record[name], f"{where}, column {name}") for name in ("chosen", "rejected")}
    prompt = None if record.get("prompt") is None else _said(record["prompt"], f"{where}, column prompt")
    kinds = [isinstance(answer, str) for answer in answers.values()]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{where}, column rejected: one of chosen and rejected is a text, the other a list of messages"
        )
    if kinds[0]:
        split = _of_texts(prompt, answers["chosen"], answers["rejected"], where)
    else:
        split = _of_messages(prompt, answers["chosen"], answers["rejected"], where)
    row = dict(zip(("prompt", "chosen", "rejected"), split, strict=True))
    others = {f"source_{k}" if k in RESERVED else k: v for k, v in record.items() if k not in (*row, *IMAGES, "image")}
    return row | _images(record, row, where) | others


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
    if chosen.startswith("\n\nHuman:"):
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
    if not text.startswith("\n\nHuman:"):
        return None
    messages: list[dict[str, str]] = []
    for turn in text.replace("\n\nHuman:", "\0user\0").replace("\n\nAssistant:", "\0assistant\0").split("\0")[1:]:
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
    marks = [
        part
        for m in row["prompt"]
        if isinstance(m["content"], list)
        for part in m["content"]
        if part["type"] == "image"
    ]
    if marks and len(marks) != len(found.get("images", ())):
        raise ValueError(
            f"{where}, column images: {len(found.get('images', ()))} images for {len(marks)} places in the prompt"
        )
    return found


def _check_image(image: Any, where: str) -> None:
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, Image.Image):
        return
    if isinstance(image, Mapping):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    if not isinstance(image, str | PathLike | io.BytesIO):
        raise ValueError(f"{where}: neither a path nor an image, but a {type(image).__name__}")
    try:
        Image.open(image).close()
    except FileNotFoundError as error:
        raise ValueError(f"{where}: there is no file {image}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{where}: the file is not an image") from error
