"""The tables of a comparison in a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from contralto.eval.comparison.report.tabulate import Cell, Table, glance, tables

__all__ = ["rich_table", "show"]

WIDE = 5
"""Tables with more columns have no room for intervals."""


def show(comparison: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a comparison.

    Args:
        comparison: The result of `compare`.
        console: The console; None for standard output.
    """
    out = console or Console()
    for task in comparison["tasks"]:
        out.print(f"\n[bold]{escape(task['name'])}[/bold]", highlight=False)
        for table in tables(task):
            if not table.is_detail:
                out.print(rich_table(table))
    out.print(rich_table(glance(comparison)))
    out.print(f"\n[bold]{escape(comparison['verdict']['sentence'])}[/bold]", highlight=False)
    for task in comparison["tasks"]:
        if task["verdict"]:
            out.print(Text(_controls(task), style="dim"))


def _controls(task: Mapping[str, Any]) -> str:
    """Return the scores of the best method of a task and of its controls in one line."""
    verdict = task["verdict"]
    others = ", ".join(f"{each['name']} {each['score']:.3f} (p {each['p']:.1g})" for each in verdict["controls"])
    times = f"; p of the tables, times {verdict['methods']} methods" if verdict["methods"] > 1 else ""
    return f"{task['name']}: {verdict['row']} {verdict['scores'][1]:.3f}, against {others}{times}"


def rich_table(table: Table) -> Group:
    """Return a table for a console.

    Args:
        table: The table.
    """
    grid = RichTable(
        title=escape(table.title), title_justify="left", box=None, header_style="dim", padding=(0, 2, 0, 0)
    )
    grid.add_column("", overflow="fold")
    for name in table.head:
        grid.add_column(escape(name), justify="right")
    for name, role, cells in table.rows:
        style = "bold" if role == "method" else ""
        short = len(cells) > WIDE
        grid.add_row(Text(name, style=style), *(_rich_cell(cell, short=short) for cell in cells))
    return Group("", grid, Text(table.note, style="dim"))


def _rich_cell(cell: Cell, *, short: bool) -> Text:
    text = Text(cell.main, style="bold green" if cell.is_found else "")
    return text if short or not cell.small else text.append(f" {cell.small}", style="dim")
