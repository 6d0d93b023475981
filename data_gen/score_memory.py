"""Scores that functions and reward models gave before, kept in the store of the answers.

Strategies run again whenever a data set is written. A score is taken from the store if the code of the function, or the weights of
the reward model, the row and the answers are the same.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol

from tqdm import tqdm

from contralto.common.hashing import source_digest
from contralto.data_gen.types import digest, image_digest

__all__ = [
    "RecordedScores",
    "ScoreMemory",
    "ScoreMemoryError",
    "StandInScores",
    "UnscoredError",
    "is_computing",
    "noted_scorers",
    "remembered",
    "remembered_scores",
]


class ScoreMemory(Protocol):
    """A place for scores; `Store` is one."""

    def known_scores(self, key: str) -> list[float] | None:
        """Return the scores that were kept under a key, None without any."""
        ...

    def keep_scores(self, key: str, scores: Sequence[float]) -> None:
        """Keep scores under a key."""
        ...

    def note_scorer(self, name: str, source: str) -> str:
        """Note the source of a scorer before it is called; return a line to print if its scores have another source."""
        ...


class UnscoredError(LookupError):
    """The error where a score is not recorded, and none may be computed."""


class ScoreMemoryError(OSError):
    """The error where recorded scores cannot be read or written: it is the store's, which a strategy cannot be blamed for."""


class _KeepsNothing:
    """Keep neither scores nor notes."""

    def keep_scores(self, key: str, scores: Sequence[float]) -> None:
        """Keep nothing.

        Args:
            key: not read.
            scores: not read.
        """

    def note_scorer(self, name: str, source: str) -> str:
        """Note nothing.

        Args:
            name: not read.
            source: not read.
        """
        return ""


class StandInScores(_KeepsNothing):
    """A memory with which no scorer is called: the scores are 0, 1, 2, ..., for strategies that run on placeholder answers."""

    def known_scores(self, key: str) -> None:
        """Return None.

        Args:
            key: not read.
        """


class RecordedScores(_KeepsNothing):
    """A memory with which no scorer is called: a score that is not recorded raises an error.

    Args:
        memory: the recorded scores.
    """

    def __init__(self, memory: ScoreMemory) -> None:
        self._memory = memory

    def known_scores(self, key: str) -> list[float]:
        """Return recorded scores.

        Args:
            key: the key of the scores.

        Raises:
            UnscoredError: no scores have this key.
        """
        scores = self._memory.known_scores(key)
        if scores is None:
            raise UnscoredError(key)
        return scores


_MEMORY: ContextVar[ScoreMemory | None] = ContextVar("score memory", default=None)


_USED: ContextVar[dict[str, str] | None] = ContextVar("used scorers", default=None)


@contextmanager
def noted_scorers() -> Iterator[dict[str, str]]:
    """Note the scorers whose scores are used within the context.

    Yields:
        The digests of their sources or weights by their names; it grows as scores are used.
    """
    used: dict[str, str] = {}
    token = _USED.set(used)
    try:
        yield used
    finally:
        _USED.reset(token)


@contextmanager
def remembered_scores(memory: ScoreMemory | None) -> Iterator[None]:
    """Take scores from a memory, and keep new ones there, within the context.

    Args:
        memory: the memory; None computes all scores.
    """
    token = _MEMORY.set(memory)
    try:
        yield
    finally:
        _MEMORY.reset(token)


def remembered(
    scorer: Callable[..., Any], row: Any, answers: Sequence[str], compute: Callable[[], list[float]]
) -> list[float]:
    """Return scores from the memory of the context, or compute and keep them.

    Args:
        scorer: the function or the reward model.
        row: the row that the answers belong to.
        answers: the answers.
        compute: returns the scores.
    """
    memory, used = _MEMORY.get(), _USED.get()
    if used is not None:
        name, source = _named(scorer)
        used[name] = source
    if isinstance(memory, StandInScores):
        return [float(at) for at in range(len(answers))]
    key = None if memory is None else _key(scorer, row, answers)
    if key is None and isinstance(memory, RecordedScores):
        raise UnscoredError(str(scorer))
    if memory is None or key is None:
        return compute()
    with _of_the_memory():
        scores = memory.known_scores(key)
        is_new = scores is None and getattr(scorer, "identity", None) is None
        line = memory.note_scorer(*_named(scorer)) if is_new else ""
    if line:
        tqdm.write(line)
    if scores is None:
        scores = compute()
        with _of_the_memory():
            memory.keep_scores(key, scores)
    return scores


@contextmanager
def _of_the_memory() -> Iterator[None]:
    """Tell errors of the memory from those of a strategy, in whose midst scores are read.

    Raises:
        ScoreMemoryError: the store cannot be read or written, or another program changed it.
    """
    try:
        yield
    except (sqlite3.Error, OSError, ValueError) as error:
        raise ScoreMemoryError(str(error)) from error


def is_computing() -> bool:
    """Return False in a context that takes recorded scores alone, in which no reward model need be loaded."""
    return not isinstance(_MEMORY.get(), RecordedScores)


def _key(scorer: Callable[..., Any], row: Any, answers: Sequence[str]) -> str | None:
    """Return a hash of all that determines the scores; None if that is not known, as for a function within a function."""
    identity = _identity(scorer)
    if identity is None:
        return None
    columns = {name: value for name, value in row.items() if name != "images"}
    try:
        return digest([identity, columns, [image_digest(image) for image in row.get("images", ())], list(answers)])
    except TypeError:  # a column that JSON does not hold
        return None


@cache
def _identity(scorer: Callable[..., Any]) -> Any:
    """Return what tells a scorer from others: its own `identity`, or the name and the code of a function of a module."""
    own = getattr(scorer, "identity", None)
    if own is not None:
        return own
    name = getattr(scorer, "__qualname__", "<unknown>")
    return [scorer.__module__, name, source_digest(scorer)] if name.isidentifier() and name != "<lambda>" else None


def _named(scorer: Callable[..., Any]) -> tuple[str, str]:
    """Return the name of a scorer, of a function as recipes write it, and the digest of its source or weights; empty if not known."""
    identity = _identity(scorer)
    if getattr(scorer, "identity", None) is not None:
        return str(getattr(scorer, "name", type(scorer).__qualname__)), digest(identity)[:16]
    if identity is None:
        return f"{scorer.__module__}:{getattr(scorer, '__qualname__', type(scorer).__qualname__)}", ""
    return f"{identity[0]}:{identity[1]}", identity[2]
