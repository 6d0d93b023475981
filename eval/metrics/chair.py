"""CHAIR: which of the objects that captions name are not in the image (Rohrbach et al. 2018, arXiv 1809.02156).

What an object is called is the user's to say: a synonym list such as that of the paper's code, one object per line, its
name first: `dog, puppy, beagle`. Matching is that of the paper's code (`utils/chair.py`) but for these points:

- Words are found by a pattern, not by NLTK's tokenizer, and brought to the singular by the rules of `Vocabulary.singular`,
  which ask the synonym list what is a word. The original asks a general rule, which makes "wine glas" of "wine glasses".
- Every name of several words that the list has is matched, the longest first. The original matches a fixed list of
  pairs, and so never its own "stove top oven".
- "train track" is no train. Forks of the original have this rule, the original has not.
"""

import json
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contralto.common.files import read_lines, read_text

__all__ = ["Counts", "Rates", "Vocabulary", "coco_objects", "count", "mentions", "rates", "read_synonyms"]

ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
COMPOUNDS = {
    **{f"{young} {animal}": animal for young in ("baby", "adult") for animal in ANIMALS},  # no person is meant
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "home plate": "home plate",
    "train track": "train track",
}
"""What two words mean together that mean something else apart; some of it is no object."""
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
"""Plural endings, and what stands there in the singular."""


class Vocabulary(NamedTuple):
    """What objects are called."""

    names: Mapping[str, str]
    """The object for each of its names, in lower case."""
    words: frozenset[str]
    """The words of all names."""
    longest: int
    """How many words the longest name has."""

    @classmethod
    def of(cls, groups: Iterable[Sequence[str]]) -> "Vocabulary":
        """Of groups of names, each the object's own name first. Where a name is in two groups, the last one counts."""
        names = {plain(name): plain(group[0]) for group in groups for name in group}
        parts = [name.split() for name in [*names, *COMPOUNDS]]
        return cls(names, frozenset(word for part in parts for word in part), max(map(len, parts)))

    def singular(self, word: str) -> str:
        """A word without its plural ending, if that makes it a word that some name has.

        Examples:
            >>> vocabulary = Vocabulary.of([["person", "policeman"], ["knife"], ["wine glass"], ["bus"], ["skis"]])
            >>> [vocabulary.singular(word) for word in ("policemen", "knives", "glasses", "bus", "buses", "skis", "us")]
            ['policeman', 'knife', 'glass', 'bus', 'bus', 'skis', 'us']
        """
        stems = [word, IRREGULAR.get(word, ""), re.sub("men$", "man", word)]
        stems += [word.removesuffix(end) + single for end, single in ENDINGS if word.endswith(end)]
        return next((stem for stem in stems if stem in self.words), word)


def plain(text: str) -> str:
    """A text in lower case, words alone."""
    return " ".join(re.findall(r"\w+", text.lower()))


class Counts(NamedTuple):
    """What one caption says of its image."""

    said: int
    """Objects named, as often as they are."""
    wrong: int
    """Those of them that are not in the image."""
    found: int
    """Different objects of the image that are named."""
    there: int
    """Different objects of the image."""


class Rates(NamedTuple):
    """The measures over captions."""

    chair_i: float
    """Share of the objects named that are not there."""
    chair_s: float
    """Share of the captions that name any such."""
    recall: float
    """Share of the objects there that are named."""


