"""Take excerpts of WikiText: prefixes of paragraphs, and the texts that follow them."""

import random
import re
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.files import read_text

__all__ = ["Excerpt", "excerpts"]

UNKNOWN = "<unk>"
SEED = 0


class Excerpt(NamedTuple):
    """The beginning of a paragraph in tokens."""

    article: int
    """The number of its article in the file."""
    prefix: list[int]
    rest: list[int]
    """The tokens that follow the prefix."""


def excerpts(path: Path, tokenizer: Any, *, prefix: int, rest: int, count: int) -> list[Excerpt]:
    """Return excerpts of the first paragraphs of a seeded shuffle that are long enough.

    WikiText's marks are undone by lm-eval's detokenizer. The mark of a rare word does not occur in a prefix, and is left out of
    the rest, since no model writes it.

    Args:
        path: A file of WikiText as published, one paragraph per line.
        tokenizer: The tokenizer of the model.
        prefix: Tokens in the prefix.
        rest: Tokens after the prefix.
        count: The number of excerpts.

    Raises:
        ValueError: The file has too few such paragraphs.
    """
    found = []
    for article, paragraph in _paragraphs(path):
        text = _detokenized(paragraph)
        if UNKNOWN in tokenizer.decode(tokenizer(text)["input_ids"][:prefix]):
            continue
        ids = tokenizer(_detokenized(" ".join(paragraph.replace(UNKNOWN, " ").split())))["input_ids"]
        if len(ids) >= prefix + rest:
            found.append(Excerpt(article, ids[:prefix], ids[prefix : prefix + rest]))
    if len(found) < count:
        raise ValueError(f"{path} has {len(found)} paragraphs of {prefix + rest} tokens or more, fewer than {count}")
    random.Random(SEED).shuffle(found)
    return found[:count]


def _paragraphs(path: Path) -> list[tuple[int, str]]:
    """Return the paragraphs with the numbers of their articles."""
    article, found = -1, []
    for line in read_text(path).split("\n"):
        text = line.strip()
        if re.fullmatch(r"= [^=].* =", text):
            article += 1
        elif text and not text.startswith("="):
            found.append((article, text))
    return found


def _detokenized(text: str) -> str:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    plain: str = wikitext_detokenizer({"page": f"{text} "})
    return plain.strip()
