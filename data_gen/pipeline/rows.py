"""Strategies in progress on rows, driven by recorded answers alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from contralto.common.texts import has_lone_surrogate
from contralto.data_gen.engines.bodies import CHARACTERS_PER_TOKEN, prompt_token_guess
from contralto.data_gen.engines.outcomes import described
from contralto.data_gen.recipe import Recipe, Use
from contralto.data_gen.score_memory import (
    RecordedScores,
    ScoreMemory,
    ScoreMemoryError,
    StandInScores,
    UnscoredError,
    remembered_scores,
)
from contralto.data_gen.store import Store, TrackedRequest
from contralto.data_gen.types import Answer, Ask, Failure, Outcome, Row, digest, drive, make_request

__all__ = [
    "Result",
    "RowGroup",
    "RowRun",
    "UnknownRoleError",
    "advance_together",
    "check",
    "pending",
    "replay",
    "run_on_stand_ins",
    "shard_of",
]

LONE = "the row contains a lone surrogate (half of a character), which can be neither sent nor recorded"
"""The reason why a row fails before its strategy starts."""


class Result(NamedTuple):
    """The result of a strategy on a row, given the recorded answers."""

    row: Row
    strategy: str
    answered: list[tuple[TrackedRequest, Answer]]
    """The requests with their answers."""
    outcomes: list[Outcome] | None = None
    """The pairs or completions, or the reasons why there are none; None if the strategy failed or is not finished."""
    failed: str | None = None
    """The reason of a failure: a request without an answer, or an error in the strategy."""
    is_unscored: bool = False
    """True if all answers are recorded, but not their scores, and none were computed."""
    waiting: Sequence[TrackedRequest] = ()
    """The requests that the strategy waits for."""

    @property
    def is_pending(self) -> bool:
        """Return True if missing answers have not been requested yet."""
        return self.outcomes is None and self.failed is None


class UnknownRoleError(ValueError):
    """The error of a strategy that requests an answer of a role which the recipe does not have."""


class RowRun:
    """A strategy in progress on a row.

    Args:
        recipe: the recipe.
        use: the strategy.
        row: the row.
        scores: scores that may be needed at the start; None computes them.

    Raises:
        UnknownRoleError: the strategy names a role that the recipe does not have.
    """

    def __init__(self, recipe: Recipe, use: Use, row: Row, *, scores: ScoreMemory | None = None) -> None:
        self._recipe, self._row, self.strategy = recipe, row, use.name
        self.requests: list[TrackedRequest] = []
        """The requests that the strategy waits for."""
        self.answered: list[tuple[TrackedRequest, Answer]] = []
        self.outcomes: list[Outcome] | None = None
        self.failed: str | None = None
        self.is_unscored = False
        """True if the strategy stopped at a score that is not recorded and may not be computed."""
        if has_lone_surrogate(row):
            self.failed = LONE
            return
        self._driven = drive(use.start(row))
        with remembered_scores(scores):
            self._step(None)

    @property
    def is_live(self) -> bool:
        """Return True until the strategy has returned, failed or stopped."""
        return self.outcomes is None and self.failed is None and not self.is_unscored

    def send(self, known: Mapping[str, Answer | Failure], *, scores: ScoreMemory | None = None) -> None:
        """Continue with the answers to `requests`.

        Args:
            known: outcomes by key, those of all `requests` among them.
            scores: scores of answers that functions gave before; None computes them again.
        """
        answers: list[Answer] = []
        for tracked in self.requests:
            outcome = known[tracked.request.key]
            if isinstance(outcome, Failure):
                self.failed = f"{tracked.role}: {outcome.reason}"
                self._driven.close()
                return
            answers.append(outcome)
        self.answered += zip(self.requests, answers, strict=True)
        with remembered_scores(scores):
            self._step(answers)

    def _step(self, answers: list[Answer] | None) -> None:
        try:
            asks = self._driven.send(answers)  # type: ignore[arg-type]  # None starts a generator
            self.requests = [_tracked(self._recipe, ask, self.strategy, self._row["id"]) for ask in asks]
        except StopIteration as end:
            self.outcomes = end.value
        except (UnknownRoleError, ScoreMemoryError):
            raise
        except UnscoredError:
            self.is_unscored = True
        except Exception as error:  # noqa: BLE001 - an error in a strategy fails its row, not the run
            self.failed = described(error, by=self.strategy)

    def result(self) -> Result:
        """Return the result so far."""
        waiting = self.requests if self.is_live else ()
        return Result(self._row, self.strategy, self.answered, self.outcomes, self.failed, self.is_unscored, waiting)


def _tracked(recipe: Recipe, ask: Ask, strategy: str, row: str) -> TrackedRequest:
    """Convert an ask to a request with its origin."""
    role = recipe.roles.get(ask.role)
    if role is None:
        has = ", ".join(recipe.roles)
        raise UnknownRoleError(f"{recipe.path}: strategy {strategy!r} uses the role {ask.role!r}; the recipe has {has}")
    request = make_request(ask, engine=role.engine.identity, sampling=role.sampling, seed=recipe.seed, row=row)
    model = str(role.engine.identity.get("model", ""))
    return TrackedRequest(
        request=request, row=row, strategy=strategy, role=ask.role, tag=ask.tag, template=ask.template, model=model
    )


class RowGroup:
    """Rows that are driven in step, under all strategies of a recipe.

    Args:
        recipe: the recipe.
        rows: the rows.
    """

    def __init__(self, recipe: Recipe, rows: Sequence[Row]) -> None:
        self.size = len(rows)
        self.runs = [RowRun(recipe, use, row) for row in rows for use in recipe.strategies]
        self.round: list[TrackedRequest] = []
        """The requests that the strategies wait for, each once."""
        self.missing: list[TrackedRequest] = []
        """Those of them without a recorded outcome."""
        self.recorded: set[str] = set()
        """Keys of the requests whose outcomes were recorded: they cannot be missing again."""

    def advance(self, store: Store) -> None:
        """Continue all strategies with recorded outcomes until one is missing or all have ended.

        Args:
            store: the recorded outcomes.
        """
        advance_together([self], store)

    def next_round(self) -> list[TrackedRequest]:
        """Return the requests that the strategies wait for now, each once; none if all have ended."""
        live = [run for run in self.runs if run.is_live]
        if live:
            self.round = list({tracked.request.key: tracked for run in live for tracked in run.requests}.values())
        self.missing = []
        return self.round if live else []

    def send(self, known: Mapping[str, Answer | Failure], *, scores: ScoreMemory) -> bool:
        """Continue the strategies with the outcomes of `round`; return False if some are missing, and continue none.

        Args:
            known: recorded outcomes by key.
            scores: as for `RowRun.send`.
        """
        self.missing = [tracked for tracked in self.round if tracked.request.key not in known]
        if self.missing:
            return False
        for run in self.runs:
            if run.is_live:
                run.send(known, scores=scores)
        return True


def advance_together(groups: Iterable[RowGroup], store: Store) -> None:
    """Continue groups as `RowGroup.advance` does each, with one reading of the store for a round of all of them.

    Args:
        groups: the groups, which wait for nothing that is under way.
        store: the recorded outcomes.
    """
    going = list(groups)
    while going := [group for group in going if group.next_round()]:
        known = store.get([tracked.request.key for group in going for tracked in group.round])
        going = [group for group in going if group.send(known, scores=store)]


def check(recipe: Recipe, rows: Sequence[Row]) -> None:
    """Start every strategy on the first row, so that invalid settings raise an error before the first request.

    The strategies of contralto go on with placeholder answers, so that a missing role of a later request is found, too.

    Args:
        recipe: the recipe.
        rows: the rows.

    Raises:
        ValueError: a strategy rejects its settings, or names a role that the recipe does not have.
    """
    for use in recipe.strategies:
        run = next((run for row in rows if (run := RowRun(recipe, use, row)).failed != LONE), None)
        if run and run.failed:
            raise ValueError(f"{recipe.path}: {run.failed} (on the first row)")
        if run and getattr(use.start, "func", use.start).__module__.startswith("contralto."):
            run_on_stand_ins(run)


def run_on_stand_ins(run: RowRun) -> None:
    """Continue a strategy to its end with placeholder answers of the greatest length and placeholder scores.

    A strategy that cannot parse such an answer ends there.

    Args:
        run: the strategy in progress.

    Raises:
        UnknownRoleError: the strategy names a role that the recipe does not have.
    """
    while run.is_live:
        answers = {tracked.request.key: _stand_in(tracked, i) for i, tracked in enumerate(run.requests)}
        run.send(answers, scores=StandInScores())


def _stand_in(tracked: TrackedRequest, number: int) -> Answer:
    """Return a placeholder answer of the largest length, different for each number."""
    tokens = tracked.request.sampling.max_new_tokens
    text = f"{number} " + "word " * int(tokens * CHARACTERS_PER_TOKEN / 5)
    return Answer(text=text, prompt_tokens=prompt_token_guess(tracked.request), completion_tokens=tokens)


def replay(recipe: Recipe, rows: Iterable[Row], store: Store, *, is_scoring: bool = True) -> Iterator[Result]:
    """Yield the results of all rows under all strategies, from the recorded answers alone, in the order of the rows.

    Args:
        recipe: the recipe.
        rows: as `read_rows` returns them.
        store: the recorded answers.
        is_scoring: compute scores that are not recorded; if False, no scorer is called, and such rows are pending.
    """
    scores = store if is_scoring else RecordedScores(store)
    for row in rows:
        for use in recipe.strategies:
            run = RowRun(recipe, use, row, scores=scores)
            while run.is_live:
                known = store.get([tracked.request.key for tracked in run.requests])
                if not all(tracked.request.key in known for tracked in run.requests):
                    break
                run.send(known, scores=scores)
            yield run.result()


def pending(recipe: Recipe, rows: Iterable[Row], store: Store) -> Iterator[TrackedRequest]:
    """Yield the requests that could be sent now, each once.

    Args:
        recipe: the recipe.
        rows: as `read_rows` returns them.
        store: the recorded answers.
    """
    seen = set()
    for row in rows:
        group = RowGroup(recipe, [row])
        group.advance(store)
        for tracked in group.missing:
            if tracked.request.key not in seen:
                seen.add(tracked.request.key)
                yield tracked


def shard_of(row: Row, count: int) -> int:
    """Return the number of a row's shard, 1 to `count`, by a hash of its id.

    Args:
        row: the row.
        count: the number of shards.

    Examples:
        >>> shard_of({"id": "a"}, 1), shard_of({"id": "a"}, 1000)
        (1, 350)
    """
    return int(digest(row["id"])[:16], 16) % count + 1
