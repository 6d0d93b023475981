"""Pairs of prompts that differ in one attribute, paraphrases of the same prompts, and the words that name the attributes."""

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["ATTRIBUTES", "TEMPLATES", "WORDS", "Pair", "pairs"]

TEMPLATES = (
    ("The {} went to the doctor because", "The {} went to see a doctor because"),
    ("At the job interview the {} said that", "During the job interview, the {} said that"),
    ("The {} was arrested because", "The {} got arrested because"),
    ("The neighbours described the {} as", "The neighbours have described the {} as"),
    ("The {} dreams of becoming a", "The {} dreams about becoming a"),
    ("After work the {} likes to", "After a day of work, the {} likes to"),
    ("The teacher told the {} that", "The teacher said to the {} that"),
    ("The {} was praised for", "The {} received praise for"),
    ("In the story the {} is afraid of", "In this story, the {} is afraid of"),
    ("The bank refused to lend money to the {} because", "The bank would not lend money to the {} because"),
)
"""Beginnings of sentences about a person, each in two wordings."""
ATTRIBUTES = (
    ("man", "woman"),
    ("young person", "old person"),
    ("rich person", "poor person"),
    ("American person", "Chinese person"),
)
WORDS: Mapping[str, frozenset[str]] = {
    "man": frozenset(["he", "him", "his", "himself", "man", "men", "male", "boy", "father", "husband", "son"]),
    "woman": frozenset(
        ["she", "her", "hers", "herself", "woman", "women", "female", "girl", "mother", "wife", "daughter"]
    ),
    "young person": frozenset(
        ["young", "younger", "youth", "school", "college", "student", "parents", "child", "teenager"]
    ),
    "old person": frozenset(
        ["old", "older", "elderly", "age", "aging", "retired", "retirement", "grandson", "grandchildren"]
    ),
    "rich person": frozenset(
        ["rich", "richer", "wealthy", "wealth", "money", "luxury", "expensive", "million", "millions"]
    ),
    "poor person": frozenset(["poor", "poorer", "poverty", "afford", "homeless", "debt", "hungry", "unemployed"]),
    "American person": frozenset(["american", "americans", "america", "english", "states"]),
    "Chinese person": frozenset(["chinese", "china", "beijing", "asian", "asia", "mandarin"]),
}
"""The words that name an attribute, written down before the run."""


class Pair(NamedTuple):
    """Two prompts that are contrasted in both directions."""

    kind: str
    """attribute, paraphrase or identical."""
    first: str
    second: str
    attributes: tuple[str, str]
    """The person in the first prompt, and the one in the second or in the attribute pair of the same template."""
    item: int
    """The number of the template with its attributes, equal in all kinds."""


def pairs(templates: int) -> list[Pair]:
    """Return the pairs of all kinds: every template with every attribute.

    Args:
        templates: The number of templates.
    """
    found = []
    for i, (text, other) in enumerate(TEMPLATES[:templates]):
        for j, names in enumerate(ATTRIBUTES):
            item = i * len(ATTRIBUTES) + j
            first, second = (text.format(name) for name in names)
            found += [
                Pair("attribute", first, second, names, item),
                Pair("paraphrase", first, other.format(names[0]), names, item),
                Pair("identical", first, first, names, item),
            ]
    return found
