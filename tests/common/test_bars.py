"""The progress bar of long runs: its estimate of the remaining time."""

import io
import random

import pytest

from contralto.common.bars import SteadyBar


class Times:
    """A bar whose clock the test moves."""

    def __init__(self, monkeypatch, total):
        self.now = 0.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)
        self.bar = SteadyBar(total=total, file=io.StringIO())

    def add(self, count, *, after):
        self.now += after
        self.bar.update(count)

    @property
    def left(self):
        shown = self.bar.format_dict
        return (shown["total"] - shown["n"]) / shown["rate"]


@pytest.mark.parametrize("together", [1, 8])
def test_a_constant_rate_is_found_exactly(monkeypatch, together):
    times = Times(monkeypatch, total=800)
    assert times.bar.format_dict["rate"] is None, "before the first item"
    for count in range(together, 400, together):
        times.add(together, after=0.25 * together)
        assert times.left == pytest.approx(0.25 * (800 - count))


def test_what_was_there_already_does_not_count_as_fast_work(monkeypatch):
    times = Times(monkeypatch, total=1000)
    times.add(500, after=1)
    for _ in range(100):
        times.add(1, after=2)
    assert times.left == pytest.approx(2 * 400, rel=0.05)


def test_pauses_are_averaged_and_a_lasting_change_is_followed(monkeypatch):
    """Answers that take a second, and every tenth of the run a pause as long as ten of them; then all take twice as long."""
    rng, times = random.Random(0), Times(monkeypatch, total=4000)
    for i in range(1, 1001):
        times.add(1, after=rng.uniform(0.5, 1.5) + 10 * (i % 100 == 0))
        if i >= 500:
            assert times.left == pytest.approx(1.1 * (4000 - i), rel=0.1)
    for _ in range(2000):
        times.add(1, after=2)
    assert times.left == pytest.approx(2 * 1000, rel=0.1)


def test_bars_that_are_not_shown_count_nothing():
    with SteadyBar(total=10, disable=True) as bar:
        bar.update(3)
        assert bar.mean_rate(1.0) is None
