"""The statistics against scipy and against slow references in plain Python; planted effects are found, planted nulls are not."""

import math
import random
import time

import numpy as np
import pytest
from scipy.stats import binomtest

from contralto.eval import stats
from contralto.eval.stats import mcnemar_exact, proportion

METRICS = {
    "accuracy": lambda tp, fp, tn, positives, n: (tp + tn) / n,
    "precision": lambda tp, fp, tn, positives, n: tp / (tp + fp) if tp + fp else 0.0,
    "recall": lambda tp, fp, tn, positives, n: tp / positives if positives else 0.0,
    "f1": lambda tp, fp, tn, positives, n: 2 * tp / (tp + fp + positives) if tp + fp + positives else 0.0,
    "yes_ratio": lambda tp, fp, tn, positives, n: (tp + fp) / n,
}


def _questions(n, *, seed=0, clusters=None, skill=(0.8, 0.9), bias=(0.0, 0.0), stick=0.0):
    """Labels, the answers of two systems, clusters. With `stick`, whole clusters are easy or hard for one system."""
    rng = random.Random(seed)
    size = n // (clusters or n)
    labels, answers, groups = [], ([], []), []
    for k in range(n // size):
        luck = [rng.random() for _ in skill]
        for _ in range(size):
            label = rng.random() < 0.5
            labels.append(label)
            groups.append(k)
            for said, p, lean, fate in zip(answers, skill, bias, luck, strict=True):
                draw = fate if rng.random() < stick else rng.random()
                is_right = draw < p
                said.append(True if rng.random() < lean else label == is_right)
    return labels, *answers, groups


def _slow_counts(labels, answers):
    tp = sum(answer is True and label for label, answer in zip(labels, answers, strict=True))
    fp = sum(answer is True and not label for label, answer in zip(labels, answers, strict=True))
    tn = sum(answer is False and not label for label, answer in zip(labels, answers, strict=True))
    return tp, fp, tn, sum(labels), len(labels)


# ------------------------------------------------------------------------------------------------------ right or wrong


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 1), (7, 7), (40, 12), (0, 30), (300, 250), (1, 113)])
def test_mcnemar_equals_the_binomial_test(won, lost):
    pairs = [(False, True)] * won + [(True, False)] * lost + [(True, True)] * 9 + [(False, False)] * 4
    random.Random(0).shuffle(pairs)
    result = mcnemar_exact([a for a, _ in pairs], [b for _, b in pairs])
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    assert (result.won, result.lost, result.p) == (won, lost, pytest.approx(expected, rel=1e-9))
    assert result.p == pytest.approx(min(1.0, 2 * tail / 2 ** (won + lost)), rel=1e-9)


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (3, 10), (500, 1000), (7, 7)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_proportion_equals_wilson(hits, n, confidence):
    interval = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    result = proportion([True] * hits + [False] * (n - hits), confidence=confidence)
    assert result == (pytest.approx(hits / n), pytest.approx(interval.low), pytest.approx(interval.high), n)
    alone = proportion([True] * hits + [False] * (n - hits), clusters=range(n), confidence=confidence)
    assert alone.low == pytest.approx(result.low, abs=0.002 + 0.4 / n)  # K / (K - 1) in place of 1
    assert alone.low <= result.low + 1e-12


@pytest.mark.parametrize("n", [3, 19, 57, 100, 400, 1000])
def test_the_interval_holds_its_value_at_the_ends(n):
    for hits in (0, n):
        value, low, high, _ = proportion([True] * hits + [False] * (n - hits))
        assert 0 <= low <= value <= high <= 1


def test_the_clustered_proportion_equals_its_formula():
    rng = random.Random(1)
    clusters = [rng.randrange(20) for _ in range(150)]
    hits = [rng.random() < 0.4 + 0.4 * (k % 2) for k in clusters]
    n, p = len(hits), sum(hits) / len(hits)
    names = sorted(set(clusters))
    residuals = [sum(h - p for h, c in zip(hits, clusters, strict=True) if c == k) for k in names]
    deff = len(names) / (len(names) - 1) * sum(r * r for r in residuals) / (n * p * (1 - p))
    assert deff > 1
    size, z = n / deff, 1.959963984540054
    half = z * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size)) / (1 + z * z / size)
    centre = (p + z * z / (2 * size)) / (1 + z * z / size)
    found = proportion(hits, clusters=clusters)
    assert found == (pytest.approx(p), pytest.approx(centre - half), pytest.approx(centre + half), n)


def test_one_cluster_is_one_document():
    """Wilson's interval for half a hit of one."""
    z = 1.959963984540054
    half = z * math.sqrt(0.25 + z * z / 4) / (1 + z * z)
    assert proportion([True, False] * 5, clusters=["one"] * 10) == pytest.approx((0.5, 0.5 - half, 0.5 + half, 10))


