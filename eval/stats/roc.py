"""Statistics of yes/no margins: AUROC, which needs no threshold, and the bias-matched threshold."""

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from contralto.eval.stats.bootstrap import Difference
from contralto.eval.stats.counts import Array, by_cluster

__all__ = ["auroc", "auroc_difference", "bias_matched"]


def auroc(margins: ArrayLike, labels: ArrayLike) -> float:
    """Return the area under the ROC curve of yes/no margins; ties count half.

        AUROC = (sum of the ranks of the yes - m (m + 1) / 2) / (m n)    midranks, m yes, n no (Mann & Whitney 1947)

    It is the probability that a question whose right answer is yes has a larger margin than one whose right answer is no. It does
    not depend on the threshold between yes and no, and so not on a bias to either.

    Args:
        margins: `(n,)`, how far each question leans to yes, such as log p(yes) - log p(no).
        labels: `(n,)`, whether the right answer is yes.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: Not exactly one label per question is given, or all labels are equal.

    Examples:
        >>> auroc([2.0, 1.0, 1.0, 0.0], [True, True, False, False])
        0.875
    """
    above_no, _ = _placements(margins, labels)
    return float(above_no.mean())


def auroc_difference(
    first: ArrayLike,
    second: ArrayLike,
    labels: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Difference:
    """Compare the AUROC of two systems on the same questions (DeLong et al. 1988; clusters: Obuchowski 1997).

    With the placements a_i (the share of no below yes i) and b_j (the share of yes above no j), the influence of cluster k is
    `sum_{i in k} (a_i - A) / m + sum_{j in k} (b_j - A) / n`; the variance of the difference is that of the differences of
    influences, times K / (K - 1), and z = difference / standard error is standard normal under the null hypothesis.

    Args:
        first: `(n,)`, the first system's margins to yes.
        second: `(n,)`, the second system's margins, in the same order.
        labels: `(n,)`, whether the right answer is yes.
        clusters: `(n,)`, the cluster of each question; None if every question is its own cluster.
        confidence: The level of the two-sided interval, in (0, 1).

    Returns:
        The difference, second less first, with its interval and p.

    Raises:
        ValueError: See `auroc`; or not exactly one cluster per question is given.

    Examples:
        >>> labels = [True, True, False, False] * 20
        >>> result = auroc_difference([2.0, 1.0, 1.0, 0.0] * 20, [2.0, 1.5, 1.0, 0.0] * 20, labels)
        >>> f"{result.value:.3f}, p {result.p:.3f}"
        '0.125, p 0.000'
    """
    truth = np.asarray(labels, dtype=bool)
    areas, influences = [], []
    for margins in (first, second):
        above_no, below_yes = _placements(margins, truth)
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


def _placements(margins: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Return for each yes the share of smaller no, and for each no the share of larger yes; ties count half."""
    x, truth = np.asarray(margins, dtype=np.float64), np.asarray(labels, dtype=bool)
    if x.shape != truth.shape:
        raise ValueError(f"AUROC needs a label per question, not {truth.size} for {x.size}")
    yes, no = int(truth.sum()), int((~truth).sum())
    if not yes or not no:
        raise ValueError(f"AUROC needs questions of either answer, not {yes} yes and {no} no")
    ranks = rankdata(x)
    above_no = (ranks[truth] - rankdata(x[truth])) / no
    below_yes = 1 - (ranks[~truth] - rankdata(x[~truth])) / yes
    return above_no, below_yes


def bias_matched(margins: ArrayLike, count: int) -> NDArray[np.bool_]:
    """Answer yes to the `count` questions with the largest margins.

    The control of a method that says yes more often: the baseline with its threshold moved until it says yes as often. What the
    method gains beyond it is not explained by bias. Of questions with equal margins, the first come first.

    Args:
        margins: `(n,)`, how far each question leans to yes.
        count: The number of questions to answer with yes.

    Returns:
        `(n,)`, bool: whether the answer is yes.

    Raises:
        ValueError: The count is negative or larger than the number of questions.

    Examples:
        >>> bias_matched([0.3, -1.0, 2.0, -0.2], 3).tolist()
        [True, False, True, True]
    """
    x = np.asarray(margins, dtype=np.float64)
    if not 0 <= count <= x.size:
        raise ValueError(f"the count of yes must lie in 0..{x.size}, the number of questions, not {count}")
    answers: Any = np.zeros(x.size, dtype=bool)
    answers[np.argsort(-x, kind="stable")[:count]] = True
    return answers  # type: ignore[no-any-return]
