"""The blocks of code in the documentation: files, commands, and their output.

A fenced block with `title="NAME"` in its first line is the content of a file; one with the title `output` is a part of what the
commands before it print. A block, fenced or indented, whose first line begins with a word of `COMMANDS` holds commands. They are run
or parsed, as `tests/project/test_blocks.py` says; `<!-- not run: REASON -->` in the line above a block leaves it to the parsers.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("contralto", "accelerate", "python", "pip", "make", "torchrun", "trl", "mkdocs")
VARIABLE = re.compile(r"^[A-Z][A-Z0-9_]*=\S* ")
"""An environment variable before a command."""
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>[\w-]*)(?P<options>.*)$")
NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")


class Block(NamedTuple):
    """A block of code in a page."""

    page: str
    line: int
    language: str
    title: str
    text: str
    reason: str
    """Why its commands are not run; empty if they are."""

    @property
    def commands(self) -> list[list[str]]:
        """Return the commands, each as its words."""
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()
        kept = (VARIABLE.sub("", re.split(r"\s{3,}#?|\s+# ", line.strip() + "   ")[0].rstrip(" &")) for line in lines)
        return [shlex.split(line.partition(" > ")[0]) for line in kept if line and not line.startswith("#")]


def is_command(line: str) -> bool:
    """Return whether a line of a block is a command."""
    return VARIABLE.sub("", line.strip()).split(" ")[0] in COMMANDS


def blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of a page.

    Args:
        page: the document, relative to the repository.
    """
    lines = (ROOT / page).read_text(encoding="utf-8").split("\n")
    number, before = 0, ""
    while number < len(lines):
        start, language, title = number, "", ""
        if fence := FENCE.match(lines[number]):
            language = fence["language"]
            title = next(iter(re.findall(r'title="([^"]+)"', fence["options"])), "")
            end = next(i for i in range(number + 1, len(lines)) if lines[i].startswith(fence["fence"]))
            text, number = "\n".join(lines[number + 1 : end]), end + 1
        elif lines[number].startswith("    ") and (not number or not lines[number - 1].strip()):
            end = next((i for i in range(number, len(lines)) if not lines[i].startswith("    ")), len(lines))
            text, number = "\n".join(line[4:] for line in lines[number:end]), end
        else:
            before = lines[number] if lines[number].strip() else before
            number += 1
            continue
        reason = NOT_RUN.match(before)
        yield Block(page, start + 1, language, title, text + "\n", reason[1] if reason else "")
        before = ""


def command_blocks(page: str) -> list[Block]:
    """Return the blocks of a page that hold commands."""
    return [block for block in blocks(page) if not block.title and is_command(block.text)]
