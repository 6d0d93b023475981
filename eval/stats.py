"""Statistics of paired comparisons: exact where they can be, clustered where items share an image, all checked by hand.

Items that share an image (or a document read under several seeds) are not independent. `clusters` says which belong
together; then intervals are as wide as the clusters make them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, rankdata

__all__ = [
    "Bootstrap",
    "Difference",
    "McNemar",
    "Proportion",
    "accuracy",
    "auroc",
    "auroc_difference",
    "bias_matched",
    "f1",
    "holm",
    "mcnemar_exact",
    "mean",
    "precision",
    "proportion",
    "recall",
    "score_table",
    "yes_no_table",
    "yes_ratio",
]

Array = NDArray[np.float64]
Metric = Callable[[Array], Array]
"""From counts `(..., C)` to the metric `(...)`."""
CHUNK = 4_000_000
"""Cluster weights held at a time, for memory's sake."""


class Proportion(NamedTuple):
    """A share of n items with its confidence interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class McNemar(NamedTuple):
    """Two systems on the same items: where they differ, and how likely such a split is by chance."""

    won: int
    """Items that only the second system gets right."""
    lost: int
    """Items that only the first system gets right."""
    p: float


class Difference(NamedTuple):
    """How much higher a metric is for the second system, with its confidence interval and two-sided p."""

    value: float
    low: float
    high: float
    p: float


# ----------------------------------------------------------------------------------------------------------- right or wrong


def proportion(hits: ArrayLike, *, clusters: ArrayLike | None = None, confidence: float = 0.95) -> Proportion:
    """The share of hits with Wilson's score interval (Wilson 1927), which is sound near 0 and 1 and for small n.

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    z the normal quantile

    With clusters, n is replaced by the effective n / deff (Korn & Graubard 1998). The design effect deff is the variance of
    the share as the clusters show it, over the p (1 - p) / n of independent items:

        deff = K / (K - 1) sum_k (sum_{i in k} (x_i - p))^2 / (n p (1 - p))    of K clusters, at least 1

    A share of 0 or 1 shows no variance; then the effective n is the number of clusters.

    Args:
        hits: one truth value per item, at least one.
        clusters: the cluster of each item, any labels; None if all are independent.
        confidence: of the two-sided interval, in (0, 1).

    Raises:
        ValueError: no items, or not one cluster per item.

    Examples:
        >>> print(proportion([True] * 8 + [False] * 2))
        0.800 [0.490, 0.943]
        >>> print(proportion([True] * 8 + [False] * 2, clusters=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]))
        0.800 [0.337, 0.969]
    """
    x = np.asarray(hits, dtype=np.float64)
    n, z = x.size, NormalDist().inv_cdf((1 + confidence) / 2)
    if not n:
        raise ValueError("a proportion needs at least one item, not none")
    p = float(x.mean())
    size = n if clusters is None else _effective_n(x, clusters)
    centre, scale = p + z * z / (2 * size), 1 + z * z / size
    half = z * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size))
    low, high = (centre - half) / scale, (centre + half) / scale
    return Proportion(p, max(0.0, min(p, low)), min(1.0, max(p, high)), n)  # rounding must not push p out


def _effective_n(x: Array, clusters: ArrayLike) -> float:
    p, sums = x.mean(), by_cluster((x - x.mean())[:, None], clusters)
    count = len(sums)
    if p in (0, 1) or count == 1:
        return count
    deff = count / (count - 1) * float((sums**2).sum() / (x.size * p * (1 - p)))
    return x.size / max(1.0, deff)


def mcnemar_exact(first: ArrayLike, second: ArrayLike) -> McNemar:
    """The exact two-sided McNemar test of two systems on the same items (McNemar 1947, exact form).

    Of the d items on which just one system is right, the second wins w. If neither were better, w would be binomial(d, 1/2):

        p = min(1, 2 * sum_{k <= min(w, d - w)} C(d, k) / 2^d)

    Args:
        first, second: one truth value per item, in the same order.

    Raises:
        ValueError: different numbers of items.

    Examples:
        >>> mcnemar_exact([True, False, False, False, False, False], [False, True, True, True, True, True])
        McNemar(won=5, lost=1, p=0.21875)
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"a paired test needs the same items for both systems, not {a.size} and {b.size}")
    won, lost = int((b & ~a).sum()), int((a & ~b).sum())
    return McNemar(won, lost, min(1.0, 2 * float(binom.cdf(min(won, lost), won + lost, 0.5))))


