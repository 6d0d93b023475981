"""Hold the requests of a completion until all have arrived, within limits of number, size and time.

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

__all__ = ["FullError", "GoneError", "PendingCompletion", "WaitingRoom"]


class FullError(Exception):
    """The error of too many requests that wait for the other branches of their completions."""


class GoneError(Exception):
    """The error of a client that closed the connection while its request waited."""


@dataclass
class PendingCompletion:
    """A completion whose requests are arriving."""

    branches: list[tuple[Row, Mapping[str, Any]]] = field(default_factory=list)
    whole: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The id that the engine uses; unique, whatever id the client chose."""


class WaitingRoom:
    """Completions whose requests have not all arrived, and those that the engine is generating.

    Args:
        limits: see `Limits`.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._coming: dict[Hashable, PendingCompletion] = {}
        self._live: Counter[Hashable] = Counter()
        """Number of requests of each completion that the engine has not finished."""
        self._waiting = self._held = 0

    async def meet(
        self,
        key: Hashable,
        row: Row,
        options: Mapping[str, Any],
        *,
        size: int,
        gone: Callable[[], Coroutine[Any, Any, None]],
    ) -> PendingCompletion:
        """Wait until all requests of a completion have arrived. `leave` must follow.

        Args:
            key: the client and its id of the completion.
            row: the contrast arguments of the request.
            options: the options of the request that must be equal in all branches.
            size: size of the request in bytes.
            gone: a coroutine that returns when the client closes the connection.

        Raises:
            ValueError: the branches do not match, one does not arrive in time, or the id is that of a running completion.
            FullError: too many requests wait.
            GoneError: the client closed the connection.
        """
        if self._live[key]:
            raise ValueError(f"{PREFIX}id {row.group!r} belongs to a running completion: use another one")
        text = self._coming.setdefault(key, PendingCompletion())
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
        self, key: Hashable, text: PendingCompletion, row: Row, size: int, gone: Callable[[], Coroutine[Any, Any, None]]
    ) -> PendingCompletion:
        limits = self._limits
        if self._waiting >= limits.waiting or self._held + size > limits.held:
            self._remove(key, text, row)
            raise FullError(
                f"{self._waiting} requests are waiting for their other branches: send all branches together"
            )
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
    async def _of(text: PendingCompletion) -> PendingCompletion:
        await asyncio.shield(text.whole)  # raises the error of a completion that was rejected
        return text

    def _missing(self, row: Row, text: PendingCompletion) -> str:
        there = {other.branch for other, _ in text.branches}
        missing = " and ".join(str(b) for b in range(len(row.rule.branches)) if b not in there)
        return (
            f"{PREFIX}id {row.group!r}: branch {missing} did not arrive within {self._limits.timeout:g} seconds: "
            "send all branches of a completion together"
        )

    def _end(self, key: Hashable, text: PendingCompletion, why: ValueError) -> None:
        """Reject a completion for all its requests, waiting or still to arrive."""
        self._coming.pop(key, None)
        if not text.whole.done():
            text.whole.set_exception(why)

    def _remove(self, key: Hashable, text: PendingCompletion, row: Row) -> None:
        """Remove a request from its completion, which keeps waiting if it has others."""
        text.branches = [(other, options) for other, options in text.branches if other is not row]
        if not text.branches and self._coming.get(key) is text:
            del self._coming[key]

    def leave(self, key: Hashable) -> None:
        """Record that the engine has finished a request of a completion.

        Args:
            key: as for `meet`.
        """
        self._live[key] -= 1
        if self._live[key] <= 0:
            del self._live[key]
