"""Measure the speed of data generation with 2,000 to 100,000 rows, answered by a function.

    python benchmarks/data_size.py            all sizes; writes benchmarks/results/data_size.md

The function answers at once, so what is measured is the pipeline and its store. Each size runs in a process of its own, from an
empty store. Rows per second depend on the disk, since each transaction waits for it; CPU time per row does not.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contralto.data_gen import export, pipeline
from contralto.data_gen.engines import FunctionEngine
from contralto.data_gen.recipe import Price, Recipe, Role, Use
from contralto.data_gen.rows import RowSource
from contralto.data_gen.store import Store
from contralto.data_gen.types import Ask, Pair, Request, Row, Sampling, Strategy

RESULTS = Path(__file__).parent / "results" / "data_size.md"
HEAD = [
    "| rows | run, rows per second | of these the last tenth | CPU ms per row | resume | status | export | store, MB | peak memory, MB |",
    "|---|---|---|---|---|---|---|---|---|",
]


def answer(request: Request) -> str:
    """Return a text of some hundred characters that depends on the prompt."""
    return 8 * str((request.messages or [])[-1]["content"])[::-1]


def one_pair(row: Row) -> Strategy:
    """Make a pair of one answer."""
    said = yield Ask(role="target", messages=row["prompt"])
    return Pair(prompt=row["prompt"], chosen=f"{said.text}!", rejected=said.text)


def recipe_in(folder: Path, engine: Any) -> Recipe:
    """Return a recipe of one strategy and one engine."""
    role = Role(name="target", engine=engine, sampling=Sampling(), price=Price())
    return Recipe(
        path=folder / "recipe.yaml",
        output=folder / "out",
        seed=0,
        rows=RowSource(source=""),
        strategies=(Use(name="one_pair", start=one_pair),),
        roles={"target": role},
        checks={},
        filters={},
        mapping={},
    )


def seconds(act: Callable[[], object]) -> float:
    """Measure the duration of a call."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def measure(count: int) -> dict[str, float]:
    """Run, resume, replay and export a data set, and return rows per second and sizes.

    Args:
        count: rows.
    """
    rows = [
        {"id": str(i), "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}], "images": ()}
        for i in range(count)
    ]
    with tempfile.TemporaryDirectory() as name:
        recipe = recipe_in(Path(name), FunctionEngine(use="data_size:answer"))
        with Store(recipe.output / "answers.sqlite") as store:
            last = count // 10
            first = seconds(lambda: pipeline.run(recipe, rows[:-last], store, is_shown=False))
            cpu = time.process_time()
            end = seconds(lambda: pipeline.run(recipe, rows[-last:], store, is_shown=False))
            cpu = time.process_time() - cpu
            found = {"run": count / (first + end), "last": last / end, "cpu": 1000 * cpu / last}
            found["resume"] = count / seconds(lambda: pipeline.run(recipe, rows, store, is_shown=False))
            found["status"] = count / seconds(lambda: list(pipeline.replay(recipe, rows, store)))
            found["export"] = count / seconds(lambda: export.export(recipe, rows, store))
        found["store"] = (recipe.output / "answers.sqlite").stat().st_size / 1e6
    return found | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def line(count: int, found: dict[str, Any]) -> str:
    """Return a line of the table."""
    speeds = " | ".join(f"{found[name]:,.0f}" for name in ("resume", "status", "export"))
    sizes = f"{found['store']:.1f} | {found['memory']:,.0f}"
    return f"| {count:,} | {found['run']:,.0f} | {found['last']:,.0f} | {found['cpu']:.2f} | {speeds} | {sizes} |"


def lines(sizes: Sequence[int]) -> list[str]:
    """Measure each size in a process of its own."""
    made = []
    for count in sizes:
        command = [sys.executable, __file__, "--one", str(count)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        made.append(line(count, json.loads(output.splitlines()[-1])))
        print(made[-1], flush=True)
    return made


def main() -> None:
    """Measure every size in a process of its own, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2_000, 10_000, 40_000, 100_000])
    parser.add_argument("--one", type=int, help="measure one size in this process, and print JSON")
    parser.add_argument("--no-write", action="store_true", help="only print the table")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    from timing import publish, setting_lines

    head = ["# Data generation by the size of the data set", "", *setting_lines(0, "cpu", 1)[1:], ""]
    publish([*head, *HEAD, *lines(args.sizes)], None if args.no_write else RESULTS)


if __name__ == "__main__":
    main()
