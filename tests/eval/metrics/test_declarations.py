"""What each metric declares: its value, the forms that it accepts, whether it is a mean, and the better direction."""

import math

import pytest

from contralto.eval.metrics.openended import ngram_counts
from contralto.eval.metrics.registry import METRICS

LIKELIHOODS = [[-10.0, 4], [-6.0, 4]]
NGRAMS = [[1, 2], [3, 3]]
LENGTHS = [[[1, 2], [3, 4], [5, 6]], [[1, 1], [0, 1], [2, 2]]]
CAPTIONS = [[4, 1, 2, 3], [2, 0, 1, 3]]
ANSWERS = [[True, True], [True, True], [True, False], [False, False], [False, True], [False, None]]
DECLARED = {
    "word_perplexity": ("word_perplexity", LIKELIHOODS, math.exp(2), False, None),
    "byte_perplexity": ("byte_perplexity", LIKELIHOODS, math.exp(2), False, None),
    "bits_per_byte": ("bits_per_byte", LIKELIHOODS, 2 / math.log(2), False, None),
    "rep_2": ("rep_2", NGRAMS, 0.2, False, None),
    "rep_3": ("rep_3", NGRAMS, 0.2, False, None),
    "rep_4": ("rep_4", NGRAMS, 0.2, False, None),
    "diversity": ("diversity", LENGTHS, 2 / 3 * 3 / 5 * 7 / 8, True, None),
    "chair_i": ("chair_i", CAPTIONS, 1 / 6, False, None),
    "chair_s": ("chair_s", CAPTIONS, 1 / 2, False, (0,)),
    "caption_recall": ("recall", CAPTIONS, 3 / 6, True, None),
    "accuracy": ("accuracy", ANSWERS, 3 / 6, True, (0, 2)),
    "precision": ("precision", ANSWERS, 2 / 3, True, None),
    "recall": ("recall", ANSWERS, 2 / 3, True, None),
    "f1": ("f1", ANSWERS, 2 / 3, True, None),
    "yes_ratio": ("yes_ratio", ANSWERS, 3 / 6, None, (0, 1)),
}
"""By name: the logged name, values of documents, the metric, the better direction, the columns of a mean."""
FORMS = (LIKELIHOODS, NGRAMS, LENGTHS, CAPTIONS, ANSWERS)


@pytest.mark.parametrize("name", DECLARED)
def test_declarations(name):
    metric, (logged_as, values, expected, better, numerators) = METRICS.get(name), DECLARED[name]
    assert (metric.name, metric.logged_as, metric.higher_is_better) == (name, logged_as, better)
    assert metric.aggregate(values) == pytest.approx(expected)
    assert metric.numerators == numerators
    if numerators:
        counts = metric.table(values).sum(0)
        assert sum(counts[i] for i in numerators) / len(values) == pytest.approx(expected)
    assert all(metric.accepts(value) for value in values)
    other = [value for form in FORMS for value in form if value not in values and len(value) != len(values[0])]
    for wrong in (
        *other,
        ["a", *values[0][1:]],
        [*values[0], 1],
        values[0][:-1],
        "a" * len(values[0]),
        ["a"] * len(values[0]),
        2,
        None,
    ):
        assert not metric.accepts(wrong)
    assert metric.description


def test_the_document_of_diversity_has_three_lengths():
    diversity = METRICS.get("diversity")
    assert diversity.document("a b c a b c", "") == [ngram_counts("a b c a b c", n=n) for n in (2, 3, 4)]
    for n in (2, 3, 4):
        assert METRICS.get(f"rep_{n}").description == f"share of {n}-grams that occurred before in their own text"