def test_seeds_of_one_document_are_not_more_documents():
    hits = [True, False, True, True, False] * 8
    once, thrice = proportion(hits), proportion(hits * 3, clusters=[*range(40)] * 3)
    assert thrice.value == once.value
    assert thrice.low == pytest.approx(once.low, abs=0.003)
    all_right = proportion([True] * 120, clusters=[*range(40)] * 3)
    assert all_right.low == pytest.approx(proportion([True] * 40).low)


def test_holm_equals_its_definition():
    rng = random.Random(2)
    for m in (1, 2, 9):
        for _ in range(20):
            p = [rng.choice([0.001, 0.01, 0.2, rng.random()]) for _ in range(m)]
            order = sorted(range(m), key=lambda i: p[i])
            expected, highest = [0.0] * m, 0.0
            for rank, i in enumerate(order):
                highest = max(highest, min(1.0, (m - rank) * p[i]))
                expected[i] = highest
            assert stats.holm(p).tolist() == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------- yes or no


def test_the_table_and_its_metrics_equal_plain_counts():
    rng, tables = random.Random(3), []
    for _ in range(50):
        labels = [rng.random() < 0.4 for _ in range(23)]
        answers = [rng.choice([True, False, None]) for _ in labels]
        counts = stats.yes_no_table(labels, answers).sum(0)
        slow = _slow_counts(labels, answers)
        assert counts.tolist() == list(slow)
        for name, formula in METRICS.items():
            assert float(getattr(stats, name)(counts)) == pytest.approx(formula(*slow))
        tables.append(counts)
    stacked = np.stack(tables).reshape(2, 5, 5, 5)
    for name, formula in METRICS.items():
        expected = np.reshape([formula(*counts) for counts in tables], (2, 5, 5))
        np.testing.assert_allclose(getattr(stats, name)(stacked), expected)


def test_metrics_of_nothing_are_zero():
    counts = stats.yes_no_table([False], [False]).sum(0)
    assert [float(each(counts)) for each in (stats.precision, stats.recall, stats.f1)] == [0, 0, 0]
    assert stats.mean(stats.score_table([1.0, 0.5]).sum(0)) == 0.75


@pytest.mark.parametrize("metric", METRICS)
def test_the_paired_bootstrap_equals_a_slow_one(metric, monkeypatch):
    monkeypatch.setattr("contralto.eval.stats.bootstrap.CHUNK", 20 * 7)  # several chunks
    labels, one, two, groups = _questions(60, clusters=20, stick=0.5)
    two[3] = None
    seed, resamples = 5, 200
    tables = {"one": stats.yes_no_table(labels, one), "two": stats.yes_no_table(labels, two)}
    drawn = stats.Bootstrap(tables, clusters=groups, seed=seed, resamples=resamples)
    found = drawn.difference("one", "two", getattr(stats, metric))
    formula, rng, differences = METRICS[metric], np.random.default_rng(seed), []
    members = {k: [i for i, g in enumerate(groups) if g == k] for k in range(20)}
    for _ in range(resamples):
        items = [i for k in rng.integers(20, size=20) for i in members[int(k)]]
        values = [formula(*_slow_counts([labels[i] for i in items], [said[i] for i in items])) for said in (one, two)]
        differences.append(values[1] - values[0])
    value = formula(*_slow_counts(labels, two)) - formula(*_slow_counts(labels, one))
    low, high = np.quantile(differences, [0.025, 0.975])
    tail = min(sum(d <= 1e-15 for d in differences), sum(d >= -1e-15 for d in differences))
    expected = (value, low, high, min(1.0, 2 * (1 + tail) / (1 + resamples)))
    assert found == pytest.approx(expected, abs=1e-12)
    assert drawn.error("one", "two", getattr(stats, metric)) == pytest.approx(np.std(differences, ddof=1))
    ends = np.quantile(differences, [0.1, 0.9])
    assert drawn.difference("one", "two", getattr(stats, metric), confidence=0.8)[1:3] == pytest.approx(ends)


def test_the_bootstrap_of_one_system_is_its_half_of_the_pair():
    labels, one, _, groups = _questions(60, clusters=20)
    table = stats.yes_no_table(labels, one)
    never = stats.yes_no_table(labels, [None] * 60)  # an F1 of 0
    drawn = stats.Bootstrap({"table": table, "never": never}, clusters=groups, resamples=300)
    assert drawn.interval("table", stats.f1) == pytest.approx(drawn.difference("never", "table", stats.f1)[:3])
    narrow = drawn.interval("table", stats.f1, confidence=0.5)
    assert narrow == pytest.approx(drawn.difference("never", "table", stats.f1, confidence=0.5)[:3])
    assert narrow != drawn.interval("table", stats.f1)


