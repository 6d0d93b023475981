"""Mutation testing: change the mathematics slightly, and check that the tests fail.

    python tests/mutants                              every mutant of every module of targets.yaml
    python tests/mutants --only decoding/rules        those of one module or folder
    python tests/mutants --sample 200 --seed 3        a random sample
    python tests/mutants --declared                   the changes that tests declare to notice (declared/*.yaml)

A survivor is a change that no test noticed: write the test, or, if the change makes no difference, add it to equivalent.yaml
with the reason. Results are kept in .cache/mutants.jsonl, so that a run that was stopped goes on.
"""

import argparse
import json
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import collected
import operators
import runner

HERE = Path(__file__).parent
KEPT = runner.ROOT / ".cache" / "mutants.jsonl"
PART = 60
"""Changes per process that collects tests."""


KERNELS = "kernels.yaml"
"""Declared changes of Triton kernels: only where Triton's interpreter runs them are there tests to notice them."""


class Task(NamedTuple):
    """A change, and the tests that should notice it."""

    path: Path
    source: str
    tests: tuple[str, ...]
    label: str

    @property
    def key(self) -> str:
        """What determines the outcome: the changed source and the tests' texts."""
        texts = [(runner.ROOT / test.split("::")[0]).read_bytes() for test in self.tests]
        return sha256(b"\0".join([self.source.encode(), *texts, *(t.encode() for t in self.tests)])).hexdigest()[:24]


