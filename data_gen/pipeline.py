"""Rows in, strategies driven, engines asked, answers recorded, pairs out.

`run` drives thousands of strategies at once. Each engine works in a thread of its own; the calling thread alone touches the
store and the strategies: it records what came, then sends it on. So whatever a strategy has seen is on the disk.

The data set is a function of the rows and the recorded answers: `replay` drives every strategy again, in the order of the rows,
and asks nobody. An interrupted run that was resumed has the same answers as one that was not, so it has the same pairs, byte
for byte. For engines that compute batches this takes care: the last bits of a model's numbers depend on the batch. Rows are
therefore driven in groups of fixed members, in step; the asks of a step make a round, which is always cut into the same batches,
and a batch is recorded whole. So after a kill each batch is computed in the company it would have had.
"""

import math
import queue
import signal
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from contralto.common.files import locked_folder
from contralto.common.texts import has_lone_surrogate
from contralto.data_gen.engines.base import Engine, Outcome
from contralto.data_gen.engines.bodies import CHARACTERS_PER_TOKEN, prompt_token_guess
from contralto.data_gen.engines.outcomes import checked_outcomes, described
from contralto.data_gen.recipe import Recipe, Use
from contralto.data_gen.store import Asked, Store
from contralto.data_gen.types import Answer, Ask, Failure, Pair, Rejected, Request, Row, digest, drive, settle

__all__ = ["Estimate", "Result", "check", "estimate", "locked", "pending", "replay", "run", "shard_of"]

LONE = "the row holds a lone surrogate: half of a character can be neither sent nor recorded"
"""Why a row fails before its strategy sees it."""
PATIENCE = 300.0
"""Seconds that answers wait in memory for room on a full disk."""


class Result(NamedTuple):
    """What became of a row under a strategy, as far as the recorded answers go."""

    row: Row
    strategy: str
    asked: list[tuple[Asked, Answer]]
    """What was asked and answered."""
    made: list[Pair | Rejected] | None = None
    """The pairs, or why there are none; None if it failed or is not finished."""
    failed: str | None = None
    """Why it failed: a request without an answer, or an error in the strategy."""

    @property
    def is_pending(self) -> bool:
        """Whether answers are missing that were not asked for yet."""
        return self.made is None and self.failed is None


# ------------------------------------------------------------------------------------------------------------- one strategy


class _Unit:
    """A strategy at work on a row."""

    def __init__(self, recipe: Recipe, use: Use, row: Row) -> None:
        self._recipe, self._row, self.strategy = recipe, row, use.name
        self.asks: list[Asked] = []
        self.asked: list[tuple[Asked, Answer]] = []
        self.made: list[Pair | Rejected] | None = None
        self.failed: str | None = None
        if has_lone_surrogate(row):
            self.failed = LONE
            return
        self._driven = drive(use.start(row))
        self._step(None)

    @property
    def is_live(self) -> bool:
        return self.made is None and self.failed is None

    def send(self, known: Mapping[str, Answer | Failure]) -> None:
        """Go on with the answers to `asks`, all of which are known."""
        answers: list[Answer] = []
        for asked in self.asks:
            said = known[asked.request.key]
            if isinstance(said, Failure):
                self.failed = f"{asked.role}: {said.reason}"
                self._driven.close()
                return
            answers.append(said)
        self.asked += zip(self.asks, answers, strict=True)
        self._step(answers)

    def _step(self, answers: list[Answer] | None) -> None:
        try:
            asks = self._driven.send(answers)  # type: ignore[arg-type]  # None starts a generator
            self.asks = [_asked(self._recipe, ask, self.strategy, self._row["id"]) for ask in asks]
        except StopIteration as end:
            self.made = end.value
        except UnknownRoleError:
            raise
        except Exception as error:  # noqa: BLE001 - a mistake in a strategy costs its row, not the run
            self.failed = described(error, by=self.strategy)

    def result(self) -> Result:
        return Result(self._row, self.strategy, self.asked, self.made, self.failed)


class UnknownRoleError(ValueError):
    """A strategy asks a role that the recipe does not have."""


def _asked(recipe: Recipe, ask: Ask, strategy: str, row: str) -> Asked:
    role = recipe.roles.get(ask.role)
    if role is None:
        has = ", ".join(recipe.roles)
        raise UnknownRoleError(f"{recipe.path}: strategy {strategy!r} asks the role {ask.role!r}; the recipe has {has}")
    request = settle(ask, engine=role.engine.identity, sampling=role.sampling, seed=recipe.seed, row=row)
    model = str(role.engine.identity.get("model", ""))
    return Asked(
        request=request, row=row, strategy=strategy, role=ask.role, tag=ask.tag, template=ask.template, model=model
    )


