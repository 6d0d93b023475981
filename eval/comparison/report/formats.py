"""The tables of a comparison as text for other programs: Markdown, CSV, LaTeX."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from contralto.eval.comparison.report.tabulate import Cell, Table, glance, tables

__all__ = ["FORMATS", "render", "render_tables"]

Sections = Sequence[tuple[str, Table]]
"""Tables, each with the name of its section."""

CSV_COLUMNS = ("task", "table", "row", "role", "column", "value", "detail", "significant")
FORMULA = ("=", "+", "-", "@")
"""Beginnings of cells that spreadsheets take for formulas (https://owasp.org/www-community/attacks/CSV_Injection)."""
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    "≥": r"$\geq$",
    "±": r"$\pm$",
}
"""Characters that LaTeX reads as commands or does not have in every font."""


def render(comparison: Mapping[str, Any], form: str) -> str:
    """Return all tables of a comparison, those of the page, in a format.

    Args:
        comparison: The result of `compare`.
        form: A key of `FORMATS`.
    """
    return render_tables(comparison["verdict"]["sentence"], list(_all_tables(comparison)), form)


def render_tables(sentence: str, sections: Sections, form: str) -> str:
    """Return tables as a text in a format.

    `csv` has one line per cell, with the columns `CSV_COLUMNS`; names that a spreadsheet would take for formulas begin with `'`. `latex` needs the package booktabs.

    Args:
        sentence: The result in words, which stands first.
        sections: The tables, each with the name of its section; an empty name for none.
        form: A key of `FORMATS`.
    """
    return FORMATS[form](sentence, sections)


def _all_tables(comparison: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Yield the tables, each with the name of its task; that of all tasks comes first, without a name."""
    yield "", glance(comparison)
    for task in comparison["tasks"]:
        yield from ((task["name"], table) for table in tables(task))


def _markdown(sentence: str, sections: Sections) -> str:
    parts, last = [sentence], ""
    for task, table in sections:
        if task != last:
            parts.append(f"## {task}")
        last = task
        lines = [["", *table.head], ["---", *["---:"] * len(table.head)]]
        lines += [[name, *map(_markdown_cell, cells)] for name, _, cells in table.rows]
        parts.append(f"### {table.title}")
        parts.append("\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines))
        parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def _markdown_cell(cell: Cell) -> str:
    main = f"**{cell.main}**" if cell.is_found and cell.main else cell.main
    return f"{main} {cell.small}".strip()


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _csv(sentence: str, sections: Sections) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for task, table in sections:
        for name, role, cells in table.rows:
            for column, cell in zip(table.head, cells, strict=True):
                found = "yes" if cell.is_found else ""
                texts = map(_without_formula, (task or column, table.title, name, role, column))
                writer.writerow([*texts, cell.main, cell.small, found])
    return text.getvalue()


def _without_formula(text: str) -> str:
    """Return a name as one line that no spreadsheet computes; the cells of figures are our own and stay numbers.

    The `csv` module leaves a carriage return unquoted where lines end at a line feed, and readers begin a new row there.
    """
    line = " ".join(text.split())
    return f"'{line}" if line.startswith(FORMULA) else line


def _latex(sentence: str, sections: Sections) -> str:
    parts = [f"% {' '.join(sentence.split())}"]
    for task, table in sections:
        caption = ". ".join(filter(None, [f"{task}: {table.title}" if task else table.title, table.note]))
        lines = [f"{_tex(name)} & {' & '.join(map(_latex_cell, cells))} \\\\" for name, _, cells in table.rows]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{_tex(caption)}}}",
                    rf"\begin{{tabular}}{{l{'r' * len(table.head)}}}",
                    r"\toprule",
                    f"& {' & '.join(map(_tex, table.head))} \\\\",
                    r"\midrule",
                    *lines,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _latex_cell(cell: Cell) -> str:
    main = rf"\textbf{{{_tex(cell.main)}}}" if cell.is_found and cell.main else _tex(cell.main)
    return f"{main} {{\\scriptsize {_tex(cell.small)}}}" if cell.small else main


def _tex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text.replace("\n", " "))


FORMATS: dict[str, Callable[[str, Sections], str]] = {"markdown": _markdown, "csv": _csv, "latex": _latex}
"""The formats by name."""
