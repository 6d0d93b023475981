"""Run long, and see whether anything grows, slows down, or is estimated wrongly.

    python benchmarks/long_runs.py            all parts; writes benchmarks/results/long_runs.md

endpoint: a day of data generation at an endpoint that refuses, fails, resets and hangs, with slow hours, on a clock that jumps (see
`simulated_endpoint.py`). At noon the run is interrupted and begun again. evaluation: 20,000 word problems, answered by an embedded model
by contrast, through lm-eval. training: 2,000 steps of `PreferenceTrainer` on the same model.

Each part runs in a process of its own. Memory is compared between a twelfth of the run and its end, CPU time per item between the
second and the last quarter, and the remaining time that the progress bar shows with the actual one, over the middle half of the run.
"""

import argparse
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from timing import named_versions, publish
from tqdm import std as tqdm_std
from tqdm import tqdm

from contralto.common.bars import SteadyBar

RESULTS = Path(__file__).parent / "results" / "long_runs.md"
DAY = 24.0
SECONDS, CONCURRENCY = 120, 8
"""Mean seconds to an answer of the endpoint, and requests at the same time."""
COUNTS = {"endpoint": 4_900, "evaluation": 20_000, "training": 2_000}
"""Items of each part; the rows of the endpoint take about a day."""
TOKENS = 8
"""New tokens of an answer of the evaluation."""
UNITS = {"endpoint": "rows", "evaluation": "documents", "training": "steps"}
MOST = {"memory": 1.05, "time": 1.25, "estimate": 0.2}
"""What counts as flat: ratios of memory and of CPU time per item; and as right: the deviation of an estimate of the remaining time."""


class Sample(NamedTuple):
    """The state of a process."""

    done: int
    """Items so far."""
    cpu: float
    resident: float
    """Megabytes of the process."""
    traced: float
    """Megabytes of Python objects."""


class Watch:
    """Takes samples and notes estimates while items are finished.

    Args:
        total: the number of items.
        now: a clock for the estimates.
        is_traced: count Python objects, which slows down what has many of them.
    """

    def __init__(self, total: int, now: Callable[[], float], *, is_traced: bool = False) -> None:
        self._total, self._now = total, now
        self.samples: list[Sample] = []
        self._at, self._left = array("d"), array("d")
        if is_traced:
            tracemalloc.start()

    def note(self, done: int, left: float | None = None) -> None:
        """Note that items are finished, and the remaining seconds that a bar shows."""
        if left is not None:
            self._at.append(self._now())
            self._left.append(left)
        if done * 24 >= (len(self.samples) + 1) * self._total:
            gc.collect()
            resident = psutil.Process().memory_info().rss / 1e6
            self.samples.append(Sample(done, time.process_time(), resident, tracemalloc.get_traced_memory()[0] / 1e6))

    def found(self) -> dict[str, float]:
        """Return the comparisons."""
        early, late = self.samples[1], self.samples[-1]
        found = {
            "early": early.resident,
            "memory": late.resident / early.resident,
            **({"traced": late.traced - early.traced} if late.traced else {}),
            "milliseconds": 1000 * self._cost(0.25, 0.5),
            "time": self._cost(0.75, 1.0) / self._cost(0.25, 0.5),
        }
        if self._at:
            end = self._at[-1]
            middle = [
                left / (end - at) - 1
                for at, left in zip(self._at, self._left, strict=True)
                if end / 4 <= at <= end * 3 / 4
            ]
            found |= {"lowest": min(middle), "highest": max(middle)}
            found["right"] = sum(abs(each) <= MOST["estimate"] for each in middle) / len(middle)
        return found

    def _cost(self, begin: float, end: float) -> float:
        """Return the CPU seconds per item between two parts of the run."""
        first, last = (min(self.samples, key=lambda s: abs(s.done - part * self._total)) for part in (begin, end))
        return (last.cpu - first.cpu) / (last.done - first.done)