def test_equal_systems_do_not_differ():
    table = stats.yes_no_table([True, False] * 10, [True, True] * 10)
    assert stats.Bootstrap({"one": table, "two": table}).difference("one", "two", stats.f1) == (0, 0, 0, 1)
    assert mcnemar_exact([True] * 5, [True] * 5) == (0, 0, 1)
    assert mcnemar_exact([1.0, 0.0, 0.0], [0.0, 1.0, 1.0])[:2] == (2, 1)
    assert stats.auroc_difference([1.0, 0.0] * 5, [1.0, 0.0] * 5, [True, False] * 5).p == 1


def test_the_bootstrap_of_three_tables_keeps_them_apart():
    labels, one, two, _ = _questions(40)
    scores = stats.score_table([0, 1, 1, 3] * 10).astype(int)  # whole numbers, too
    tables = {"one": stats.yes_no_table(labels, one), "scores": scores, "two": stats.yes_no_table(labels, two)}
    drawn = stats.Bootstrap(tables, resamples=200)
    for name in ("one", "two"):
        alone = stats.Bootstrap({name: tables[name]}, resamples=200)
        assert drawn.interval(name, stats.f1) == alone.interval(name, stats.f1)
    assert drawn.interval("scores", stats.mean)[0] == 1.25
    assert drawn.interval("scores", lambda counts: counts[..., 0])[0] == 50  # a sum over documents, not their mean


def test_whole_numbers_are_truth_values_and_scores():
    assert stats.yes_no_table([1, 0, 1], [True, True, None]).tolist() == [
        [1, 0, 0, 1, 1],
        [0, 1, 0, 0, 1],
        [0, 0, 0, 1, 1],
    ]
    assert stats.yes_no_table([], []).shape == (0, 5)
    assert stats.mean(stats.score_table([1, 0]).sum(0)) == 0.5
    assert mcnemar_exact([1, 0, 0], [1, 1, 1]) == mcnemar_exact([True, False, False], [True, True, True]) == (2, 0, 0.5)
    margins = [3.0, 1.0, 2.0, 0.5], [3.0, 2.0, 1.0, 0.5]
    assert stats.auroc_difference(*margins, [1, 1, 0, 0]) == stats.auroc_difference(
        *margins, [True, True, False, False]
    )
    assert stats.auroc([3.0, 1.0, 2.0, 0.5], [1, 1, 0, 0]) == 0.75


@pytest.mark.slow
def test_ten_thousand_resamples_of_three_thousand_questions_take_less_than_five_seconds():
    labels, one, two, groups = _questions(3000, clusters=500)
    tables = {"one": stats.yes_no_table(labels, one), "two": stats.yes_no_table(labels, two)}
    for clusters in (groups, None):
        started = time.perf_counter()
        found = stats.Bootstrap(tables, clusters=clusters).difference("one", "two", stats.f1)
        assert time.perf_counter() - started < 5
        assert found.p < 0.01


# ------------------------------------------------------------------------------------------------- apart from thresholds


def _slow_auroc(lean, labels):
    yes = [x for x, label in zip(lean, labels, strict=True) if label]
    no = [x for x, label in zip(lean, labels, strict=True) if not label]
    return sum((a > b) + (a == b) / 2 for a in yes for b in no) / (len(yes) * len(no))


def test_auroc_counts_pairs_and_ties_half():
    rng = random.Random(4)
    for _ in range(20):
        labels = [rng.random() < 0.5 for _ in range(30)]
        lean = [rng.randrange(6) + label for label in labels]
        assert stats.auroc(lean, labels) == pytest.approx(_slow_auroc(lean, labels))


def test_the_auroc_difference_equals_its_formula():
    rng = random.Random(5)
    labels = [rng.random() < 0.5 for _ in range(60)]
    groups = [i // 3 for i in range(60)]
    leans = [[rng.randrange(5) + gain * label for label in labels] for gain in (1, 3)]
    positives = sum(labels)

    def influence(lean, i):
        others = [x for x, label in zip(lean, labels, strict=True) if label != labels[i]]
        share = sum((lean[i] > x) + (lean[i] == x) / 2 for x in others) / len(others)
        place = share if labels[i] else 1 - share
        return (place - _slow_auroc(lean, labels)) / (positives if labels[i] else 60 - positives)

    for clusters in (groups, range(60), [i % 2 for i in range(60)]):
        names = sorted(set(clusters))
        sums = [
            sum(influence(leans[1], i) - influence(leans[0], i) for i in range(60) if clusters[i] == k) for k in names
        ]
        error = math.sqrt(len(names) / (len(names) - 1) * sum(s * s for s in sums))
        value = _slow_auroc(leans[1], labels) - _slow_auroc(leans[0], labels)
        p = math.erfc(abs(value) / error / math.sqrt(2))
        half = 1.959963984540054 * error
        found = stats.auroc_difference(*leans, labels, clusters=clusters)
        assert found == pytest.approx((value, value - half, value + half, p))


def test_the_bias_matched_threshold_says_yes_as_often_where_it_leans_most():
    rng = random.Random(6)
    lean = [rng.randrange(8) for _ in range(40)]
    for count in (0, 1, 17, 40):
        answers = stats.bias_matched(lean, count)
        assert (answers.sum(), answers.dtype) == (count, bool)
        order = sorted(range(40), key=lambda i: (-lean[i], i))
        assert {i for i in range(40) if answers[i]} == set(order[:count])


# ------------------------------------------------------------------------------------------------------------- power


ROUNDS = 300
LEVEL = 0.05
CEILING = LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / ROUNDS)
"""How many false findings chance explains: three standard errors above the level."""


