"""Read the answers of a system, and question sets, in the forms in which benchmarks publish them."""

# ruff: noqa: TRY004 (a wrong type in somebody's file is a ValueError like any other mistake in it)

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.column_names import rename_columns
from contralto.common.files import read_json_lines, read_text
from contralto.common.texts import has_lone_surrogate
from contralto.data_gen.templates import as_text

__all__ = ["ANSWER_FORMS", "NAMES", "EvalQuestion", "SystemAnswer", "read_answers", "read_questions"]

NAMES = ("id", "prompt", "answer", "category", "reference")
"""The names under which columns are read; `--columns` maps others to them."""
IDS = ("id", "question_id", "uid", "idx", "prompt_id")
PROMPTS = ("prompt", "instruction", "question", "Instruction", "turns")
ANSWERS = ("answer", "output", "response", "completion", "generated_text", "text")
CATEGORIES = ("category", "subcategory", "Skill", "dataset", "cluster", "subset")
REFERENCES = ("reference", "reference_answer", "ref_answer")
"""Columns in published files, the first one that a row has is read."""


class SystemAnswer(NamedTuple):
    """A system's answer to a prompt of one or several turns."""

    id: str | None
    turns: tuple[str, ...]
    """The turns of the user; empty if the row does not have them."""
    texts: tuple[str, ...]
    """The answer to each turn."""
    system: str = ""
    """The name of the system, if the row has one."""


class EvalQuestion(NamedTuple):
    """A question of a benchmark."""

    id: str | None
    turns: tuple[str, ...]
    category: str = ""
    references: tuple[str, ...] = ()
    """A reference answer to each turn; empty without."""


class AnswerForm(NamedTuple):
    """A published form of answers."""

    name: str
    columns: tuple[str, ...]
    """The columns by which a row of this form is recognized."""
    read: Callable[[Mapping[str, Any], str], tuple[Any, Any]]
    """Returns the turns of the user, None without, and the answer or answers."""


