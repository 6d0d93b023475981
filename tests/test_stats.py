"""The statistics against scipy. Seen to go red with: a one-sided tail, `<` for `<=` in the sum, z^2 left out."""

import random

import pytest
from scipy.stats import binomtest

from contralto.eval.stats import mcnemar_exact, proportion


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 1), (7, 7), (40, 12), (0, 30), (300, 250)])
def test_mcnemar_equals_the_binomial_test(won, lost):
    pairs = [(False, True)] * won + [(True, False)] * lost + [(True, True)] * 9 + [(False, False)] * 4
    random.Random(0).shuffle(pairs)
    result = mcnemar_exact([a for a, _ in pairs], [b for _, b in pairs])
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert (result.won, result.lost, result.p) == (won, lost, pytest.approx(expected, rel=1e-9))


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (3, 10), (500, 1000), (7, 7)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_proportion_equals_wilson(hits, n, confidence):
    interval = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    result = proportion([True] * hits + [False] * (n - hits), confidence=confidence)
    assert result == (pytest.approx(hits / n), pytest.approx(interval.low), pytest.approx(interval.high), n)


@pytest.mark.parametrize("n", [3, 19, 57, 100, 400, 1000])
def test_the_interval_holds_its_value_at_the_ends(n):
    for hits in (0, n):
        value, low, high, _ = proportion([True] * hits + [False] * (n - hits))
        assert 0 <= low <= value <= high <= 1


def test_unequal_or_no_items():
    with pytest.raises(ValueError, match="zip"):
        mcnemar_exact([True], [True, False])
    with pytest.raises(ValueError, match="at least one item"):
        proportion([])
