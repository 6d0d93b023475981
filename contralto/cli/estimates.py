"""Print estimates of tokens and money, as `contralto data` and `contralto judge` do before they spend any."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from contralto.common.texts import amount, printable

if TYPE_CHECKING:
    from contralto.data_gen.pipeline.costs import Estimate

__all__ = ["show_estimates", "sum_of", "table_width"]


def show_estimates(estimates: Sequence["Estimate"], basis: str, rows: str) -> None:
    """Print a table of estimates, and a line with their sum.

    Args:
        estimates: by role.
        basis: the data on which they are based.
        rows: the number of rows, with the word for them.
    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    names = (Column(name, overflow="fold") for name in ("role", "model"))
    counts = (Column(name, min_width=len(name)) for name in ("requests", "recorded"))
    table = Table(*names, *counts, "tokens in", "tokens out", "money", "still to pay")
    for each in estimates:
        figures = (f"{value:,.0f}" for value in (each.requests, each.recorded, *each[3:5]))
        money = (f"{amount(value)} {each.currency}" for value in (each.money, each.to_pay))
        table.add_row(*(Text(printable(name)) for name in each[:2]), *figures, *money)
    Console(width=table_width()).print(table)
    total = f"total for {rows}: {sum_of(estimates, 'money')}"
    if any(each.recorded for each in estimates):
        total += f", still to pay: {sum_of(estimates, 'to_pay')}"
    print(f"{total}, estimated from {basis}.")


def sum_of(estimates: Sequence["Estimate"], field: str) -> str:
    """Return the sum of a field of estimates, by currency.

    Args:
        estimates: by role.
        field: the name of the field.
    """
    totals = dict[str, float]()
    for each in estimates:
        totals[each.currency] = totals.get(each.currency, 0.0) + getattr(each, field)
    return ", ".join(f"{amount(money)} {currency}" for currency, money in totals.items())


def table_width() -> int | None:
    """Return the width of tables, None for that of the terminal."""
    return None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120"))
