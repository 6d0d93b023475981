"""The run: request all answers that are not recorded yet."""

import math
import queue
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from contralto.common.files import locked_folder
from contralto.data_gen.engines.feed import all_of
from contralto.data_gen.pipeline.progress import RunProgress
from contralto.data_gen.pipeline.rows import RowGroup, advance_together, check
from contralto.data_gen.pipeline.workers import Answered, EngineWorker, Interrupted, WorkerEnded, signals_as_events
from contralto.data_gen.recipe import Recipe
from contralto.data_gen.store import Store, TrackedRequest
from contralto.data_gen.types import Answer, Failure, Request, Row

__all__ = ["locked", "note_sources", "run"]

PATIENCE = 300.0
"""Seconds that answers wait in memory for space on a full disk."""
Interrupts = Callable[[Any], AbstractContextManager[None]]
"""A context in which interruptions are put into a queue as events."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working on the same folder; the lock ends with the process, however it ends.

    Args:
        folder: the folder of a store.

    Raises:
        OSError: another process holds the lock.
    """
    with locked_folder(
        folder, f"process {{pid}} is working on {folder}: wait for it, or give each process a shard of the rows"
    ):
        yield


def run(
    recipe: Recipe,
    rows: Sequence[Row],
    store: Store,
    *,
    is_shown: bool = True,
    patience: float = PATIENCE,
    interrupts: Interrupts = signals_as_events,
) -> None:
    """Request all answers that are not recorded yet, until every row has pairs, is rejected, or has failed.

    After Ctrl-C or SIGTERM no new request is sent, and the answers that were requested are awaited and recorded. A second
    Ctrl-C ends the run at once. On a full disk no new request is sent, and answers wait in memory for space.

    Args:
        recipe: the recipe.
        rows: as `read_rows` returns them, or some of them.
        store: where the answers are recorded.
        is_shown: show a progress bar.
        patience: seconds to wait for space on a full disk.
        interrupts: a context in which interruptions are put into the queue that it is called with.

    Raises:
        ValueError: an engine lacks something that it needs, such as a key, or a strategy rejects its settings.
        OSError: an endpoint refuses to work at all, or the disk stayed full.
        KeyboardInterrupt: Ctrl-C was pressed, or SIGTERM came.
    """
    for engine in recipe.engines:
        getattr(engine, "check_ready", lambda: None)()
    check(recipe, rows)
    progress = RunProgress(recipe, store, len(rows), is_shown=is_shown)
    for line in note_sources(recipe, store):
        progress.write(line)
    _Runner(recipe, rows, store, progress, patience).go(interrupts)


def note_sources(recipe: Recipe, store: Store) -> Iterator[str]:
    """Note the sources of functions that answer, and yield a line for each that has changed since its answers were recorded.

    Args:
        recipe: the recipe.
        store: where the answers are recorded.
    """
    for engine in recipe.engines:
        model, source = (engine.identity.get(name) for name in ("model", "source"))
        if source is not None and (count := store.note_source(str(model), str(source))):
            yield f"{model} has changed since {count} of its answers were recorded: they stay in {store.path}, and the new code is asked again"


