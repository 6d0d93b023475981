"""`contralto demo`: contrastive decoding on the embedded models, next to the baselines that could explain it away."""

import argparse
from pathlib import Path

from contralto.cli.outputs import check_output_file
from contralto.common.errors import require

__all__ = ["add_arguments", "run"]

FEWEST = 10
"""Problems that are worth a comparison."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags.

    Args:
        parser: the parser of the command.
    """
    parser.add_argument("--html", type=Path, default=Path("demo.html"), help="where the page goes (default demo.html)")
    parser.add_argument("--problems", type=int, default=400, help="held-out problems per model (default 400)")


def run(args: argparse.Namespace) -> None:
    """Decode, print the examples and the tables, and write the page.

    Args:
        args: the parsed flags.

    Raises:
        ValueError: too few problems, or the page cannot be written.
        ImportError: a package of the extra `demo` is not installed.
    """
    if args.problems < FEWEST:
        raise ValueError(f"--problems must be at least {FEWEST}, not {args.problems}: fewer say nothing")
    check_output_file(args.html, "--html")
    require("aiohttp", "datasets", "lm_eval", "matplotlib", "peft", "rich", "scipy", "trl", "yaml")
    from contralto.cli.demo.show import show

    show(args.html, args.problems)
