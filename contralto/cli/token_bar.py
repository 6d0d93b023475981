"""A progress bar of generation: the tokens of a batch, with the time that is left."""

import sys
from typing import Any, Self

from tqdm import tqdm

__all__ = ["DELAY", "TokenBar"]

DELAY = 3.0
"""Seconds after which a bar appears; work that takes less shows none."""


class TokenBar:
    """A streamer for `generate()` that shows a progress bar of tokens on a terminal, after `DELAY` seconds.

    The estimate is an upper bound: it assumes that every text is as long as it may be.

    Args:
        length: the largest number of new tokens of a call of `generate()`.
        calls: the number of calls.
        title: the beginning of the line.
        shown: show the bar; by default on a terminal.

    Examples:
        >>> import torch
        >>> with TokenBar(4, calls=2, shown=False) as bar:
        ...     bar.put(torch.zeros(2, 9))  # the prompts
        ...     bar.put(torch.zeros(2))
        ...     bar.end()
        >>> bar.done
        4
    """

    def __init__(self, length: int, *, calls: int = 1, title: str = "tokens", shown: bool | None = None) -> None:
        is_shown = sys.stderr.isatty() if shown is None else shown
        self._length, self._in_call = length, -1
        self.done = 0
        """Tokens so far; a call that ended early counts in full."""
        self._bar: Any = tqdm(
            total=length * calls, desc=title, unit="token", leave=False, delay=DELAY, disable=not is_shown
        )

    def put(self, value: Any) -> None:
        """Count the tokens of a step.

        Args:
            value: the prompts, first in every call; then the tokens of a step, `(B,)`, or of several steps, `(B, T)`.
        """
        count = value.shape[-1] if value.ndim > 1 else 1
        self._advance(0 if self._in_call < 0 else min(count, self._length - self._in_call))

    def end(self) -> None:
        """End a call."""
        self._advance(self._length - max(self._in_call, 0))
        self._in_call = -1

    def _advance(self, count: int) -> None:
        self._in_call = max(self._in_call, 0) + count
        self.done += count
        self._bar.update(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
