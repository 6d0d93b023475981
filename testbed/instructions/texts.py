"""Split answers into words and sentences, and finish truncated ones."""

import re

__all__ = ["FILLERS", "count_word", "finished", "has_content", "items", "join_sentences", "sentences", "words"]

FILLERS = (
    "That is the main point.",
    "There is more to say about it.",
    "Much depends on the case.",
    "It is worth a closer look.",
    "Most people would agree.",
)
"""Sentences that fit every answer, with which a reviser lengthens one that is too short."""
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")  # noqa: RUF001 (models write the typographic apostrophe)
_END = re.compile(r"(?<=[.!?])[\"'”)\]]*\s+|\s*\n\s*")
_FINISHED = re.compile(r"[.!?][\"'”)\]]*\Z")
_MARK = re.compile(r"^(?:[-*•]|\d+[.)])\s+")


def words(text: str) -> list[str]:
    """Return the words of a text: runs of letters and digits, joined by apostrophes and hyphens.

    Args:
        text: any text.

    Examples:
        >>> words("Well-known bees don't sleep, 24/7.")
        ['Well-known', 'bees', "don't", 'sleep', '24', '7']
    """
    return _WORD.findall(text)


def has_content(text: str, least: int = 3) -> bool:
    """Return True if a text has some words, so that no check is passed by an empty answer.

    Args:
        text: an answer.
        least: the number of words that it must have.
    """
    return len(words(text)) >= least


def sentences(text: str) -> list[str]:
    """Split a text into sentences at `.`, `!`, `?` before white space, and at line ends; the last one may be unfinished.

    Args:
        text: any text.

    Examples:
        >>> sentences("Bees fly. Do they sleep?\\nThey")
        ['Bees fly.', 'Do they sleep?', 'They']
    """
    pieces, start = [], 0
    for match in _END.finditer(text):
        pieces.append(text[start : match.end()])
        start = match.end()
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces if words(piece)]


def finished(text: str) -> str:
    """Return a text without an unfinished last sentence; a text of one unfinished sentence gets a full stop.

    Args:
        text: an answer, perhaps truncated.

    Examples:
        >>> finished("Bees fly. They also"), finished("Bees fly and")
        ('Bees fly.', 'Bees fly and.')
    """
    text = text.strip()
    if _FINISHED.search(text) or not text:
        return text
    kept = text
    while parts := sentences(kept):
        if _FINISHED.search(parts[-1]) and len(parts[-1]) > 3:  # "1." begins an item and ends none
            return kept
        cut = kept.rfind(parts[-1])
        kept = kept[:cut].rstrip()
    return text.rstrip(",;: ") + "."


def join_sentences(parts: list[str], count: int) -> list[str]:
    """Return exactly `count` sentences: the first ones, filled up with `FILLERS`.

    Args:
        parts: sentences.
        count: their number in the result, at most `len(FILLERS)`.
    """
    kept = parts[:count]
    spare = [filler for filler in FILLERS if filler not in kept]
    return [*kept, *spare[: count - len(kept)]]


def items(text: str) -> list[str]:
    """Return the items of a list, or else the sentences of a text, without marks at their beginning.

    Args:
        text: an answer.

    Examples:
        >>> items("- Honey\\n- Wax"), items("Bees fly. They sting.")
        (['Honey', 'Wax'], ['Bees fly.', 'They sting.'])
    """
    lines = [line.strip() for line in text.split("\n")]
    marked = [_MARK.sub("", line) for line in lines if _MARK.match(line)]
    found = marked or sentences(text)
    return [item for item in found if words(item)]


def count_word(text: str, word: str) -> int:
    """Return how often a word occurs in a text, whatever its case, as a word of its own.

    Args:
        text: any text.
        word: the word.

    Examples:
        >>> count_word("Bees! No bee is like other bees.", "bees")
        2
    """
    return sum(found.lower() == word.lower() for found in words(text))