def _choices(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise ValueError(f"{where}, column choices: must be a list of one object with turns")
    return None, choices[0].get("turns")


def _conversation(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and {"role", "content"} <= {*m} for m in messages
    ):
        raise ValueError(f"{where}, column messages: must be a list of messages with role and content")
    system, users, answers = (
        [m["content"] for m in messages if m["role"] == role] for role in ("system", "user", "assistant")
    )
    if system and users:
        users[0] = f"system: {system[0]}\n\nuser: {users[0]}"
    return users, [a.get("answer") if isinstance(a, Mapping) else a for a in answers]


def _instruction(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    return _plain_prompt(row), row["output"]


def _generated(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    return row["prompt"], row["text"]


def _plain(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    names = ["answer"] if "answer" in row else [name for name in ANSWERS if name in row]
    if len(names) != 1:
        has = (
            f"{' and '.join(names)} could both be it"
            if names
            else f"the row has {', '.join(map(str, row)) or 'nothing'}"
        )
        raise ValueError(f"{where}: no column is known to hold the answer: {has}; name it with --columns answer=COLUMN")
    return _plain_prompt(row), row[names[0]]


def _plain_prompt(row: Mapping[str, Any]) -> Any:
    return next((row[name] for name in PROMPTS if name in row), None)


ANSWER_FORMS = (
    AnswerForm("FastChat (MT-Bench), Arena-Hard v0.1", ("choices",), _choices),
    AnswerForm("Arena-Hard v2, conversations", ("messages",), _conversation),
    AnswerForm("AlpacaEval", ("instruction", "output"), _instruction),
    AnswerForm("contralto generate", ("index", "settings", "text"), _generated),
    AnswerForm("a prompt and an answer", (), _plain),
)
"""The forms in the order in which they are tried; a column that is mapped to `answer` has the last one."""


def read_answers(path: Path, *, columns: Mapping[str, str] | None = None) -> list[SystemAnswer]:
    """Read the answers of a system.

    Args:
        path: a `.jsonl` file, or a `.json` file with a list.
        columns: columns under other names: `{"answer": "reply"}`; names of `NAMES`.

    Raises:
        OSError: the file cannot be read.
        ValueError: a row is not valid; the message names file, row and column.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.jsonl"
        ...     _ = file.write_text('{"prompt": "2 + 2?", "output": "4"}\\n')
        ...     read_answers(file)
        [SystemAnswer(id=None, turns=('2 + 2?',), texts=('4',), system='')]
    """
    answers = []
    for number, record in _records(path):
        where = f"{path}, row {number}"
        row = _row(record, columns, where)
        if any(row.get(name) for name in ("image", "images")):
            raise ValueError(f"{where}: judges of answers read no images, and this prompt has one")
        form = next(f for f in ANSWER_FORMS if {*f.columns} <= {*row} and ("answer" not in row or not f.columns))
        turns, texts = form.read(row, where)
        answers.append(
            SystemAnswer(
                _identity(row),
                () if turns is None else _turns(turns, f"{where}, the prompt"),
                _turns(texts, f"{where}, the answer", may_be_empty=True),
                str(row.get("generator") or row.get("model_id") or row.get("model") or ""),
            )
        )
    if not answers:
        raise ValueError(f"{path} has no rows")
    return answers


def read_questions(path: Path, *, columns: Mapping[str, str] | None = None) -> list[EvalQuestion]:
    """Read a question set: that of AlpacaEval, Arena-Hard, MT-Bench, Evol-Instruct, or rows with `prompt`.

    Args:
        path: a `.jsonl` file, or a `.json` file with a list.
        columns: columns under other names: `{"category": "topic"}`.

    Raises:
        OSError: the file cannot be read.
        ValueError: a row has no prompt; the message names file, row and column.
    """
    questions = []
    for number, record in _records(path):
        where = f"{path}, row {number}"
        row = _row(record, columns, where)
        prompt = _plain_prompt(row)
        if prompt is None and "messages" in row:
            prompt = _conversation(row, where)[0]
        if prompt is None:
            raise ValueError(f"{where}: no column is known to hold the question; name it with --columns prompt=COLUMN")
        category = next((row[name] for name in CATEGORIES if row.get(name) is not None), "")
        references = next((row[name] for name in REFERENCES if row.get(name)), ())
        questions.append(
            EvalQuestion(
                _identity(row),
                _turns(prompt, f"{where}, the question"),
                str(category),
                _turns(references, f"{where}, the reference") if references else (),
            )
        )
    if not questions:
        raise ValueError(f"{path} has no rows")
    return questions


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file with their numbers."""
    if path.suffix == ".jsonl":
        yield from read_json_lines(path)
        return
    if path.suffix != ".json":
        kind = f"not from {path.suffix}" if path.suffix else "and this name has no suffix"
        raise ValueError(f"{path}: answers and questions are read from .jsonl and .json files, {kind}")
    text = read_text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}, column {error.colno}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a .json file must hold a list of rows, not one {type(rows).__name__}")
    yield from enumerate(rows, 1)


def _row(record: Any, columns: Mapping[str, str] | None, where: str) -> Mapping[str, Any]:
    row = rename_columns(record, columns or {}, where)
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, not a {type(row).__name__}")
    if has_lone_surrogate(row):
        raise ValueError(f"{where}: a string holds half of a surrogate pair, which can be neither sent nor recorded")
    return row


def _identity(row: Mapping[str, Any]) -> str | None:
    return next((str(row[name]) for name in IDS if row.get(name) is not None), None)


def _turns(value: Any, where: str, *, may_be_empty: bool = False) -> tuple[str, ...]:
    """Return the texts of turns: of a text, of a list of texts, of messages, or of objects with content."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not values:
        raise ValueError(f"{where}: must be a text or a list of turns, not {value!r:.60}")
    if all(isinstance(each, Mapping) and {"role", "content"} <= {*each} for each in values):
        values = [as_text(values)]
    turns = tuple(each.get("content") if isinstance(each, Mapping) else each for each in values)
    for turn in turns:
        if not isinstance(turn, str) or not (turn.strip() or may_be_empty):
            raise ValueError(f"{where}: a turn must be a text, not {turn!r:.60}")
    return turns  # type: ignore[return-value]
