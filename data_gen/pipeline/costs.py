"""Estimates of tokens and money before they are spent."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from contralto.data_gen.engines.bodies import CHARACTERS_PER_TOKEN, prompt_token_guess
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
    recorded: int
    """The number of these requests that are answered."""
    to_pay: float
    """The part of the money for requests that are not answered."""


ADVICE = (
    "Requests that depend on an answer, such as those to a judge, may be missing. For a better estimate run contralto data preview "
    "first, whose rows are then used"
)


def estimate(
    recipe: Recipe, rows: Sequence[Row], store: Store | None, *, advice: str = ADVICE
) -> tuple[list[Estimate], str]:
    """Estimate tokens and money for all rows.

    Recorded answers count with their own tokens. The number of further requests of a row is the mean of the finished rows, if there are
    any, as after a preview; their tokens are the means of all recorded answers of the role. If no row is finished, the strategies run
    on up to 50 rows with placeholder answers of the greatest length; a strategy that cannot parse such an answer ends there, and
    its later requests are not counted. No scorer is called.

    Args:
        recipe: the recipe.
        rows: all rows.
        store: recorded answers, if any.
        advice: how to get a better estimate, where no row is finished.

    Returns:
        The estimates by role, and what they are based on.
    """
    results = list(replay(recipe, rows, store, is_scoring=False)) if store else []
    ended = [each for each in results if not each.is_pending or each.is_unscored]
    finished = [each for each in ended if each.failed is None]
    recorded = _totals(results)
    if any(each.answered for each in finished):
        typical, units = _totals(finished), Counter(each.strategy for each in finished)
        basis = _basis(finished, [each for each in results if each.is_pending and not each.is_unscored])
    else:
        typical, units = _totals_of_stand_ins(recipe, rows[:50])
        basis = (
            f"{min(50, len(rows))} rows. Every answer is counted with max_new_tokens tokens, every prompt with a token per "
            f"{CHARACTERS_PER_TOKEN} characters. {advice}"
        )
    waiting = _waiting(results)
    missing = _missing(typical, units, len(rows), results, waiting)
    estimates = []
    for name, role in recipe.roles.items():
        known, left = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        for use in recipe.strategies:
            place = (use.name, name)
            each = next((totals[place] for totals in (recorded, typical) if totals[place][0]), waiting[place])
            requests = missing.get(place, 0.0)
            left = [sum_ + requests * of / max(each[0], 1) for sum_, of in zip(left, each, strict=True)]
            known = [sum_ + of for sum_, of in zip(known, recorded[place], strict=True)]
        total = [one + other for one, other in zip(known, left, strict=True)]
        money, to_pay = (role.price.of(tokens[1], tokens[2]) for tokens in (total, left))
        model, currency = str(role.engine.identity.get("model", "")), role.price.currency
        estimates.append(Estimate(name, model, total[0], total[1], total[2], money, currency, int(known[0]), to_pay))
    return estimates, basis


def _basis(finished: Sequence[Result], pending: Sequence[Result]) -> str:
    """Return what an estimate from recorded rows is based on."""
    count = len({result.row["id"] for result in finished if result.answered})
    others = " and the recorded answers of the others" * any(result.answered for result in pending)
    return f"the means of {count} finished row{'s' * (count != 1)}{others}"


def _missing(
    typical: Totals, units: Mapping[str, int], count: int, results: Sequence[Result], waiting: Totals
) -> dict[tuple[str, str], float]:
    """Return the expected numbers of requests that are not recorded, by strategy and role.

    Args:
        typical: the totals of the rows on which the estimate is based.
        units: their numbers, by strategy.
        count: the number of all rows.
        results: the results of all rows, [] without a store.
        waiting: the totals of the requests that rows wait for, at least which are missing.
    """
    missing: dict[tuple[str, str], float] = {}
    for strategy, role in dict.fromkeys([*waiting, *typical]):
        own = [each for each in results if each.strategy == strategy]
        each_row = typical[strategy, role][0] / units[strategy] if units[strategy] else 0.0
        if not own:
            missing[strategy, role] = each_row * count
            continue
        pending = [each for each in own if each.is_pending and not each.is_unscored]
        answered = (sum(tracked.role == role for tracked, _ in each.answered) for each in pending)
        missing[strategy, role] = max(
            sum(max(0.0, each_row - number) for number in answered), waiting[strategy, role][0]
        )
    return missing


def _waiting(results: Iterable[Result]) -> Totals:
    """Return the totals of the requests that rows wait for, each once, with answers of the greatest length."""
    totals: Totals = defaultdict(lambda: [0.0, 0.0, 0.0])
    seen: set[str] = set()
    for result in results:
        for tracked in result.waiting:
            if tracked.request.key not in seen:
                seen.add(tracked.request.key)
                total = totals[result.strategy, tracked.role]
                tokens = prompt_token_guess(tracked.request), tracked.request.sampling.max_new_tokens
                for i, each in enumerate((1, *tokens)):
                    total[i] += each
    return totals


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