class _Runner:
    """The state of a run: workers, groups of rows in progress, requests that wait for an answer."""

    def __init__(
        self, recipe: Recipe, rows: Sequence[Row], store: Store, progress: RunProgress, patience: float
    ) -> None:
        self._store, self._progress, self._patience = store, progress, patience
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        engines = recipe.engines
        self._workers = {id(engine): EngineWorker(engine, self._events) for engine in engines}
        self._role_of = {name: id(role.engine) for name, role in recipe.roles.items()}
        together = max((engine.rows_together for engine in engines), default=1)
        self._groups = (RowGroup(recipe, rows[i : i + together]) for i in range(0, len(rows), together))
        self._room = 1 + math.ceil(
            2 * max((getattr(engine, "concurrency", 1) for engine in engines), default=1) / together
        )
        self._ready: dict[int, list[Request]] = defaultdict(list)
        """Requests that are answered one by one and not sent yet, by engine."""
        self._waiting: dict[str, tuple[RowGroup, TrackedRequest]] = {}
        self._left: Counter[int] = Counter()
        """The number of answers that a group waits for, by its identity."""
        self._open: dict[int, RowGroup] = {}
        self._ending: BaseException | None = None
        self._running = len(self._workers)

    def go(self, interrupts: Interrupts) -> None:
        """Run to the end; no worker is left when it returns or raises, unless Ctrl-C was pressed twice."""
        try:
            with interrupts(self._events), logging_redirect_tqdm():  # keeps the bar whole
                self._fill()
                self._send()
                if not self._open:
                    self._stop(None)
                while self._running:
                    self._take(all_of(self._events))
                    self._progress.show()
        finally:
            for worker in self._workers.values():
                worker.stop()  # a thread that waits for requests would keep the process from ending
            self._progress.close()
        if self._ending is not None:
            raise self._ending

    def _fill(self) -> None:
        """Start groups of rows until enough are in progress."""
        while self._ending is None and (room := self._room + 1 - len(self._open)) > 0:
            groups = list(islice(self._groups, room))
            if not groups:
                return
            advance_together(groups, self._store)
            for group in groups:
                self._open[id(group)] = group
                self._hand_over(group, is_new=False)

    def _hand_over(self, group: RowGroup, *, is_new: bool) -> None:
        """Send the missing requests of a group to their engines; a group without any is finished."""
        if not group.missing:
            del self._open[id(group)]
            self._progress.finish(group, is_new=is_new)
            return
        if lost := next((a for a in group.missing if a.request.key in group.recorded), None):
            raise OSError(
                f"{self._store.path} does not contain the answer to request {lost.request.key}, although it was recorded"
            )
        self._left[id(group)] = len(group.missing)
        new = {tracked.request.key for tracked in group.missing}
        self._waiting |= {tracked.request.key: (group, tracked) for tracked in group.missing}
        rounds: dict[int, list[Request]] = defaultdict(list)
        for tracked in group.round:
            request = tracked.request if tracked.request.key in new else replace(tracked.request, known=True)
            rounds[self._role_of[tracked.role]].append(request)
        for engine, requests in rounds.items():
            worker = self._workers[engine]
            wanted = requests if worker.engine.rows_together > 1 else [r for r in requests if not r.known]
            if worker.engine.rows_together == 1:
                self._ready[engine] += wanted
            elif any(not request.known for request in wanted):
                worker.put(wanted)

    def _send(self) -> None:
        """Send the requests of all groups that are answered one by one: the engine's thread is woken once for them."""
        for engine, requests in self._ready.items():
            if requests:
                self._workers[engine].put(requests)
        self._ready.clear()

    def _take(self, events: list[Any]) -> None:
        """Record what the workers returned, then advance the groups that wait for it."""
        for event in events:
            if isinstance(event, WorkerEnded):
                self._running -= 1
                if event.error is not None:
                    self._stop(event.error)
            elif isinstance(event, Interrupted):
                self._progress.write("stopping: waiting for pending answers (Ctrl-C again to stop at once)")
                self._stop(KeyboardInterrupt())
        outcomes = [outcome for event in events if isinstance(event, Answered) for outcome in event.outcomes]
        known = [(*self._waiting.pop(request.key), answer) for request, answer in outcomes]
        stops = next((a for *_, a in known if isinstance(a, Failure) and a.stops), None)
        if stops is not None:
            self._stop(OSError(stops.reason))
        kept = [(tracked, a) for _, tracked, a in known if not (isinstance(a, Failure) and a.stops)]
        if kept:
            self._record(kept)
        for group, tracked, _ in known:
            group.recorded.add(tracked.request.key)
        for tracked, answer in kept:
            self._progress.add(tracked, answer)
        self._go_on({id(group): group for group, _, _ in known}.values(), Counter(id(group) for group, _, _ in known))

    def _go_on(self, groups: Iterable[RowGroup], answered: Counter[int]) -> None:
        """Advance the groups whose requests are all answered."""
        self._left.subtract(answered)
        ready = [group for group in groups if not self._left[id(group)]] if self._ending is None else []
        advance_together(ready, self._store)
        for group in ready:
            self._hand_over(group, is_new=True)
        self._fill()
        self._send()
        if not self._open:
            self._stop(None)

    def _record(self, kept: Sequence[tuple[TrackedRequest, Answer | Failure]]) -> None:
        """Record outcomes; while the disk is full, hold them and send no request."""
        end, held = time.monotonic() + self._patience, None
        while True:
            try:
                self._store.record(kept)
                break
            except sqlite3.OperationalError as error:
                if held is None:
                    held = {worker: worker.take_back() for worker in self._workers.values()}
                    self._progress.write(
                        f"cannot write {error}: free disk space; {len(kept)} answers are kept in memory"
                    )
                if time.monotonic() > end:
                    lost = sum(isinstance(a, Answer) for _, a in kept)
                    raise OSError(
                        f"cannot write {error}: {lost} answers could not be recorded; "
                        "free disk space and run again: all other answers are recorded"
                    ) from error
                time.sleep(0.5)
        for worker, rounds in (held or {}).items():
            for requests in rounds:
                worker.put(requests)

    def _stop(self, why: BaseException | None) -> None:
        """Stop sending requests; the first reason is raised at the end."""
        self._ending = self._ending or why
        for worker in self._workers.values():
            worker.stop()
