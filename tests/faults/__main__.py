"""Fail every write, fsync, rename, open, read and mmap of every component once, and see what becomes of the work.

    python tests/faults --write                  every call of every component, six kinds of faults: benchmarks/results/faults.md
    python tests/faults --component store        those of one component
    python tests/faults --every 25               a sample: each 25th call
    python tests/faults --kind torn --every 5    one kind of fault

Every trial runs the component in a new folder with one failing call, and then again without faults. The table counts runs that
the fault did not harm, runs that failed and were recovered by the second one, and runs that the second one refused to resume with
a sentence. A result that differs without an error (silent), and an error without a sentence (unclear), end the command with status 1.
The trials of each component are kept in .cache/faults; `--write` writes the table of all that are there.
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
KEPT = injection.LIBRARY.parent
MEMORY = Path("/dev/shm")
"""A file system in memory, in which trials take less time: the faults are injected above the file system."""


def main() -> int:
    """Run the trials; return 1 if one is silent or unclear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--component", action="append", default=[], help="by default all")
    parser.add_argument("--kind", action="append", choices=[each.name.lower() for each in injection.Kind], default=[])
    parser.add_argument("--every", type=int, default=1, help="fail each n-th call only (default 1)")
    parser.add_argument("--no-keep", action="store_true", help="leave the trials in .cache/faults as they are")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    injection.preloaded()

    import components
    import trials

    kinds = [each for each in injection.Kind if not args.kind or each.name.lower() in args.kind]
    made = []
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        for component in components.chosen(args.component):
            made.append(_tried(component, Path(folder) / "trial" / "work", kinds, args.every))
            if not args.no_keep:
                _path(component.name).write_text(json.dumps(made[-1], indent=0), encoding="utf-8")
    for trial in (trial for each in made for trial in each.trials if trial.verdict in ("silent", "unclear")):
        print(f"{trial.verdict}: {trial}", file=sys.stderr)
    if args.write:
        kept = [trials.read(path) for name in components.COMPONENTS if (path := _path(name)).exists()]
        RESULTS.write_text(trials.page(kept), encoding="utf-8")
    print(trials.table(made))
    return int(any(each.verdicts["silent"] + each.verdicts["unclear"] for each in made))


def _tried(component, work, kinds, every):
    """Run the trials of a component."""
    import trials

    expected = trials.undisturbed(component, work)
    made = []
    for kind in kinds:
        numbers = range(0, trials.calls(component, work, kind), every)
        bar = tqdm(numbers, desc=f"{component.name}, {kind.name.lower()}", leave=False)
        made += trials.trials(component, work, kind, bar, expected)
    return trials.Result(component.name, trials.calls(component, work, injection.Kind.ERROR), every, made)


def _path(name: str) -> Path:
    return KEPT / f"{name.replace(' ', '_').strip('-')}.json"


if __name__ == "__main__":
    sys.exit(main())
