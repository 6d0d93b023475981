"""Progress bars whose remaining time is right for long runs."""

from typing import Any

from tqdm import tqdm

__all__ = ["SteadyBar"]


class SteadyBar(tqdm):  # type: ignore[type-arg]
    """A progress bar that estimates the remaining time from the whole run so far, later parts of it first.

    tqdm takes the rate of the last few updates, so that its estimate follows each pause of an endpoint, or that of the whole run, so that
    items which were there already, as in a resumed run, count as fast work. Here a moment counts in proportion to its distance from
    the beginning: with n(t) items at time t, the rate is

        2 / T^2 * integral_0^T t n'(t) dt,

    which is n / T where the rate is constant. Items of one update are spread over the time since the one before it.

    Examples:
        >>> bar = SteadyBar(total=300, disable=True)
        >>> bar.add_moment(50, 0.0), bar.add_moment(100, 10.0)  # 50 are there already
        (None, None)
        >>> bar.mean_rate(10.0)
        10.0
    """

    _time: Any  # of tqdm, whose types leave it out

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._moment = self._before = 0.0
        super().__init__(*args, **kwargs)

    def update(self, n: float | None = 1) -> bool | None:
        """Count items.

        Args:
            n: the number of them.
        """
        if not self.disable:
            self.add_moment(n or 0, self._time() - self.start_t)
        return super().update(n)

    def add_moment(self, n: float, elapsed: float) -> None:
        """Count items in the estimate.

        Args:
            n: the number of them.
            elapsed: seconds since the beginning.
        """
        self._moment += n * (self._before + elapsed) / 2
        self._before = elapsed

    def mean_rate(self, elapsed: float) -> float | None:
        """Return the items per second by which the rest is estimated, None before the first of them.

        Args:
            elapsed: seconds since the beginning.
        """
        return 2 * self._moment / elapsed**2 or None if elapsed > 0 else None

    @property
    def format_dict(self) -> Any:
        """Return what the bar shows, tqdm's names with the own rate."""
        shown = super().format_dict
        return {**shown, "rate": self.mean_rate(shown["elapsed"] or 0)}
