"""Statistics of paired comparisons: exact where possible, clustered where documents depend on each other.

Documents that share an image, and answers to one document under several seeds, are not independent. `clusters` names the
group of each document; intervals and tests then treat a cluster as one unit.

- `counts`: tables of per-document counts, and metrics of their sums.
- `proportions`: Wilson intervals, McNemar's exact test, Holm's adjustment.
- `bootstrap`: intervals of any metric and of differences.
- `permutation`: exact tests of paired differences.
- `roc`: AUROC of yes/no margins, and the bias-matched threshold.
- `power`: the smallest difference that a test would find.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.eval.stats.bootstrap import Bootstrap as Bootstrap
    from contralto.eval.stats.bootstrap import Difference as Difference
    from contralto.eval.stats.counts import Array as Array
    from contralto.eval.stats.counts import CountMetric as CountMetric
    from contralto.eval.stats.counts import accuracy as accuracy
    from contralto.eval.stats.counts import by_cluster as by_cluster
    from contralto.eval.stats.counts import f1 as f1
    from contralto.eval.stats.counts import mean as mean
    from contralto.eval.stats.counts import precision as precision
    from contralto.eval.stats.counts import ratio as ratio
    from contralto.eval.stats.counts import recall as recall
    from contralto.eval.stats.counts import score_table as score_table
    from contralto.eval.stats.counts import yes_no_table as yes_no_table
    from contralto.eval.stats.counts import yes_ratio as yes_ratio
    from contralto.eval.stats.permutation import Permutation as Permutation
    from contralto.eval.stats.permutation import sign_flip as sign_flip
    from contralto.eval.stats.permutation import swap as swap
    from contralto.eval.stats.power import detectable as detectable
    from contralto.eval.stats.power import detectable_by_error as detectable_by_error
    from contralto.eval.stats.proportions import McNemar as McNemar
    from contralto.eval.stats.proportions import Proportion as Proportion
    from contralto.eval.stats.proportions import holm as holm
    from contralto.eval.stats.proportions import mcnemar_exact as mcnemar_exact
    from contralto.eval.stats.proportions import proportion as proportion
    from contralto.eval.stats.roc import auroc as auroc
    from contralto.eval.stats.roc import auroc_difference as auroc_difference
    from contralto.eval.stats.roc import bias_matched as bias_matched

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "bootstrap": ["Bootstrap", "Difference"],
        "counts": [
            "Array",
            "CountMetric",
            "accuracy",
            "by_cluster",
            "f1",
            "mean",
            "precision",
            "ratio",
            "recall",
            "score_table",
            "yes_no_table",
            "yes_ratio",
        ],
        "permutation": ["Permutation", "sign_flip", "swap"],
        "power": ["detectable", "detectable_by_error"],
        "proportions": ["McNemar", "Proportion", "holm", "mcnemar_exact", "proportion"],
        "roc": ["auroc", "auroc_difference", "bias_matched"],
    },
)
