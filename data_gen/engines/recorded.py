"""Answers of one engine to a list of requests, each on disk before it is used: what was recorded is not requested again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from contralto.data_gen.engines.base import Engine
from contralto.data_gen.engines.outcomes import checked_outcomes
from contralto.data_gen.store import Store, TrackedRequest
from contralto.data_gen.types import Answer, Ask, Sampling, make_request

__all__ = ["recorded_answers"]


def recorded_answers(
    engine: Engine,
    store: Store,
    asks: Sequence[Ask],
    *,
    rows: Sequence[str],
    strategy: str,
    sampling: Sampling,
    seed: int = 0,
    title: str = "answers",
) -> list[Answer | None]:
    """Return the answers to requests, after requesting those that the store does not have; None for a failure.

    Args:
        engine: what answers.
        store: where every answer is recorded before it is used.
        asks: the requests.
        rows: the name of each request's row, which is a part of its key.
        strategy: the name under which the store lists them.
        sampling: of requests that have none of their own.
        seed: mixed into every request.
        title: of the progress bar.
    """
    identity = engine.identity
    tracked = [
        TrackedRequest(
            request=make_request(ask, engine=identity, sampling=sampling, seed=seed, row=row),
            row=row,
            strategy=strategy,
            role=ask.role,
            tag=ask.tag,
            model=str(identity.get("model", "")),
        )
        for ask, row in zip(asks, rows, strict=True)
    ]
    with tqdm(total=len(tracked), desc=title, unit="text") as bar:
        for start in range(0, len(tracked), engine.rows_together):  # the same rounds in a resumed run
            _answer_round(engine, store, tracked[start : start + engine.rows_together], bar)
    keys = [each.request.key for each in tracked]
    outcomes = store.get(keys)
    answers = (outcomes.get(key) for key in keys)
    return [answer if isinstance(answer, Answer) else None for answer in answers]


def _answer_round(engine: Engine, store: Store, tracked: Sequence[TrackedRequest], bar: Any) -> None:
    """Request the missing answers of a round, and record each batch as it comes."""
    known = store.get([each.request.key for each in tracked])
    bar.update(sum(each.request.key in known for each in tracked))
    waiting = {each.request.key: each.request for each in tracked if each.request.key not in known}
    by_key = {each.request.key: each for each in tracked}
    if not waiting:
        return
    requests = [replace(each.request, known=each.request.key in known) for each in by_key.values()]
    for outcomes in engine.answer(requests):
        answered = checked_outcomes(outcomes, waiting)
        store.record([(by_key[request.key], outcome) for request, outcome in answered])
        bar.update(len(answered))
