"""Kill a running `contralto data run` repeatedly at random instants, and compare the final data set.

    python benchmarks/data_kills.py --kills 100        writes benchmarks/results/data_kills.md

For each engine (transformers on the embedded expert, and a real HTTP server on the loopback address) a run is made without
interruption. Then runs are killed with SIGKILL, at instants drawn uniformly over the time that a run takes, and started again
until they finish; when one has finished and kills are left, another is begun. Every finished data set has to be byte-identical
with the uninterrupted one.

The child is forked from a process that has imported everything, so that a kill falls into the work and not into the imports.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from killed_runs import files, publish
from tqdm import tqdm

from contralto.data_gen import card, checks, export, pipeline  # noqa: F401 - the children need them all
from contralto.data_gen import recipe as recipes
from contralto.data_gen.engines import TransformersEngine
from contralto.data_gen.rows import read_rows
from contralto.data_gen.store import Store
from contralto.data_gen.types import Request, Sampling

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "data_kills.md"
SOURCE = "contralto.testbed.questions:problems"
STRATEGIES = [
    {"use": "best_of_n", "n": 3, "scorer": "contralto.testbed.questions:score"},
    "clair",
    "on_policy_judge",
]
PROGRAMS = {
    name: {"engine": "function", "use": f"contralto.testbed.questions:{use}"}
    for name, use in {"reviser": "revise", "judge": "judge"}.items()
}


class Found(NamedTuple):
    """What became of one engine's runs."""

    engine: str
    seconds: float
    """Of the run without interruption."""
    kills: int
    runs: int
    identical: int
    requests: int
    """Answers in the store of a finished run."""


def recipe_for(engine: dict[str, Any], folder: Path, problems: int) -> Path:
    """A recipe of so many problems whose target is the engine."""
    path = folder / "recipe.yaml"
    rows = {"source": SOURCE, "arguments": {"count": problems, "seed": 1, "split": "dev"}}
    said = {"rows": rows, "strategies": STRATEGIES, "roles": {"target": engine, **PROGRAMS}, "checks": {"contrast": {}}}
    path.write_text(yaml.safe_dump(said))
    return path


def run(recipe_path: Path, output: Path) -> None:
    """What the command does."""
    recipe = recipes.load_recipe(recipe_path, output=output)
    rows = read_rows(recipe.rows, folder=recipe_path.parent)
    with pipeline.locked(recipe.output), Store(recipe.output / "answers.sqlite") as store:
        pipeline.run(recipe, rows, store, is_shown=False)
        export.export(recipe, rows, store)


def fork(recipe: Path, output: Path) -> int:
    """A child that runs; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = sys.stdout = open(recipe.with_suffix(".log"), "w")  # noqa: SIM115 - the child ends with it
        run(recipe, output)
        code = 0
    except BaseException:  # noqa: BLE001 - the child must not go on as its parent
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def until_finished(recipe: Path, output: Path, seconds: float, kills: int, rng: random.Random) -> Iterator[None]:
    """Start a run until it ends by itself; yields at every kill, of which there are at most `kills`."""
    while True:
        child = fork(recipe, output)
        if kills:
            time.sleep(rng.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise RuntimeError(f"a resumed run failed: {recipe.with_suffix('.log').read_text()}")
            return
        kills -= 1
        yield


def try_engine(name: str, engine: dict[str, Any], kills: int, folder: Path, problems: int) -> Found:
    """Kills and comparisons for one engine."""
    folder.mkdir()
    recipe, rng = recipe_for(engine, folder, problems), random.Random(0)
    start = time.perf_counter()
    for _ in until_finished(recipe, folder / "whole" / "pairs", 0, 0, rng):
        raise AssertionError
    seconds, expected = time.perf_counter() - start, files(folder / "whole" / "pairs")
    assert len(expected) >= 5, expected.keys()
    with Store(folder / "whole" / "pairs" / "answers.sqlite") as store:
        requests = sum(usage.requests for usage in store.usage())
    done = runs = identical = 0
    with tqdm(total=kills, desc=name, unit="kill") as bar:
        while done < kills:
            output = folder / "killed" / "pairs"  # the same name, which the card bears
            for _ in until_finished(recipe, output, seconds, min(kills - done, 12), rng):
                done += 1
                bar.update()
            runs += 1
            identical += files(output) == expected
            shutil.rmtree(output)
    return Found(name, seconds, done, runs, identical, requests)


def serve() -> tuple[subprocess.Popen[str], str]:
    """The tests' server in a process of its own."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "serving.py"), "0.02"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"


def cells(found: Found) -> dict[str, object]:
    """The cells of a row of the table, by heading."""
    return {
        "engine": found.engine,
        "requests": found.requests,
        "a whole run, s": f"{found.seconds:.1f}",
        "kills": found.kills,
        "runs that were killed and resumed": found.runs,
        "data sets byte-identical": found.identical,
    }


def main() -> int:
    """Kill runs, resume them, and return 1 if a data set differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each engine (default 100)")
    parser.add_argument("--problems", type=int, default=20, help="of a run (default 20)")
    parser.add_argument("--no-write", action="store_true", help="only print the table")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no other threads
    local = {
        "engine": "transformers",
        "model": "testbed:expert",
        "batch_size": 8,
        "temperature": 1.0,
        "max_new_tokens": 64,
    }
    warm = TransformersEngine(model="testbed:expert", batch_size=8)
    request = Request(key="", messages=None, prompt="Ben", images=(), sampling=Sampling(max_new_tokens=2), seed=0)
    list(warm.answer([request]))  # the children inherit the weights
    server, url = serve()
    remote = {
        "engine": "openai",
        "base_url": url,
        "served_by": "here",
        "model": "m",
        "concurrency": 8,
        "key_env": None,
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = [
                try_engine(name, engine, args.kills, Path(folder) / name, args.problems)
                for name, engine in {"transformers": local, "openai": remote}.items()
            ]
    finally:
        server.terminate()
        server.wait()
    command = f"python benchmarks/data_kills.py --kills {args.kills}"
    publish("Killed runs", command, list(map(cells, found)), "", None if args.no_write else RESULTS)
    for each in found:
        verdict = "byte-identical" if each.identical == each.runs else f"{each.runs - each.identical} DIFFER"
        print(f"{each.engine}: {verdict} after {each.kills} kills")
    return int(any(each.identical < each.runs for each in found))


if __name__ == "__main__":
    sys.exit(main())
