"""Progress bars whose remaining time is right for long runs."""

from typing import Any

from tqdm import tqdm

__all__ = ["Cost", "SteadyBar"]


class SteadyBar(tqdm):  # type: ignore[type-arg]
    """A progress bar that estimates the remaining time from the whole run so far, later parts of it first.

    tqdm takes the rate of the last few updates, so that its estimate follows each pause of an endpoint, or that of the whole run, so that
    items which were there already, as in a resumed run, count as fast work. Here a moment counts in proportion to its distance from
    the beginning: with n(t) items at time t, the rate is

        2 / T^2 * integral_0^T t n'(t) dt,

    which is n / T where the rate is constant. Items of one update are spread over the time since the one before it.

    Items of which the work is known, such as tokens to read, take `a` seconds each and `b` for each unit of work, both fitted to the updates
    so far, see `Cost`: an evaluation that answers the longest prompts first shows the time that the shorter ones will take.

    Args:
        args: of tqdm.
        work: the work of all items together, in any unit; None if nothing is known of it.
        kwargs: of tqdm.

    Examples:
        >>> bar = SteadyBar(total=300, disable=True)
        >>> bar.add_moment(50, 0.0), bar.add_moment(100, 10.0)  # 50 are there already
        (None, None)
        >>> bar.mean_rate(10.0)
        10.0
    """

    _time: Any  # of tqdm, whose types leave it out

    def __init__(self, *args: Any, work: float | None = None, **kwargs: Any) -> None:
        self._left, self._cost = work, Cost()
        self._done = self._moment = self._before = 0.0
        self._earlier = self._seconds = 0.0
        super().__init__(*args, **kwargs)

    def update(self, n: float | None = 1, *, work: float | None = None) -> bool | None:
        """Count items.

        Args:
            n: the number of them.
            work: their work, if the bar knows that of all items.
        """
        if not self.disable:
            elapsed = self._time() - self.start_t
            if self._left is not None and n and work:
                self._left -= work
                self._cost.add(n, work, elapsed - self._before)
            self.add_moment(n or 0, elapsed)
        return super().update(n)

    def add_earlier(self, n: float, seconds: float) -> bool | None:
        """Count items of an earlier run, as if it had ended when this one began.

        Args:
            n: the number of them.
            seconds: the time that they took.
        """
        self._earlier += n
        self._seconds += seconds
        return super().update(n)

    def add_moment(self, n: float, elapsed: float) -> None:
        """Count items in the estimate.

        Args:
            n: the number of them.
            elapsed: seconds since the beginning.
        """
        self._done += n
        self._moment += n * (self._before + elapsed) / 2
        self._before = elapsed

    def mean_rate(self, elapsed: float) -> float | None:
        """Return the items per second by which the rest is estimated where their work is not known, None before the first of them.

        Args:
            elapsed: seconds since the beginning.
        """
        begin = self._seconds
        moment = self._earlier * begin / 2 + self._done * begin + self._moment
        return 2 * moment / (begin + elapsed) ** 2 or None if begin + elapsed > 0 else None

    @property
    def format_dict(self) -> Any:
        """Return what the bar shows, tqdm's names with the own rate: that of the remaining items."""
        shown = super().format_dict
        rate = self.mean_rate(shown["elapsed"] or 0)
        if rate and self._left is not None:
            left = shown["total"] - shown["n"]
            seconds = self._cost.seconds(left, self._left)
            rate = left / seconds if left > 0 and seconds > 0 else None
        return {**shown, "rate": rate}


class Cost:
    """Fit the seconds of items: `a` for each item and `b` for each unit of its work, neither negative.

    Least squares of seconds / work = a * items / work + b, so that a long batch counts no more than a short one.

    Examples:
        >>> cost = Cost()
        >>> for items, work in ((8, 100), (8, 60), (8, 20)):
        ...     cost.add(items, work, 0.5 * items + 0.1 * work)
        >>> round(cost.seconds(16, 30), 9)
        11.0
    """

    def __init__(self) -> None:
        self._count = 0
        self._x = self._y = self._xx = self._xy = 0.0

    def add(self, items: float, work: float, seconds: float) -> None:
        """Count items that are finished.

        Args:
            items: the number of them, not 0.
            work: their work, above 0.
            seconds: the time that they took together.
        """
        x, y = items / work, seconds / work
        self._count += 1
        self._x, self._y, self._xx, self._xy = self._x + x, self._y + y, self._xx + x * x, self._xy + x * y

    def seconds(self, items: float, work: float) -> float:
        """Return the seconds that further items will take; 0 before the first are finished.

        Args:
            items: the number of them.
            work: their work.
        """
        if not self._count:
            return 0.0
        spread = self._count * self._xx - self._x**2
        a = (self._count * self._xy - self._x * self._y) / spread if spread > 1e-12 * self._xx else 0.0
        b = (self._y - max(0.0, a) * self._x) / self._count
        if b < 0:
            a, b = self._xy / self._xx, 0.0
        return max(0.0, a) * items + b * work