def read_synonyms(path: Path) -> Vocabulary:
    """The synonym list of a file: a line per object, names separated by commas, the object's own name first.

    Raises:
        ValueError: no file; a line without a name.
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
    return Vocabulary.of(groups)


def mentions(text: str, vocabulary: Vocabulary) -> list[str]:
    """The objects that a text names, in its order, as often as it names them.

    Examples:
        >>> vocabulary = Vocabulary.of([["dog", "puppy"], ["train"], ["chair", "seat"], ["toilet"]])
        >>> mentions("Two puppies and a baby dog on train tracks, near the seat of a toilet", vocabulary)
        ['dog', 'dog', 'toilet']
    """
    words = [vocabulary.singular(word) for word in plain(text).split()]
    parts: list[str] = []
    while words:
        length, part = _first(words, vocabulary)
        parts.append(part)
        words = words[length:]
    if {"toilet", "seat"} <= set(parts):  # "the seat of the toilet" is no chair
        parts = [part for part in parts if part != "seat"]
    return [vocabulary.names[part] for part in parts if part in vocabulary.names]


def _first(words: Sequence[str], vocabulary: Vocabulary) -> tuple[int, str]:
    """The longest name that the words begin with, or the first word."""
    for length in range(min(vocabulary.longest, len(words)), 1, -1):
        name = " ".join(words[:length])
        if name in COMPOUNDS or name in vocabulary.names:
            return length, COMPOUNDS.get(name, name)
    return 1, words[0]


def count(text: str, objects: Collection[str], vocabulary: Vocabulary) -> Counts:
    """What a caption says of an image that shows these objects.

    Examples:
        >>> count("A cat, a cat and a dog.", {"dog", "bed"}, Vocabulary.of([["cat"], ["dog"], ["bed"]]))
        Counts(said=3, wrong=2, found=1, there=2)
    """
    said, there = mentions(text, vocabulary), set(objects)
    return Counts(len(said), sum(name not in there for name in said), len(there & set(said)), len(there))


def rates(counts: Sequence[Counts]) -> Rates:
    """CHAIR over captions (Rohrbach et al. 2018, arXiv 1809.02156), and the recall that shows what a low CHAIR has cost.

        CHAIR_i = sum wrong / sum said    CHAIR_s = captions with wrong > 0 / captions    recall = sum found / sum there

    Where a quotient is 0 / 0, it is 0.

    Args:
        counts: one per caption, from `count`.

    Raises:
        ValueError: no captions.

    Examples:
        >>> rates([Counts(said=3, wrong=2, found=1, there=2), Counts(said=1, wrong=0, found=1, there=2)])
        Rates(chair_i=0.5, chair_s=0.5, recall=0.5)
    """
    if not counts:
        raise ValueError("CHAIR needs at least one caption, not none")
    said, wrong, found, there = (sum(column) for column in zip(*counts, strict=True))
    return Rates(
        chair_i=wrong / said if said else 0.0,
        chair_s=sum(each.wrong > 0 for each in counts) / len(counts),
        recall=found / there if there else 0.0,
    )


def coco_objects(
    instances: Path, captions: Path, vocabulary: Vocabulary, *, n: int | None = None, seed: int = 0
) -> dict[str, list[str]]:
    """The objects of COCO images: those with a segmentation mask, and those that any of their human captions names.

    Args:
        instances: COCO's `instances_*.json`.
        captions: COCO's `captions_*.json` of the same images.
        vocabulary: what the objects are called; it has every category of `instances`.
        n: of how many images, chosen at random among those that have captions; None for all.
        seed: of that choice.

    Returns:
        By file name of the image, sorted by COCO's number.

    Raises:
        ValueError: not COCO annotations; n is none of 1, 2, ... images; a category that has no name in the vocabulary.
    """
    boxes, told = _coco(instances, {"annotations", "categories"}), _coco(captions, {"annotations", "images"})
    category = {each["id"]: plain(each["name"]) for each in boxes["categories"]}
    for name in category.values():
        if name not in vocabulary.names:
            raise ValueError(f"the synonym list has no line for {name!r}, a category of {instances}: add one")
    numbers = sorted({each["image_id"] for each in told["annotations"]})
    if n is None:
        n = len(numbers)
    if not isinstance(n, int) or not 1 <= n <= len(numbers):
        raise ValueError(f"n must be from 1 to {len(numbers)}, the images that {captions} has captions of, not {n!r}")
    chosen = sorted(random.Random(seed).sample(numbers, n))
    found: dict[int, set[str]] = {number: set() for number in chosen}
    for each in boxes["annotations"]:
        if each["image_id"] in found:
            found[each["image_id"]].add(vocabulary.names[category[each["category_id"]]])
    for each in told["annotations"]:
        if each["image_id"] in found:
            found[each["image_id"]].update(mentions(each["caption"], vocabulary))
    files = {each["id"]: each["file_name"] for each in told["images"]}
    return {files[number]: sorted(objects) for number, objects in found.items()}


def _coco(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """A file of annotations."""
    if not path.is_file():
        raise ValueError(f"there is no {path}: CHAIR reads COCO's instances and captions of the images")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise ValueError(f"{path} is not a COCO annotation file: it needs the keys {' and '.join(sorted(keys))}")
    return content


def measures(text: str, counts: Counts) -> dict[str, Any]:
    """What lm-eval keeps of one caption; `chair_i` and `recall` are made of the counts of all."""
    return {
        "chair_i": tuple(counts),
        "chair_s": float(counts.wrong > 0),
        "recall": tuple(counts),
        "objects": float(counts.said),
        "length": float(len(text.split())),
    }


def chair_i(counts: Iterable[Sequence[int]]) -> float:
    """`Rates.chair_i`, for lm-eval."""
    return rates([Counts(*each) for each in counts]).chair_i


def recall(counts: Iterable[Sequence[int]]) -> float:
    """`Rates.recall`, for lm-eval."""
    return rates([Counts(*each) for each in counts]).recall
