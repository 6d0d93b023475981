"""The generative part of AMBER: objects that captions name, cover and make up (Wang et al. 2023, arXiv 2311.07397).

The word lists are those of its release. Nouns are found and compared as in its code, by NLTK's tagger and spaCy's vectors, if `OFFICIAL`; `PLAIN`
needs neither and finds words of the lists alone, so that its figures are not the published ones.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from contralto.common.errors import require
from contralto.common.suggestions import did_you_mean
from contralto.eval import stats
from contralto.eval.metrics.base import Metric, is_counts, stack
from contralto.eval.metrics.vocabulary import ObjectVocabulary, normalize
from contralto.eval.stats.counts import Array, CountMetric

__all__ = [
    "METRICS",
    "READERS",
    "AmberCounts",
    "AmberWords",
    "NounReader",
    "chair",
    "cog",
    "count",
    "cover",
    "document_metrics",
    "hal",
    "reader_of",
]

SIMILARITY = 0.8
"""The cosine of spaCy's vectors above which the released code takes two words as synonyms."""
SPACY, NLTK = "en_core_web_lg", ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")


class AmberCounts(NamedTuple):
    """Counts of the objects that one caption names."""

    named: int
    """Nouns of AMBER's lists, with repetitions."""
    wrong: int
    """Those that are neither in the image, nor synonyms of what is, nor words that AMBER does not count."""
    covered: int
    """Objects of the image that are named."""
    present: int
    """Objects of the image."""
    imagined: int
    """Named objects of those that people expect in such an image, and that are not in it."""
    expected: int
    """Objects that people expect, and that are not in the image."""


class AmberWords(NamedTuple):
    """AMBER's word lists."""

    association: Mapping[str, Sequence[str]]
    """The words that stand for each object (`relation.json`)."""
    safe: frozenset[str]
    """Words that are never wrong (`safe_words.txt`)."""

    @property
    def vocabulary(self) -> frozenset[str]:
        """Return all words of the association."""
        return frozenset(self.association) | {word for words in self.association.values() for word in words}


class NounReader(NamedTuple):
    """A way to find the nouns of a caption, and to tell which of them mean the same."""

    nouns: Callable[[str, Collection[str]], Sequence[str]]
    """Returns the nouns of a text, given AMBER's vocabulary."""
    similar: Callable[[str, str], bool]


