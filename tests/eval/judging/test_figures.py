"""Figures of judgements against plain references: kappa, the length-controlled win rate, win rates, biases."""

import math
from itertools import product

import numpy as np
import pytest

from contralto.common.agreement import cohen_kappa, count_labels, fleiss_kappa
from contralto.eval.judging.accuracy import PairScorer
from contralto.eval.judging.figures import outcome, summarise_judgements
from contralto.eval.judging.games import Game
from contralto.eval.judging.judges import Judgement
from contralto.eval.judging.length import RIDGE, length_controlled
from contralto.eval.judging.presets import PRESETS
from contralto.eval.judging.verdicts import Vote


def test_cohens_kappa_of_a_textbook():
    """50 proposals, two readers: both yes 20, both no 15, only the first yes 5, only the second 10; kappa 0.4."""
    first = "Y" * 25 + "N" * 25
    second = "Y" * 20 + "N" * 5 + "Y" * 10 + "N" * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert math.isnan(cohen_kappa("YY", "YY"))
    with pytest.raises(ValueError, match="2 and 1"):
        cohen_kappa("YY", "Y")


def test_fleiss_kappa_of_a_textbook():
    """Fleiss 1971 as in textbooks: 14 raters, 10 subjects, 5 categories; kappa 0.21."""
    table = [
        *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
        *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
    ]
    assert fleiss_kappa(table) == pytest.approx(0.20993, abs=1e-5)
    assert fleiss_kappa(count_labels(["AB", "BB", "AA"], "AB")) == pytest.approx(1 - (1 / 3) / 0.5)
    with pytest.raises(ValueError, match="same number of ratings"):
        fleiss_kappa([[2, 0], [1, 0]])


def test_the_length_controlled_win_rate_solves_its_equations():
    """At the maximum the gradient of the penalised likelihood vanishes; it is computed here in plain Python."""
    rng = np.random.default_rng(0)
    shares = rng.choice([0.0, 0.25, 0.5, 1.0], 60).tolist()
    first, second = rng.integers(10, 400, (2, 60)).tolist()
    result = length_controlled(shares, first, second, resamples=200)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    center = sum(differences) / 60
    deviation = math.sqrt(sum((d - center) ** 2 for d in differences) / 59)
    theta, phi = math.log(result.value / (1 - result.value)), result.coefficient
    terms = [math.tanh(d / deviation) for d in differences]
    errors = [y - 1 / (1 + math.exp(-theta - phi * x)) for y, x in zip(shares, terms, strict=True)]
    assert sum(errors) == pytest.approx(RIDGE * theta, abs=1e-8)
    assert sum(e * x for e, x in zip(errors, terms, strict=True)) == pytest.approx(RIDGE * phi, abs=1e-8)
    assert result.low < result.value < result.high


def test_length_explains_a_judge_who_counts_characters():
    first = list(range(40, 120))
    shares = [float(a > 100) for a in first]
    plain, controlled = np.mean(shares), length_controlled(shares, first, [100] * 80, resamples=50)
    assert plain < 0.3
    assert abs(controlled.value - 0.5) < 0.15
    assert controlled.coefficient > 5
    everything = length_controlled([1.0] * 10, [5] * 10, [5] * 10, resamples=50)
    assert 0.95 < everything.value < 1
    assert everything.coefficient == 0


def _judged(first, second, *, game=0, category="", texts=("a", "b"), is_clear=False):
    """Return the judgement of a game by the shares of the answer shown first in both orders."""
    votes = tuple(None if share is None else Vote(share, is_clear) for share in (first, second))
    return Judgement(Game(str(game), str(game), ("?",), (texts[0],), (texts[1],), category), votes, ("x", "y"))


class _Rater(PairScorer):
    """A rater of a fixed name."""


def _summary(columns, preset="pairs", **options):
    judges = [_Rater(name=name, scorer=name) for name in columns]
    return summarise_judgements(
        columns, judges, systems=("tuned", "base"), preset=PRESETS[preset], resamples=200, **options
    )


def test_win_rates_and_outcomes():
    columns = {
        "j": [_judged(a, b, game=i) for i, (a, b) in enumerate([(1, 0), (1, 0), (1, 1), (0.5, 0), (0, 1), (None, 1)])]
    }
    (line,) = _summary(columns)["judges"]
    assert line["games"] == 5
    assert line["unread"] == 1
    assert line["outcomes"] == {"win": 2, "tie": 2, "loss": 1}
    assert line["win_rate"]["value"] == pytest.approx((1 + 1 + 0.5 + 0.75 + 0) / 5)
    # the exact test by enumeration: every question's sum of verdicts may have the other sign
    sums = [2, 2, 0, 1, -2]
    extreme = [
        abs(sum(s * e for s, e in zip(sums, signs, strict=True))) >= abs(sum(sums))
        for signs in product((1, -1), repeat=5)
    ]
    assert line["win_rate"]["p"] == pytest.approx(np.mean(extreme))


def test_a_clear_verdict_counts_three_times_in_arena_hard():
    columns = {"j": [_judged(1, 0, game=0, is_clear=True), _judged(0, 1, game=1), _judged(1, 0, game=2)]}
    assert _summary(columns, "arena_hard")["judges"][0]["win_rate"]["value"] == pytest.approx(
        (3 + 3 + 0 + 0 + 1 + 1) / 10
    )
    assert _summary(columns, "pairs")["judges"][0]["win_rate"]["value"] == pytest.approx(4 / 6)


def test_several_judges_are_compared_and_pooled():
    columns = {
        "a": [_judged(1, 0, game=0), _judged(1, 0, game=1), _judged(0, 1, game=2), _judged(1, 1, game=3)],
        "b": [_judged(1, 0, game=0), _judged(0, 1, game=1), _judged(0, 1, game=2), _judged(None, 1, game=3)],
        "c": [_judged(1, 0, game=0), _judged(1, 0, game=1), _judged(0.5, 1, game=2), _judged(1, 0, game=3)],
    }
    figures = _summary(columns)
    pooled = figures["judges"][-1]
    assert pooled["name"] == "all judges"
    assert pooled["games"] == 3
    assert pooled["outcomes"] == {"win": 2, "tie": 0, "loss": 1}
    assert pooled["win_rate"]["value"] == pytest.approx((1 + 2 / 3 + (0 + 0 + 0.25) / 3) / 3)
    between = figures["between"]
    assert between["games"] == 3
    assert between["pairs"][0]["same"] == pytest.approx(2 / 3)
    assert between["fleiss"] == pytest.approx(
        fleiss_kappa(
            count_labels([["win"] * 3, ["win", "loss", "win"], ["loss", "loss", "tie"]], ["win", "tie", "loss"])
        )
    )
    p = [line["win_rate"]["p"] for line in figures["judges"][:3]]
    assert max(line["win_rate"]["holm"] for line in figures["judges"][:3]) >= max(p)


def test_outcomes_need_both_orders():
    assert [outcome(each) for each in ((1.0, 1.0), (1.0, 0.5), (0.0, 1.0), (0.0, 0.0))] == ["win", "tie", "tie", "loss"]


def test_nothing_readable_is_an_error():
    with pytest.raises(ValueError, match="j has no readable verdict in both orders of any game"):
        _summary({"j": [_judged(None, None)]})