@contextmanager
def watched_bars(watch: Watch, now: Callable[[], float]) -> Iterator[None]:
    """Note each update of a progress bar, which goes by a clock."""
    update = SteadyBar.update

    def noted(bar: Any, n: float | None = 1, *, work: float | None = None) -> bool | None:
        shown = update(bar, n, work=work)
        values = bar.format_dict
        watch.note(int(bar.n), (values["total"] - values["n"]) / values["rate"] if values["rate"] else None)
        return shown

    SteadyBar.update = noted  # type: ignore[method-assign, assignment]
    tqdm_std.time = now  # type: ignore[attr-defined]
    tqdm.monitor_interval = 0
    try:
        yield
    finally:
        SteadyBar.update = update  # type: ignore[method-assign]
        tqdm_std.time = time.time  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------------- endpoint


def endpoint(count: int) -> dict[str, Any]:
    """Make rows at the flaky endpoint, with an interruption in the middle."""
    from data_size import recipe_in
    from simulated_endpoint import HOUR, Clock, FlakyEngine, simulated

    from contralto.data_gen import pipeline
    from contralto.data_gen.pipeline.workers import Interrupted
    from contralto.data_gen.store import Store

    clock = Clock()
    rows = [
        {"id": str(i), "prompt": [{"role": "user", "content": f"question {i}"}], "images": ()} for i in range(count)
    ]
    engine, watch = (
        FlakyEngine(clock, rows=count, seconds=SECONDS, concurrency=CONCURRENCY),
        Watch(count, clock.time, is_traced=True),
    )

    @contextmanager
    def at_noon(events: Any) -> Iterator[None]:
        engine.at_half = lambda: events.put(Interrupted(signal.SIGTERM))
        yield

    with tempfile.TemporaryDirectory() as folder, simulated(clock), watched_bars(watch, clock.time):
        recipe = recipe_in(Path(folder), engine)
        with Store(recipe.output / "answers.sqlite") as store:
            try:
                pipeline.run(recipe, rows, store, interrupts=at_noon)
                raise RuntimeError("the run was not interrupted")
            except KeyboardInterrupt:
                pipeline.run(recipe, rows, store)
            results = list(pipeline.replay(recipe, rows, store))
    lost = sum(
        not r.outcomes or getattr(r.outcomes[0], "chosen", "") != f"{8 * f'question {i}'[::-1]}!"
        for i, r in enumerate(results)
    )
    faults = {name: engine.faults[name] for name in ("429", "500", "reset", "hang")}
    twice = sum(max(0, times - 1) for times in engine.delivered)
    return {"hours": clock.now / HOUR, "lost": lost, "twice": twice, "faults": faults, **watch.found()}


# ------------------------------------------------------------------------------------------------- evaluation, training


def evaluation(count: int) -> dict[str, Any]:
    """Answer word problems by contrast, through lm-eval, and keep each answer on disk."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from contralto.eval.data import TASKS
    from contralto.eval.models.lm import ContraltoLM

    watch = Watch(count, time.process_time)  # which other programs do not disturb
    with tempfile.TemporaryDirectory() as folder, watched_bars(watch, time.process_time):
        lm = ContraltoLM("testbed:expert", method="cd", amateur="testbed:amateur", batch_size=64)
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"n": count})
        results = lm_eval.simple_evaluate(
            lm,
            tasks=["testbed_arithmetic"],
            task_manager=manager,
            gen_kwargs=f"max_gen_toks={TOKENS}",
            use_cache=f"{folder}/answers",
            bootstrap_iters=0,
        )
        answered = sum(bool(sample["resps"][0]) for sample in results["samples"]["testbed_arithmetic"])
    return {"lost": count - answered, **watch.found()}


def training(count: int) -> dict[str, Any]:
    """Train by preference pairs."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from contralto.align.trainers.config import PreferenceConfig
    from contralto.align.trainers.preference import PreferenceTrainer
    from contralto.common.hub import from_pretrained
    from contralto.testbed import worlds

    watch, rng = Watch(count, time.process_time), random.Random(0)

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.note(state.global_step)

    solved = [(p.question, p.solution()) for p in islice(worlds.problems(0, "train"), 400)]
    rows = [
        {"prompt": question, "chosen": text, "rejected": re.sub(r"#### (\S+)$", f"#### {rng.randint(1, 99)}", text)}
        for question, text in solved
    ]
    with tempfile.TemporaryDirectory() as folder:
        config: Any = PreferenceConfig(
            folder,
            max_steps=count,
            per_device_train_batch_size=1,
            logging_steps=10,
            save_steps=max(1, count // 20),
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
        )
        model = from_pretrained(AutoModelForCausalLM, "testbed:expert")
        tokenizer = from_pretrained(AutoTokenizer, "testbed:expert")
        trainer: Any = PreferenceTrainer(
            model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Steps()]
        )
        trainer.train()
    return {"lost": count - trainer.state.global_step, **watch.found()}


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "endpoint": endpoint,
    "evaluation": evaluation,
    "training": training,
}


