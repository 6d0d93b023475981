"""The number of requests under way at an endpoint, found by additive increase and multiplicative decrease."""

import asyncio
import time
from typing import Any

from contralto.data_gen.ranges import check_number

__all__ = ["MOST_BY_ITSELF", "Window", "checked_concurrency"]

MOST_BY_ITSELF = 256
"""Largest number of requests at the same time with `concurrency: auto`."""
START = 4.0
"""Requests at the same time before the first answer."""
DECREASE = 0.85
"""Factor of the limit at a refusal; a half, as in TCP, leaves a quarter of a rate unused."""
SLOW = 3.0
"""Ratio of smoothed to least seconds of an answer that counts as a refusal."""
SMOOTHING, FORGETTING = 1 / 16, 1.002
"""Weight of an answer in its smoothed seconds, and growth of the least ones at each answer, since answers may become longer."""


def checked_concurrency(value: Any) -> tuple[int, bool]:
    """Return the largest number of requests at the same time, and whether the number is to be found below it.

    Args:
        value: a number, or `auto`.

    Raises:
        ValueError: neither.

    Examples:
        >>> checked_concurrency(32), checked_concurrency("auto")
        ((32, False), (256, True))
    """
    if value == "auto":
        return MOST_BY_ITSELF, True
    check_number("concurrency", value, above=0, most=10_000, whole=True)
    return value, False


class Window:
    """Limit the requests under way.

    An adaptive limit doubles in each round of answers until the first refusal. From then on it grows by one in a round, and a refusal
    multiplies it by 0.85 (Chiu and Jain, 1989), once for all requests that were under way then. Answers that take three times as
    long as the quickest count as a refusal: the endpoint queues them.

    Args:
        most: the largest limit.
        is_adaptive: find the limit; if False it is `most`.
    """

    def __init__(self, most: int, *, is_adaptive: bool) -> None:
        self.limit = min(START, most) if is_adaptive else float(most)
        self._most, self._is_adaptive = most, is_adaptive
        self._under_way, self._decreased_at = 0, 0.0
        self._smoothed = self._least = 0.0
        self._waiting = asyncio.Condition()

    async def enter(self) -> None:
        """Wait until a request may be sent; `leave` follows it."""
        async with self._waiting:
            await self._waiting.wait_for(lambda: self._under_way < int(self.limit))
            self._under_way += 1

    async def leave(self) -> None:
        """Let others follow a request that has ended."""
        async with self._waiting:
            self._under_way -= 1
            self._waiting.notify(max(1, int(self.limit) - self._under_way))

    def answered(self, sent: float) -> None:
        """Raise the limit after an answer, or lower it if answers have become slow.

        Args:
            sent: the time at which the request was sent, by `time.monotonic`.
        """
        took = time.monotonic() - sent
        self._smoothed += (took - self._smoothed) * (SMOOTHING if self._smoothed else 1)
        self._least = min(self._smoothed, self._least * FORGETTING or self._smoothed)
        if self._smoothed > SLOW * self._least:
            self.refused(sent)
        elif self._is_adaptive and self._under_way >= int(self.limit):  # a limit that is not reached tells nothing
            self.limit = min(float(self._most), self.limit + (1 / self.limit if self._decreased_at else 1))

    def refused(self, sent: float) -> None:
        """Lower the limit after a refusal for too many requests, or none after the time for an answer.

        Args:
            sent: as for `answered`.
        """
        if self._is_adaptive and sent > self._decreased_at:
            self.limit, self._decreased_at = max(1.0, self.limit * DECREASE), time.monotonic()