def read(name: str) -> Any:
    """Return the content of a YAML file of this folder."""
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def modules(only: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yield the modules of targets.yaml with their tests."""
    for pattern, tests in read("targets.yaml").items():
        if not pattern.startswith(only.split("/")[0]):
            continue
        paths = sorted(runner.ROOT.glob(pattern))
        if not paths:
            raise SystemExit(f"targets.yaml: {pattern} matches no file")
        for path in paths:
            if str(path.relative_to(runner.ROOT)).startswith(only):
                yield path, tuple(tests)


def generated(only: str) -> list[Task]:
    """Return every mutant that is not known to make no difference."""
    equal = {(e["file"], e["where"], e["before"], e["after"]) for e in read("equivalent.yaml") or []}
    found = []
    for path, tests in modules(only):
        name = str(path.relative_to(runner.ROOT))
        for mutant in operators.mutants(path.read_text(encoding="utf-8")):
            if (name, *mutant.key) not in equal:
                label = f"{name}:{mutant.line} {mutant.where}: {mutant.before} -> {mutant.after}"
                found.append(Task(path, mutant.source, tests, label))
    return found


def declared(only: str) -> list[Task]:
    """Return the changes that tests declare to notice.

    Raises:
        ValueError: a change whose old text is not in its file exactly once.
    """
    found = []
    for listing in sorted((HERE / "declared").glob("*.yaml")):
        if listing.name == KERNELS and os.environ.get("TRITON_INTERPRET") != "1":
            continue
        for change in yaml.safe_load(listing.read_text(encoding="utf-8")):
            path = runner.ROOT / change["file"]
            source = path.read_text(encoding="utf-8")
            if source.count(change["old"]) != 1:
                raise ValueError(
                    f"{listing.name}: {change['old']!r} is {source.count(change['old'])} times in {change['file']}"
                )
            if change["file"].startswith(only):
                label = f"{change['file']}: {change['old']!r} -> {change['new']!r} ({' '.join(change['tests'])})"
                changed = source.replace(change["old"], change["new"])
                found.append(Task(path, changed, tuple(change["tests"]), label))
    return found


def outcomes(tasks: list[Task], log: Path, *, jobs: int, timeout: float) -> Iterator[tuple[Task, bool]]:
    """Yield every task with whether it was killed, those that are kept in `log` first."""
    log.parent.mkdir(exist_ok=True)
    kept = dict(json.loads(line) for line in log.read_text().splitlines()) if log.exists() else {}
    todo = {task.key: task for task in tasks if task.key not in kept}
    yield from ((task, kept[task.key]) for task in tasks if task.key in kept)
    if not todo:
        return
    runner.preload()
    _unlock_bars()
    _check_unchanged(list(todo.values()), timeout)
    done: Queue[tuple[str, bool]] = Queue()
    with ThreadPoolExecutor(jobs) as pool, log.open("a") as file, tqdm(total=len(todo), unit="mutant") as bar:
        running = [pool.submit(_run, part, done, timeout) for part in _parts(todo)]
        for _ in todo:
            key, killed = _next(done, running)
            file.write(json.dumps([key, killed]) + "\n")
            file.flush()
            bar.update()
            if not killed:
                bar.write(f"SURVIVED {todo[key].label}")
            yield todo[key], killed


def _unlock_bars() -> None:
    """Give each process a lock of its own for progress bars.

    tqdm's default lock is shared with children, and one that is killed while it holds it blocks all; one that is forked meanwhile never
    sees it released.
    """
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))


def _parts(todo: dict[str, Task]) -> Iterator[dict[str, Task]]:
    """Yield changes that have their tests in common, a few at a time."""
    by_tests: dict[tuple[str, ...], list[str]] = {}
    for key, task in todo.items():
        by_tests.setdefault(task.tests, []).append(key)
    for keys in by_tests.values():
        yield from ({key: todo[key] for key in keys[i : i + PART]} for i in range(0, len(keys), PART))


def _run(part: dict[str, Task], done: "Queue[tuple[str, bool]]", timeout: float) -> None:
    """Put into `done` whether each of some changes was noticed; what survives in place is run anew."""
    tests = next(iter(part.values())).tests
    found = (
        collected.run([(t.path, t.source) for t in part.values()], tests, timeout=timeout) if len(part) > 1 else [None]
    )
    for (key, task), killed in zip(part.items(), found, strict=True):
        done.put((key, killed or runner.run(task.path, task.source, tests, timeout=timeout).killed))


def _next(done: "Queue[tuple[str, bool]]", running: list[Future[None]]) -> tuple[str, bool]:
    """Return the next outcome, or raise what went wrong in a thread."""
    while True:
        try:
            return done.get(timeout=1)
        except Empty:
            for future in running:
                if future.done():
                    future.result()


def _check_unchanged(tasks: list[Task], timeout: float) -> None:
    """Stop unless the tests pass without any change: else every mutant would count as noticed."""
    path, every = tasks[0].path, sorted({test for task in tasks for test in task.tests})
    if not runner.run(path, path.read_text(encoding="utf-8"), every, timeout=timeout * len(every)).killed:
        return
    for tests, path in sorted({task.tests: task.path for task in tasks}.items()):
        outcome = runner.run(path, path.read_text(encoding="utf-8"), tests, timeout=timeout)
        if outcome.killed:
            raise SystemExit(
                f"{' '.join(tests)} fail without a change (status {outcome.status}); MUTANTS_LOG=FILE shows why"
            )


def main() -> int:
    """Run, print the survivors, and return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a module or folder, seen from the root of the repository")
    parser.add_argument("--declared", action="store_true", help="the changes of declared/*.yaml")
    parser.add_argument("--sample", type=int, help="so many of them, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--fresh", action="store_true", help="neither read nor write what is kept of earlier runs")
    parser.add_argument("--jobs", type=int, default=2, help="children at a time (default 2)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for the tests of a mutant (default 120)")
    args = parser.parse_args()
    tasks = (declared if args.declared else generated)(args.only)
    if args.sample and args.sample < len(tasks):
        tasks = random.Random(args.seed).sample(tasks, args.sample)
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log" if args.fresh else KEPT
        results = list(outcomes(tasks, log, jobs=args.jobs, timeout=args.timeout))
    survivors = sorted(task.label for task, killed in results if not killed)
    counts = Counter((task.label.split(":")[0], killed) for task, killed in results)
    for name in sorted({name for name, _ in counts}):
        print(f"{name}: {counts[name, True]} of {counts[name, True] + counts[name, False]} noticed")
    print("\n".join(["", *survivors, f"{len(survivors)} of {len(tasks)} survived"]))
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
