"""Checks write new columns of pairs; filters, named separately, drop pairs by these columns.

    checks:
      contrast: {}                                       # length_ratio, jaccard, levenshtein, no_op
      finish: {}                                         # finished, empty
      duplicates: {threshold: 0.8}                       # duplicate_of, near_duplicate_of
      contamination: {against: [gsm8k, my_test.jsonl]}   # contamination, contaminated_by
      ches: {model: my-model}                            # ches, ln_ches
      reward: {scorer: "my_module:reward"}               # chosen_score, rejected_score, reward_margin
    filters:
      no_op: false                     # this value
      length_ratio: [0.5, 2.0]         # a band, both ends included; null is open
      direction: [chosen, unclear]     # one of these
      duplicate_of: null               # an empty column
      ln_ches: {lowest: 0.5}           # the half with the lowest values

Checks receive all pairs at once and in their order, since duplicates are a property of several pairs. `registry` holds the
checks by name; packages add theirs by entry points of the group `contralto.checks`.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.data_gen.checks.base import answer_text as answer_text
    from contralto.data_gen.checks.base import writes as writes
    from contralto.data_gen.checks.contrast import jaccard as jaccard
    from contralto.data_gen.checks.filters import select as select
    from contralto.data_gen.checks.registry import CHECKS as CHECKS
    from contralto.data_gen.checks.registry import annotate as annotate
    from contralto.data_gen.checks.registry import check_settings as check_settings

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "base": ["answer_text", "writes"],
        "contrast": ["jaccard"],
        "filters": ["select"],
        "registry": ["CHECKS", "annotate", "check_settings"],
    },
)
