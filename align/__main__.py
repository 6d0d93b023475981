"""`accelerate launch -m contralto.align ...`: `contralto align`, in every process."""

import os
import sys

from contralto.align.run import run
from contralto.common.errors import guarded


def main() -> int:
    """Train, and return the exit status; only the first process prints the message of a user's error."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    is_first = os.environ.get("RANK", "0") == "0"
    return guarded("align", lambda: run(argv, launched=True), debug="--debug" in sys.argv, quiet=not is_first)


if __name__ == "__main__":
    sys.exit(main())