def check(recipe: Recipe, rows: Sequence[Row]) -> None:
    """Start every strategy on the first row, so that a mistake in its settings shows before anybody is asked.

    Raises:
        ValueError: the strategy refuses its settings, or asks a role that the recipe does not have.
    """
    for use in recipe.strategies:
        unit = next((unit for row in rows if (unit := _Unit(recipe, use, row)).failed != LONE), None)
        if unit and unit.failed:
            raise ValueError(f"{recipe.path}: {unit.failed} (on the first row)")


def replay(recipe: Recipe, rows: Iterable[Row], store: Store) -> Iterator[Result]:
    """Every row under every strategy, from the recorded answers alone, in the order of the rows.

    Args:
        recipe: the recipe.
        rows: as `recipes.read_rows` gives them.
        store: the answers.
    """
    for row in rows:
        for use in recipe.strategies:
            unit = _Unit(recipe, use, row)
            while unit.is_live and _is_known(unit, known := store.get([asked.request.key for asked in unit.asks])):
                unit.send(known)
            yield unit.result()


def _is_known(unit: _Unit, known: Mapping[str, Any]) -> bool:
    return all(asked.request.key in known for asked in unit.asks)


def pending(recipe: Recipe, rows: Iterable[Row], store: Store) -> Iterator[Asked]:
    """The requests that could be asked now, each once."""
    seen = set()
    for row in rows:
        group = _Group(recipe, [row])
        group.advance(store)
        for asked in group.missing:
            if asked.request.key not in seen:
                seen.add(asked.request.key)
                yield asked


def shard_of(row: Row, count: int) -> int:
    """The number of a row's shard, 1 to `count`, by a hash of its id.

    Examples:
        >>> shard_of({"id": "a"}, 1), shard_of({"id": "a"}, 1000)
        (1, 350)
    """
    return int(digest(row["id"])[:16], 16) % count + 1


# ------------------------------------------------------------------------------------------------------------------ the run


class _Group:
    """Rows that are driven in step, under all strategies."""

    def __init__(self, recipe: Recipe, rows: Sequence[Row]) -> None:
        self.size = len(rows)
        self.units = [_Unit(recipe, use, row) for row in rows for use in recipe.strategies]
        self.round: list[Asked] = []
        """What the units want to know, each request once."""
        self.missing: list[Asked] = []
        self.recorded: set[str] = set()
        """Keys of the requests that were answered and recorded: they cannot be missing again."""

    def advance(self, store: Store) -> None:
        """Send the units what is known, step by step, until something is missing or all have ended."""
        while live := [unit for unit in self.units if unit.is_live]:
            self.round = list({asked.request.key: asked for unit in live for asked in unit.asks}.values())
            known = store.get([asked.request.key for asked in self.round])
            self.missing = [asked for asked in self.round if asked.request.key not in known]
            if self.missing:
                return
            for unit in live:
                unit.send(known)
        self.missing = []


class _Came(NamedTuple):
    """Outcomes that belong together."""

    outcomes: list[Outcome]


class _Done(NamedTuple):
    """A worker has ended, by an error or in peace."""

    error: BaseException | None


class _Interrupted(NamedTuple):
    """Somebody pressed Ctrl-C, or the machine is being taken away."""

    signal: int


