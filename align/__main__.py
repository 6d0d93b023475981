"""`accelerate launch -m contralto.align ...`: `contralto align`, in every process."""

import os
import sys

from contralto.align.run import run
from contralto.common.errors import guarded

USAGE = """\
usage: accelerate launch [options of accelerate] -m contralto.align [RECIPE] [options]

Train with contralto align in processes that accelerate launch, torchrun or a cluster starts. RECIPE and options are those of contralto align,
which starts such processes itself: contralto align --num_processes 2 ... `contralto align --help` lists recipes and options.
"""


def main() -> int:
    """Train, and return the exit status; only the first process prints the message of a user's error."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    if not argv or {*argv} & {"-h", "--help"}:
        print(USAGE, end="")
        return 0
    is_first = os.environ.get("RANK", "0") == "0"
    return guarded("align", lambda: run(argv, launched=True), debug="--debug" in sys.argv, quiet=not is_first)


if __name__ == "__main__":
    sys.exit(main())
