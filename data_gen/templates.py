"""Prompt templates: text files in `prompts/`, each of which a user can replace by a file of their own.

A template is Jinja, so that `{task}` is text and `{{ task }}` is filled in. Its version is a hash of its text, which is a part of the
key of every request made with it: a changed template causes new requests, an unchanged one none.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from contralto.common.files import read_text
from contralto.common.hashing import content_digest
from contralto.common.suggestions import did_you_mean

__all__ = ["Template", "as_text", "content_text", "load", "sections", "user_messages"]

_JINJA = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
"""Sandboxed, since a template may come from other people: it fills in its fields, and reaches no Python object behind them."""
del _JINJA.filters["random"], _JINJA.globals["lipsum"]
"""Random prompts would never find their recorded answers."""


@dataclass(frozen=True)
class Template:
    """A prompt template with its name."""

    name: str
    """The name of the packaged template, or of the user's file."""
    text: str

    @property
    def version(self) -> str:
        """Return the first twelve digits of the SHA-256 of the text."""
        return content_digest(self.text, 12)

    @property
    def label(self) -> str:
        """Return name and version: `clair@0c1d...`."""
        return f"{self.name}@{self.version}"

    def render(self, **values: str) -> str:
        """Return the prompt.

        Args:
            values: the fields of the template. Braces in them are plain text.
        """
        return _compiled(self.text).render(values)


@cache
def _compiled(text: str) -> jinja2.Template:
    return _JINJA.from_string(text)


@cache
def load(name: str, *fields: str) -> Template:
    """Load a packaged template by its name, or a user's by its path.

    Args:
        name: `clair`, `judge`, ...: a file of `data_gen/prompts`; or a path that ends in `.txt`.
        fields: the fields that the template must fill in, and no others.

    Raises:
        ValueError: there is no such template, it is not valid Jinja, lacks a field, has an unknown one, or an expression fails.

    Examples:
        >>> template = load("prefix_good", "task")
        >>> print(template.render(task="Name {{ a }} prime."))
        (Give a helpful, honest and harmless answer.)
        <BLANKLINE>
        Name {{ a }} prime.
    """
    text = _read(name)
    try:
        used = jinja2.meta.find_undeclared_variables(_JINJA.parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"template {name}, line {error.lineno}: not valid Jinja: {error.message}") from error
    needed = "fill in " + ", ".join(f"{{{{ {field} }}}}" for field in fields) if fields else "fill in nothing"
    if missing := sorted(set(fields) - used):
        raise ValueError(f"template {name} must {needed}; it leaves out {', '.join(missing)}")
    if unknown := sorted(used - set(fields)):
        raise ValueError(f"template {name} must {needed}; it also asks for {', '.join(unknown)}")
    try:
        _compiled(text).render(dict.fromkeys(fields, "text"))
    except Exception as error:  # whatever its expressions raise
        raise ValueError(f"template {name} cannot be filled in: {error}") from error
    return Template(Path(name).stem, text)


def _read(name: str) -> str:
    if name.endswith(".txt"):
        if not Path(name).is_file():
            raise ValueError(f"there is no template file {name}")
        return read_text(name)
    folder = resources.files("contralto.data_gen") / "prompts"
    packaged = sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))
    if name not in packaged:
        raise ValueError(
            f"there is no template {name!r}{did_you_mean(name, packaged)}: give a path that ends in .txt, or one of {', '.join(packaged)}"
        )
    return (folder / f"{name}.txt").read_text(encoding="utf-8")


def as_text(messages: Sequence[Any]) -> str:
    """Return a conversation as text for a template: a single user message as it is, several messages with their roles.

    Args:
        messages: with a text, or a list of parts, as `content`; parts that are not texts are left out.

    Examples:
        >>> as_text([{"role": "user", "content": "Hello"}])
        'Hello'
        >>> as_text([{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hello"}])
        'system: Rhyme.\\n\\nuser: Hello'
    """
    texts = [(message["role"], content_text(message["content"])) for message in messages]
    if [role for role, _ in texts] == ["user"]:
        return texts[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in texts)


def user_messages(text: str) -> list[dict[str, Any]]:
    """Return the conversation of one user message.

    Args:
        text: the message.
    """
    return [{"role": "user", "content": text}]


def content_text(content: Any) -> str:
    """Return the text of a message's content: the content itself, or its joined text parts.

    Args:
        content: a text or a list of parts.
    """
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def sections(text: str, *heads: str) -> dict[str, str]:
    """Split a reply into sections by the headings that a template requests.

    Models format headings in many ways: `{answer}:`, `{answer}`, `**Answer:**`, `### Answer`. In braces a heading counts at the
    start of a line, or anywhere with a colon, and the last one with a text below it is used, since models often name a heading
    before they use it. Without braces it counts at the start of a line with a colon, or as a line of its own, and the first one
    with a text is used. A section ends where another heading begins.

    Args:
        text: a model's reply.
        heads: the headings without braces: `teacher_reasoning`.

    Returns:
        The section of every heading in the reply, without lines of dashes around it; and under `""` the text before the first
        heading.

    Examples:
        >>> sections("Sure.\\n{thought}: Be brief.\\n**Answer:** 42", "thought", "answer")
        {'': 'Sure.', 'thought': 'Be brief.', 'answer': '42'}
    """
    braced = [(head, match) for head in heads for match in _braced(head).finditer(text)]
    with_braces = {head for head, _ in braced}
    bare = [(head, match) for head in heads if head not in with_braces for match in _bare(head).finditer(text)]
    marks = sorted(braced + bare, key=lambda mark: mark[1].start())
    found = {"": _trimmed(text[: marks[0][1].start()] if marks else text)}
    for at, (head, match) in enumerate(marks):
        end = marks[at + 1][1].start() if at + 1 < len(marks) else len(text)
        body = _trimmed(text[match.end() : end])
        if body and (head in with_braces or head not in found):
            found[head] = body
    return found


_DRESS = r"[ \t>#*_`]*"


@cache
def _braced(head: str) -> re.Pattern[str]:
    name = r"\{\s*" + _words(head) + r"\s*\}"
    return re.compile(rf"(?im)(?:^{_DRESS}{name}{_DRESS}:?|{name}{_DRESS}:){_DRESS}")


@cache
def _bare(head: str) -> re.Pattern[str]:
    return re.compile(rf"(?im)^{_DRESS}{_words(head)}(?:{_DRESS}:{_DRESS}|{_DRESS}$)")


def _words(head: str) -> str:
    return r"[\s\\_]+".join(map(re.escape, head.split("_")))


def _trimmed(text: str) -> str:
    """Return a text without blank lines and lines of dashes at both ends."""
    lines = text.split("\n")  # a regular expression would take a time quadratic in the white space of a hostile reply
    first, last = 0, len(lines)
    while first < last and _is_empty(lines[first]):
        first += 1
    while first < last and _is_empty(lines[last - 1]):
        last -= 1
    return "\n".join(lines[first:last]).strip()


def _is_empty(line: str) -> bool:
    text = line.strip()
    return not text or (len(text) >= 3 and not text.strip("-"))
