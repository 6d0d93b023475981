"""An endpoint whose clock jumps from event to event, with faults: a day of it takes minutes.

The client and the server share an event loop, and speak HTTP over the loopback address. When neither has anything to read, and the
rest of the process has had a moment to send something, the clock of the loop jumps to its next timer. Answers, timeouts, pauses after
`Retry-After` and between attempts take the seconds that they would take, by this clock.
"""

import asyncio
import json
import random
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from aiohttp import web

from contralto.data_gen import store
from contralto.data_gen.engines import limiter, openai, window

HOUR = 3600.0
MOMENT, PATIENCE = 0.001, 0.3
"""Real seconds before the clock jumps: for what is on its way through the network, and for the rest of the process to send a request."""
SLOW_HOURS = 6
"""One of so many hours is slow: answers take three times as long, and a fifth of the requests is refused."""


class Clock:
    """Seconds since the beginning."""

    def __init__(self) -> None:
        self.now = 0.0
        self.is_idle: Callable[[], bool] = lambda: False
        """Returns True while a place for a request is free: the rest of the process gets `PATIENCE` to send one before a jump."""

    def time(self) -> float:
        """Return the seconds since the beginning."""
        return self.now


class _Selector(selectors.DefaultSelector):
    """A selector that moves a clock instead of waiting."""

    clock: Clock

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            return super().select()
        ready = super().select(min(timeout, MOMENT))
        end = time.monotonic() + PATIENCE
        while not ready and timeout and self.clock.is_idle() and time.monotonic() < end:
            ready = super().select(MOMENT)
        if not ready:
            self.clock.now += timeout
        return ready


@contextmanager
def simulated(clock: Clock) -> Iterator[None]:
    """Give new event loops, the modules of the endpoint's engine, and the store a clock.

    Args:
        clock: the clock.
    """

    class Policy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self) -> Any:
            selector = _Selector()
            selector.clock = clock
            loop = asyncio.SelectorEventLoop(selector)
            loop.time = clock.time  # type: ignore[method-assign]
            return loop

    modules, real = (openai, limiter, window, store), openai.time  # type: ignore[attr-defined]
    asyncio.set_event_loop_policy(Policy())
    for module in modules:
        module.time = SimpleNamespace(monotonic=clock.time, time=clock.time)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(None)
        for module in modules:
            module.time = real  # type: ignore[attr-defined]


class FlakyEngine(openai.OpenAIEngine):
    """The engine for endpoints, with an endpoint that fails now and then.

    Args:
        clock: the clock of both.
        rows: the number of rows, whose prompts end in their numbers.
        seconds: to an answer, in the mean.
        **options: of the engine.
    """

    def __init__(self, clock: Clock, *, rows: int, seconds: float, **options: Any) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        port = self._socket.getsockname()[1]
        super().__init__(base_url=f"http://127.0.0.1:{port}/v1", served_by="here", model="m", key_env=None, **options)
        self._clock, self._seconds, self._random = clock, seconds, random.Random(0)
        self.delivered = bytearray(rows)
        """Answers that were sent whole, by row."""
        self.at_half: Callable[[], object] | None = None
        """Is called once, when half of the rows are answered."""
        self._answered = 0
        self.faults: Counter[str] = Counter()

    async def _serve(self, requests: Iterable[Any], outcomes: Any) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        under_way = 0

        def counted() -> Iterator[Any]:
            nonlocal under_way
            for request in requests:
                under_way += 1
                yield request

        def put(some: list[Any]) -> None:
            nonlocal under_way
            under_way -= len(some)
            outcomes.put(some)

        self._clock.is_idle = lambda: under_way < self.concurrency
        await web.SockSite(runner, self._socket.dup()).start()  # the site closes it, and another run may follow
        try:
            await super()._serve(counted(), SimpleNamespace(put=put))
        finally:
            await runner.cleanup()

    def _fault(self, is_slow: bool) -> str:
        """Draw a fault, or an empty string."""
        value = self._random.random()
        for name, share in {"429": 0.2 if is_slow else 0.02, "500": 0.03, "reset": 0.02, "hang": 0.005}.items():
            value -= share
            if value < 0:
                return name
        return ""

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        is_slow = self._clock.now // HOUR % SLOW_HOURS == SLOW_HOURS - 1
        fault = self._fault(is_slow)
        self.faults[fault] += 1
        if fault == "429":
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "10"})
        if fault == "500":
            return web.Response(text="<html>oops</html>", status=500)
        await asyncio.sleep(self._random.gammavariate(4, self._seconds * (3 if is_slow else 1) / 4))
        if fault == "hang":
            await asyncio.sleep(24 * HOUR)
        if fault == "reset":
            assert request.transport
            request.transport.abort()
            return web.Response()
        prompt = body["messages"][-1]["content"]
        self.delivered[int(prompt.split()[-1])] += 1
        self._answered += 1
        if self.at_half and 2 * self._answered >= len(self.delivered):
            act, self.at_half = self.at_half, None
            act()
        return web.Response(text=_reply(prompt), content_type="application/json")


def _reply(prompt: str) -> str:
    """Return the reply to a prompt."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": 8 * prompt[::-1]}}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 20, "completion_tokens": 40}})
