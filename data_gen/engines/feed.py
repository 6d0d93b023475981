"""Hand requests from an iterator that may block to the tasks of an event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from contralto.data_gen.types import Request

__all__ = ["Feed", "Outlet", "all_of"]


def all_of(items: Any) -> list[Any]:
    """Wait for an item of a queue, and return it with all others that are there, in their order.

    Args:
        items: a `queue.SimpleQueue`.
    """
    taken = [items.get()]
    while not items.empty():
        taken.append(items.get())
    return taken


class Feed:
    """Take requests from an iterable, each as a task is free for it, in a thread of its own where that may block.

    One thread for all requests: a call in another thread for each costs as much as the request itself at a quick endpoint. Each thread
    wakes the other once for all that has come meanwhile. And no thread for requests that are there, since a change of threads keeps
    a free task waiting.

    Args:
        requests: the requests: a sequence, or an iterable that may block. None is taken that no task is free for. An iterator with a method
            `now` returns the next request from it if that is there, and None if it is not.
        tasks: the number of tasks that call `take`.
    """

    def __init__(self, requests: Iterable[Request], tasks: int) -> None:
        self._requests, self._tasks = iter(requests), tasks
        self._now: Callable[[], Request | None] = getattr(self._requests, "now", lambda: None)
        if isinstance(requests, Sequence):
            self._now = partial(next, self._requests, None)
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Queue[Request | BaseException | None]()
        self._coming = deque[Request | BaseException | None]()
        self._is_called = self._is_asking = False
        self._wanted = 0
        self._free = threading.Semaphore(0)
        self._is_closed = False
        threading.Thread(target=self._run, daemon=True).start()

    async def take(self) -> Request | None:
        """Wait for the next request, and return it; None if there are no more.

        Raises:
            BaseException: the iterator raised it.
        """
        if (request := self._now()) is not None:
            return request
        self._wanted += 1
        if not self._is_asking:
            self._is_asking = True
            self._loop.call_soon(self._ask)
        item = await self._arrived.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Take no further request; a thread that waits in the iterator ends with it."""
        self._is_closed = True
        self._free.release()

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            while self._free.acquire() and not self._is_closed:
                request = next(self._requests, None)
                if request is None:
                    break
                self._put(request)
        except BaseException as error:  # noqa: BLE001 - a task raises it
            end = error
        for _ in range(self._tasks):
            self._put(end)

    def _ask(self) -> None:
        self._is_asking, wanted, self._wanted = False, self._wanted, 0
        self._free.release(wanted)

    def _put(self, item: Request | BaseException | None) -> None:
        self._coming.append(item)
        if not self._is_called:
            self._is_called = True
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_called = False  # before the items are taken: one that comes meanwhile is taken here, or calls again
        while self._coming:
            self._arrived.put_nowait(self._coming.popleft())


class Outlet:
    """Put items of an event loop into a queue that another thread reads, in lists of all items of one pass of the loop.

    Args:
        items: a `queue.SimpleQueue`.
    """

    def __init__(self, items: Any) -> None:
        self._items, self._held = items, list[Any]()
        self._loop = asyncio.get_running_loop()

    def put(self, item: Any) -> None:
        """Put an item into the queue with others.

        Args:
            item: the item.
        """
        self._held.append(item)
        if len(self._held) == 1:
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Put the items into the queue that are not there yet."""
        if self._held:
            self._items.put(self._held)
            self._held = []
