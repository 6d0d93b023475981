"""The progress bar of long runs: its estimate of the remaining time."""

import io
import random

import pytest

from contralto.common.bars import Cost, SteadyBar


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


def test_a_resumed_run_goes_on_with_the_rate_of_the_earlier_one(monkeypatch):
    """A slow hour after an interruption counts as one of many, in whatever order the items of before are found."""
    times = Times(monkeypatch, total=1000)
    times.bar.add_earlier(250, 500)
    assert times.left == pytest.approx(2 * 750)
    for _ in range(10):
        times.add(1, after=20)
    slow = 1 / times.bar.mean_rate(times.now)
    assert 2 < slow < 5, "ten items in 200 s, 250 in 500 s before: not 20 s for each of the rest"
    times.bar.add_earlier(250, 500)
    assert 2 < 1 / times.bar.mean_rate(times.now) < slow
    for _ in range(400):
        times.add(1, after=2)
    assert times.left == pytest.approx(2 * 90, rel=0.15)


def test_an_interruption_changes_no_estimate_of_a_constant_rate(monkeypatch):
    times = Times(monkeypatch, total=800)
    times.bar.add_earlier(300, 75)
    for count in range(308, 800, 8):
        times.add(8, after=2)
        assert times.left == pytest.approx(0.25 * (800 - count))


@pytest.mark.parametrize(("each", "unit"), [(0, 3), (5, 0), (40, 3)])
@pytest.mark.parametrize("ascending", [False, True])
def test_items_of_unequal_work_are_estimated_by_the_rest_of_it(monkeypatch, ascending, each, unit):
    times = Times(monkeypatch, total=100)
    works = sorted(range(1, 101), reverse=not ascending)
    bar = times.bar = SteadyBar(total=100, work=sum(works), file=io.StringIO())
    for i, work in enumerate(works[:-1], start=1):
        times.now += each + unit * work
        bar.update(1, work=work)
        if i > 1:
            assert times.left == pytest.approx(each * (100 - i) + unit * sum(works[i:]))
    bar.update(1, work=works[-1])
    assert bar.format_dict["rate"] is None, "the mean of all items is shown at the end"


@pytest.mark.parametrize(("each", "unit"), [(1, 0), (0, 1), (100, 1), (300, 1)])
def test_long_prompts_first_and_a_busy_machine(monkeypatch, each, unit):
    """Within a fifth over the middle half of the run, whether time goes with the prompts, with their tokens, or with both."""
    rng = random.Random(0)
    lengths = sorted((int(rng.lognormvariate(5.5, 0.8)) for _ in range(4000)), reverse=True)
    batches = [16 * max(lengths[i : i + 16]) for i in range(0, 4000, 16)]
    seconds = [(16 * each + unit * work) * rng.uniform(1, 1.2) for work in batches]
    times = Times(monkeypatch, total=4000)
    times.bar = SteadyBar(total=4000, work=sum(batches), file=io.StringIO())
    for work, took in zip(batches, seconds, strict=True):
        times.now += took
        times.bar.update(16, work=work)
        if 0.25 <= times.now / sum(seconds) <= 0.75:
            assert times.left == pytest.approx(sum(seconds) - times.now, rel=0.2)


@pytest.mark.parametrize("seconds", [[5, 4, 30], [30, 4, 5]])
def test_no_item_and_no_work_takes_less_than_nothing(seconds):
    """The quickest fit of these would have a negative part."""
    cost = Cost()
    for work, took in zip((50, 40, 30), seconds, strict=True):
        cost.add(10, work, took)
    assert cost.seconds(1, 0) >= 0
    assert cost.seconds(0, 1) >= 0
    assert cost.seconds(1, 0) + cost.seconds(0, 1) > 0
    assert Cost().seconds(5, 5) == 0


def test_bars_that_are_not_shown_count_nothing():
    with SteadyBar(total=10, disable=True) as bar:
        bar.update(3)
        assert bar.mean_rate(1.0) is None
