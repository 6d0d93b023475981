"""Show preference pairs side by side in a terminal."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from contralto.common.texts import printable

__all__ = ["highlighted", "show"]


def show(console: Any, results: Iterable[Any]) -> None:
    """Print pairs side by side, with their differences highlighted, or the reasons why there are none and the answers.

    Single completions are printed below each other.

    Args:
        console: a console of rich.
        results: as `pipeline.replay` returns them.
    """
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from contralto.data_gen.types import Pair, Rejected

    for result in results:
        title = printable(f"{result.row['id']} · {result.strategy}")
        prompt = printable("\n".join(f"{m['role']}: {_text_of(m['content'])}" for m in result.row["prompt"]))
        console.print(Panel(Text(prompt), title=Text(title), title_align="left"))
        if result.failed is not None:
            console.print(Text(printable(f"failed: {result.failed}"), style="bold red"))
        for pair in result.outcomes or []:
            if isinstance(pair, Rejected):
                console.print(Text(printable(f"rejected: {pair.reason}"), style="yellow"))
                for tracked, answer in result.answered:
                    console.print(Text(printable(f"{tracked.role}: {answer.text}"), style="dim"))
                continue
            if isinstance(pair, Pair):
                table = Table("[green]chosen", "[red]rejected", expand=True)
                table.add_row(*highlighted(*map(printable, (pair.chosen, pair.rejected))))
            else:
                table = Table("[green]to learn" if pair.label else "[red]to avoid", expand=True)
                table.add_row(Text(printable(pair.completion)))
            console.print(table)
            for name, value in pair.columns.items():
                console.print(Text(printable(f"{name}: {value}"), style="dim"))


def _text_of(content: Any) -> str:
    """Return the text of a message; other parts are named in brackets."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", f"[{part['type']}]") for part in content)


def highlighted(chosen: str, rejected: str) -> tuple[Any, Any]:
    """Highlight the words that only one of two texts has, in colour and in brackets: {+words+} and [-words-].

    Args:
        chosen: the better text.
        rejected: the worse text.

    Returns:
        Two texts of rich.

    Examples:
        >>> [text.plain for text in highlighted("It is 13 now.", "It is 11 now.")]
        ['It is {+13+} now.', 'It is [-11-] now.']
    """
    from rich.text import Text

    one, other = re.findall(r"\s+|\w+|[^\w\s]", chosen), re.findall(r"\s+|\w+|[^\w\s]", rejected)
    left, right = Text(), Text()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if kind == "equal":
            left.append("".join(one[a:b]))
            right.append("".join(other[c:d]))
            continue
        if a < b:
            left.append("{+" + "".join(one[a:b]) + "+}", style="bold green")
        if c < d:
            right.append("[-" + "".join(other[c:d]) + "-]", style="bold red")
    return left, right