# ------------------------------------------------------------------------------------------------------------------ table


def line(name: str, count: int, found: dict[str, Any]) -> str:
    """Return a line of the table."""
    estimate = "its own, by transformers"
    if "right" in found:
        estimate = f"{found['lowest']:+.0%} to {found['highest']:+.0%}, {found['right']:.0%} within a fifth"
    memory = (
        f"{found['early']:.0f} | {found['memory']:.3f} | {f'{traced:+.2f}' if (traced := found.get('traced')) else '-'}"
    )
    lost = f"{found['lost']} | {found.get('twice', '-')}"
    return f"| {name} | {count:,} {UNITS[name]} | {memory} | {found['milliseconds']:.2f} | {found['time']:.2f} | {lost} | {estimate} |"


def is_right(found: dict[str, Any]) -> bool:
    """Return True if nothing grew, slowed down, was lost or repeated, or was estimated wrongly."""
    flat = all(found[name] <= MOST[name] for name in ("memory", "time"))
    return flat and found.get("right", 1) == 1 and not found["lost"] and not found.get("twice")


def measured(name: str, count: int) -> dict[str, Any]:
    """Run a part in a process of its own."""
    command = [sys.executable, __file__, "--part", name, "--count", str(count)]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Run the parts, print and write the table, and return 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the items of each part (default 1)")
    parser.add_argument("--part", choices=PARTS, help="run one part in this process, and print JSON")
    parser.add_argument("--count", type=int, help="its items")
    parser.add_argument("--no-write", action="store_true", help="only print the table")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.part:
        print(json.dumps(PARTS[args.part](args.count)))
        return 0
    lines, right = [], True
    for name in args.parts:
        count = max(48, int(args.share * COUNTS[name]))
        found = measured(name, count)
        lines.append(line(name, count, found))
        if "hours" in found:
            faults = ", ".join(f"{number:,} of {fault}" for fault, number in found["faults"].items())
            lines[-1:] = [lines[-1].replace("| endpoint |", f"| endpoint, {found['hours']:.1f} hours with {faults} |")]
        print(lines[-1], flush=True)
        right &= is_right(found)
    head = [
        "# Long runs",
        "",
        f"`python benchmarks/long_runs.py`; {named_versions('contralto', 'torch', 'transformers', 'trl')}.",
        "",
    ]
    publish([*head, *HEAD, *lines, "", *NOTES], None if args.no_write else RESULTS)
    return int(not right)


HEAD = [
    "| run | items | MB after 1/12 | times at the end | objects, MB more | CPU ms per item | times at the end | lost | asked twice | estimate |",
    "|---|---|---|---|---|---|---|---|---|---|",
]
NOTES = [
    "Memory after a twelfth of the run and at its end; CPU time per item in the second quarter and in the last one. The estimate of the remaining",
    "time is compared with the actual one at each update of the progress bar in the middle half of the run; the clock of the endpoint is simulated,",
    "that of the evaluation is CPU time. Objects are those of Python, with what a run has to keep, such as the answers of an evaluation.",
    "",
    "A bar that began anew after the interruption at noon took one slow hour for all that follow: +215%, 87% within a fifth. It now goes on with",
    "the seconds per answer that the store has. The evaluation answers the longest prompts first: its bar fits what an item and what a token takes.",
    "What is left is the machine: the CPU time of batches of one length varied by a half while other programs ran.",
]

if __name__ == "__main__":
    sys.exit(main())
