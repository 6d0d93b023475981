"""Hand requests from an iterator that may block to the tasks of an event loop."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from contralto.data_gen.types import Request

__all__ = ["Feed", "all_of"]


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
    """Take requests from an iterator in a thread of its own, each as a task is free for it.

    One thread for all requests: a call in another thread for each costs as much as the request itself at a quick endpoint.

    Args:
        requests: the requests; the iterator may block. None is taken from it that no task is free for.
        tasks: the number of tasks that call `take`.
    """

    def __init__(self, requests: Iterator[Request], tasks: int) -> None:
        self._requests, self._tasks = requests, tasks
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Queue[Request | BaseException | None]()
        self._free = threading.Semaphore(0)
        self._is_closed = False
        threading.Thread(target=self._run, daemon=True).start()

    async def take(self) -> Request | None:
        """Wait for the next request, and return it; None if there are no more.

        Raises:
            BaseException: the iterator raised it.
        """
        self._free.release()
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

    def _put(self, item: Request | BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, item)
