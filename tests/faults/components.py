"""The parts of contralto that leave files behind, each as a run that can be resumed and a reading of what it left."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trials import Component

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.stored_answers import answer, asked

from contralto.align.caches.reference import ReferenceCache
from contralto.data_gen.store import Store
from contralto.data_gen.types import Failure

# ----------------------------------------------------------------------------------------------------------------- store

LISTS = [range(start, start + 3) for start in range(0, 9, 3)]


def _outcomes(numbers: range) -> list[Any]:
    return [(asked(n), Failure("cut") if n == 4 else answer(n, f"{n} " * 2000)) for n in numbers]


def _fill_shard(folder: Path) -> None:
    with Store(folder / "shard.sqlite") as shard:
        shard.record([(asked(n), answer(n)) for n in range(20, 24)])


def _record(folder: Path, is_resumed: bool) -> list[int]:
    """Record lists of answers, keep scores, and merge the store of another machine; return what had been lost."""
    notes = folder.parent / "recorded"
    with Store(folder / "answers.sqlite") as store:
        recorded = [int(line) for line in notes.read_text().split()] if notes.exists() else []
        lost = [n for n in recorded if asked(n).request.key not in store.get([asked(n).request.key])]
        store.note_source("m", "1")
        for numbers in LISTS:
            missing = [
                each for each in _outcomes(numbers) if each[0].request.key not in store.get([each[0].request.key])
            ]
            assert len(missing) in (0, len(numbers)), "a list was recorded in part"
            store.record(missing)
            with notes.open("a") as file:
                file.writelines(f"{n}\n" for n in numbers)
            if store.known_scores(str(numbers)) is None:
                store.keep_scores(str(numbers), [0.5])
        store.merge(folder / "shard.sqlite")
    return lost


def _recorded(folder: Path, lost: list[int]) -> dict[str, Any]:
    with Store(folder / "answers.sqlite", read_only=True) as store:
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        answers = store._db.execute("SELECT key, text, completion_tokens, logprobs FROM answers").fetchall()
        scores = {str(store.known_scores(str(numbers))) for numbers in LISTS}
        # Scores are computed again where a full disk has not kept them.
        return {
            "lost": lost,
            "answers": answers,
            "failures": list(store.failures()),
            "wrong scores": scores - {"[0.5]", "None"},
        }


# ---------------------------------------------------------------------------------------------------------------- caches


def _rows() -> Dataset:
    return Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2, n], "rejected_ids": [3]} for n in range(6)])


class _SmallReference(ReferenceCache):
    rows_per_block = 2


def _reference(folder: Path, is_resumed: bool) -> Dataset:
    def logps_of(rows: Any) -> Any:
        return [torch.tensor([float(row["chosen_ids"][1])]) for row in rows], [torch.zeros(1) for _ in rows]

    return _SmallReference(folder, "key", logps_of).add(_rows(), "train")


def _columns(folder: Path, dataset: Dataset) -> dict[str, Any]:
    return {name: dataset[name][:] for name in dataset.column_names}


COMPONENTS = {
    each.name: each
    for each in (
        Component("store", _record, _recorded, _fill_shard),
        Component("reference cache", _reference, _columns),
    )
}


def chosen(names: list[str]) -> Iterator[Component]:
    """Yield components by name, all if there are no names.

    Raises:
        KeyError: there is no such component.
    """
    yield from (COMPONENTS[name] for name in names or COMPONENTS)