class _Worker(threading.Thread):
    """An engine at work: rounds or single requests in, lists of outcomes out."""

    def __init__(self, engine: Engine, outbox: Any) -> None:
        super().__init__(daemon=True)
        self.engine, self._outbox = engine, outbox
        self.inbox: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()
        self._is_stopping = False
        self._waiting: dict[str, Request] = {}
        """Requests that the engine has taken and not answered."""
        self.start()

    def run(self) -> None:
        error: BaseException | None = None
        try:
            if self.engine.rows_together > 1:
                for requests in iter(self.inbox.get, None):
                    self._waiting = {request.key: request for request in requests if not request.known}
                    self._answer(requests)
            else:
                self._answer(self._one_by_one())
                if not self._is_stopping:
                    raise ValueError("the engine ended before its requests did: its answer() must take them all")
        except BaseException as caught:  # noqa: BLE001 - it is the run's, not the thread's
            error = caught
        self._outbox.put(_Done(error))

    def _one_by_one(self) -> Iterator[Request]:
        """The requests as they are handed over, until the run stops."""
        for requests in iter(self.inbox.get, None):
            for request in requests:
                if self._is_stopping:
                    return
                self._waiting[request.key] = request
                yield request

    def _answer(self, requests: Iterable[Request]) -> None:
        """Let the engine answer. What it leaves out without an error has failed: nobody waits for it for ever."""
        for outcomes in self.engine.answer(requests):
            self._outbox.put(_Came(checked_outcomes(outcomes, self._waiting)))
            if self._is_stopping and self.engine.rows_together > 1:
                return
        if not self._is_stopping:
            failed = Failure("the engine ended without an answer to this request")
            self._outbox.put(_Came([(request, failed) for request in self._waiting.values()]))
            self._waiting = {}

    def take_back(self) -> list[list[Request]]:
        """What is not begun."""
        found = []
        while not self.inbox.empty():
            found.append(self.inbox.get())
        return [requests for requests in found if requests is not None]

    def stop(self) -> None:
        """Begin nothing more, and try nothing again."""
        self._is_stopping = True
        self.take_back()
        self.inbox.put(None)
        getattr(self.engine, "stop", lambda: None)()


class _Progress:
    """The bar: rows, tokens in and out, money so far and in the end, failures."""

    def __init__(self, recipe: Recipe, store: Store, total: int, *, is_shown: bool) -> None:
        self._prices = {name: role.price for name, role in recipe.roles.items()}
        self._in = self._out = self._new = self._failed = 0
        self.money = 0.0
        self._spent = sum(self._price(use.role).of(*use[-2:]) for use in store.usage())
        self._currency = next((p.currency for p in self._prices.values() if p.input or p.output), "")
        self._bar: Any = tqdm(total=total, desc="rows", unit="row", disable=not is_shown, smoothing=0.05)

    def _price(self, role: str) -> Any:
        return self._prices.get(role) or next(iter(self._prices.values())).__class__()

    def said(self, asked: Asked, said: Answer | Failure) -> None:
        if isinstance(said, Failure):
            return
        self._in += said.prompt_tokens
        self._out += said.completion_tokens
        self.money += self._price(asked.role).of(said.prompt_tokens, said.completion_tokens)

    def done(self, group: _Group, *, is_new: bool) -> None:
        self._new += group.size if is_new else 0
        self._failed += sum(unit.failed is not None for unit in group.units)
        self._bar.update(group.size)

    def show(self) -> None:
        said = {"in": _short_number(self._in), "out": _short_number(self._out), "failed": str(self._failed)}
        if self._currency:
            left = (self._bar.total - self._bar.n) * self.money / self._new if self._new else math.nan
            total = self._spent + self.money
            said["money"] = f"{total:.2f} of about {total + left:.2f} {self._currency}" if self._new else f"{total:.2f}"
        self._bar.set_postfix(said, refresh=False)

    def say(self, text: str) -> None:
        tqdm.write(text)

    def close(self) -> None:
        self.show()
        self._bar.close()


def _short_number(value: float) -> str:
    """A count with its unit.

    Examples:
        >>> _short_number(950), _short_number(12_345)
        ('950', '12.3k')
    """
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def run(
    recipe: Recipe, rows: Sequence[Row], store: Store, *, is_shown: bool = True, patience: float = PATIENCE
) -> None:
    """Ask for all that is not recorded yet, until every row is a pair, is rejected, or has failed.

    Ctrl-C and SIGTERM end it in peace: nothing new is asked, the answers under way are awaited and recorded. A second Ctrl-C
    ends it at once. On a full disk nothing new is asked, and the answers under way wait in memory for room.

    Args:
        recipe: the recipe.
        rows: as `recipes.read_rows` gives them, or some of them.
        store: where the answers go.
        is_shown: show a progress bar.
        patience: seconds to wait for room on a full disk.

    Raises:
        ValueError: an engine lacks what it needs, such as a key, or a strategy refuses its settings.
        OSError: an endpoint refuses to work at all, or the disk stayed full.
        KeyboardInterrupt: as said.
    """
    for engine in recipe.engines:
        getattr(engine, "check_ready", lambda: None)()
    check(recipe, rows)
    _Run(recipe, rows, store, _Progress(recipe, store, len(rows), is_shown=is_shown), patience).go()


