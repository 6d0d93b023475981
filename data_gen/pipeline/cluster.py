"""A run on many machines: Ray Data places shards of the rows on workers and replaces those that die.

The rows are cut into consecutive shards of whole groups, so that engines which compute batches compute the same ones as in one
process. A worker runs the pipeline on a shard, with engines of its own and a store in the shard's folder, which lies below the
data set's folder, on a disk that all machines share. A shard that is run again, by whatever worker, goes on from its store: an
answer on disk is never asked again. The calling process alone uses the store of the data set: it copies into a shard what is
recorded already, and back what the shard has recorded.
"""

import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from contralto.common.errors import is_mistake, sentence
from contralto.data_gen.pipeline.rows import check
from contralto.data_gen.pipeline.runner import locked, note_sources, run
from contralto.data_gen.ray_settings import read_ray_settings
from contralto.data_gen.recipe import Recipe, load_recipe
from contralto.data_gen.store import Store
from contralto.data_gen.types import Row

__all__ = ["Shard", "ShardWorker", "collect", "cut", "run_on_ray"]

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
    return sum(_take_over(Shard(each, []), store) for each in sorted(shards) if each.is_dir())


def _take_over(shard: Shard, store: Store) -> int:
    """Move the outcomes of a shard into the store, and return the number of new answers."""
    with locked(shard.folder):
        new = store.merge(shard.store) if shard.store.exists() else 0
        shutil.rmtree(shard.folder)
    return new


def run_on_ray(recipe: Recipe, rows: Sequence[Row], store: Store, *, is_shown: bool = True) -> None:
    """Request all answers that are not recorded yet by workers on a Ray cluster.

    The cluster is that of `RAY_ADDRESS`, otherwise a local one that ends with the run. After an error or Ctrl-C the answers that
    workers have recorded are in the shards' folders; `collect` takes them over.

    Args:
        recipe: the recipe; `ray` in it says how many workers there are.
        rows: as `read_rows` returns them.
        store: the store of the data set, in `recipe.output`.
        is_shown: show a progress bar.

    Raises:
        ValueError: a mistake in the recipe, or an engine lacks something.
        OSError: a worker reported an error, or died again and again on the same rows.
    """
    for engine in recipe.engines:
        getattr(engine, "check_ready", lambda: None)()
    check(recipe, rows)
    settings = read_ray_settings(recipe.mapping)
    collect(recipe.output, store)
    with tqdm(total=len(rows), desc="rows", unit="row", disable=not is_shown) as bar:
        for line in note_sources(recipe, store):
            bar.write(line)
        shards = cut(recipe, rows, settings.concurrency)
        for shard in shards:
            _prepare(shard, store)
        answers = 0
        with _cluster(settings.concurrency * settings.num_cpus, settings.concurrency * settings.num_gpus):
            for number, error in _finished(recipe, shards):
                if error:
                    raise OSError(error)
                answers += _take_over(shards[number], store)
                bar.update(len(shards[number].rows))
                bar.set_postfix(answers=f"{answers:,}", refresh=False)
    _remove_if_empty(recipe.output / "shards")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # shards of the user's own, or none at all
        folder.rmdir()


def _prepare(shard: Shard, store: Store) -> None:
    """Write the store of a shard, with the outcomes that are recorded already."""
    with locked(shard.folder), Store(shard.store) as own:
        if store.path.stat().st_size:
            own.merge(store.path, rows=[row["id"] for row in shard.rows])


@contextmanager
def _cluster(num_cpus: float, num_gpus: float) -> Iterator[None]:
    """Connect to the cluster of `RAY_ADDRESS`, or begin a local one; one that the caller is connected to stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        local: dict[str, Any] = {"address": "local", "include_dashboard": False}
        ray.init(num_cpus=math.ceil(num_cpus) + 1, num_gpus=math.ceil(num_gpus), **local, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _finished(recipe: Recipe, shards: Sequence[Shard]) -> Iterator[tuple[int, str]]:
    """Yield the numbers of shards as they are finished, each with the sentence of an error or an empty string."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    settings = read_ray_settings(recipe.mapping)
    items = [
        {"number": i, "folder": str(shard.folder.resolve()), "rows": pickle.dumps(shard.rows)}
        for i, shard in enumerate(shards)
    ]
    finished = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        ShardWorker,
        fn_constructor_args=(str(recipe.path.resolve()),),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=settings.concurrency),
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
    )
    for row in finished.iter_rows():
        yield int(row["number"]), str(row["error"])


class ShardWorker:
    """A worker: the pipeline on one shard after another, in a process of Ray.

    Args:
        recipe: the file of the recipe, on a disk that all machines share.
    """

    def __init__(self, recipe: str) -> None:
        self._path = Path(recipe)
        self._recipe: Recipe | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Run shards, and return their numbers with the sentence of an error each, or an empty string.

        Args:
            batch: the columns `number`, `folder` and `rows` (pickled).

        Raises:
            Exception: a bug.
        """
        shards = [
            Shard(Path(str(folder)), pickle.loads(rows))  # pickled by the driver of this job
            for folder, rows in zip(batch["folder"], batch["rows"], strict=True)
        ]
        return {"number": list(batch["number"]), "error": [self._error(shard) for shard in shards]}

    def _error(self, shard: Shard) -> str:
        """Run a shard, and return the sentence of the error that ended it."""
        try:
            self._recipe = self._recipe or load_recipe(self._path)
            with locked(shard.folder), Store(shard.store) as store:
                _note_start(shard, store)
                run(self._recipe, shard.rows, store, is_shown=False)
        except Exception as error:
            if not is_mistake(error):
                raise
            return sentence(error)
        return ""


def _note_start(shard: Shard, store: Store) -> None:
    """Note that a worker starts on a shard; refuse one on which workers die again and again."""
    noted = shard.folder / "starts.jsonl"
    starts = [json.loads(line) for line in noted.read_text().splitlines()] if noted.exists() else []
    now = sum(usage.requests for usage in store.usage()) + sum(1 for _ in store.failures())
    if len(starts) >= MOST_STARTS and set(starts[-MOST_STARTS:]) == {now}:
        first, last = shard.rows[0]["id"], shard.rows[-1]["id"]
        raise OSError(
            f"workers died {MOST_STARTS} times on the rows {first!r} to {last!r} without a new answer: "
            "run them without --runner ray to see what ends the process, such as too little memory for the engine"
        )
    with noted.open("a") as file:
        file.write(f"{now}\n")
