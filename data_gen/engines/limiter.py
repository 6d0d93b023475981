"""Rate limits of an endpoint: requests and tokens per minute, pauses that the endpoint asks for, and cancellation."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from contralto.data_gen.engines.window import Window
from contralto.data_gen.ranges import check_number

__all__ = ["Flow", "Limiter"]

RATES: dict[str, Any] = {"least": 1, "most": 10**9, "whole": True}


class Limiter:
    """Limit requests and tokens in every window of a minute.

    Requests are spread: at most one second's share is sent within a second, since hosts also count in short windows. Tokens are
    booked by an estimate when a request is sent, and corrected when its answer reports their number.

    Args:
        rpm: requests per minute; None is no limit.
        tpm: tokens per minute, those of prompts and answers together; None is no limit.

    Raises:
        ValueError: a limit that is not positive.
    """

    def __init__(self, *, rpm: int | None = None, tpm: int | None = None) -> None:
        for name, value in {"rpm": rpm, "tpm": tpm}.items():
            if value is not None:
                check_number(name, value, **RATES)
        self._rpm, self._tpm = rpm, tpm
        self._left: deque[float] = deque()
        self._booked: deque[list[float]] = deque()
        self._turn = asyncio.Lock()
        self._not_before = 0.0

    async def wait(self, tokens: int) -> list[float]:
        """Wait until a request may be sent.

        Args:
            tokens: the estimate of its tokens.

        Returns:
            A booking for `correct`.
        """
        if not self._rpm and not self._tpm and self._not_before <= time.monotonic():
            return [0.0, float(tokens)]  # without a turn, which nobody else waits for either
        async with self._turn:
            tokens = min(tokens, self._tpm or tokens)
            while (pause := self._pause(time.monotonic(), tokens)) > 0:
                await asyncio.sleep(pause)
            now = time.monotonic()
            booking = [now, float(tokens)]
            if self._rpm:
                self._left.append(now)
            if self._tpm:
                self._booked.append(booking)
            return booking

    def correct(self, booking: list[float], tokens: int) -> None:
        """Replace the estimated tokens of a request by their actual number.

        Args:
            booking: of the request, as `wait` returned it.
            tokens: the number of its tokens.
        """
        booking[1] = float(tokens)

    def hold(self, seconds: float) -> bool:
        """Pause all requests for the time that the endpoint asks for.

        Args:
            seconds: the time from now.

        Returns:
            True if that is notably longer than before.
        """
        until = time.monotonic() + seconds
        is_news = until > self._not_before + 1
        self._not_before = max(self._not_before, until)
        return is_news

    def _pause(self, now: float, tokens: int) -> float:
        """Return the seconds for which a request has to wait, by the present state."""
        waits = [self._not_before - now]
        if self._rpm:
            while self._left and self._left[0] <= now - 60:
                self._left.popleft()
            share = max(1, self._rpm // 60)
            for count, window in ((self._rpm, 60.0), (share, 60.0 * share / self._rpm)):
                if len(self._left) >= count:
                    waits.append(self._left[-count] + window - now)
        if self._tpm:
            while self._booked and self._booked[0][0] <= now - 60:
                self._booked.popleft()
            if self._booked and sum(booking[1] for booking in self._booked) + tokens > self._tpm:
                waits.append(self._booked[0][0] + 60 - now)
        return max(waits)


class Flow:
    """The state that the tasks of one call of `answer` share: the limiter, the window, and whether to stop."""

    def __init__(self, limiter: Limiter, window: Window) -> None:
        self.limiter, self.window, self.is_stopping = limiter, window, False
        self._loop, self._pausing = asyncio.get_running_loop(), set[Any]()

    def stop(self) -> None:
        """Cancel the tasks that are pausing; any thread may call this."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self.is_stopping = True
        for task in self._pausing:
            task.cancel()

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Mark the part of a task in which it only waits; a task that is cancelled there ends without an outcome."""
        if self.is_stopping:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        self._pausing.add(task)
        try:
            yield
        finally:
            self._pausing.discard(task)
