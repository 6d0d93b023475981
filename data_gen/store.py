"""The store of answers: every answer is written to disk before it is used.

One SQLite file. Why not an append-only file of JSON lines: both survive `kill -9`, but the file needs code for what SQLite
does by contract. A line that a kill or a full disk cut in two must be found and taken off, also where the cut fell between two
characters; two processes that append by mistake interleave lines beyond the size of a pipe's atomic write; a retried answer
must be kept from standing there twice; and an index must be rebuilt at each start. Here a transaction is there or it is not
(write-ahead log, `synchronous=FULL`: it is on the disk before `record` returns, power cuts included), a full disk rolls it
back, a second writer waits, and the primary key makes a second answer to a request impossible: the first one stands. What the
file form does better is network file systems, on which the write-ahead log must not lie: many machines write a store each
(`--shard`), and `merge` joins them.

A store holds answers and failures, not pairs. Pairs are made of the answers at every export, so that a repaired parser improves
them without a new request.
"""

import json
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

from contralto.data_gen.store_file import (
    ANSWERS,
    APPLICATION,
    FAILURES,
    VERSION,
    Transaction,
    check,
    checked_line,
    named_errors,
    numbers_in,
    open_read_only,
    undo_interrupted_write,
)
from contralto.data_gen.types import Answer, Failure, Request

__all__ = ["Recorded", "Store", "TrackedRequest", "Usage"]

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
SCORES = """
CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, scores TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
"""
"""A table that is created with the first scores, which stores of earlier versions do not have."""
SOURCES = """
CREATE TABLE IF NOT EXISTS sources (model TEXT NOT NULL, source TEXT NOT NULL, PRIMARY KEY (model, source)) WITHOUT ROWID;
"""
"""A table of the functions that answered, by name and source, which stores of earlier versions do not have."""
MOST_PENDING = 64
"""Scores that wait to be written with the next answers."""
Line = tuple[Any, ...]
"""A row of a table."""
OF_ROWS = "WHERE row IN (SELECT value FROM json_each(?))"
OF_ANSWERS = ("key", "text", "finish_reason", "prompt_tokens", "completion_tokens", "logprobs")
"""The columns of an answer that are read."""
LONGEST_GAP = 600.0
"""Seconds between two answers of a run, in which an endpoint may be slow; a longer time is one between two runs."""
MOST_TOGETHER = 64
"""Answers of one statement: each statement waits for the threads of the engines, whatever it inserts."""
INSERT_ANSWERS = "INSERT OR IGNORE INTO answers VALUES "
MARKS = f"({', '.join('?' * len(ANSWERS))})"
INSERT_FAILURE = f"""INSERT OR {{on_conflict}} INTO failures SELECT {", ".join("?" * len(FAILURES))}
    WHERE NOT EXISTS (SELECT 1 FROM answers WHERE key = ?)"""
"""A failure of a request that has an answer is not recorded."""


@dataclass(frozen=True, kw_only=True)
class TrackedRequest:
    """A request with its origin."""

    request: Request
    row: str
    strategy: str
    role: str
    tag: str = ""
    template: str = ""
    model: str = ""


class Recorded(NamedTuple):
    """A recorded outcome."""

    key: str
    row: str
    strategy: str
    role: str
    tag: str
    outcome: Answer | Failure


