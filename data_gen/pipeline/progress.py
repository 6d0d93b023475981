"""The progress bar of a run: rows, tokens, failures, money so far and at the end."""

import math
from typing import Any

from tqdm import tqdm

from contralto.common.bars import SteadyBar
from contralto.common.texts import amount
from contralto.data_gen.pipeline.rows import RowGroup
from contralto.data_gen.recipe import Price, Recipe
from contralto.data_gen.store import Store, TrackedRequest
from contralto.data_gen.types import Answer, Failure

__all__ = ["RunProgress"]


class RunProgress:
    """A progress bar.

    Args:
        recipe: the recipe, with the prices of its roles.
        store: the answers of earlier runs, which were paid already.
        total: the number of rows.
        is_shown: show the bar.
    """

    def __init__(self, recipe: Recipe, store: Store, total: int, *, is_shown: bool) -> None:
        self._prices = {name: role.price for name, role in recipe.roles.items()}
        self._in = self._out = self._new = self._failed = 0
        self._money = 0.0
        spent = (self._price(u.role).of(u.prompt_tokens, u.completion_tokens) for u in store.usage())
        self._spent = sum(spent)
        self._currency = next((p.currency for p in self._prices.values() if p.input or p.output), "")
        self._seconds = store.seconds_per_answer() if is_shown else 0.0
        self._bar: Any = SteadyBar(total=total, desc="rows", unit="row", disable=not is_shown)

    def _price(self, role: str) -> Price:
        return self._prices.get(role) or Price()

    def add(self, tracked: TrackedRequest, outcome: Answer | Failure) -> None:
        """Count the tokens of an answer and what they cost.

        Args:
            tracked: the request.
            outcome: its outcome.
        """
        if isinstance(outcome, Failure):
            return
        self._in += outcome.prompt_tokens
        self._out += outcome.completion_tokens
        self._money += self._price(tracked.role).of(outcome.prompt_tokens, outcome.completion_tokens)

    def finish(self, group: RowGroup, *, is_new: bool) -> None:
        """Count the rows of a group.

        Args:
            group: a group whose strategies have all ended.
            is_new: True if this run requested answers for it.
        """
        self._new += group.size if is_new else 0
        self._failed += sum(run.failed is not None for run in group.runs)
        if is_new:
            self._bar.update(group.size)
        else:
            self._bar.add_earlier(group.size, self._seconds * sum(len(run.answered) for run in group.runs))

    def show(self) -> None:
        """Show the current values."""
        shown = {"in": _short_number(self._in), "out": _short_number(self._out), "failed": str(self._failed)}
        if self._currency:
            left = (self._bar.total - self._bar.n) * self._money / self._new if self._new else math.nan
            total = self._spent + self._money
            shown["money"] = (
                f"{amount(total)} of about {amount(total + left)} {self._currency}" if self._new else amount(total)
            )
        self._bar.set_postfix(shown, refresh=False)

    def write(self, text: str) -> None:
        """Print a line above the bar.

        Args:
            text: the line.
        """
        tqdm.write(text)

    def close(self) -> None:
        """Show the last values and end the bar."""
        self.show()
        self._bar.close()


def _short_number(value: float) -> str:
    """Return a count with its unit.

    Examples:
        >>> _short_number(950), _short_number(12_345)
        ('950', '12.3k')
    """
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"
