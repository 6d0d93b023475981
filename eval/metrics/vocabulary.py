"""Match names of objects in captions as the code of CHAIR does (Rohrbach et al. 2018, arXiv 1809.02156).

The names are the user's: a synonym list such as that of the paper's code, one object per line, its own name first:
`dog, puppy, beagle`. Matching is that of the paper's code (`utils/chair.py`) but for these points:

- Words are found by a pattern, not by NLTK's tokenizer, and converted to the singular by the rules of
  `ObjectVocabulary.singular`, which accept only words of the synonym list. The original applies a general rule, which makes
  "wine glas" of "wine glasses".
- Every name of several words that the list has is matched, the longest first. The original matches a fixed list of
  pairs, and so never its own "stove top oven".
- "train track" is no train. Forks of the original have this rule, the original has not.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from contralto.common.files import read_lines

__all__ = ["ObjectVocabulary", "mentions", "normalize", "read_synonyms"]

ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
COMPOUNDS = {
    **{f"{young} {animal}": animal for young in ("baby", "adult") for animal in ANIMALS},  # not a person
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "home plate": "home plate",
    "train track": "train track",
}
"""Compounds whose words mean something else on their own; some compounds are no object."""
IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
    "oxen": "ox",
    "feet": "foot",
    "teeth": "tooth",
}
ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
"""Plural endings and their replacement in the singular."""


class ObjectVocabulary(NamedTuple):
    """The names of objects."""

    names: Mapping[str, str]
    """The object of each name, in lower case."""
    words: frozenset[str]
    """The words of all names."""
    longest: int
    """The number of words of the longest name."""

    @classmethod
    def of(cls, groups: Iterable[Sequence[str]]) -> "ObjectVocabulary":
        """Build a vocabulary of groups of names; the first name of a group is the object's own.

        Args:
            groups: The names of each object. A name in two groups belongs to the last of them.
        """
        names = {normalize(name): normalize(group[0]) for group in groups for name in group}
        parts = [name.split() for name in [*names, *COMPOUNDS]]
        return cls(names, frozenset(word for part in parts for word in part), max(map(len, parts)))

    def singular(self, word: str) -> str:
        """Return a word without its plural ending, if the result is a word of some name; else the word.

        Args:
            word: A word in lower case.

        Examples:
            >>> vocabulary = ObjectVocabulary.of([["person", "policeman"], ["knife"], ["wine glass"], ["bus"], ["skis"]])
            >>> [vocabulary.singular(word) for word in ("policemen", "knives", "glasses", "bus", "buses", "skis", "us")]
            ['policeman', 'knife', 'glass', 'bus', 'bus', 'skis', 'us']
        """
        stems = [word, IRREGULAR.get(word, ""), re.sub("men$", "man", word)]
        stems += [word.removesuffix(end) + single for end, single in ENDINGS if word.endswith(end)]
        return next((stem for stem in stems if stem in self.words), word)


def normalize(text: str) -> str:
    """Return the words of a text in lower case, separated by single spaces.

    Args:
        text: The text.
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def read_synonyms(path: Path) -> ObjectVocabulary:
    """Read a synonym list: a line per object, names separated by commas, the object's own name first.

    Args:
        path: The file.

    Raises:
        ValueError: The file is missing or empty, or a name is empty.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no synonym list {path}: CHAIR needs one, a line per object, names separated by commas, the object's "
            "own name first (the paper's is data/synonyms.txt of github.com/LisaAnne/Hallucination)"
        )
    groups = []
    for number, line in enumerate(read_lines(path), 1):
        group = [name.strip() for name in line.split(",")]
        if line.strip() and not all(group):
            raise ValueError(
                f"{path}, line {number}: an empty name in {line.strip()!r}; names are separated by one comma"
            )
        groups += [group] if line.strip() else []
    if not groups:
        raise ValueError(f"{path} names no object: it must have a line per object, names separated by commas")
    return ObjectVocabulary.of(groups)


def mentions(text: str, vocabulary: ObjectVocabulary) -> list[str]:
    """Return the objects that a text names, in its order, with repetitions.

    Args:
        text: The text.
        vocabulary: The names of objects.

    Examples:
        >>> vocabulary = ObjectVocabulary.of([["dog", "puppy"], ["train"], ["chair", "seat"], ["toilet"]])
        >>> mentions("Two puppies and a baby dog on train tracks, near the seat of a toilet", vocabulary)
        ['dog', 'dog', 'toilet']
    """
    words = [vocabulary.singular(word) for word in normalize(text).split()]
    parts: list[str] = []
    while words:
        length, part = _first(words, vocabulary)
        parts.append(part)
        words = words[length:]
    if {"toilet", "seat"} <= set(parts):  # "the seat of the toilet" is no chair
        parts = [part for part in parts if part != "seat"]
    return [vocabulary.names[part] for part in parts if part in vocabulary.names]


def _first(words: Sequence[str], vocabulary: ObjectVocabulary) -> tuple[int, str]:
    """Return the length and the meaning of the longest name that the words begin with, or of the first word."""
    for length in range(min(vocabulary.longest, len(words)), 1, -1):
        name = " ".join(words[:length])
        if name in COMPOUNDS or name in vocabulary.names:
            return length, COMPOUNDS.get(name, name)
    return 1, words[0]
