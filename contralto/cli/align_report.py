"""`contralto align report`: write the report of a training again, or one page about several trainings.

contralto align report out
contralto align report out-dpo out-apo --output trainings.html
contralto align report rounds
"""

from collections.abc import Sequence
from pathlib import Path

from contralto.cli.outputs import check_output_file
from contralto.cli.parser import Parser
from contralto.common.errors import require

__all__ = ["run"]


def run(argv: Sequence[str]) -> None:
    """Write the page that the words of the command line describe.

    Args:
        argv: the words after `contralto align report`.

    Raises:
        ValueError: a folder has no record of a training.
    """
    args = make_parser().parse_args(argv)
    require("matplotlib", "scipy")
    from contralto.align.monitoring.log_report import LOG, write_log_report
    from contralto.align.monitoring.report import write_report
    from contralto.align.monitoring.side_by_side import find_runs, write_comparison

    runs = find_runs(args.folders)
    if len(runs) == 1 and args.output is None:
        is_distillation = (runs[0] / LOG).is_file()
        print(f"report: {write_log_report(runs[0]) if is_distillation else write_report(runs[0])}")
        return
    if len(runs) == 1:
        raise ValueError("--output is for several trainings: the report of one is written into its folder")
    path = args.output or Path("training_reports.html")
    check_output_file(path, "--output")
    print(f"report of {len(runs)} trainings: {write_comparison(runs, path)}")


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="contralto align report",
        description="Write the report of a training again, or one page about several trainings.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="output_dir of a training, or of on-policy rounds, which stands for them all",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="page of several trainings (default training_reports.html)"
    )
    return parser
