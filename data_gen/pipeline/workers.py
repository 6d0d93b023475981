"""Run engines in threads; engines and signals put events into the queue of a run."""

import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from contralto.data_gen.engines.base import Engine, Outcome
from contralto.data_gen.engines.outcomes import checked_outcomes
from contralto.data_gen.types import Failure, Request

__all__ = ["Answered", "EngineWorker", "Interrupted", "WorkerEnded", "file_as_event", "signals_as_events"]

LOOKS = 0.5
"""Seconds between two looks for a file."""


class Answered(NamedTuple):
    """The event of outcomes that are recorded together."""

    outcomes: list[Outcome]


class WorkerEnded(NamedTuple):
    """The event of a worker that has ended, by an error or because it was stopped."""

    error: BaseException | None


class Interrupted(NamedTuple):
    """The event of Ctrl-C or SIGTERM, here or where a worker's run was started."""

    signal: int


class _OneByOne:
    """The requests of an engine that answers them one by one, for a worker: an iterator that waits for the next one.

    Args:
        take: returns the next request; None if there are no more, or, where it may not wait, none yet.
    """

    def __init__(self, take: Callable[..., Request | None]) -> None:
        self._take = take

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Request:
        request = self._take(waits=True)
        if request is None:
            raise StopIteration
        return request

    def now(self) -> Request | None:
        """Return the next request if it is there, which `Feed` asks before it lets a thread wait."""
        return self._take(waits=False)


class EngineWorker(threading.Thread):
    """An engine in a thread of its own, which takes requests and yields lists of outcomes.

    The thread starts at once.

    Args:
        engine: the engine.
        events: the queue for `Answered` and `WorkerEnded`.
    """

    def __init__(self, engine: Engine, events: Any) -> None:
        super().__init__(daemon=True)
        self.engine, self._events = engine, events
        self._inbox: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()
        self._is_stopping = False
        self._waiting: dict[str, Request] = {}
        """Requests that the engine has taken and not answered."""
        self.start()

    def put(self, requests: list[Request]) -> None:
        """Hand a round of requests to the engine.

        Args:
            requests: the requests.
        """
        for each in [requests] if self.engine.rows_together > 1 else [[request] for request in requests]:
            self._inbox.put(each)

    def run(self) -> None:
        """Run the engine until the worker is stopped, and put its outcomes into the queue as events."""
        error: BaseException | None = None
        try:
            if self.engine.rows_together > 1:
                for requests in iter(self._inbox.get, None):
                    self._waiting = {request.key: request for request in requests if not request.known}
                    self._answer(requests)
            else:
                self._answer(_OneByOne(self._take))
                if not self._is_stopping:
                    raise ValueError("the engine ended before its requests: its answer() must process all of them")
        except BaseException as caught:  # noqa: BLE001 - the main thread raises it
            error = caught
        self._events.put(WorkerEnded(error))

    def _take(self, *, waits: bool) -> Request | None:
        """Return the next request; None if the run stops, or, where it may not wait, if there is none yet."""
        try:
            requests = self._inbox.get(block=waits)
        except queue.Empty:
            return None
        if requests is None or self._is_stopping:
            self._inbox.put(None)  # for whoever asks next
            return None
        (request,) = requests
        self._waiting[request.key] = request
        return request

    def _answer(self, requests: Iterable[Request]) -> None:
        """Call the engine, and record requests that it omits as failed, since the run would wait for them."""
        for outcomes in self.engine.answer(requests):
            self._events.put(Answered(checked_outcomes(outcomes, self._waiting)))
            if self._is_stopping and self.engine.rows_together > 1:
                return
        if not self._is_stopping:
            failed = Failure("the engine ended without an answer to this request")
            self._events.put(Answered([(request, failed) for request in self._waiting.values()]))
            self._waiting = {}

    def take_back(self) -> list[list[Request]]:
        """Remove and return the rounds that the engine has not started."""
        rounds = []
        with suppress(queue.Empty):  # which the engine empties, too
            while True:
                rounds.append(self._inbox.get_nowait())
        return [requests for requests in rounds if requests is not None]

    def stop(self) -> None:
        """Start no further request, and fail those that wait for another attempt."""
        self._is_stopping = True
        self.take_back()
        self._inbox.put(None)
        getattr(self.engine, "stop", lambda: None)()


@contextmanager
def signals_as_events(events: Any) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that no answer is lost before it is recorded.

    The second one has its usual effect. Other threads than the main one cannot handle signals and leave them alone.

    Args:
        events: the queue for `Interrupted`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def interrupted(number: int, _: object) -> None:
        restore()
        events.put(Interrupted(number))

    for number in before:
        signal.signal(number, interrupted)
    try:
        yield
    finally:
        restore()


@contextmanager
def file_as_event(file: Path, events: Any) -> Iterator[None]:
    """Turn the appearance of a file into an event, for a worker whose run was started on another machine.

    Args:
        file: the file, on a disk that both machines share.
        events: the queue for `Interrupted`.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not file.exists():
            if is_over.wait(LOOKS):
                return
        events.put(Interrupted(signal.SIGTERM))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