class _Run:
    def __init__(self, recipe: Recipe, rows: Sequence[Row], store: Store, progress: _Progress, patience: float) -> None:
        self._store, self._progress, self._patience = store, progress, patience
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        engines = recipe.engines
        self._workers = {id(engine): _Worker(engine, self._outbox) for engine in engines}
        self._role_of = {name: id(role.engine) for name, role in recipe.roles.items()}
        together = max(engine.rows_together for engine in engines)
        self._groups = (_Group(recipe, rows[i : i + together]) for i in range(0, len(rows), together))
        self._room = 1 + math.ceil(2 * max(getattr(engine, "concurrency", 1) for engine in engines) / together)
        self._waiting: dict[str, tuple[_Group, Asked]] = {}
        self._left: Counter[int] = Counter()
        """How many answers a group waits for, by its identity."""
        self._open: dict[int, _Group] = {}
        self._ending: BaseException | None = None
        self._running = len(self._workers)

    def go(self) -> None:
        """Everything; the workers have ended when it returns or raises, unless Ctrl-C was pressed twice."""
        try:
            with _signals(self._outbox), logging_redirect_tqdm():  # what engines log does not break the bar
                self._fill()
                if not self._open:
                    self._stop(None)
                while self._running:
                    self._take(_all_of(self._outbox))
                    self._progress.show()
        finally:
            for worker in self._workers.values():
                worker.stop()  # one that waits for requests would keep the process from ending
            self._progress.close()
        if self._ending is not None:
            raise self._ending

    def _fill(self) -> None:
        """Begin groups until enough are under way."""
        while self._ending is None and len(self._open) < self._room + 1:
            group = next(self._groups, None)
            if group is None:
                return
            group.advance(self._store)
            self._open[id(group)] = group
            self._hand_over(group, is_new=False)

    def _hand_over(self, group: _Group, *, is_new: bool) -> None:
        """Give a group's missing requests to their engines; or see it off."""
        if not group.missing:
            del self._open[id(group)]
            self._progress.done(group, is_new=is_new)
            return
        if lost := next((a for a in group.missing if a.request.key in group.recorded), None):
            raise OSError(
                f"{self._store.path} does not hold the answer to request {lost.request.key}, which was recorded"
            )
        self._left[id(group)] = len(group.missing)
        new = {asked.request.key for asked in group.missing}
        self._waiting |= {asked.request.key: (group, asked) for asked in group.missing}
        rounds: dict[int, list[Request]] = defaultdict(list)
        for asked in group.round:
            rounds[self._role_of[asked.role]].append(replace(asked.request, known=asked.request.key not in new))
        for engine, requests in rounds.items():
            worker = self._workers[engine]
            wanted = requests if worker.engine.rows_together > 1 else [r for r in requests if not r.known]
            if any(not request.known for request in wanted):
                worker.inbox.put(wanted)

    def _take(self, came: list[Any]) -> None:
        """Record what came, then use it."""
        for event in came:
            if isinstance(event, _Done):
                self._running -= 1
                if event.error is not None:
                    self._stop(event.error)
            elif isinstance(event, _Interrupted):
                self._progress.say("stopping: waiting for the answers under way (Ctrl-C again to leave at once)")
                self._stop(KeyboardInterrupt())
        said = [outcome for event in came if isinstance(event, _Came) for outcome in event.outcomes]
        known = [(*self._waiting.pop(request.key), answer) for request, answer in said]
        stops = next((a for *_, a in known if isinstance(a, Failure) and a.stops), None)
        if stops is not None:
            self._stop(OSError(stops.reason))
        kept = [(asked, a) for _, asked, a in known if not (isinstance(a, Failure) and a.stops)]
        if kept:
            self._record(kept)
        for group, asked, _ in known:
            group.recorded.add(asked.request.key)
        for asked, answer in kept:
            self._progress.said(asked, answer)
        self._go_on({id(group): group for group, _, _ in known}.values(), Counter(id(group) for group, _, _ in known))

    def _go_on(self, groups: Iterable[_Group], came: Counter[int]) -> None:
        """Advance the groups that wait for nothing more."""
        self._left.subtract(came)
        for group in groups:
            if not self._left[id(group)] and self._ending is None:
                group.advance(self._store)
                self._hand_over(group, is_new=True)
        self._fill()
        if not self._open:
            self._stop(None)

    def _record(self, kept: Sequence[tuple[Asked, Answer | Failure]]) -> None:
        """Put answers on the disk; while it is full, hold them and ask nothing."""
        end, held = time.monotonic() + self._patience, None
        while True:
            try:
                self._store.record(kept)
                break
            except sqlite3.OperationalError as error:
                if held is None:
                    held = {worker: worker.take_back() for worker in self._workers.values()}
                    self._progress.say(
                        f"cannot write {self._store.path} ({error}): make room; {len(kept)} answers wait"
                    )
                if time.monotonic() > end:
                    lost = sum(isinstance(a, Answer) for _, a in kept)
                    raise OSError(
                        f"cannot write {self._store.path} ({error}): {lost} answers could not be recorded; "
                        "make room and run again: all others are there"
                    ) from error
                time.sleep(0.5)
        for worker, rounds in (held or {}).items():
            for requests in rounds:
                worker.inbox.put(requests)

    def _stop(self, why: BaseException | None) -> None:
        """Ask nothing more; the first reason stands."""
        self._ending = self._ending or why
        for worker in self._workers.values():
            worker.stop()


