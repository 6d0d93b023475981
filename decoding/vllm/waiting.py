"""Requests of one text that wait for each other before the engine: bounded in number, size and time.

Nothing of vLLM or of HTTP is needed here.
"""

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from contralto.decoding.vllm.limits import Limits
from contralto.decoding.vllm.settings import PREFIX, Row, check_group

__all__ = ["FullError", "GoneError", "Text", "WaitingRoom"]


class FullError(Exception):
    """There are too many requests that wait for their text."""


class GoneError(Exception):
    """The client closed the connection while its request waited."""


@dataclass
class Text:
    """A text whose requests are coming."""

    branches: list[tuple[Row, Mapping[str, Any]]] = field(default_factory=list)
    whole: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The id by which the engine knows it. No other text has it, whatever its client called it."""


class WaitingRoom:
    """Texts whose requests have not all come yet, and those that the engine is writing.

    Args:
        limits: see `Limits`.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._coming: dict[Hashable, Text] = {}
        self._live: Counter[Hashable] = Counter()
        """Requests of each text that the engine has not finished."""
        self._waiting = self._held = 0

    async def meet(
        self,
        key: Hashable,
        row: Row,
        options: Mapping[str, Any],
        *,
        size: int,
        gone: Callable[[], Coroutine[Any, Any, None]],
    ) -> Text:
        """Wait until all requests of a text are there, and return it. `leave` must follow.

        Args:
            key: the client and its id of the text.
            row: what the request says of its text.
            options: its options that must be equal in all branches.
            size: of the request in bytes.
            gone: what to wait for to learn that the client closed the connection.

        Raises:
            ValueError: the branches do not fit each other, one does not come in time, or the id is that of a text in flight.
            FullError: too many requests wait.
            GoneError: the client closed the connection.
        """
        if self._live[key]:
            raise ValueError(f"{PREFIX}id {row.group!r} is that of a text in flight: give every text its own")
        text = self._coming.setdefault(key, Text())
        text.branches.append((row, options))
        try:
            check_group(text.branches)
        except ValueError as error:
            self._end(key, text, error)
        if len(text.branches) == len(row.rule.branches) and not text.whole.done():
            del self._coming[key]
            self._live[key] = len(text.branches)
            text.whole.set_result(None)
        if text.whole.done():
            return await self._of(text)
        return await self._wait(key, text, row, size, gone)

    async def _wait(
        self, key: Hashable, text: Text, row: Row, size: int, gone: Callable[[], Coroutine[Any, Any, None]]
    ) -> Text:
        limits = self._limits
        if self._waiting >= limits.waiting or self._held + size > limits.held:
            self._remove(key, text, row)
            raise FullError(f"{self._waiting} requests wait for the other branches of their texts: send all together")
        self._waiting, self._held = self._waiting + 1, self._held + size
        leaving = asyncio.create_task(gone())
        try:
            done, _ = await asyncio.wait(
                {leaving, text.whole}, timeout=limits.timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            self._waiting, self._held = self._waiting - 1, self._held - size
            leaving.cancel()
        if not text.whole.done() and leaving in done:
            self._remove(key, text, row)
            raise GoneError
        if not text.whole.done():
            self._end(key, text, ValueError(self._missing(row, text)))
        return await self._of(text)

    @staticmethod
    async def _of(text: Text) -> Text:
        await asyncio.shield(text.whole)  # raises what became of it
        return text

    def _missing(self, row: Row, text: Text) -> str:
        there = {other.branch for other, _ in text.branches}
        missing = " and ".join(str(b) for b in range(len(row.rule.branches)) if b not in there)
        return (
            f"{PREFIX}id {row.group!r}: branch {missing} did not come within {self._limits.timeout:g} seconds: send all "
            "branches of a text together"
        )

    def _end(self, key: Hashable, text: Text, why: ValueError) -> None:
        """End a text for all its requests, those that wait and those that are still to come to it."""
        self._coming.pop(key, None)
        if not text.whole.done():
            text.whole.set_exception(why)

    def _remove(self, key: Hashable, text: Text, row: Row) -> None:
        """Take a request out of its text, which goes on waiting if it has others."""
        text.branches = [(other, options) for other, options in text.branches if other is not row]
        if not text.branches and self._coming.get(key) is text:
            del self._coming[key]

    def leave(self, key: Hashable) -> None:
        """Say that the engine has finished a request of a text.

        Args:
            key: as for `meet`.
        """
        self._live[key] -= 1
        if self._live[key] <= 0:
            del self._live[key]
