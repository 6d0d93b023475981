"""Fail every write, fsync, rename, open, read and mmap of every component once, and see what becomes of the work.

    python tests/faults                          every call of every component, six kinds of faults: benchmarks/results/faults.md
    python tests/faults --component store        those of one component
    python tests/faults --every 25               a sample: each 25th call
    python tests/faults --kind torn --every 5    one kind of fault

Every trial runs the component in a new folder with one failing call, and then again without faults. The table counts runs that
the fault did not harm, runs that failed and were recovered by the second one, and runs that the second one refused to resume with
a sentence. A result that differs without an error (silent), and an error without a sentence (unclear), end the command with status 1.
Every trial is a line of .cache/faults/trials.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent))
import injection
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults.md"
LOG = injection.LIBRARY.with_name("trials.jsonl")


def main() -> int:
    """Run the trials; return 1 if one is silent or unclear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--component", action="append", default=[], help="by default all")
    parser.add_argument("--kind", action="append", choices=[each.name.lower() for each in injection.Kind], default=[])
    parser.add_argument("--every", type=int, default=1, help="fail each n-th call only (default 1)")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    injection.preloaded()

    import components
    import trials

    kinds = [each for each in injection.Kind if not args.kind or each.name.lower() in args.kind]
    made, calls = [], {}
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, LOG.open("w", encoding="utf-8") as log:
        work = Path(folder) / "trial" / "work"
        for component in components.chosen(args.component):
            expected = trials.undisturbed(component, work)
            calls[component.name] = trials.calls(component, work, injection.Kind.ERROR)
            for kind in kinds:
                numbers = range(0, trials.calls(component, work, kind), args.every)
                bar = tqdm(numbers, desc=f"{component.name}, {kind.name.lower()}", leave=False)
                for trial in trials.trials(component, work, kind, bar, expected):
                    made.append(trial)
                    log.write(json.dumps(trial._asdict() | {"verdict": trial.verdict}) + "\n")
    for trial in made:
        if trial.verdict in ("silent", "unclear"):
            print(f"{trial.verdict}: {trial}", file=sys.stderr)
    print(trials.table(made, calls))
    if args.write:
        trials.write(RESULTS, made, calls, args.every)
    return int(any(trial.verdict in ("silent", "unclear") for trial in made))


if __name__ == "__main__":
    sys.exit(main())
