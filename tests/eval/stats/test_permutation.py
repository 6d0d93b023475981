"""Exact tests of paired comparisons against brute force and closed forms; their power against simulation."""

import itertools
import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from contralto.eval import stats
from contralto.eval.stats import detectable, detectable_by_error, permutation, sign_flip, swap


def _brute(differences, clusters=None):
    """All assignments of signs, in whole numbers."""
    sums = {}
    for value, unit in zip(differences, clusters or range(len(differences)), strict=True):
        sums[unit] = sums.get(unit, Fraction(0)) + Fraction(value).limit_denominator(100)
    values = [value for value in sums.values() if value]
    least = abs(sum(values))
    signed = [
        sum(s * v for s, v in zip(signs, values, strict=True))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return float(Fraction(sum(abs(total) >= least for total in signed), len(signed)))


@pytest.mark.parametrize("seed", range(12))
def test_sign_flips_equal_all_assignments(seed):
    """Scores 0 and 1, sums of seeds, means of seeds, and numbers without a common step."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 11))
    kinds = (rng.integers(-1, 2, size), rng.integers(-5, 6, size), rng.integers(-3, 4, size) / 3)
    for values in kinds:
        found = sign_flip(values)
        assert found.p == pytest.approx(_brute(values.tolist()), rel=1e-12)
        assert (found.exact, found.units) == (True, np.count_nonzero(values))
    values = rng.normal(size=size)
    least = abs(values.sum())
    signed = [abs(values @ signs) for signs in itertools.product((1, -1), repeat=size)]
    assert sign_flip(values).p == np.mean(np.array(signed) >= least - 1e-12)


def test_clusters_are_flipped_whole():
    values, clusters = [1, 1, 1, -1, 0, 1, 1, 0], ["a", "a", "a", "b", "b", "c", "d", "d"]
    assert sign_flip(values, clusters=clusters).p == pytest.approx(_brute(values, clusters)) == 0.5
    assert sign_flip(values).p == pytest.approx(_brute(values)) != 0.5
    assert sign_flip(values, clusters=clusters).units == 4


@pytest.mark.parametrize(("won", "lost"), [(4, 0), (0, 9), (7, 3), (5, 5), (40, 21), (600, 500), (0, 0)])
def test_right_and_wrong_of_one_seed_is_mcnemar(won, lost):
    first = [False] * won + [True] * lost + [True, False] * 10
    second = [True] * won + [False] * lost + [True, False] * 10
    found = sign_flip(np.array(second, float) - np.array(first, float))
    assert found.p == pytest.approx(stats.mcnemar_exact(first, second).p, rel=1e-12)
    assert found.exact


def test_closed_forms():
    assert sign_flip([0.3] * 4).p == 2 / 2**4
    assert sign_flip([0] * 9) == (1.0, 0, True)
    assert sign_flip([2, -1]).p == 1.0  # |+-2 +-1| is at least 1
    assert sign_flip([3, 1]).p == pytest.approx(0.5)
    assert sign_flip([1] * 2000).p == pytest.approx(2.0**-1999)


def test_drawn_assignments_are_near_the_exact_share_and_never_0():
    rng = np.random.default_rng(0)
    values = rng.normal(0.1, 1, size=60)
    found = sign_flip(values, resamples=20_000)
    assert not found.exact
    assert found == sign_flip(values, resamples=20_000)  # a seed
    normal = 2 * NormalDist().cdf(-abs(values.sum()) / math.sqrt((values**2).sum()))
    assert found.p == pytest.approx(normal, abs=0.01)
    assert sign_flip(np.abs(values), resamples=999).p == 1 / 1000


@pytest.mark.parametrize("size", [3, 6, 9])
def test_no_level_is_exceeded_under_the_null(size):
    """Of all equally likely signs at most a share `level` has p <= level, for every level; p is as uniform as it can be."""
    magnitudes = np.random.default_rng(size).integers(1, 4, size)
    ps = sorted(sign_flip(magnitudes * np.array(signs)).p for signs in itertools.product((1, -1), repeat=size))
    for level in sorted(set(ps)):
        assert sum(p <= level + 1e-12 for p in ps) / len(ps) == pytest.approx(level)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seeds", "clusters", "drawn", "F1"])
def test_p_is_uniform_under_the_null(kind):
    rng, ps = np.random.default_rng(5), []
    for _ in range(800):
        docs = 60
        skill = rng.beta(2, 1, size=docs)
        if kind == "seeds":
            a, b = ((rng.random((5, docs)) < skill).sum(0) for _ in range(2))
            ps.append(sign_flip(b - a).p)
        elif kind == "clusters":
            unit = np.repeat(np.arange(docs // 4), 4)
            shift = rng.normal(size=docs // 4)[unit]
            ps.append(sign_flip(np.where(rng.random(docs) < 0.5, 0, np.sign(shift)), clusters=unit).p)
        elif kind == "drawn":
            ps.append(sign_flip(rng.normal(size=docs) * skill, resamples=400).p)
        else:
            labels = rng.random(docs) < 0.5
            a, b = (stats.yes_no_table(labels, list((rng.random(docs) < skill) == labels)) for _ in range(2))
            ps.append(swap(a, b, stats.f1, resamples=400).p)
    ps = np.array(ps)
    for level in (0.05, 0.2, 0.5):
        error = 3 * math.sqrt(level * (1 - level) / len(ps))
        assert np.mean(ps <= level) <= level + error
        assert np.mean(ps <= level) >= level - error - 0.12  # discrete, so it may be below


# ---------------------------------------------------------------------------------------------------------------- swapping


def _brute_swap(first, second, metric, clusters):
    units = sorted(set(clusters))
    one, two = (np.array([table[[c == u for c in clusters]].sum(0) for u in units]) for table in (first, second))
    least = abs(float(metric(two.sum(0)) - metric(one.sum(0))))
    found = []
    for moved in itertools.product((False, True), repeat=len(units)):
        keep = np.array(moved)[:, None]
        a, b = np.where(keep, two, one).sum(0), np.where(keep, one, two).sum(0)
        found.append(abs(float(metric(b) - metric(a))) >= least - 1e-9)
    return np.mean(found)


@pytest.mark.parametrize("metric", [stats.f1, stats.precision, stats.recall, stats.yes_ratio])
def test_swaps_equal_all_assignments(metric):
    rng = np.random.default_rng(3)
    labels, clusters = rng.random(24) < 0.5, [i // 3 for i in range(24)]
    tables = [stats.yes_no_table(labels, list(rng.random(24) < 0.3 + 0.4 * labels)) for _ in range(2)]
    found = swap(*tables, metric, clusters=clusters)
    assert found.exact
    assert found.p == pytest.approx(_brute_swap(*tables, metric, clusters))
    if metric is stats.yes_ratio:
        assert found.p == pytest.approx(sign_flip((tables[1] - tables[0])[:, :2].sum(-1), clusters=clusters).p)


def test_many_swaps_are_drawn():
    rng = np.random.default_rng(4)
    labels = rng.random(200) < 0.5
    one, two = (stats.yes_no_table(labels, list((rng.random(200) < skill) == labels)) for skill in (0.6, 0.9))
    found = swap(one, two, stats.f1, resamples=500)
    assert found.p == 1 / 501
    assert not found.exact
    assert swap(one, one, stats.f1) == (1.0, 0, True)
    with pytest.raises(ValueError, match="needs the same documents, not 200 and 199"):
        swap(one, two[1:], stats.f1)


# ---------------------------------------------------------------------------------------------------------- what is found


def _power_by_hand(items, discordance, difference, level=0.05):
    """The double sum of the formula, slowly."""
    share = max(discordance, difference)
    total = 0.0
    for apart in range(items + 1):
        chance = math.comb(items, apart) * share**apart * (1 - share) ** (items - apart)
        better = (1 + difference / share) / 2
        for won in range(apart + 1):
            p = (
                stats.mcnemar_exact([False] * won + [True] * (apart - won), [True] * won + [False] * (apart - won)).p
                if apart
                else 1
            )
            if p <= level:
                total += chance * math.comb(apart, won) * better**won * (1 - better) ** (apart - won)
    return total


@pytest.mark.parametrize(("items", "discordance"), [(12, 0.5), (25, 0.3), (25, 0.0), (8, 1.0)])
def test_the_smallest_difference_has_the_power(items, discordance):
    found = detectable(items, discordance)
    assert _power_by_hand(items, discordance, found) == pytest.approx(0.8, abs=0.005) or found == pytest.approx(
        1, abs=1e-3
    )
    assert _power_by_hand(items, discordance, found - 0.002) < 0.8


def test_few_documents_find_nothing():
    assert detectable(5, 0.2) is None
    assert detectable(6, 1.0) is not None  # six of six
    assert detectable(1, 1.0) is None


def test_the_smallest_difference_falls_with_documents_and_rises_with_discordance():
    assert detectable(400, 0.1) > detectable(1600, 0.1) > detectable(6400, 0.1)
    assert detectable(1600, 0.05) < detectable(1600, 0.1) < detectable(1600, 0.4)
    near = 2.8 * math.sqrt(0.1 / 6400)  # the normal approximation
    assert detectable(6400, 0.1) == pytest.approx(near, rel=0.05)
    assert detectable_by_error(1.0, units=10**6, apart=10**5) == pytest.approx(1.959964 + 0.841621, abs=0.3)
    assert detectable_by_error(math.sqrt(40) / 400, units=400, apart=40) == pytest.approx(detectable(400, 0.1))
    assert detectable_by_error(0.001, units=5, apart=2) is None
    with pytest.raises(ValueError, match=r"discordance must lie in \[0, 1\], not 2"):
        detectable(10, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("items", "discordance"), [(200, 0.1), (1000, 0.05), (60, 0.0)])
def test_a_simulation_finds_it_four_times_in_five(items, discordance):
    difference = detectable(items, discordance)
    share, rng, found = max(discordance, difference), np.random.default_rng(1), []
    for _ in range(2000):
        apart = rng.random(items) < share
        signs = np.where(rng.random(items) < (1 + difference / share) / 2, 1, -1)
        found.append(sign_flip(apart * signs).p <= 0.05)
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("docs", "size"), [(300, 1), (300, 4), (40, 1)])
def test_a_simulation_of_seeds_and_clusters_finds_it(docs, size):
    """Three seeds, right and wrong; clusters of several documents. What is found at the bound that each sample itself gives."""
    rng, found = np.random.default_rng(2), []
    unit, answers = np.repeat(np.arange(docs // size), size), 3 * docs
    skill = np.random.default_rng(3).uniform(0.2, 0.6, size=docs)

    def answer(gain):
        return (rng.random((3, docs)) < skill + gain).sum(0)

    def bound():
        sums = stats.by_cluster((answer(0) - answer(0))[:, None].astype(float), unit)
        error = math.sqrt(float((sums**2).sum())) / answers
        return detectable_by_error(error, units=len(sums), apart=np.count_nonzero(sums))

    gain = np.mean([bound() for _ in range(50)])
    for _ in range(1000):
        found.append(sign_flip(answer(gain) - answer(0), clusters=unit).p <= 0.05)
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)


def test_nothing_is_not_compared():
    with pytest.raises(ValueError, match="no items to compare"):
        sign_flip([])
    with pytest.raises(ValueError, match="one cluster per item"):
        sign_flip([1, 2], clusters=[1])


def test_what_is_exact_and_what_is_drawn():
    """Up to 14 units of any differences, and any number on a lattice of at most 60 steps."""
    any_values = np.random.default_rng(0).normal(size=15)
    assert [sign_flip(any_values[:size]).exact for size in (14, 15)] == [True, False]
    assert [sign_flip(np.arange(1, 41) / step).exact for step in (1, 59, 60, 61)] == [True, True, True, False]
    table = stats.score_table(any_values)
    assert [swap(table[:size], 0 * table[:size], stats.mean).units for size in (14, 15)] == [14, 15]
    swapped = swap(table[:14] * [1, 1], table[:14] * [0, 1], stats.mean)  # a difference of scores, so signs that flip
    assert swapped == pytest.approx(sign_flip(-any_values[:14]))


def test_draws_depend_on_the_seed():
    values = np.random.default_rng(1).normal(0.1, size=40)
    assert len({sign_flip(values, resamples=2000, seed=seed).p for seed in range(3)}) > 1
    tables = stats.score_table(values), stats.score_table(0 * values)
    assert len({swap(*tables, stats.mean, resamples=2000, seed=seed).p for seed in range(3)}) > 1


@pytest.mark.parametrize(("level", "power"), [(0.01, 0.8), (0.05, 0.9), (0.2, 0.5)])
def test_level_and_power_are_those_asked_for(level, power):
    found = detectable(25, 0.3, level=level, power=power)
    assert _power_by_hand(25, 0.3, found, level) == pytest.approx(power, abs=0.005)
    scaled = detectable_by_error(math.sqrt(12) / 40, units=40, apart=12, level=level, power=power)
    assert scaled == pytest.approx(detectable(40, 0.3, level=level, power=power))


def test_a_level_that_is_reached_exactly_counts():
    """Three of three have p = 1/4; with x = (1 + difference) / 2 they occur with the probability x^3 + (1 - x)^3 = 0.8."""
    assert detectable(3, 1.0, level=0.25) == pytest.approx(math.sqrt(6.6) / 3, abs=2e-4)


def test_sums_that_are_too_long_are_drawn():
    found = sign_flip([permutation.LONGEST + 1, 1] + [2] * 20, resamples=50)
    assert not found.exact


def test_rounding_is_no_difference_however_large_the_scores():
    noise = [0.1 * 3e9, 0.2 * 3e9, -0.3 * 3e9]  # their sum is 6e-8, not 0
    assert sign_flip([*noise, 2e9], clusters=[0, 0, 0, 1]).units == 1
    assert sign_flip([1.5e-9, 0.5]).units == 2
    changes = np.array([1, 2, -3, 4, 2, -1, 7]) * 0.1
    for scale in (1, 1e9):
        table = stats.score_table(scale * changes)
        found = swap(0 * table + [0, 1], table, lambda counts: counts[..., 0])
        assert found.p == pytest.approx(_brute(changes.round(1).tolist()))
    close = stats.score_table([1, 0.75e-9])
    assert swap(close * [0, 1], close, lambda counts: counts[..., 0]).p == 0.5  # 1 - 0.75e-9 is less than 1 + 0.75e-9
    whole = stats.score_table([2, 0, 1, 1]).astype(int)
    assert swap(whole, whole[::-1], stats.mean).p == 1.0  # the means are equal


def test_long_sums_are_exact_up_to_the_limit():
    assert sign_flip([60_000] * 20) == sign_flip([1] * 20)  # multiples of a common step
    assert sign_flip([permutation.LONGEST - 20] + [1] * 20).exact


def test_a_power_of_one_is_found_where_every_document_differs():
    assert detectable(10, 0.5, power=1.0) == pytest.approx(1.0, abs=1e-3)
    assert detectable(1000, 0.1) * 2**14 % 1 == 0
