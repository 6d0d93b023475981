"""Escape untrusted text for Markdown.

Answers, error messages, and names of models and strategies may hold HTML, links, tracking images, bars that break a table, and control
sequences.
"""

import re

from contralto.common.texts import printable

__all__ = ["Markdown", "fenced", "inline", "quoted"]

MEANT = re.compile(r"[\\`*\[\]<>&|#~$]|:(?=//)|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])")
"""Characters with a meaning in a line of Markdown as the Hub renders it; underscores within words have none."""


class Markdown(str):
    """Text that is already Markdown: `inline` returns it unchanged."""

    __slots__ = ()


def inline(value: object) -> str:
    r"""Escape a value for a line of Markdown or a cell of a table, with its white space as single spaces.

    Args:
        value: anything; `Markdown` is returned as it is.

    Examples:
        >>> print(inline("a|b <b>[click](javascript:x)</b> my_model"))
        a\|b \<b\>\[click\](javascript:x)\</b\> my_model
    """
    if isinstance(value, Markdown):
        return value
    return Markdown(MEANT.sub(r"\\\g<0>", printable(" ".join(str(value).split()))))


def quoted(text: str, *, limit: int) -> Markdown:
    """Return a text as an indented block, in which nothing is Markdown or HTML.

    Args:
        text: any text.
        limit: the number of characters after which it is cut off.
    """
    shown = text if len(text) <= limit else f"{text[:limit]} [...]"
    lines = [printable(line) for line in re.split(r"\r\n|\r|\n", shown)]
    return Markdown("\n".join(f"    {line}".rstrip() for line in lines))


def fenced(text: str, language: str = "") -> Markdown:
    """Return a text as a block of code whose fence is longer than any run of backticks in it.

    Args:
        text: any text.
        language: of the code.

    Examples:
        >>> print(fenced("a: 1"))
        ```
        a: 1
        ```
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    body = "\n".join(printable(line) for line in text.rstrip("\n").split("\n"))
    return Markdown(f"{fence}{language}\n{body}\n{fence}")