def _all_of(outbox: Any) -> list[Any]:
    """Wait for something, and take what else is there."""
    found = [outbox.get()]
    while not outbox.empty():
        found.append(outbox.get())
    return found


@contextmanager
def _signals(outbox: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM as events, so that none falls between an answer and its record; the second one as always."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def interrupted(number: int, _: object) -> None:
        restore()
        outbox.put(_Interrupted(number))

    for number in before:
        signal.signal(number, interrupted)
    try:
        yield
    finally:
        restore()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from asking for the same folder; the lock goes with the process, however it ends.

    Raises:
        OSError: another process has it.
    """
    with locked_folder(folder, f"process {{pid}} is working on {folder}: wait for it, or share the work with --shard"):
        yield


# ----------------------------------------------------------------------------------------------------------------- estimate


class Estimate(NamedTuple):
    """What a role will cost, for all rows."""

    role: str
    model: str
    requests: float
    prompt_tokens: float
    completion_tokens: float
    money: float
    currency: str


def estimate(recipe: Recipe, rows: Sequence[Row], store: Store | None) -> tuple[list[Estimate], str]:
    """Tokens and money for all rows, before they are spent, and what the figures rest on.

    With recorded rows, as after a preview: their means. Without: stand-in answers of the greatest length drive the strategies
    on up to 50 rows, so answers are counted at their limit; what comes after an answer that must be parsed cannot be seen.

    Args:
        recipe: the recipe.
        rows: all rows.
        store: recorded answers, if any.
    """
    finished = [r for r in replay(recipe, rows, store) if r.made is not None and r.asked] if store else []
    if finished:
        totals, units = _measured(finished), Counter(result.strategy for result in finished)
        basis = f"the means of {len({result.row['id'] for result in finished})} rows that are done"
    else:
        totals, units = _guessed(recipe, rows[:50])
        basis = (
            f"{min(50, len(rows))} rows with stand-in answers of the greatest length, prompts at {CHARACTERS_PER_TOKEN} "
            "characters per token: an upper bound for answers; roles that are asked about answers may lack: preview measures"
        )
    found = []
    for name, role in recipe.roles.items():
        sums = [0.0, 0.0, 0.0]
        for strategy, count in units.items():
            sums = [s + each * len(rows) / count for s, each in zip(sums, totals[strategy, name], strict=True)]
        money = role.price.of(sums[1], sums[2])
        model, currency = str(role.engine.identity.get("model", "")), role.price.currency
        found.append(Estimate(name, model, sums[0], sums[1], sums[2], money, currency))
    return found, basis


def _measured(results: Iterable[Result]) -> dict[tuple[str, str], list[float]]:
    """Requests, prompt tokens and answer tokens by strategy and role."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for result in results:
        for asked, answer in result.asked:
            total = totals[result.strategy, asked.role]
            for i, each in enumerate((1, answer.prompt_tokens, answer.completion_tokens)):
                total[i] += each
    return totals


def _guessed(recipe: Recipe, rows: Sequence[Row]) -> tuple[dict[tuple[str, str], list[float]], Counter[str]]:
    """The same, with stand-in answers."""
    results = []
    for row in rows:
        for use in recipe.strategies:
            unit = _Unit(recipe, use, row)
            while unit.is_live:
                unit.send({asked.request.key: _stand_in(asked, i) for i, asked in enumerate(unit.asks)})
            results.append(unit.result())
    return _measured(results), Counter(result.strategy for result in results)


def _stand_in(asked: Asked, number: int) -> Answer:
    """An answer as long as may be, unlike its neighbours."""
    request = asked.request
    tokens = request.sampling.max_new_tokens
    text = f"{number} " + "word " * int(tokens * CHARACTERS_PER_TOKEN / 5)
    return Answer(text=text, prompt_tokens=prompt_token_guess(request), completion_tokens=tokens)