def count(
    nouns: Iterable[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    words: AmberWords,
    similar: Callable[[str, str], bool],
) -> AmberCounts:
    """Count what a caption names, as AMBER's released code does.

    A noun of the lists is right if it is a safe word, an object of the image, one of the words that stand for one, or similar to these.
    Of an object that the annotation lists twice, the first is covered.

    Args:
        nouns: The nouns of the caption, in the singular.
        truth: The objects of the image.
        hallu: Objects that people expect in such an image, and that are not in it.
        words: AMBER's word lists.
        similar: Returns True for two words that mean the same.

    Examples:
        >>> words = AmberWords({"sky": [], "person": ["man"], "dog": [], "cat": []}, frozenset({"light"}))
        >>> count(["man", "dog", "cat", "light", "hope"], ["sky", "person"], ["dog"], words, lambda one, other: False)
        AmberCounts(named=3, wrong=2, covered=1, present=2, imagined=1, expected=1)
    """
    vocabulary = words.vocabulary
    named = [noun for noun in nouns if noun in vocabulary]
    real, unreal = _places(truth, words), _places(hallu, words)
    covered: set[int] = set()
    imagined: set[int] = set()
    wrong = 0
    for noun in named:
        if noun in words.safe:
            continue
        if (place := _first(noun, real, str.__eq__)) is not None:
            covered.add(place)
            continue
        found = (_first(noun, unreal, str.__eq__), _first(noun, unreal, similar))
        imagined.update(each for each in found if each is not None)
        if (place := _first(noun, real, similar)) is not None:
            covered.add(place)
        else:
            wrong += 1
    return AmberCounts(len(named), wrong, len(covered), len(truth), len(imagined), len(hallu))


def _places(objects: Sequence[str], words: AmberWords) -> list[tuple[str, int]]:
    """Return the words for objects with the number of the object: first those that stand for it, then its own name."""
    standing = [(word, place) for place, name in enumerate(objects) for word in words.association[name]]
    return standing + [(name, place) for place, name in enumerate(objects)]


def _first(noun: str, places: Sequence[tuple[str, int]], same: Callable[[str, str], bool]) -> int | None:
    return next((place for word, place in places if same(noun, word)), None)


def document_metrics(counts: AmberCounts) -> dict[str, Any]:
    """Return the values that lm-eval logs for a caption.

    Args:
        counts: Its counts.
    """
    values = tuple(counts)
    return {"chair": values, "cover": values, "hal": float(counts.wrong > 0), "cog": values}


# -------------------------------------------------------------------------------------------------------------- readers


def _official_nouns(text: str, vocabulary: Collection[str]) -> list[str]:
    """Return the nouns of a text by NLTK's tokenizer, tagger and lemmatizer."""
    import nltk
    from nltk.stem import WordNetLemmatizer

    lemmatizer = WordNetLemmatizer()
    try:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [lemmatizer.lemmatize(word) for word, tag in tagged if tag.startswith("NN")]
    except LookupError as error:
        raise ValueError(
            f"AMBER finds nouns by data of NLTK that is not there: python -m nltk.downloader {' '.join(NLTK)}; or set amber_words "
            "to plain in metadata, whose figures are not the published ones"
        ) from error


@cache
def _vectors() -> Any:
    require("spacy")
    import spacy

    try:
        return spacy.load(SPACY)
    except OSError as error:
        raise ValueError(
            f"AMBER compares nouns by spaCy's vectors, which are not there: python -m spacy download {SPACY}; or set amber_words to "
            "plain in metadata, whose figures are not the published ones"
        ) from error


@cache
def _official_similar(one: str, other: str) -> bool:
    vectors = _vectors()
    return bool(vectors(one).similarity(vectors(other)) > SIMILARITY)


def _plain_nouns(text: str, vocabulary: Collection[str]) -> list[str]:
    """Return the words of a text that are words of the vocabulary, in the singular."""
    names = _vocabulary_of(frozenset(vocabulary))
    return [names.singular(word) for word in normalize(text).split()]


@cache
def _vocabulary_of(words: frozenset[str]) -> ObjectVocabulary:
    return ObjectVocabulary.of([[word] for word in sorted(words)])


OFFICIAL, PLAIN = "official", "plain"
READERS: Mapping[str, NounReader] = {
    OFFICIAL: NounReader(_official_nouns, _official_similar),
    PLAIN: NounReader(_plain_nouns, str.__eq__),
}
"""How nouns are read: as the released code does, or by the word lists alone."""


def reader_of(name: str) -> NounReader:
    """Return a way to read nouns, after a check that it can be used.

    Args:
        name: A key of `READERS`.

    Raises:
        ModuleNotFoundError: NLTK or spaCy is not installed.
        ValueError: There is no such way, or its data is missing.
    """
    if name not in READERS:
        raise ValueError(
            f"there is no amber_words {name!r}{did_you_mean(name, READERS)}; there are {', '.join(READERS)}"
        )
    reader = READERS[name]
    if name == OFFICIAL:
        require("nltk")
        reader.nouns("A dog.", ())
        _vectors()
    return reader


# -------------------------------------------------------------------------------------------------------------- metrics


def _names_wrong_object(values: Sequence[Sequence[int]]) -> Array:
    return stats.score_table([wrong > 0 for _, wrong, *_ in values])


def _declare(name: str, description: str, value: CountMetric, *, higher_is_better: bool = False) -> Metric:
    return Metric(
        name=f"amber_{name}",
        logged_as=name,
        description=description,
        accepts=lambda value: is_counts(value, 6),
        table=_names_wrong_object if name == "hal" else stack,
        value=value,
        numerators=(0,) if name == "hal" else None,
        higher_is_better=higher_is_better,
        document=None,
    )


METRICS = (
    _declare("chair", "share of named objects that are not in the image", lambda c: stats.ratio(c[..., 1], c[..., 0])),
    _declare(
        "cover",
        "share of the objects of the image that are named",
        lambda c: stats.ratio(c[..., 2], c[..., 3]),
        higher_is_better=True,
    ),
    _declare("hal", "share of captions that name an object that is not in the image", stats.mean),
    _declare(
        "cog",
        "share of the objects that people expect, and that are not there, which are named",
        lambda c: stats.ratio(c[..., 4], c[..., 5]),
    ),
)
"""CHAIR, Cover, Hal and Cog, of `AmberCounts`; shares, where the release prints percentages."""
chair, cover, hal, cog = (metric.aggregate for metric in METRICS)