def holm(p_values: ArrayLike) -> Array:
    """Holm's step-down adjustment for several tests (Holm 1979): compare the results with the level as they are.

        p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))    p_(1) <= ... <= p_(m)

    It holds the chance of any false finding among the m tests at the level, however they depend on each other.

    Args:
        p_values: `(m,)`, in any order.

    Examples:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, (p.size - np.arange(p.size)) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted


# ------------------------------------------------------------------------------------------------------------ yes or no


def yes_no_table(labels: ArrayLike, answers: Sequence[bool | None]) -> Array:
    """The counts of yes/no answers: a row per question, to be summed over questions and given to a metric.

    Args:
        labels: whether the right answer is yes.
        answers: whether the answer was yes; None if it was neither, which is wrong and not a yes.

    Returns:
        `(n, 5)`: right yes, wrong yes, right no, questions with the answer yes, questions.

    Raises:
        ValueError: not one answer per label.

    Examples:
        >>> table = yes_no_table([True, True, False, False], [True, None, True, False])
        >>> [float(each(table.sum(0))) for each in (accuracy, precision, recall, f1, yes_ratio)]
        [0.5, 0.5, 0.5, 0.5, 0.5]
    """
    truth = np.asarray(labels, dtype=bool)
    if truth.size != len(answers):
        raise ValueError(f"yes_no_table needs an answer per label, not {len(answers)} for {truth.size}")
    yes = np.array([answer is not None and bool(answer) for answer in answers], dtype=bool)
    no = np.array([answer is not None and not answer for answer in answers], dtype=bool)
    columns = (yes & truth, yes & ~truth, no & ~truth, truth, np.ones_like(truth))
    return np.stack(columns, axis=-1).astype(np.float64)


def score_table(values: ArrayLike) -> Array:
    """The counts of any score: `(n, 2)`, the value and 1 for each item; `mean` is their metric."""
    x = np.asarray(values, dtype=np.float64)
    return np.stack((x, np.ones_like(x)), axis=-1)


def mean(counts: Array) -> Array:
    """The mean score: sum of values / items, of a `score_table`."""
    return _ratio(counts[..., 0], counts[..., 1])


def accuracy(counts: Array) -> Array:
    """(right yes + right no) / questions, of a `yes_no_table`."""
    return _ratio(counts[..., 0] + counts[..., 2], counts[..., 4])


def precision(counts: Array) -> Array:
    """Right yes / yes; 0 where nothing is answered yes."""
    return _ratio(counts[..., 0], counts[..., 0] + counts[..., 1])


def recall(counts: Array) -> Array:
    """Right yes / questions with the answer yes; 0 where there are none."""
    return _ratio(counts[..., 0], counts[..., 3])


def f1(counts: Array) -> Array:
    """2 right yes / (yes + questions with the answer yes); 0 where there are neither."""
    return _ratio(2 * counts[..., 0], counts[..., 0] + counts[..., 1] + counts[..., 3])


def yes_ratio(counts: Array) -> Array:
    """Yes / questions: of the answers, not of the labels."""
    return _ratio(counts[..., 0] + counts[..., 1], counts[..., 4])


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


# ------------------------------------------------------------------------------------------------------------- bootstrap


class Bootstrap:
    """Counts of several systems on the same items, whole clusters being drawn again and again with replacement.

    Every system sees the same draws (the paired bootstrap, Efron & Tibshirani 1993, section 16.4), so that any number of
    intervals and differences cost one round of drawing: the counts of each cluster times how often it was drawn.

    Args:
        tables: by any name, `(n, C)` counts of each item in the same order, see `yes_no_table` and `score_table`.
        clusters: the cluster of each item; None if every item is one.
        resamples: how many.
        seed: of the draws. The same seed and number of clusters give the same draws.

    Raises:
        ValueError: no items, tables of different lengths, or not one cluster per item.

    Examples:
        >>> labels = [True, False] * 100
        >>> right, half = (yes_no_table(labels, [True, is_right, False, False] * 50) for is_right in (False, True))
        >>> both = Bootstrap({"right": right, "half": half})
        >>> found = both.difference("right", "half", yes_ratio)
        >>> f"{found.value:.2f}, p {found.p:.4f}"
        '0.25, p 0.0002'
    """

    def __init__(
        self,
        tables: Mapping[Any, ArrayLike],
        *,
        clusters: ArrayLike | None = None,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> None:
        arrays = {name: np.asarray(table, dtype=np.float64) for name, table in tables.items()}
        lengths = {len(table) for table in arrays.values()}
        if len(lengths) > 1:
            raise ValueError(f"a paired bootstrap needs the same items for all systems, not {sorted(lengths)}")
        sums = by_cluster(np.concatenate(list(arrays.values()), axis=1), clusters)
        ends = np.cumsum([table.shape[1] for table in arrays.values()])[:-1]
        self._totals = dict(zip(arrays, np.split(sums.sum(0), ends), strict=True))
        self._drawn = dict(zip(arrays, np.split(_resampled(sums, resamples, seed), ends, axis=1), strict=True))

    def interval(self, name: Any, metric: Metric, *, confidence: float = 0.95) -> tuple[float, float, float]:
        """A metric of one system: value, and the low and the high end of its percentile interval.

        Args:
            name: of the table.
            metric: from counts `(..., C)` to values `(...)`.
            confidence: of the two-sided interval, in (0, 1).
        """
        return float(metric(self._totals[name])), *_percentiles(metric(self._drawn[name]), confidence)

    def error(self, first: Any, second: Any, metric: Metric) -> float:
        """Return the standard error of how much higher a metric is for the second system.

        Args:
            first: the name of the first system's table.
            second: the name of the second system's table.
            metric: see `interval`.
        """
        return float((metric(self._drawn[second]) - metric(self._drawn[first])).std(ddof=1))

    def difference(self, first: Any, second: Any, metric: Metric, *, confidence: float = 0.95) -> Difference:
        """How much higher a metric is for the second system, with the percentile interval of the difference and its p.

        The p is the smallest level at which the interval excludes 0, with a correction that keeps it above 0:

            p = min(1, 2 (1 + min(#{d* <= 0}, #{d* >= 0})) / (1 + resamples))

        Args:
            first, second: names of tables.
            metric, confidence: see `interval`.
        """
        differences = metric(self._drawn[second]) - metric(self._drawn[first])
        below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
        p = min(1.0, 2 * (1 + min(below, above)) / (1 + differences.size))
        value = float(metric(self._totals[second]) - metric(self._totals[first]))
        return Difference(value, *_percentiles(differences, confidence), p)


def by_cluster(table: Array, clusters: ArrayLike | None) -> Array:
    """Return the sums of each cluster.

    Args:
        table: `(n, C)`, the counts of each item.
        clusters: the cluster of each item; None if every item is one.

    Returns:
        `(K, C)`.

    Raises:
        ValueError: no items, or not one cluster per item.
    """
    if not len(table):
        raise ValueError("there are no items to compare")
    if clusters is None:
        return table
    labels = np.asarray(clusters)
    if labels.shape != (len(table),):
        raise ValueError(f"clusters must name one cluster per item, not {labels.shape} for {len(table)}")
    names, index = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(names), table.shape[1]))
    np.add.at(sums, index, table)
    return sums


def _resampled(sums: Array, resamples: int, seed: int) -> Array:
    """The total counts of each resample, `(R, C)`: how often each cluster was drawn, times its counts."""
    rng, count = np.random.default_rng(seed), len(sums)
    totals = []
    step = max(1, CHUNK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        totals.append(weights.astype(np.float64) @ sums)
    return np.concatenate(totals)


def _percentiles(values: Array, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


# ----------------------------------------------------------------------------------------------- apart from any threshold


def auroc(lean: ArrayLike, labels: ArrayLike) -> float:
    """The chance that a question with the answer yes leans more to yes than one with the answer no; ties count half.

        AUROC = (sum of the ranks of the yes - m (m + 1) / 2) / (m n)    midranks, m yes, n no (Mann & Whitney 1947)

    It does not depend on where the threshold between yes and no lies, and so not on a bias to either.

    Args:
        lean: how far each question leans to yes, such as log p(yes) - log p(no).
        labels: whether the right answer is yes.

    Raises:
        ValueError: not one label per question, or no question of either kind.

    Examples:
        >>> auroc([2.0, 1.0, 1.0, 0.0], [True, True, False, False])
        0.875
    """
    above_no, _ = _placements(lean, labels)
    return float(above_no.mean())


def auroc_difference(
    first: ArrayLike,
    second: ArrayLike,
    labels: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Difference:
    """How much higher the second system's AUROC is on the same questions (DeLong et al. 1988; clusters: Obuchowski 1997).

    With the placements a_i (the share of no below yes i) and b_j (the share of yes above no j), the influence of cluster k is
    `sum_{i in k} (a_i - A) / m + sum_{j in k} (b_j - A) / n`; the variance of the difference is that of the differences of
    influences, times K / (K - 1), and z = difference / standard error is standard normal under the null.

    Args:
        first, second: how far each question leans to yes for either system, in the same order.
        labels: whether the right answer is yes.
        clusters: the cluster of each question; None if every question is one.
        confidence: of the two-sided interval, in (0, 1).

    Raises:
        ValueError: see `auroc`; not one cluster per question.

    Examples:
        >>> labels = [True, True, False, False] * 20
        >>> found = auroc_difference([2.0, 1.0, 1.0, 0.0] * 20, [2.0, 1.5, 1.0, 0.0] * 20, labels)
        >>> f"{found.value:.3f}, p {found.p:.3f}"
        '0.125, p 0.000'
    """
    truth = np.asarray(labels, dtype=bool)
    areas, influences = [], []
    for lean in (first, second):
        above_no, below_yes = _placements(lean, truth)
        area, influence = above_no.mean(), np.empty(truth.size)
        influence[truth] = (above_no - area) / above_no.size
        influence[~truth] = (below_yes - area) / below_yes.size
        areas.append(float(area))
        influences.append(influence)
    sums = by_cluster((influences[1] - influences[0])[:, None], clusters)
    error = math.sqrt(len(sums) / max(1, len(sums) - 1) * float((sums**2).sum()))
    value, normal = areas[1] - areas[0], NormalDist()
    half = normal.inv_cdf((1 + confidence) / 2) * error
    p = 2 * normal.cdf(-abs(value) / error) if error else float(value == 0)
    return Difference(value, value - half, value + half, p)


def _placements(lean: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """For each yes the share of no that lean less to yes, for each no the share of yes that lean more; ties half."""
    x, truth = np.asarray(lean, dtype=np.float64), np.asarray(labels, dtype=bool)
    if x.shape != truth.shape:
        raise ValueError(f"AUROC needs a label per question, not {truth.size} for {x.size}")
    yes, no = int(truth.sum()), int((~truth).sum())
    if not yes or not no:
        raise ValueError(f"AUROC needs questions of either answer, not {yes} yes and {no} no")
    ranks = rankdata(x)
    above_no = (ranks[truth] - rankdata(x[truth])) / no
    below_yes = 1 - (ranks[~truth] - rankdata(x[~truth])) / yes
    return above_no, below_yes


def bias_matched(lean: ArrayLike, count: int) -> NDArray[np.bool_]:
    """Answer yes where it leans most to yes, to as many questions as another system does.

    The control of a method that says yes more often: the plain model with its threshold moved until it says yes as often.
    What the method gains beyond it is not a matter of bias. Of questions that lean alike, the first come first.

    Args:
        lean: how far each question leans to yes.
        count: to how many the answer is yes.

    Raises:
        ValueError: more than there are questions, or fewer than none.

    Examples:
        >>> bias_matched([0.3, -1.0, 2.0, -0.2], 3).tolist()
        [True, False, True, True]
    """
    x = np.asarray(lean, dtype=np.float64)
    if not 0 <= count <= x.size:
        raise ValueError(f"the count of yes must lie in 0..{x.size}, the number of questions, not {count}")
    answers: Any = np.zeros(x.size, dtype=bool)
    answers[np.argsort(-x, kind="stable")[:count]] = True
    return answers  # type: ignore[no-any-return]