class Usage(NamedTuple):
    """The recorded requests and tokens of a role."""

    role: str
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class Store:
    """A store of answers by key, on disk.

    Args:
        path: the file, created if it is missing. A file in which nothing is then recorded keeps its bytes.
        read_only: create and change nothing.

    Raises:
        OSError: `read_only`, and the file is missing.
        ValueError: the file is no store, or one of a later version.

    Examples:
        >>> import tempfile
        >>> from contralto.data_gen.types import Ask, Sampling, make_request
        >>> request = make_request(Ask(role="target", prompt="2 + 2 ="), engine={}, sampling=Sampling(), seed=0, row="a")
        >>> asked = TrackedRequest(request=request, row="a", strategy="s", role="target")
        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "answers.sqlite") as store:
        ...     store.record([(asked, Answer(text=" 4"))])
        ...     store.record([(asked, Answer(text=" 5"))])  # the first stands
        ...     store.get([request.key])[request.key].text
        ' 4'
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path, self._is_read_only, self._is_logging = path, read_only, False
        self._pending: dict[str, Sequence[float]] = {}
        undo_interrupted_write(path)
        is_new = not path.exists() or (not read_only and path.is_file() and path.stat().st_size == 0)
        if read_only and is_new:
            raise FileNotFoundError(f"there is no store {path} yet: no request was recorded")
        if not is_new:
            check(path)
        if read_only:
            self._db = open_read_only(path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with named_errors(path):
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA synchronous=FULL")
            if is_new:
                self._create_tables()

    def _create_tables(self) -> None:
        """Create the tables where there are none, and write into the file's header that it is a store."""
        begin = f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={VERSION}; PRAGMA application_id={APPLICATION}; COMMIT"
        self._db.executescript(begin)

    def _writing(self) -> Transaction:
        """Return a transaction for the caller to write in.

        The first one begins the write-ahead log, which changes the file's header: a store that is opened and only read
        keeps its bytes. The tables go into the file itself before that, so that the header says what the file is.
        """
        if not self._is_logging and not self._is_read_only:
            with named_errors(self.path):
                (application,) = self._db.execute("PRAGMA application_id").fetchone()
                if application != APPLICATION:
                    self._create_tables()
                self._db.execute("PRAGMA journal_mode=WAL")
            self._is_logging = True
        return Transaction(self._db, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file.

        The last writer ends the write-ahead log, so that a store at rest is one file, which can be read from a folder that
        cannot be written.
        """
        if not self._is_read_only:
            with suppress(sqlite3.ProgrammingError):  # closed already
                self._write_scores()
            with suppress(
                sqlite3.OperationalError, sqlite3.ProgrammingError
            ):  # open in another process; closed already
                self._db.execute("PRAGMA busy_timeout=0")
                self._db.execute("PRAGMA journal_mode=DELETE")
        self._db.close()

    def record(self, outcomes: Sequence[tuple[TrackedRequest, Answer | Failure]]) -> None:
        """Write answers and failures to the disk, all or none of them. A recorded answer is never replaced.

        Args:
            outcomes: requests with their outcomes.

        Raises:
            sqlite3.OperationalError: the disk is full, or the file is locked for a minute. Nothing was recorded then.
        """
        if not outcomes:
            return
        now = time.time()
        answers = [_answer_row(tracked, outcome, now) for tracked, outcome in outcomes if isinstance(outcome, Answer)]
        failures = [
            (each.request.key, each.row, each.strategy, each.role, each.tag, outcome.reason, now)
            for each, outcome in outcomes
            if isinstance(outcome, Failure)
        ]
        with self._writing():
            self._insert(answers, failures, on_conflict="REPLACE")
        self._write_scores()

    def _insert(self, answers: Iterable[Line], failures: Iterable[Line], *, on_conflict: str) -> None:
        """Insert rows of both tables at a cost that does not depend on the size of the store.

        Args:
            answers: rows of the table `answers`. A row whose key is there is left out.
            failures: rows of the table `failures`. A row whose key has an answer is left out.
            on_conflict: `REPLACE` or `IGNORE`, for failures whose key is there.
        """
        rest = iter(answers)
        while some := list(islice(rest, MOST_TOGETHER)):
            self._db.execute(INSERT_ANSWERS + ", ".join([MARKS] * len(some)), list(chain.from_iterable(some)))
            keys = [each[0] for each in some]
            self._db.execute(f"DELETE FROM failures WHERE key IN ({', '.join('?' * len(keys))})", keys)
        insert = INSERT_FAILURE.format(on_conflict=on_conflict)
        self._db.executemany(insert, ((*each, each[0]) for each in failures))

    def get(self, keys: Sequence[str]) -> dict[str, Answer | Failure]:
        """Return the recorded outcomes of requests by key.

        Args:
            keys: keys of requests; those without an outcome are left out of the result.
        """
        with named_errors(self.path):
            return self._get(keys)

    def _get(self, keys: Sequence[str]) -> dict[str, Answer | Failure]:
        outcomes: dict[str, Answer | Failure] = {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ", ".join("?" * len(some))
            where = f"WHERE key IN ({marks})"
            outcomes |= {
                key: Failure(reason) for key, reason in self._lines("failures", ("key", "reason"), where, some)
            }
            outcomes |= {key: self._answer(*rest) for key, *rest in self._lines("answers", OF_ANSWERS, where, some)}
        return outcomes

    def _lines(self, table: str, columns: Sequence[str], rest: str = "", values: Sequence[Any] = ()) -> Iterator[Line]:
        """Yield lines of a table; other types of values than a store holds end in an error that names the file."""
        with named_errors(self.path):
            for line in self._db.execute(f"SELECT {', '.join(columns)} FROM {table} {rest}", values):
                yield checked_line(self.path, table, columns, line)

    def _answer(
        self, text: str, finish_reason: str, prompt_tokens: int, completion_tokens: int, logprobs: str | None
    ) -> Answer:
        return Answer(
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            logprobs=None if logprobs is None else tuple(numbers_in(self.path, "answers", logprobs)),
        )

    def known_scores(self, key: str) -> list[float] | None:
        """Return the scores that `keep_scores` kept under a key, None without any.

        Args:
            key: see `score_memory`.
        """
        if key in self._pending:
            return list(self._pending[key])
        if not self._has("scores"):
            return None
        found = list(self._lines("scores", ("scores",), "WHERE key = ?", (key,)))
        return numbers_in(self.path, "scores", found[0][0]) if found else None

    def keep_scores(self, key: str, scores: Sequence[float]) -> None:
        """Keep scores, written to the disk with the next answers; a store that is only read keeps none.

        Args:
            key: see `score_memory`.
            scores: one per answer.
        """
        if not self._is_read_only:
            self._pending[key] = list(scores)
            if len(self._pending) >= MOST_PENDING:
                self._write_scores()

    def note_source(self, model: str, source: str) -> int:
        """Note the source of a function before it answers, and return the number of answers that it gave with other sources.

        Args:
            model: the name of the function.
            source: a hash of its source.

        Returns:
            0 if the source was noted before.
        """
        if source in self._known_sources(model):
            return 0
        self._keep_source(model, source)
        return int(self._db.execute("SELECT COUNT(*) FROM answers WHERE model = ?", (model,)).fetchone()[0])

    def note_scorer(self, name: str, source: str) -> str:
        """Note the source of a scorer before it is called.

        Args:
            name: the function, as `module:function`.
            source: a hash of its source.

        Returns:
            A line to print if scores of another source are recorded and none of this one; otherwise an empty string.
        """
        model = f"scorer {name}"
        known = self._known_sources(model)
        if self._is_read_only or source in known:
            return ""
        self._keep_source(model, source)
        return f"{name} has changed since its scores were recorded: the answers are scored again" if known else ""

    def _known_sources(self, model: str) -> set[str]:
        if not self._has("sources"):
            return set()
        return {each for (each,) in self._lines("sources", ("source",), "WHERE model = ?", (model,))}

    def _keep_source(self, model: str, source: str) -> None:
        with self._writing():  # an error ends the run: without the note, the next one would call the function changed
            self._db.execute(SOURCES)
            self._db.execute("INSERT OR IGNORE INTO sources VALUES (?, ?)", (model, source))

    def _has(self, table: str) -> bool:
        query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
        with named_errors(self.path):
            return self._db.execute(query, (table,)).fetchone() is not None

    def _write_scores(self) -> None:
        """Write the scores that wait; if the disk is full they go on waiting, since they can be computed again."""
        if not self._pending:
            return
        now = time.time()
        lines = [(key, json.dumps(list(scores)), now) for key, scores in self._pending.items()]
        with suppress(sqlite3.OperationalError), self._writing():
            self._db.execute(SCORES)
            self._db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", lines)
            self._pending.clear()

    def failures(self) -> Iterator[Recorded]:
        """Yield the failed requests, by row."""
        columns = ("key", "row", "strategy", "role", "tag", "reason")
        # All at once: an open cursor would keep a caller that writes meanwhile from beginning the write-ahead log.
        for key, row, strategy, role, tag, reason in list(
            self._lines("failures", columns, "ORDER BY row, strategy, key")
        ):
            yield Recorded(key, row, strategy, role, tag, Failure(reason))

    def forget_failures(self) -> int:
        """Remove all failures, so that the requests are sent again, and return their number."""
        if self._db.execute("SELECT 1 FROM failures LIMIT 1").fetchone() is None:
            return 0
        with self._writing():
            return self._db.execute("DELETE FROM failures").rowcount

    def usage(self) -> list[Usage]:
        """Return the recorded requests and tokens by role and model."""
        query = """SELECT role, model, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens) FROM answers
            GROUP BY role, model, typeof(prompt_tokens), typeof(completion_tokens)"""  # sums leave out NULL and texts
        with named_errors(self.path):
            return [Usage(*checked_line(self.path, "answers", Usage._fields, line)) for line in self._db.execute(query)]

    def seconds_per_answer(self) -> float:
        """Return the mean time from one answer to the next, without times between two runs, see `LONGEST_GAP`; 0 if there is none."""
        times = self._lines("answers", ("at",), "ORDER BY at")
        seconds = count = 0
        for (at,), (after,) in pairwise(times):
            if after - at <= LONGEST_GAP:
                seconds, count = seconds + after - at, count + 1
        return seconds / max(1, count)

    def merge(self, other: Path, *, rows: Collection[str] | None = None) -> int:
        """Copy the answers and failures of another store that are not here, and return the number of new answers.

        Args:
            other: the other store. It is only read.
            rows: ids of rows, whose outcomes alone are copied, without scores; None copies everything.

        Raises:
            OSError: no such file.
            ValueError: it is not a store, or it is this one.
        """
        if other.exists() and other.samefile(self.path):
            raise ValueError(f"{other} is the store to merge into: name the other stores")
        with Store(other, read_only=True) as source:
            before = self._count()
            tables = {"answers": ANSWERS, "failures": FAILURES}
            chosen, ids = ("", ()) if rows is None else (OF_ROWS, (json.dumps(list(rows)),))
            lines = {name: source._lines(name, of, chosen, ids) for name, of in tables.items()}
            with self._writing():
                self._insert(**lines, on_conflict="IGNORE")
                if source._has("sources"):
                    self._db.execute(SOURCES)
                    sources = source._lines("sources", ("model", "source"))
                    self._db.executemany("INSERT OR IGNORE INTO sources VALUES (?, ?)", sources)
                if rows is None and source._has("scores"):
                    self._db.execute(SCORES)
                    scores = source._lines("scores", ("key", "scores", "at"))
                    self._db.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", scores)
        return self._count() - before

    def _count(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])


_READABLE = json.JSONEncoder(ensure_ascii=False).encode


def _answer_row(tracked: TrackedRequest, answer: Answer, now: float) -> tuple[Any, ...]:
    request = tracked.request
    content: dict[str, Any] = {"prompt": request.prompt} if request.messages is None else {"messages": request.messages}
    content |= {"seed": request.seed, "images": len(request.images)}
    logprobs = None if answer.logprobs is None else json.dumps(answer.logprobs)
    where = (request.key, tracked.row, tracked.strategy, tracked.role, tracked.tag, tracked.template, tracked.model)
    tokens = (answer.prompt_tokens, answer.completion_tokens)
    return (*where, _READABLE(content), answer.text, answer.finish_reason, *tokens, logprobs, now)
