"""The window: it finds how many requests an endpoint answers at a time, and leaves a number as it is."""

import asyncio
import time

import pytest
from aiohttp import web
from helpers.serving import Server

from contralto.data_gen.engines.openai import OpenAIEngine
from contralto.data_gen.engines.window import Window, checked_concurrency
from contralto.data_gen.types import Ask, Sampling, make_request


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("contralto.data_gen.engines.window.time.monotonic", lambda: self.now)


def answered(window, clock, *, seconds=1.0, count=1):
    """As many answers, each of which found the window full."""
    for _ in range(count):
        window._under_way = int(window.limit)
        clock.now += seconds
        window.answered(clock.now - seconds)


def test_it_doubles_until_a_refusal_and_then_grows_by_one_a_round(monkeypatch):
    clock = Clock(monkeypatch)
    window = Window(256, is_adaptive=True)
    answered(window, clock, count=4)
    assert window.limit == 8
    answered(window, clock, count=12)
    assert window.limit == 20
    window.refused(clock.now)
    assert window.limit == 20 * 0.85 == 17
    answered(window, clock, count=17)
    assert window.limit == pytest.approx(18, abs=0.03)


def test_one_round_of_refusals_lowers_it_once(monkeypatch):
    clock = Clock(monkeypatch)
    window = Window(256, is_adaptive=True)
    answered(window, clock, count=16)
    sent, before = clock.now, window.limit
    clock.now += 1
    for _ in range(10):
        window.refused(sent)
    assert window.limit == before * 0.85
    clock.now += 2
    window.refused(clock.now - 0.5)
    assert window.limit == before * 0.85**2


def test_slow_answers_lower_it_and_longer_ones_are_learnt(monkeypatch):
    clock = Clock(monkeypatch)
    window = Window(256, is_adaptive=True)
    answered(window, clock, count=16)
    before = window.limit
    answered(window, clock, seconds=10, count=8)
    assert window.limit < before
    answered(window, clock, seconds=10, count=2000)
    assert window.limit > before


def test_an_idle_window_does_not_grow_and_no_window_leaves_its_bounds(monkeypatch):
    clock = Clock(monkeypatch)
    window = Window(6, is_adaptive=True)
    clock.now += 1
    window.answered(clock.now - 1)
    assert window.limit == 4
    answered(window, clock, count=50)
    assert window.limit == 6
    for _ in range(50):
        clock.now += 1
        window.refused(clock.now - 0.5)
    assert window.limit == 1


def test_a_number_stays_what_it_is(monkeypatch):
    clock = Clock(monkeypatch)
    window = Window(32, is_adaptive=False)
    answered(window, clock, count=5)
    window.refused(clock.now)
    answered(window, clock, seconds=50, count=5)
    assert window.limit == 32


def test_no_more_are_under_way_than_the_limit():
    async def serve():
        window, most, now = Window(3, is_adaptive=False), 0, 0

        async def ask():
            nonlocal most, now
            await window.enter()
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.001)
            now -= 1
            await window.leave()

        await asyncio.gather(*(ask() for _ in range(20)))
        return most

    assert asyncio.run(asyncio.wait_for(serve(), 10)) == 3


@pytest.mark.parametrize("value", ["8", "Auto", 0, 10_001, None])
def test_what_is_no_concurrency(value):
    with pytest.raises(ValueError, match="concurrency must be"):
        checked_concurrency(value)


class Bucket:
    """A server's limit of requests per second, with a bucket of tokens."""

    def __init__(self, rate, burst):
        self.rate, self.burst, self.tokens, self.at, self.refused = rate, burst, burst, time.monotonic(), 0

    async def __call__(self, request, body):
        now = time.monotonic()
        self.tokens, self.at = min(self.burst, self.tokens + (now - self.at) * self.rate), now
        if self.tokens >= 1:
            self.tokens -= 1
            return None
        self.refused += 1
        return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0.02"})


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("rate", [50, 150])
def test_a_limited_rate_is_found(rate):
    """The rate within a tenth, few refusals, every request with an answer and answered once."""
    bucket = Bucket(rate, burst=rate / 5)
    with Server(latency=0.1, raw=bucket) as server:
        engine = OpenAIEngine(base_url=server.url, model="m", key_env=None, concurrency="auto", attempts=100)
        ask = [Ask(role="r", messages=[{"role": "user", "content": f"{n}?"}]) for n in range(8 * rate)]
        requests = [make_request(a, engine={}, sampling=Sampling(), seed=0, row=str(n)) for n, a in enumerate(ask)]
        found = [(request.key, outcome) for some in engine.answer(requests) for request, outcome in some]
        times = sorted(seen.at for seen in server.answered)
    first, last = times[len(times) // 10], times[len(times) * 9 // 10]  # without the search and the last retries
    used = 0.8 * len(times) / (last - first) / rate
    print(f"{used:.3f} of the rate, {bucket.refused / len(found):.3f} refused")
    assert sorted(key for key, _ in found) == sorted(request.key for request in requests)
    assert all(outcome.text for _, outcome in found)
    assert len(server.answered) == len(requests)
    assert used > 0.9
    assert bucket.refused < 0.25 * len(found)  # the search overshoots once; a small limit is passed often
