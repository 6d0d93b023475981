"""`python -m contralto.testbed train --out DIR`: train the embedded models anew."""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Thread

from tqdm import tqdm

from contralto.testbed import training, vision

TRAINERS = dict.fromkeys(training.RECIPES, training.train) | dict.fromkeys(vision.RECIPES, vision.train)
COSTS = {name: recipe.hidden * recipe.steps for name, recipe in training.RECIPES.items()}
COSTS |= {name: 100 * recipe.steps for name, recipe in vision.RECIPES.items()}
"""About how long each takes, relative to the others."""


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(
        prog="python -m contralto.testbed", description="The embedded models of contralto."
    )
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "train", help="train them anew", description="Train the embedded models, one thread each, several at a time."
    )
    command.add_argument("--out", type=Path, required=True, help="the folder that gets a folder per model")
    command.add_argument("--only", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="train only these models")
    command.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time (default: one per core)")
    args = parser.parse_args()
    if args.jobs < 1:
        command.error(f"--jobs must be at least 1, not {args.jobs}")
    train_all(args.only, args.out, jobs=args.jobs)


def train_all(names: list[str], out: Path, *, jobs: int) -> None:
    """Train models in parallel processes of one thread, under one progress bar; the longest begin first."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    names = sorted(names, key=lambda name: -COSTS[name])
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, tqdm(total=sum(_steps(name) for name in names), unit="step") as bar:
        steps = manager.Queue()
        listener = Thread(target=_listen, args=(steps, bar))
        listener.start()
        try:
            with ProcessPoolExecutor(jobs, mp_context=context) as pool:
                for job in [pool.submit(TRAINERS[name], name, out, steps.put) for name in names]:
                    job.result()
        finally:
            steps.put(0)
            listener.join()


def _steps(name: str) -> int:
    return (vision.RECIPES[name] if name in vision.RECIPES else training.RECIPES[name]).steps


def _listen(steps: "Queue[int]", bar: "tqdm[None]") -> None:
    """Update the progress bar with the steps that processes report, until a 0."""
    while count := steps.get():
        bar.update(count)


if __name__ == "__main__":
    main()
