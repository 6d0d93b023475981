"""Shards of rows, each with a store of its own, and the worker that runs the pipeline on one after another."""

import json
import math
import pickle
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.errors import is_mistake, sentence
from contralto.common.files import read_lines
from contralto.data_gen.pipeline.runner import locked, run
from contralto.data_gen.pipeline.workers import file_as_event
from contralto.data_gen.recipe import Recipe, load_recipe
from contralto.data_gen.store import Store
from contralto.data_gen.types import Row

__all__ = ["Shard", "ShardEnd", "ShardWorker", "collect", "cut"]

MOST_ROWS = 1024
"""Rows of a shard, but for the last rows of a group."""
SHARDS_EACH = 8
"""Shards per worker at least, where there are rows enough: a worker that ends early takes another."""
MOST_STARTS = 5
"""Starts of a shard without a new answer between them, after which it is given up."""
PREFIX = "ray-"


class Shard(NamedTuple):
    """Consecutive rows with the folder of their store."""

    folder: Path
    rows: Sequence[Row]

    @property
    def store(self) -> Path:
        """Return the file of the store."""
        return self.folder / "answers.sqlite"

    @property
    def stop(self) -> Path:
        """Return the file in the data set's folder that tells the workers of all shards to stop."""
        return self.folder.parents[1] / "ray-stop"

    def prepare(self, store: Store) -> None:
        """Write the store of the shard, with the outcomes that are recorded already.

        Args:
            store: the store of the data set.
        """
        with locked(self.folder), Store(self.store) as own:
            if store.path.stat().st_size:
                own.merge(store.path, rows=[row["id"] for row in self.rows])

    def take_over(self, store: Store) -> int:
        """Move the outcomes of the shard into the store of the data set, and return the number of new answers.

        Args:
            store: the store of the data set.

        Raises:
            OSError: a worker still works on the shard.
        """
        with locked(self.folder):
            new = store.merge(self.store) if self.store.exists() else 0
            shutil.rmtree(self.folder)
        return new


class ShardEnd(NamedTuple):
    """The end of a worker's run on a shard."""

    number: int
    is_finished: bool
    """False if an error or the file `stop` ended the run."""
    error: str
    """The sentence of the error, or an empty string."""


def cut(recipe: Recipe, rows: Sequence[Row], workers: int) -> list[Shard]:
    """Cut rows into shards that begin where a group of rows begins.

    Args:
        recipe: the recipe, whose engines say how many rows are a group.
        rows: all rows.
        workers: the number of workers.
    """
    together = max((engine.rows_together for engine in recipe.engines), default=1)
    wanted = min(MOST_ROWS, math.ceil(len(rows) / (SHARDS_EACH * workers)))
    size = together * math.ceil(wanted / together)
    starts = range(0, len(rows), size or 1)
    return [Shard(recipe.output / "shards" / f"{PREFIX}{i}", rows[s : s + size]) for i, s in enumerate(starts)]


def collect(folder: Path, store: Store) -> int:
    """Move what interrupted runs on Ray left in their shards into the store, and return the number of new answers.

    Args:
        folder: the folder of the data set, locked by the caller.
        store: its store.

    Raises:
        OSError: a worker still works on a shard.
    """
    shards = (folder / "shards").glob(f"{PREFIX}*")
    return sum(Shard(each, []).take_over(store) for each in sorted(shards) if each.is_dir())


class ShardWorker:
    """A worker: the pipeline on one shard after another, in a process of Ray.

    Args:
        recipe: the file of the recipe, on a disk that all machines share.
    """

    def __init__(self, recipe: str) -> None:
        self._path = Path(recipe)
        self._recipe: Recipe | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Run shards, and return the columns of a `ShardEnd` for each.

        Args:
            batch: the columns `number`, `folder` and `rows` (pickled).

        Raises:
            Exception: a bug.
        """
        columns = zip(batch["number"], batch["folder"], batch["rows"], strict=True)
        ends = [
            self._run(int(number), Shard(Path(str(folder)), pickle.loads(rows)))  # pickled by the caller of this job
            for number, folder, rows in columns
        ]
        return {name: list(values) for name, values in zip(ShardEnd._fields, zip(*ends, strict=True), strict=True)}

    def _run(self, number: int, shard: Shard) -> ShardEnd:
        """Run a shard until it is finished, or the file `stop` is there and what was requested is answered."""
        if shard.stop.exists():
            return ShardEnd(number, False, "")
        try:
            self._recipe = self._recipe or load_recipe(self._path)
            with locked(shard.folder), Store(shard.store) as store:
                _note_start(shard, store)
                run(self._recipe, shard.rows, store, is_shown=False, interrupts=partial(file_as_event, shard.stop))
        except KeyboardInterrupt:
            return ShardEnd(number, False, "")
        except Exception as error:
            if not is_mistake(error):
                raise
            return ShardEnd(number, False, sentence(error))
        return ShardEnd(number, True, "")


def _note_start(shard: Shard, store: Store) -> None:
    """Note that a worker starts on a shard; reject one on which workers die again and again."""
    noted = shard.folder / "starts.jsonl"
    starts = [json.loads(line) for line in read_lines(noted)] if noted.exists() else []
    now = sum(usage.requests for usage in store.usage()) + sum(1 for _ in store.failures())
    if len(starts) >= MOST_STARTS and set(starts[-MOST_STARTS:]) == {now}:
        first, last = shard.rows[0]["id"], shard.rows[-1]["id"]
        raise OSError(
            f"workers died {MOST_STARTS} times on the rows {first!r} to {last!r} without a new answer: "
            "run them without --runner ray to see what ends the process, such as too little memory for the engine"
        )
    with noted.open("a", encoding="utf-8") as file:
        file.write(f"{now}\n")