def _found(how, **world):
    """The share of rounds in which a test of two systems is significant."""
    tests = {
        "mcnemar": lambda labels, one, two, groups: (
            mcnemar_exact(
                [a == b for a, b in zip(labels, one, strict=True)], [a == b for a, b in zip(labels, two, strict=True)]
            ).p
        ),
        "f1": lambda labels, one, two, groups: _bootstrapped(labels, one, two, stats.f1, groups),
        "yes_ratio": lambda labels, one, two, groups: _bootstrapped(labels, one, two, stats.yes_ratio, groups),
        "f1 without clusters": lambda labels, one, two, groups: _bootstrapped(labels, one, two, stats.f1, None),
    }
    return sum(tests[how](*_questions(seed=seed, **world)) < LEVEL for seed in range(ROUNDS)) / ROUNDS


def _bootstrapped(labels, one, two, metric, groups):
    tables = {"one": stats.yes_no_table(labels, one), "two": stats.yes_no_table(labels, two)}
    return stats.Bootstrap(tables, clusters=groups, resamples=400).difference("one", "two", metric).p


@pytest.mark.slow
def test_a_planted_difference_is_found_and_a_planted_null_is_not():
    equal, better = {"skill": (0.8, 0.8)}, {"skill": (0.75, 0.9)}
    assert _found("mcnemar", n=300, **equal) <= CEILING
    assert _found("mcnemar", n=300, **better) >= 0.95
    assert _found("f1", n=300, clusters=100, stick=0.6, **equal) <= CEILING
    assert _found("f1", n=300, clusters=100, stick=0.6, **better) >= 0.8
    assert _found("yes_ratio", n=300, clusters=100, bias=(0.3, 0.3), **equal) <= CEILING
    assert _found("yes_ratio", n=300, clusters=100, bias=(0.05, 0.4), **equal) >= 0.95


@pytest.mark.slow
def test_what_clusters_are_for():
    """Questions of one image succeed together: tests that take them for independent find differences that are not there."""
    world = {"n": 300, "clusters": 30, "stick": 0.8, "skill": (0.8, 0.8)}
    assert _found("f1 without clusters", **world) > 3 * LEVEL
    assert _found("f1", **world) <= LEVEL + 0.06  # thirty clusters are few for a bootstrap


@pytest.mark.slow
def test_holm_holds_the_chance_of_any_false_finding():
    """Nine splits without an effect: one in two or three rounds finds something unadjusted, one in twenty adjusted."""
    rng = np.random.default_rng(0)
    raw = adjusted = 0
    for _ in range(ROUNDS):
        wins = rng.binomial(80, 0.5, size=9)
        p = [binomtest(int(w), 80).pvalue for w in wins]
        raw += min(p) < LEVEL
        adjusted += stats.holm(p).min() < LEVEL
    assert raw / ROUNDS > 0.2
    assert adjusted / ROUNDS <= CEILING


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mcnemar_exact([True], [True, False]), "the same items for both systems, not 1 and 2"),
        (lambda: proportion([]), "at least one item"),
        (lambda: proportion([True, False], clusters=[1]), "one cluster per item"),
        (lambda: stats.yes_no_table([True], []), "an answer per label, not 0 for 1"),
        (lambda: stats.Bootstrap({"one": np.zeros((0, 2))}), "no items"),
        (lambda: stats.Bootstrap({"one": np.ones((2, 2)), "two": np.ones((3, 2))}), "the same items for all systems"),
        (lambda: stats.auroc([1.0], [True, False]), "a label per question, not 2 for 1"),
        (lambda: stats.auroc([1.0, 2.0], [True, True]), "of either answer, not 2 yes and 0 no"),
        (lambda: stats.bias_matched([1.0], 2), "must lie in 0..1"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
