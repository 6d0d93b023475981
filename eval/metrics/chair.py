"""CHAIR: the rate of objects that captions name but images do not show (Rohrbach et al. 2018, arXiv 1809.02156)."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from contralto.eval import stats
from contralto.eval.metrics.base import Metric, is_counts, stack
from contralto.eval.metrics.vocabulary import ObjectVocabulary, mentions
from contralto.eval.stats.counts import Array, CountMetric

__all__ = [
    "CUT_METRICS",
    "METRICS",
    "CaptionCounts",
    "ChairRates",
    "chair_i",
    "count",
    "cut",
    "cut_metrics",
    "document_metrics",
    "equal_length",
    "rates",
    "recall",
]


class CaptionCounts(NamedTuple):
    """The objects that one caption names."""

    named: int
    """Objects named, with repetitions."""
    wrong: int
    """Those of `named` that are not in the image."""
    recalled: int
    """Distinct objects of the image that are named."""
    present: int
    """Distinct objects of the image."""


class ChairRates(NamedTuple):
    """The metrics over captions."""

    chair_i: float
    """Share of the objects named that are not in the image."""
    chair_s: float
    """Share of the captions that name any such object."""
    recall: float
    """Share of the objects of the image that are named."""


def count(caption: str, objects: Collection[str], vocabulary: ObjectVocabulary) -> CaptionCounts:
    """Count the objects that a caption names.

    Args:
        caption: The caption.
        objects: The objects of the image.
        vocabulary: The names of objects.

    Examples:
        >>> count("A cat, a cat and a dog.", {"dog", "bed"}, ObjectVocabulary.of([["cat"], ["dog"], ["bed"]]))
        CaptionCounts(named=3, wrong=2, recalled=1, present=2)
    """
    named, present = mentions(caption, vocabulary), set(objects)
    wrong = sum(name not in present for name in named)
    return CaptionCounts(len(named), wrong, len(present & set(named)), len(present))


def rates(counts: Sequence[CaptionCounts]) -> ChairRates:
    """Return CHAIR over captions (Rohrbach et al. 2018, arXiv 1809.02156), and the recall that a low CHAIR may cost.

        CHAIR_i = sum wrong / sum named    CHAIR_s = captions with wrong > 0 / captions    recall = sum recalled / sum present

    A quotient 0 / 0 is 0.

    Args:
        counts: The counts of each caption, from `count`.

    Returns:
        Shares in [0, 1].

    Raises:
        ValueError: There are no captions.

    Examples:
        >>> rates([CaptionCounts(named=3, wrong=2, recalled=1, present=2), CaptionCounts(named=1, wrong=0, recalled=1, present=2)])
        ChairRates(chair_i=0.5, chair_s=0.5, recall=0.5)
    """
    if not counts:
        raise ValueError("CHAIR needs at least one caption, not none")
    return ChairRates(*(metric.aggregate(counts) for metric in METRICS))


def document_metrics(caption: str, counts: CaptionCounts) -> dict[str, Any]:
    """Return the values that lm-eval logs for a caption: numbers, and the counts behind `chair_i` and `recall`.

    Args:
        caption: The caption.
        counts: Its counts, from `count`.
    """
    return {
        "chair_i": tuple(counts),
        "chair_s": float(counts.wrong > 0),
        "recall": tuple(counts),
        "objects": float(counts.named),
        "length": float(len(caption.split())),
    }


def cut(caption: str, words: int) -> str:
    """Return the first words of a caption.

    Args:
        caption: The caption.
        words: The number of words, separated by white space, at least 1.

    Raises:
        ValueError: `words` is below 1 or no whole number.

    Examples:
        >>> cut("A cat on a bed.  A dog below it.", 5)
        'A cat on a bed.'
    """
    if type(words) is not int or words < 1:
        raise ValueError(f"chair_words must be a whole number of at least 1, not {words!r}")
    return " ".join(caption.split()[:words])


def cut_metrics(caption: str, objects: Collection[str], vocabulary: ObjectVocabulary, *, words: int) -> dict[str, Any]:
    """Return CHAIR of the beginning of a caption, so that systems that write at different length are compared at the same length.

    Args:
        caption: The caption.
        objects: The objects of the image.
        vocabulary: The names of objects.
        words: The number of words that count.

    Returns:
        `chair_i_cut` and `recall_cut`, the counts; `chair_s_cut`; `reached`, 1.0 for a caption that is long enough.
    """
    counts = count(cut(caption, words), objects, vocabulary)
    return {
        "chair_i_cut": tuple(counts),
        "chair_s_cut": float(counts.wrong > 0),
        "recall_cut": tuple(counts),
        "reached": float(len(caption.split()) >= words),
    }


def equal_length(
    captions: Mapping[str, Sequence[str]], objects: Sequence[Collection[str]], vocabulary: ObjectVocabulary
) -> dict[str, list[CaptionCounts]]:
    """Count the objects of several systems' captions at equal length: of each image as many words as the shortest caption has.

    `rates` of the counts is CHAIR at equal length, and paired intervals of a difference come from
    `contralto.eval.stats.Bootstrap`, since every image has counts of every system.

    Args:
        captions: The captions of each system, one per image.
        objects: The objects of each image.
        vocabulary: The names of objects.

    Returns:
        The counts of each system, one per image.

    Raises:
        ValueError: The systems have captions of different numbers of images.

    Examples:
        >>> vocabulary = ObjectVocabulary.of([["cat"], ["dog"], ["bed"]])
        >>> captions = {"short": ["A cat on a bed."], "long": ["A cat lies on a bed, and a dog below it."]}
        >>> {name: rates(each).chair_s for name, each in equal_length(captions, [["cat", "bed"]], vocabulary).items()}
        {'short': 0.0, 'long': 0.0}
    """
    if len({len(objects), *(len(each) for each in captions.values())}) != 1:
        numbers = ", ".join(f"{name} {len(each)}" for name, each in captions.items())
        raise ValueError(f"systems must have one caption for each of the {len(objects)} images, and have {numbers}")
    shortest = [min(len(caption.split()) for caption in each) for each in zip(*captions.values(), strict=True)]
    return {
        name: [
            count(" ".join(caption.split()[:words]), present, vocabulary)
            for caption, words, present in zip(each, shortest, objects, strict=True)
        ]
        for name, each in captions.items()
    }


def _names_wrong_object(values: Sequence[Sequence[int]]) -> Array:
    return stats.score_table([wrong > 0 for _, wrong, *_ in values])


def _declare(
    logged_as: str, description: str, value: CountMetric, *, higher_is_better: bool = False, is_share: bool = False
) -> Metric:
    return Metric(
        name=logged_as if logged_as.startswith("chair") else f"caption_{logged_as}",
        logged_as=logged_as,
        description=description,
        accepts=lambda value: is_counts(value, 4),
        table=_names_wrong_object if is_share else stack,
        value=value,
        numerators=(0,) if is_share else None,
        higher_is_better=higher_is_better,
        document=None,
    )


METRICS = (
    _declare(
        "chair_i", "share of named objects that are not in the image", lambda c: stats.ratio(c[..., 1], c[..., 0])
    ),
    _declare("chair_s", "share of captions that name such an object", stats.mean, is_share=True),
    _declare(
        "recall",
        "share of the objects of the image that are named",
        lambda c: stats.ratio(c[..., 2], c[..., 3]),
        higher_is_better=True,
    ),
)
"""lm-eval keeps `CaptionCounts` of each caption; in the order of `ChairRates`."""
CUT_METRICS = tuple(
    _declare(
        f"{each.logged_as}_cut",
        f"{each.description}, in its first words",
        each.value,
        higher_is_better=bool(each.higher_is_better),
        is_share=each.numerators is not None,
    )
    for each in METRICS
)
"""The same of the beginnings of captions."""
chair_i, recall = METRICS[0].aggregate, METRICS[2].aggregate
