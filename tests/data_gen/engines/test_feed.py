"""The feed: requests reach the tasks that are free, in order, and none is taken before."""

import asyncio
import queue
import time
from contextlib import suppress

import pytest
from helpers.stored_answers import asked

from contralto.data_gen.engines.feed import Feed, Outlet, all_of

REQUESTS = [asked(number).request for number in range(6)]


def test_tasks_share_the_requests_and_all_end():
    async def serve():
        feed, taken = Feed(iter(REQUESTS), 3), []

        async def work():
            while (request := await feed.take()) is not None:
                taken.append(request)
                await asyncio.sleep(0)

        await asyncio.gather(*(work() for _ in range(3)))
        return taken

    assert asyncio.run(asyncio.wait_for(serve(), 10)) == REQUESTS


def test_no_request_is_taken_that_no_task_is_free_for():
    """What was not taken can be taken back, when the disk is full or the run stops."""
    taken = []

    def source():
        for request in REQUESTS:
            taken.append(request)
            yield request

    async def serve():
        feed = Feed(source(), 2)
        await asyncio.sleep(0.05)
        before = len(taken)
        await feed.take()
        await feed.take()
        await asyncio.sleep(0.05)
        feed.close()
        await asyncio.sleep(0.05)
        return before, len(taken)

    assert asyncio.run(serve()) == (0, 2)


class Inbox:
    """Requests that come later."""

    def __init__(self, requests=()):
        self.items = queue.SimpleQueue()
        for request in requests:
            self.items.put(request)

    def __iter__(self):
        return self

    def __next__(self):
        if (request := self.items.get()) is None:
            raise StopIteration
        return request

    def now(self):
        with suppress(queue.Empty):
            if (request := self.items.get_nowait()) is not None:
                return request
            self.items.put(None)
        return None


@pytest.mark.parametrize("kind", [list, Inbox])
def test_a_request_that_is_there_is_taken_without_waiting(kind):
    """Not even for another task: a thread that is woken keeps a free place empty."""

    async def serve():
        feed = Feed(kind(REQUESTS[:3]), 2)
        found = []
        for _ in range(3):
            with pytest.raises(StopIteration) as taken:
                feed.take().send(None)
            found.append(taken.value.value)
        feed.close()
        return found

    assert asyncio.run(asyncio.wait_for(serve(), 10)) == REQUESTS[:3]


def test_requests_that_come_later_are_waited_for_and_all_tasks_end():
    inbox = Inbox(REQUESTS[:2])

    async def serve():
        feed, taken = Feed(inbox, 3), []

        async def work():
            while (request := await feed.take()) is not None:
                taken.append(request)
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(work()) for _ in range(3)]
        for request in [*REQUESTS[2:], None]:
            await asyncio.sleep(0.03)
            inbox.items.put(request)
        await asyncio.gather(*tasks)
        return taken

    assert asyncio.run(asyncio.wait_for(serve(), 10)) == REQUESTS


def test_an_error_of_the_iterator_reaches_a_task():
    def source():
        yield REQUESTS[0]
        raise ValueError("no more")

    async def serve():
        feed = Feed(source(), 1)
        assert await feed.take() == REQUESTS[0]
        await feed.take()

    with pytest.raises(ValueError, match="no more"):
        asyncio.run(asyncio.wait_for(serve(), 10))


def test_the_loop_is_woken_once_for_all_requests_that_come_together():
    """Each waking costs a system call, and the other thread the interpreter's lock."""

    async def serve():
        loop, calls = asyncio.get_running_loop(), []
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), call(*args))
        feed = Feed(iter(REQUESTS[:5]), 5)
        taken = [asyncio.create_task(feed.take()) for _ in range(5)]
        await asyncio.sleep(0)  # the tasks ask
        await asyncio.sleep(0)  # the feed is told
        time.sleep(0.2)  # noqa: ASYNC251 - the loop is not to look
        found = [await task for task in taken]
        return found, len(calls)

    found, calls = asyncio.run(asyncio.wait_for(serve(), 10))
    assert found == REQUESTS[:5]
    assert calls == 1


def test_outcomes_of_one_pass_of_the_loop_are_one_list():
    async def serve():
        items = queue.SimpleQueue()
        outlet = Outlet(items)
        for number in range(3):
            outlet.put(number)
        await asyncio.sleep(0)
        outlet.put(3)
        await asyncio.sleep(0)
        outlet.put(4)
        outlet.flush()
        await asyncio.sleep(0)
        return all_of(items)

    assert asyncio.run(serve()) == [[0, 1, 2], [3], [4]]


def test_all_that_is_there_is_taken_at_once():
    items = queue.SimpleQueue()
    for number in range(3):
        items.put(number)
    assert all_of(items) == [0, 1, 2]
