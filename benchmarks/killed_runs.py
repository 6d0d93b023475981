"""Helpers of the benchmarks that kill runs of `contralto data`: the files of a data set, and a page with a table."""

from collections.abc import Sequence
from pathlib import Path


def files(output: Path) -> dict[str, bytes]:
    """Return the contents of the files of a data set, by path. Pictures are left out: they carry dates.

    Args:
        output: the folder of the run.
    """
    folder = output / "dataset"
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".png")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def publish(title: str, command: str, rows: Sequence[dict[str, object]], note: str, results: Path | None) -> None:
    """Print a table, and write a page with it.

    Args:
        title: the heading of the page.
        command: the command that makes the page.
        rows: the cells of each row by heading.
        note: a paragraph behind the table, or an empty string.
        results: the file of the page; None only prints the table.
    """
    lines = (rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows))
    table = "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
    print(table)
    if results is not None:
        results.write_text("\n\n".join([f"# {title}", f"`{command}`", table, *filter(None, [note])]) + "\n")
