"""A run on many machines: Ray Data places shards of the rows on workers and replaces those that die.

The rows are cut into consecutive shards of whole groups, so that engines which compute batches compute the same ones as in one
process. A worker runs the pipeline on a shard, with engines of its own and a store in the shard's folder, which lies below the
data set's folder, on a disk that all machines share. A shard that is run again, by whatever worker, goes on from its store: an
answer on disk is never asked again. The calling process alone uses the store of the data set: it copies into a shard what is
recorded already, and back what the shard has recorded.
"""

import logging
import math
import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from contralto.common.bars import SteadyBar
from contralto.data_gen.pipeline.rows import check
from contralto.data_gen.pipeline.runner import note_sources
from contralto.data_gen.pipeline.shards import Shard, ShardEnd, ShardWorker, collect, cut
from contralto.data_gen.pipeline.workers import Interrupted, signals_as_events
from contralto.data_gen.ray_settings import RaySettings, read_ray_settings
from contralto.data_gen.recipe import Recipe
from contralto.data_gen.store import Store
from contralto.data_gen.types import Row

__all__ = ["run_on_ray"]

VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no statistics are sent to anybody
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # an error of the calling process is raised, and need not be logged
    "RAY_worker_niceness": "0",  # 15 by default, at which workers starve beside other programs and a killed one takes minutes to return
}
"""Variables that Ray reads when it begins."""
CONNECT_SECONDS = 10.0


class _Stop:
    """The reason to stop before all shards are finished, and the file by which the workers learn of it."""

    def __init__(self, file: Path, write: Callable[[str], object]) -> None:
        self._file, self._write = file, write
        self.why: BaseException | None = None
        file.unlink(missing_ok=True)  # of a run that was killed

    def put(self, _: Interrupted) -> None:
        """Stop for Ctrl-C or SIGTERM; a queue of events takes them by this name."""
        self._write("stopping: waiting for pending answers (Ctrl-C again to stop at once)")
        self.set(KeyboardInterrupt())

    def set(self, why: BaseException) -> None:
        """Stop; the first reason is kept."""
        self.why = self.why or why
        self._file.touch()


def run_on_ray(recipe: Recipe, rows: Sequence[Row], store: Store, *, is_shown: bool = True) -> None:
    """Request all answers that are not recorded yet by workers on a Ray cluster.

    The cluster is that of `RAY_ADDRESS`, otherwise a local one that ends with the run. After Ctrl-C, SIGTERM or an error no new
    request is sent, and the answers that were requested are awaited and recorded. A second Ctrl-C ends the run at once; what
    workers have recorded is then in the shards' folders, from which `collect` takes it.

    Args:
        recipe: the recipe; `ray` in it says how many workers there are.
        rows: as `read_rows` returns them.
        store: the store of the data set, in `recipe.output`.
        is_shown: show a progress bar.

    Raises:
        ValueError: a mistake in the recipe, or an engine lacks something.
        OSError: a worker reported an error, or died again and again on the same rows.
        KeyboardInterrupt: Ctrl-C was pressed, or SIGTERM came.
    """
    for engine in recipe.engines:
        getattr(engine, "check_ready", lambda: None)()
    check(recipe, rows)
    settings = read_ray_settings(recipe.mapping)
    collect(recipe.output, store)
    with SteadyBar(total=len(rows), desc="rows", unit="row", disable=not is_shown) as bar:
        for line in note_sources(recipe, store):
            bar.write(line)
        shards = cut(recipe, rows, settings.concurrency)
        for shard in shards:
            shard.prepare(store)
        if shards:
            with _cluster(settings, bar.write):
                _take_results(recipe, shards, store, bar)


def _take_results(recipe: Recipe, shards: Sequence[Shard], store: Store, bar: Any) -> None:
    """Run the shards, and move the outcomes of each into the store as its run ends."""
    answers, stop = 0, _Stop(shards[0].stop, bar.write)
    with signals_as_events(stop):
        for end in _ends(recipe, shards):
            answers += shards[end.number].take_over(store)
            if end.error:
                stop.set(OSError(end.error))
            bar.update(len(shards[end.number].rows) if end.is_finished else 0)
            bar.set_postfix(answers=f"{answers:,}", refresh=False)
    shards[0].stop.unlink(missing_ok=True)
    with suppress(OSError):  # shards of the user's own
        shards[0].folder.parent.rmdir()
    if stop.why:
        raise stop.why


@contextmanager
def _cluster(settings: RaySettings, write: Callable[[str], object]) -> Iterator[None]:
    """Connect to the cluster of `RAY_ADDRESS`, or begin a local one; one that the caller is connected to stays."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data  # configures its logging

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    wanted, local = _reserved(settings), dict[str, Any]()
    if address := os.environ.get("RAY_ADDRESS"):
        check_address(address)
    else:
        write("starting a local Ray cluster")
        local = {"address": "local", "include_dashboard": False}
        local |= {"num_cpus": math.ceil(wanted["CPU"]) + 1, "num_gpus": math.ceil(wanted["GPU"])}
    with held_back():
        ray.init(log_to_driver=False, logging_level="ERROR", **local)
    try:
        if line := shortage(settings, ray.cluster_resources()):
            write(line)
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raise an error if nothing answers at the address of a cluster, for which Ray waits many minutes.

    Args:
        address: what `RAY_ADDRESS` says. Only `HOST:PORT` is checked.

    Raises:
        ConnectionError: nothing answers.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): begin one there with ray start --head, or unset it"
        ) from error


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back what libraries in C++ write to standard error, and write it if the block raises."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, os.fdopen(os.dup(2), "wb") as shown:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            shown.write(held.read())
            raise
        finally:
            os.dup2(shown.fileno(), 2)


def _reserved(settings: RaySettings) -> dict[str, float]:
    """Return what all workers together reserve, under Ray's names."""
    return {"CPU": settings.concurrency * settings.num_cpus, "GPU": settings.concurrency * settings.num_gpus}


def shortage(settings: RaySettings, resources: Mapping[str, float]) -> str:
    """Return a line that says what a cluster lacks for all workers to run, or an empty string.

    It is no error: a cluster may grow, and some of the workers do the work of all.

    Args:
        settings: the workers.
        resources: the resources of the cluster, by Ray's names.

    Examples:
        >>> shortage(RaySettings(concurrency=8, num_gpus=1), {"CPU": 64, "GPU": 2})
        'the cluster has 2 GPUs now, and 8 workers reserve 8: some of them wait until it has more'
        >>> shortage(RaySettings(concurrency=2), {"CPU": 2})
        ''
    """
    for name, wanted in _reserved(settings).items():
        if (has := resources.get(name, 0)) < wanted:
            workers = f"{settings.concurrency} workers reserve {wanted:g}"
            return f"the cluster has {has:g} {name}s now, and {workers}: some of them wait until it has more"
    return ""


def _ends(recipe: Recipe, shards: Sequence[Shard]) -> Iterator[ShardEnd]:
    """Yield the ends of the shards' runs as they come."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    settings = read_ray_settings(recipe.mapping)
    items = [
        {"number": i, "folder": str(shard.folder.resolve()), "rows": pickle.dumps(shard.rows)}
        for i, shard in enumerate(shards)
    ]
    ended = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        ShardWorker,
        fn_constructor_args=(str(recipe.path.resolve()),),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=settings.concurrency),
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
    )
    for row in ended.iter_rows():
        yield ShardEnd(int(row["number"]), bool(row["is_finished"]), str(row["error"]))
