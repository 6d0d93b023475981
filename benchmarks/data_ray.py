"""Kill the workers of `contralto data run --runner ray` again and again, and compare the final data set with that of one process.

    python benchmarks/data_ray.py --rows 20000        writes benchmarks/results/data_ray.md

A function answers, and notes the time of each of its calls. Three runs: one process; two workers on a local Ray cluster; the same
with SIGKILL of a random worker every few seconds. Printed are rows that are lost, calls for an answer that was on disk by then, calls
for an answer that died with its worker before it was on disk, and whether the data set has the bytes of one process. The rows per
second are those after the first answer, before which the cluster and the workers begin.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml
from killed_runs import files, publish

from contralto.data_gen import export, pipeline
from contralto.data_gen import recipe as recipes
from contralto.data_gen.rows import read_rows
from contralto.data_gen.store import Store
from contralto.data_gen.store_file import open_read_only

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "data_ray.md"
UNDER_WAY = 4
"""Requests that a worker here has under way at most: one row each, of 2 * concurrency + 2 rows, see `pipeline.runner`."""
NOTE = f"""An answer that its worker had not written to the disk when it was killed is asked for again, as after a kill of one process:
at most what the worker had under way, here {UNDER_WAY} requests for a kill. The command fails if there are more. The function answers
at once, so these are the rates of recording and of the start of workers, on two cores that did other work, too. A worker that starts again
imports Ray and Ray Data, 1.7 s of a processor, and contralto, .2 s."""
FUNCTIONS = """
import os
import time
from contralto.data_gen.types import Ask, Pair

def rows(count):
    for i in range(count):
        yield {"prompt": f"question {i}"}

def answer(request):
    said = request.messages[-1]["content"]
    with open(os.path.join(os.environ["CALLS"], str(os.getpid())), "a") as file:
        file.write(f"{time.time()} {said}\\n")
    return f"{said[::-1]} {request.seed % 1000}"

def refined(row):
    first = yield Ask(role="target", messages=row["prompt"])
    return Pair(prompt=row["prompt"], chosen=f"{first.text}!", rejected=first.text)
"""


class Found(NamedTuple):
    """What became of a run."""

    name: str
    seconds: float
    before: float
    """Seconds before the first answer."""
    kills: int
    lost: int
    """Rows without a pair."""
    repeated: int
    """Calls for an answer that was on disk."""
    died: int
    """Calls for an answer that was not on disk when its worker died."""
    is_identical: bool

    @property
    def is_kept(self) -> bool:
        """Return True if nothing is lost, repeated or different, but for what workers had under way when they died."""
        return self.is_identical and not self.lost and not self.repeated and self.died <= UNDER_WAY * self.kills


def write_recipe(folder: Path, rows: int) -> Path:
    """Write the recipe with its functions, and return its path."""
    (folder / "ray_functions.py").write_text(FUNCTIONS)
    path = folder / "recipe.yaml"
    recipe = {
        "rows": {"source": "ray_functions:rows", "arguments": {"count": rows}},
        "strategies": ["ray_functions:refined"],
        "roles": {"target": {"engine": "function", "use": "ray_functions:answer"}},
        "ray": {"concurrency": 2},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


class Killer(threading.Thread):
    """Kills a random worker of this process's cluster again and again, until it is stopped."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self._seconds, self._random, self._stopped = seconds, random.Random(0), threading.Event()
        self.kills = 0

    def run(self) -> None:
        """Kill."""
        while not self._stopped.wait(self._seconds):
            workers = [each for each in psutil.Process().children(recursive=True) if is_worker(each)]
            if workers:
                os.kill(self._random.choice(workers).pid, signal.SIGKILL)
                self.kills += 1

    def stop(self) -> None:
        """Kill no more."""
        self._stopped.set()
        self.join()


def is_worker(process: psutil.Process) -> bool:
    """Return True for a process that runs shards, or is about to."""
    try:
        return "ShardWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def repeated_calls(times: list[list[str]], store: Path) -> tuple[int, int]:
    """Return the numbers of calls for answers on disk, and for answers that were lost with a worker."""
    with closing(open_read_only(store)) as db:
        recorded = {
            json.loads(content)["messages"][-1]["content"]: at
            for content, at in db.execute("SELECT request, at FROM answers")
        }
    late = sum(float(at) > recorded[said] for at, said in times)
    return late, len(times) - len(recorded) - late


def measure(name: str, recipe_path: Path, folder: Path, expected: dict[str, bytes] | None, kill: float) -> Found:
    """Run the recipe once."""
    calls, killer = folder / "calls", Killer(kill) if kill else None
    calls.mkdir(parents=True)
    os.environ["CALLS"] = str(calls)
    recipe = recipes.load_recipe(recipe_path, output=folder / "pairs")
    rows = read_rows(recipe.rows, folder=recipe_path.parent)
    start, begun = time.perf_counter(), time.time()
    if killer:
        killer.start()
    with pipeline.locked(recipe.output), Store(recipe.output / "answers.sqlite") as store:
        (pipeline.run if expected is None else pipeline.run_on_ray)(recipe, rows, store)
        seconds = time.perf_counter() - start
        if killer:
            killer.stop()
        exported = export.export(recipe, rows, store)
    times = [line.split(" ", 1) for file in calls.iterdir() for line in file.read_text().splitlines()]
    late, died = repeated_calls(times, recipe.output / "answers.sqlite")
    before, kills = min(float(at) for at, _ in times) - begun, killer.kills if killer else 0
    same = expected is None or files(recipe.output) == expected
    return Found(name, seconds, before, kills, len(rows) - exported.pairs, late, died, same)


def cells(found: Found, rows: int) -> dict[str, object]:
    """The cells of a row of the table, by heading."""
    return {
        "run": found.name,
        "rows": f"{rows:,}",
        "s": f"{found.seconds:.1f}",
        "first answer after, s": f"{found.before:.1f}",
        "then rows per second": f"{rows / (found.seconds - found.before):,.0f}",
        "kills": found.kills,
        "rows lost": found.lost,
        "asked again: on disk": found.repeated,
        "died with worker": found.died,
        "same bytes": "yes" if found.is_identical else "NO",
    }


def main() -> int:
    """Run, kill, compare, and return 1 unless all is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of a run (default 20000)")
    parser.add_argument("--seconds", type=float, default=3.0, help="between two kills (default 3)")
    parser.add_argument("--no-write", action="store_true", help="only print the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PYTHONPATH"] = os.pathsep.join([name, *filter(None, [os.environ.get("PYTHONPATH")])])
        recipe = write_recipe(folder, args.rows)
        found = [measure("one process", recipe, folder / "one", None, 0)]
        expected = files(folder / "one" / "pairs")
        found.append(measure("two workers", recipe, folder / "two", expected, 0))
        found.append(measure("two workers, killed", recipe, folder / "killed", expected, args.seconds))
    command = f"python benchmarks/data_ray.py --rows {args.rows} --seconds {args.seconds:g}"
    rows = [cells(each, args.rows) for each in found]
    publish("Killed workers of a Ray cluster", command, rows, NOTE, None if args.no_write else RESULTS)
    return int(not all(each.is_kept for each in found))


if __name__ == "__main__":
    sys.exit(main())
