"""Workers: requests reach an engine that asks for those that are there, and one that waits; a stop ends both."""

import queue
import threading
import time

import pytest
from helpers.stored_answers import asked

from contralto.data_gen.pipeline.workers import Answered, EngineWorker, WorkerEnded
from contralto.data_gen.types import Answer

REQUESTS = [asked(number).request for number in range(4)]


class Asking:
    """An engine that asks for what is there before it waits."""

    rows_together = 1

    def __init__(self, *, is_held=False):
        self.go_on = threading.Event()
        if not is_held:
            self.go_on.set()

    def answer(self, requests):
        self.go_on.wait()
        while True:
            request = requests.now()
            if request is None:
                time.sleep(0.05)  # a stop may come now
                request = requests.now() or next(requests, None)
            if request is None:
                return
            yield [(request, Answer(text="yes"))]


def outcomes(events, count):
    found = []
    while len(found) < count:
        found += events.get(timeout=10).outcomes
    return found


def test_requests_that_are_there_and_those_that_come_later():
    events = queue.SimpleQueue()
    worker = EngineWorker(Asking(), events)
    worker.put(REQUESTS[:3])
    assert [request for request, _ in outcomes(events, 3)] == REQUESTS[:3]
    time.sleep(0.2)  # it waits by now
    worker.put(REQUESTS[3:])
    assert [request for request, _ in outcomes(events, 1)] == REQUESTS[3:]
    worker.stop()
    assert events.get(timeout=10) == WorkerEnded(None)


@pytest.mark.parametrize("after", [0.0, 0.02, 0.2])
def test_a_stop_ends_an_engine_wherever_it_asks(after):
    events = queue.SimpleQueue()
    worker = EngineWorker(Asking(), events)
    time.sleep(after)
    worker.stop()
    assert events.get(timeout=10) == WorkerEnded(None)


def test_what_was_not_taken_is_taken_back():
    """In the form in which it can be put again, and never waiting for what the engine takes meanwhile."""
    events, engine = queue.SimpleQueue(), Asking(is_held=True)
    worker = EngineWorker(engine, events)
    worker.put(REQUESTS)
    rounds = worker.take_back()
    assert [request for requests in rounds for request in requests] == REQUESTS
    assert worker.take_back() == []
    for requests in rounds:
        worker.put(requests)
    engine.go_on.set()
    assert [request for request, _ in outcomes(events, 4)] == REQUESTS
    worker.stop()
    assert isinstance(events.get(timeout=10), Answered | WorkerEnded)
