"""What was answered, on disk before anything uses it.

One SQLite file. Why not an append-only file of JSON lines: both survive `kill -9`, but the file needs code for what SQLite
does by contract. A line that a kill or a full disk cut in two must be found and taken off, also where the cut fell between two
characters; two processes that append by mistake interleave lines beyond the size of a pipe's atomic write; a retried answer
must be kept from standing there twice; and an index must be rebuilt at each start. Here a transaction is there or it is not
(write-ahead log, `synchronous=FULL`: it is on the disk before `record` returns, power cuts included), a full disk rolls it
back, a second writer waits, and the primary key makes a second answer to a request impossible: the first one stands. What the
file form does better is network file systems, on which the write-ahead log must not lie: many machines write a store each
(`--shard`), and `merge` joins them.

A store holds answers and failures, not pairs. Pairs are made from the answers whenever they are wanted, so whoever repairs a
parser gets the better pairs without asking anybody again.
"""

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from contralto.data_gen.requests import Answer, Failure, Request

__all__ = ["Asked", "Recorded", "Store", "Usage"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, row TEXT NOT NULL, strategy TEXT NOT NULL, role TEXT NOT NULL, tag TEXT NOT NULL,
    template TEXT NOT NULL, model TEXT NOT NULL, request TEXT NOT NULL, text TEXT NOT NULL, finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, logprobs TEXT, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (
    key TEXT PRIMARY KEY, row TEXT NOT NULL, strategy TEXT NOT NULL, role TEXT NOT NULL, tag TEXT NOT NULL,
    reason TEXT NOT NULL, at REAL NOT NULL
) WITHOUT ROWID;
"""
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request and where it comes from."""

    request: Request
    row: str
    strategy: str
    role: str
    tag: str = ""
    template: str = ""
    model: str = ""


class Recorded(NamedTuple):
    """A line of the store."""

    key: str
    row: str
    strategy: str
    role: str
    tag: str
    said: Answer | Failure


class Usage(NamedTuple):
    """What a role cost so far."""

    role: str
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class Store:
    """Answers by key, on disk.

    Args:
        path: the file; it is made if there is none.
        read_only: do not make or change anything.

    Raises:
        OSError: no such file, if `read_only`.
        ValueError: a file that is no store, or of a later version.

    Example:
        >>> import tempfile
        >>> from contralto.data_gen.requests import Ask, Sampling, settle
        >>> request = settle(Ask(role="target", prompt="2 + 2 ="), engine={}, sampling=Sampling(), seed=0, row="a")
        >>> asked = Asked(request=request, row="a", strategy="s", role="target")
        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "answers.sqlite") as store:
        ...     store.record([(asked, Answer(text=" 4"))])
        ...     store.record([(asked, Answer(text=" 5"))])  # the first stands
        ...     store.get([request.key])[request.key].text
        ' 4'
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        if read_only and not path.exists():
            raise FileNotFoundError(f"there is no store {path} yet: nothing was asked")
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._db.close()
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise ValueError(f"{path} is not a store of answers: {error}") from error

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise ValueError(
                f"{self.path} was written by a later contralto (store version {version}): update contralto"
            )
        if version < VERSION:
            self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def record(self, said: Sequence[tuple[Asked, Answer | Failure]]) -> None:
        """Put answers and failures on the disk, all or none of them. An answer to the same request that is there stands.

        Raises:
            sqlite3.OperationalError: the disk is full, or the file is locked for a minute. Nothing was recorded then.
        """
        now = time.time()
        answers = [_answer_row(asked, it, now) for asked, it in said if isinstance(it, Answer)]
        failures = [
            (a.request.key, a.row, a.strategy, a.role, a.tag, it.reason, now)
            for a, it in said
            if isinstance(it, Failure)
        ]
        with _Transaction(self._db):
            self._db.executemany(f"INSERT OR IGNORE INTO answers VALUES ({', '.join('?' * 14)})", answers)
            self._db.executemany(f"INSERT OR REPLACE INTO failures VALUES ({', '.join('?' * 7)})", failures)
            self._db.execute("DELETE FROM failures WHERE key IN (SELECT key FROM answers)")

    def get(self, keys: Sequence[str]) -> dict[str, Answer | Failure]:
        """What is known of requests, by key."""
        found: dict[str, Answer | Failure] = {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ", ".join("?" * len(some))
            found |= {
                key: Failure(reason)
                for key, reason in self._db.execute(f"SELECT key, reason FROM failures WHERE key IN ({marks})", some)
            }
            columns = "key, text, finish_reason, prompt_tokens, completion_tokens, logprobs"
            for key, *rest in self._db.execute(f"SELECT {columns} FROM answers WHERE key IN ({marks})", some):
                found[key] = _answer(*rest)
        return found

    def failures(self) -> Iterator[Recorded]:
        """Failed requests, by row."""
        query = "SELECT key, row, strategy, role, tag, reason FROM failures ORDER BY row, strategy, key"
        for key, row, strategy, role, tag, reason in self._db.execute(query):
            yield Recorded(key, row, strategy, role, tag, Failure(reason))

    def forget_failures(self) -> int:
        """Make all failed requests askable again, and say how many there were."""
        return self._db.execute("DELETE FROM failures").rowcount

    def usage(self) -> list[Usage]:
        """What was asked so far, by role and model."""
        query = (
            "SELECT role, model, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens) FROM answers GROUP BY role, model"
        )
        return [Usage(*row) for row in self._db.execute(query)]

    def per_row(self) -> dict[tuple[str, str], tuple[float, float, float, int]]:
        """By strategy and role: requests, prompt tokens and answer tokens per row that asked, and how many rows did."""
        query = """SELECT strategy, role, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), COUNT(DISTINCT row)
            FROM answers GROUP BY strategy, role"""
        return {(s, r): (n / k, p / k, c / k, k) for s, r, n, p, c, k in self._db.execute(query)}

    def merge(self, other: Path) -> int:
        """Take over the answers and failures of another store that are not here, and say how many answers came.

        Raises:
            OSError: no such file.
            ValueError: it is no store.
        """
        with Store(other, read_only=True):
            pass
        before = self._count()
        self._db.execute("ATTACH ? AS other", (str(other),))
        try:
            with _Transaction(self._db):
                for table in ("answers", "failures"):
                    self._db.execute(f"INSERT OR IGNORE INTO {table} SELECT * FROM other.{table}")
                self._db.execute("DELETE FROM failures WHERE key IN (SELECT key FROM answers)")
        finally:
            self._db.execute("DETACH other")
        return self._count() - before

    def _count(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])


class _Transaction:
    """BEGIN IMMEDIATE, so that a second writer waits for its turn at the beginning, and COMMIT or ROLLBACK."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._db.execute("COMMIT" if kind is None else "ROLLBACK")
        except sqlite3.Error:
            if self._db.in_transaction:  # a full disk may have rolled back by itself
                self._db.execute("ROLLBACK")
            if kind is None:
                raise


def _answer_row(asked: Asked, answer: Answer, now: float) -> tuple[Any, ...]:
    request = asked.request
    said: dict[str, Any] = {"prompt": request.prompt} if request.messages is None else {"messages": request.messages}
    said |= {"seed": request.seed, "images": len(request.images)}
    logprobs = None if answer.logprobs is None else json.dumps(answer.logprobs)
    where = (request.key, asked.row, asked.strategy, asked.role, asked.tag, asked.template, asked.model)
    tokens = (answer.prompt_tokens, answer.completion_tokens)
    return (*where, json.dumps(said, ensure_ascii=False), answer.text, answer.finish_reason, *tokens, logprobs, now)


def _answer(text: str, finish_reason: str, prompt_tokens: int, completion_tokens: int, logprobs: str | None) -> Answer:
    return Answer(
        text=text,
        finish_reason=finish_reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        logprobs=None if logprobs is None else tuple(json.loads(logprobs)),
    )
