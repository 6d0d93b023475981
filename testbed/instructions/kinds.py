"""The kinds of instructions, each declared once: its wordings, its check, and the smallest revision that passes the check."""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from contralto.testbed.instructions.texts import (
    FILLERS,
    count_word,
    finished,
    has_content,
    items,
    join_sentences,
    sentences,
    words,
)

__all__ = ["KINDS", "Instruction", "Kind", "parse_instruction"]

Arguments = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of instruction whose fulfilment a program decides.

    Args:
        name: its name.
        wordings: sentences that state it; `{n}` stands for a number, `{word}` for a word or phrase.
        values: for each field of the wordings its possible values; the value `TOPIC` stands for the topic of the prompt.
        check: whether an answer fulfils it, called with the answer and the fields.
        revise: the smallest change of an answer that fulfils it, called in the same way; None if a program cannot make one.
    """

    name: str
    wordings: tuple[str, ...]
    values: Mapping[str, Sequence[Any]]
    check: Callable[..., bool]
    revise: Callable[..., str] | None

    def draw(self, rng: random.Random, topic: str) -> "Instruction":
        """Draw a wording and its fields.

        Args:
            rng: the source of randomness.
            topic: the topic of the prompt.
        """
        fields = {name: rng.choice(values) for name, values in self.values.items()}
        fields = {name: topic if value == TOPIC else value for name, value in fields.items()}
        return Instruction(kind=self, arguments=fields, sentence=rng.choice(self.wordings).format(**fields))

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """Return a regular expression of each wording, with a group for each field."""
        return tuple(re.compile(_pattern(wording)) for wording in self.wordings)


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """An instruction of a kind."""

    kind: Kind
    arguments: Arguments
    sentence: str
    """The sentence in the prompt."""

    def is_fulfilled(self, answer: str) -> bool:
        """Return whether an answer fulfils the instruction. Answers of fewer than three words never do.

        Args:
            answer: the answer; white space around it does not count.
        """
        return has_content(answer) and self.kind.check(answer.strip(), **self.arguments)

    def revised(self, answer: str) -> str | None:
        """Return an answer changed as little as is needed to fulfil the instruction; None if a program cannot do that.

        An unfinished last sentence, which a limit of tokens leaves behind, is dropped; an answer that fulfils the instruction is
        returned as it is.

        Args:
            answer: the answer.
        """
        if self.is_fulfilled(answer) or self.kind.revise is None:
            return answer if self.is_fulfilled(answer) else None
        base = finished(answer)
        if not has_content(base):
            base = " ".join([base, FILLERS[0]]).strip()
        revision = self.kind.revise(base, **self.arguments).strip()
        return revision if self.is_fulfilled(revision) else None


TOPIC = "{topic}"
_FIELDS = {"n": r"(?P<n>\d+)", "word": r"(?P<word>[^\"\n]+?)"}


def _pattern(wording: str) -> str:
    """Return a regular expression of a wording, with a group in place of each field."""
    escaped = re.escape(wording.format(**{field: f"<{field}>" for field in _FIELDS}))
    for field, group in _FIELDS.items():
        escaped = escaped.replace(re.escape(f"<{field}>"), group)
    return escaped


def parse_instruction(prompt: str) -> Instruction:
    """Return the instruction that a prompt contains.

    Args:
        prompt: a prompt of `contralto.testbed.instructions`.

    Raises:
        ValueError: the prompt contains none.

    Examples:
        >>> found = parse_instruction("Describe bees. Use at most 12 words.")
        >>> found.kind.name, found.arguments, found.is_fulfilled("Bees are small insects."), found.is_fulfilled("bees " * 13)
        ('max_words', {'n': 12}, True, False)
    """
    for kind in KINDS.values():
        for pattern in kind.patterns:
            if match := pattern.search(prompt):
                fields = match.groupdict()
                arguments = {name: int(value) if name == "n" else value for name, value in fields.items()}
                return Instruction(kind=kind, arguments=arguments, sentence=match[0])
    raise ValueError(f"no instruction of the testbed is in {prompt[:80]!r}")


# ----------------------------------------------------------------------------------------------------- length


def _cut_to(text: str, n: int) -> str:
    """Return the whole sentences that fit into `n` words, or else the first `n` words."""
    kept: list[str] = []
    for sentence in sentences(text):
        if len(words(" ".join([*kept, sentence]))) > n:
            break
        kept.append(sentence)
    if has_content(" ".join(kept)):
        return " ".join(kept)
    ends = [match.end() for match in re.finditer(r"\S+", text) if len(words(text[: match.end()])) <= n]
    return text[: ends[-1]].rstrip(",;:.!? ") + "."


def _lengthen(text: str, n: int) -> str:
    at = 0
    while len(words(text)) < n:
        text = f"{text} {FILLERS[at % len(FILLERS)]}"
        at += 1
    return text


def _is_of_sentences(text: str, n: int) -> bool:
    return len(sentences(text)) == n and finished(text) == text


# ------------------------------------------------------------------------------------------------------ format


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _is_bulleted(text: str, n: int) -> bool:
    lines = _lines(text)
    return len(lines) == n and all(re.match(r"- \S", line) for line in lines)


def _is_numbered(text: str, n: int) -> bool:
    lines = _lines(text)
    return len(lines) == n and all(re.match(rf"{at}\. \S", line) for at, line in enumerate(lines, 1))


def _is_json(text: str, word: str) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(value, dict) and list(value) == [word] and isinstance(value[word], str) and has_content(value[word])
    )


def _as_json(text: str, word: str) -> str:
    return json.dumps({word: " ".join(text.split())}, ensure_ascii=False)


def _is_quoted(text: str) -> bool:
    return len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]


def _is_parted(text: str) -> bool:
    parts = re.split(r"(?m)^\s*\*\*\*\s*$", text)
    return len(parts) == 2 and all(map(words, parts))


def _part(text: str) -> str:
    first, *rest = sentences(text)
    return f"{first}\n***\n{' '.join(rest) or FILLERS[0]}"


def _is_titled(text: str) -> bool:
    return re.match(r"<<[^<>\n]*\w[^<>\n]*>>\s*\n?.*\w", text, re.DOTALL) is not None


# ------------------------------------------------------------------------------------------- beginnings and ends


def _ends_with(text: str, word: str) -> bool:
    return text.casefold().endswith(word.casefold()) and len(words(text)) > len(words(word))


def _begins_with(text: str, word: str) -> bool:
    return (words(text) or [""])[0] == word


def _begin(text: str, word: str) -> str:
    first = text.split(maxsplit=1)[0]
    is_plain = first[:1].isupper() and first[1:] == first[1:].lower() and first not in ("I", "I'm", "I've")
    return f"{word}, {text[0].lower() + text[1:] if is_plain else text}"


def _has_postscript(text: str) -> bool:
    return re.search(r"\w.*\sP\.\s?S\.\W*\w", text, re.DOTALL) is not None


# ----------------------------------------------------------------------------------------------------- keywords


def _repeat(text: str, n: int, word: str) -> str:
    """Return a text in which a word occurs `n` times: the first ones stay, others become pronouns, missing ones are added."""
    seen = 0

    def _kept(match: re.Match[str]) -> str:
        nonlocal seen
        seen += 1
        return match[0] if seen <= n else "they"

    text = re.sub(_alone(word), _kept, text)
    return " ".join([text, *[f"This is about {word}."] * (n - count_word(text, word))])


def _alone(word: str) -> str:
    return rf"(?i)(?<![\w'’-]){re.escape(word)}(?![\w'’-])"  # noqa: RUF001


def _avoid(text: str, word: str) -> str:
    def _other(match: re.Match[str]) -> str:
        return "They" if match[0][0].isupper() else "they"

    return re.sub(_alone(word), _other, text)


def _avoids(text: str, word: str) -> bool:
    return not re.search(_alone(word), text)


# ----------------------------------------------------------------------------------------------------- language

FUNCTION_WORDS = {
    "English": "the and of to is are in that they it with for as you be this can have on their",
    "Spanish": "el la los las de que y en es son un una por con para se del como su lo",
    "French": "le la les des et est sont une un que qui dans pour avec ils elles sur du au ce",
    "German": "der die das und ist sind ein eine nicht mit von zu sie den im auf es für werden auch",
}
"""Frequent words of each language, by which the language of an answer is decided."""


def _is_in(text: str, word: str) -> bool:
    """Return whether an answer has at least two function words of a language, and more than of any other."""
    spoken = [each.lower() for each in words(text)]
    counts = {name: sum(each in known.split() for each in spoken) for name, known in FUNCTION_WORDS.items()}
    others = max(count for name, count in counts.items() if name != word)
    return counts[word] >= 2 and counts[word] > others


# -------------------------------------------------------------------------------------------------------- the kinds

_ALL = (
    Kind(
        name="max_words",
        wordings=("Use at most {n} words.", "Answer in {n} words or fewer."),
        values={"n": (8, 10, 12, 15)},
        check=lambda text, n: len(words(text)) <= n,
        revise=_cut_to,
    ),
    Kind(
        name="min_words",
        wordings=("Use at least {n} words.", "The answer must have {n} words or more."),
        values={"n": (25, 28, 30)},
        check=lambda text, n: len(words(text)) >= n,
        revise=_lengthen,
    ),
    Kind(
        name="sentences",
        wordings=("Write exactly {n} sentence(s).", "The number of sentences must be exactly {n}."),
        values={"n": (1, 2)},
        check=_is_of_sentences,
        revise=lambda text, n: " ".join(
            join_sentences([finished(each) for each in items(text) if has_content(each)], n)
        ),
    ),
    Kind(
        name="lower_case",
        wordings=("Write everything in lower case.", "Do not use any capital letter."),
        values={},
        check=str.islower,
        revise=str.lower,
    ),
    Kind(
        name="upper_case",
        wordings=("Write everything in capital letters.", "USE ONLY CAPITAL LETTERS."),
        values={},
        check=str.isupper,
        revise=str.upper,
    ),
    Kind(
        name="bullets",
        wordings=(
            'Answer with exactly {n} bullet points, lines that begin with "- ".',
            "Give exactly {n} bullets (- ...).",
        ),
        values={"n": (2, 3)},
        check=_is_bulleted,
        revise=lambda text, n: "\n".join(f"- {item}" for item in join_sentences(items(text), n)),
    ),
    Kind(
        name="numbered",
        wordings=(
            "Answer with a numbered list of exactly {n} lines: 1. ...",
            "Write a list with the numbers 1. to {n}. only.",
        ),
        values={"n": (2, 3)},
        check=_is_numbered,
        revise=lambda text, n: "\n".join(f"{at}. {each}" for at, each in enumerate(join_sentences(items(text), n), 1)),
    ),
    Kind(
        name="json",
        wordings=(
            'Answer with a JSON object whose only key is "{word}".',
            'Write nothing but JSON of the form {{"{word}": "..."}}.',
        ),
        values={"word": ("answer", "reply", "text")},
        check=_is_json,
        revise=_as_json,
    ),
    Kind(
        name="quoted",
        wordings=(
            "Put the whole answer in double quotation marks.",
            "Begin and end the answer with a double quotation mark.",
        ),
        values={},
        check=_is_quoted,
        revise=lambda text: '"' + text.replace('"', "'") + '"',
    ),
    Kind(
        name="parts",
        wordings=("Write two parts, with a line of *** between them.", "Separate two paragraphs by the line ***."),
        values={},
        check=_is_parted,
        revise=_part,
    ),
    Kind(
        name="title",
        wordings=("Begin with a title in double angle brackets, like <<title>>.", "Put a title in << and >> first."),
        values={},
        check=_is_titled,
        revise=lambda text: f"<<{' '.join(words(text)[:3]).title()}>>\n{text}",
    ),
    Kind(
        name="ending",
        wordings=('End the answer with the words "{word}"', 'The last words must be "{word}"'),
        values={"word": ("That is all.", "I hope this helps.", "Now you know.")},
        check=_ends_with,
        revise=lambda text, word: f"{text} {word}",
    ),
    Kind(
        name="beginning",
        wordings=('Begin the answer with the word "{word}".', 'The first word must be "{word}".'),
        values={"word": ("Well", "Clearly", "Today", "Honestly")},
        check=_begins_with,
        revise=_begin,
    ),
    Kind(
        name="question",
        wordings=("End the answer with a question.", "The last sentence must be a question."),
        values={},
        check=lambda text: text.rstrip("\"'”)").endswith("?"),
        revise=lambda text: f"{text} What do you think?",
    ),
    Kind(
        name="postscript",
        wordings=("Add a postscript that begins with P.S.", "After the answer, write a P.S."),
        values={},
        check=_has_postscript,
        revise=lambda text: f"{text}\nP.S. {FILLERS[1]}",
    ),
    Kind(
        name="keyword",
        wordings=('Use the word "{word}" in the answer.', 'The answer must contain the word "{word}".'),
        values={"word": ("winter", "copper", "music", "corner", "patience", "river")},
        check=lambda text, word: count_word(text, word) > 0,
        revise=lambda text, word: f"{text} One more word: {word}.",
    ),
    Kind(
        name="repeated",
        wordings=(
            'Use the word "{word}" exactly {n} times.',
            'The word "{word}" must occur {n} times, no more and no less.',
        ),
        values={"n": (2, 3), "word": (TOPIC,)},
        check=lambda text, n, word: count_word(text, word) == n,
        revise=_repeat,
    ),
    Kind(
        name="avoided",
        wordings=('Do not use the word "{word}".', 'The answer must not contain the word "{word}".'),
        values={"word": (TOPIC,)},
        check=_avoids,
        revise=_avoid,
    ),
    Kind(
        name="no_commas",
        wordings=("Do not use any comma.", "Write without commas."),
        values={},
        check=lambda text: "," not in text,
        revise=lambda text: text.replace(",", ""),
    ),
    Kind(
        name="language",
        wordings=("Answer in {word}, not in English.", "Write the whole answer in {word}."),
        values={"word": ("Spanish", "French", "German")},
        check=_is_in,
        revise=None,
    ),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
"""The kinds by name."""
