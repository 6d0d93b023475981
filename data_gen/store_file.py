"""The SQLite file of a store: what makes it one, how it is opened, its transactions, its errors."""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from contralto.common.files import naming
from contralto.common.texts import printable

__all__ = [
    "ANSWERS",
    "APPLICATION",
    "FAILURES",
    "VERSION",
    "Transaction",
    "check",
    "checked_line",
    "named_errors",
    "numbers_in",
    "open_read_only",
    "undo_interrupted_write",
]

VERSION = 1
APPLICATION = 0x63747261
"""SQLite's `application_id` of a store, the letters "ctra". Stores of earlier versions have 0 and are known by their columns."""
ANSWERS = (
    *("key", "row", "strategy", "role", "tag", "template", "model", "request", "text", "finish_reason"),
    *("prompt_tokens", "completion_tokens", "logprobs", "at"),
)
FAILURES = ("key", "row", "strategy", "role", "tag", "reason", "at")
KINDS: dict[str, tuple[type, ...]] = {
    "requests": (int,),
    "prompt_tokens": (int,),
    "completion_tokens": (int,),
    "logprobs": (str, type(None)),
    "at": (int, float),
}
"""Types of the values of columns; those of all others are texts. SQLite keeps any type in any column."""
NAMES = {str: "a text", int: "a whole number", float: "a number", bytes: "bytes", type(None): "NULL"}
STRANGE = "SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL AND (type <> 'table' OR rootpage = 0) LIMIT 1"
"""Triggers, views, indexes over expressions and virtual tables: SQL that runs when a store is read or written. A store has none."""


class Transaction:
    """A transaction that begins with BEGIN IMMEDIATE, so that a second writer waits at its beginning.

    Args:
        db: the connection.
        path: its file, which errors name.
    """

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db, self._path = db, path

    def __enter__(self) -> None:
        with named_errors(self._path):
            self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        with named_errors(self._path):
            try:
                self._db.execute("COMMIT" if kind is None else "ROLLBACK")
            except sqlite3.Error:
                if self._db.in_transaction:  # a full disk may have rolled back by itself
                    self._db.execute("ROLLBACK")
                if kind is None:
                    raise
            if isinstance(error, sqlite3.DatabaseError):
                raise error


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Name the file in errors of SQLite, which say "disk I/O error" and no more.

    Args:
        path: the file.

    Raises:
        sqlite3.DatabaseError: raised within the block, of the same class, with the path.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        if error.args[:1] and str(error.args[0]).startswith(str(path)):
            raise
        raise type(error)(f"{path}: {error}") from error


