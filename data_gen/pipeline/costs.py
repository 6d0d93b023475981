"""Estimates of tokens and money before they are spent."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from contralto.data_gen.engines.bodies import CHARACTERS_PER_TOKEN
from contralto.data_gen.pipeline.rows import Result, RowRun, replay, run_on_stand_ins
from contralto.data_gen.recipe import Recipe
from contralto.data_gen.store import Store
from contralto.data_gen.types import Row

__all__ = ["Estimate", "estimate"]

Totals = dict[tuple[str, str], list[float]]
"""Requests, prompt tokens and completion tokens by strategy and role."""


class Estimate(NamedTuple):
    """The expected cost of a role, for all rows."""

    role: str
    model: str
    requests: float
    prompt_tokens: float
    completion_tokens: float
    money: float
    currency: str


def estimate(recipe: Recipe, rows: Sequence[Row], store: Store | None) -> tuple[list[Estimate], str]:
    """Estimate tokens and money for all rows.

    If rows are recorded, as after a preview, their means are used. If not, the strategies run on up to 50 rows with placeholder
    answers of the greatest length; a strategy that cannot parse such an answer ends there, and its later requests are not counted.

    Args:
        recipe: the recipe.
        rows: all rows.
        store: recorded answers, if any.

    Returns:
        The estimates by role, and what they are based on.
    """
    finished = [r for r in replay(recipe, rows, store) if r.outcomes is not None and r.answered] if store else []
    if finished:
        totals, units = _totals(finished), Counter(result.strategy for result in finished)
        count = len({result.row["id"] for result in finished})
        basis = f"the means of {count} finished row{'s' * (count != 1)}"
    else:
        totals, units = _totals_of_stand_ins(recipe, rows[:50])
        basis = (
            f"{min(50, len(rows))} rows. Every answer is counted with max_new_tokens tokens, every prompt with a token per "
            f"{CHARACTERS_PER_TOKEN} characters. Requests that depend on an answer, such as those to a judge, may be missing. For a better "
            "estimate run contralto data preview first, whose rows are then used"
        )
    estimates = []
    for name, role in recipe.roles.items():
        sums = [0.0, 0.0, 0.0]
        for strategy, count in units.items():
            sums = [s + each * len(rows) / count for s, each in zip(sums, totals[strategy, name], strict=True)]
        money = role.price.of(sums[1], sums[2])
        model, currency = str(role.engine.identity.get("model", "")), role.price.currency
        estimates.append(Estimate(name, model, sums[0], sums[1], sums[2], money, currency))
    return estimates, basis


def _totals(results: Iterable[Result]) -> Totals:
    """Return the totals; a request that several strategies have in common is sent once, and counts for the first of them."""
    totals: Totals = defaultdict(lambda: [0.0, 0.0, 0.0])
    seen: set[str] = set()
    for result in results:
        for tracked, answer in result.answered:
            if tracked.request.key in seen:
                continue
            seen.add(tracked.request.key)
            total = totals[result.strategy, tracked.role]
            for i, each in enumerate((1, answer.prompt_tokens, answer.completion_tokens)):
                total[i] += each
    return totals


def _totals_of_stand_ins(recipe: Recipe, rows: Sequence[Row]) -> tuple[Totals, Counter[str]]:
    """Run the strategies with placeholder answers; return the totals and the rows of each strategy."""
    results = []
    for row in rows:
        for use in recipe.strategies:
            run = RowRun(recipe, use, row)
            run_on_stand_ins(run)
            results.append(run.result())
    return _totals(results), Counter(result.strategy for result in results)