def checked_line(path: Path, table: str, columns: Sequence[str], line: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a line of a table whose values have the types that a store holds.

    Args:
        path: the file, which errors name.
        table: `answers`, `failures` or `scores`.
        columns: the names of the values.
        line: the values, as SQLite returned them.

    Raises:
        ValueError: a value has another type, which another program wrote.

    Examples:
        >>> checked_line(Path("a.sqlite"), "answers", ["text"], (b"5",))
        Traceback (most recent call last):
            ...
        ValueError: a.sqlite holds bytes in the column text of its answers, where contralto writes a text: another program changed the file; restore a copy of it
    """
    for column, value in zip(columns, line, strict=True):
        kinds = KINDS.get(column, (str,))
        if not isinstance(value, kinds):
            raise _changed(path, f"{NAMES[type(value)]} in the column {column} of its {table}", NAMES[kinds[0]])
    return line


def numbers_in(path: Path, table: str, text: str) -> list[float]:
    """Return the numbers of a JSON list, in which a store keeps log-probabilities and scores.

    Args:
        path: the file, which errors name.
        table: as for `checked_line`.
        text: the JSON.

    Raises:
        ValueError: the text is something else, which another program wrote.
    """
    with suppress(ValueError, RecursionError):
        numbers = json.loads(text)
        if isinstance(numbers, list) and all(type(number) in (int, float) for number in numbers):
            return numbers
    raise _changed(path, f"a text in its {table}", "a JSON list of numbers")


def _changed(path: Path, held: str, expected: str) -> ValueError:
    return ValueError(
        f"{path} holds {held}, where contralto writes {expected}: another program changed the file; restore a copy of it"
    )


def undo_interrupted_write(path: Path) -> None:
    """Let SQLite roll back what a killed process was writing; connections that only read cannot, and fail.

    Only the header and new tables are written in this way, before the write-ahead log and after it. A journal without its database,
    or one whose process is alive, is left alone by SQLite itself.

    Args:
        path: the file; it may be missing, or no database.
    """
    if not path.is_file() or not _has_journal(path):
        return
    # No database, or a folder that cannot be written: `check` says so.
    with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(_address(path, "mode=rw"), uri=True)) as db:
        db.execute("SELECT 1 FROM sqlite_master").fetchone()


def _has_journal(path: Path) -> bool:
    return path.with_name(f"{path.name}-journal").exists()


def _address(path: Path, mode: str) -> str:
    return f"file:{quote(str(path.absolute()))}?{mode}"


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open a database read-only, without changing its folder.

    SQLite creates files beside a database in write-ahead mode, also for a connection with `mode=ro`, which cannot remove them.
    They are needed only while another process has the database open, and then they are there.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
    """
    has_log = path.with_name(f"{path.name}-wal").exists()
    if has_log or not _is_in_log_mode(path):
        mode, settings = "mode=ro", []
    elif all(os.access(each, os.W_OK) for each in (path, path.parent)):
        # As the last to close the database, a connection that could write removes the files beside it.
        mode, settings = "mode=rw", ["PRAGMA query_only=ON"]
    else:
        mode, settings = "immutable=1", []
    db = sqlite3.connect(_address(path, mode), uri=True, timeout=60, isolation_level=None)
    for each in settings:
        db.execute(each)
    return db


def _is_in_log_mode(path: Path) -> bool:
    with naming(path), path.open("rb") as file:
        return file.read(20)[18:] == b"\2\2"  # https://www.sqlite.org/fileformat.html#file_format_version_numbers


def check(path: Path) -> None:
    """Reject a file that is not a store, without changing it.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a store, or a store of a later version.
    """
    stranger = f"{path} is not a store of answers"
    if not path.is_file():  # not opened: a pipe would wait for a writer for ever
        raise ValueError(f"{stranger}: it is {'a folder' if path.is_dir() else 'not a regular file'}")
    if path.stat().st_size == 0:
        raise ValueError(f"{stranger}: it is empty")
    try:
        with closing(open_read_only(path)) as db:
            strange = db.execute(STRANGE).fetchone()
            version, application, columns = (0, 0, ()) if strange else _signature(db)
    except sqlite3.OperationalError as error:
        if _has_journal(path):
            raise OSError(
                f"{path} cannot be read: its last write was interrupted, and only a process that may write into {path.parent} can undo "
                f"that: open it as its owner, or copy {path.name} and {path.name}-journal into a folder of your own"
            ) from error
        raise OSError(f"{path} cannot be read: {error}") from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{stranger}: {error}") from error
    if strange:
        raise ValueError(
            f"{stranger} that contralto wrote: it holds the {strange[0]} {printable(strange[1])[:80]}, which could change or invent answers"
        )
    if application == APPLICATION and version > VERSION:
        raise ValueError(f"{path} was written by a later contralto (store version {version}): update contralto")
    if application not in (0, APPLICATION) or version != VERSION or columns != (ANSWERS, FAILURES):
        raise ValueError(f"{stranger}: another program wrote it")


def _signature(db: sqlite3.Connection) -> tuple[int, int, tuple[tuple[str, ...], ...]]:
    """Return `user_version`, `application_id`, and the columns of the tables of a store."""
    (version,), (application,) = (
        db.execute(f"PRAGMA {name}").fetchone() for name in ("user_version", "application_id")
    )
    tables = ("answers", "failures")
    names = [db.execute("SELECT name FROM pragma_table_info(?)", (table,)).fetchall() for table in tables]
    return version, application, tuple(tuple(name for (name,) in columns) for columns in names)
