"""Pairs of translations by a metric."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from contralto.data_gen.scorers import resolve_scorer, score_answers
from contralto.data_gen.strategies.shared import ask_scores, best_and_worst, check_count, sample_answers
from contralto.data_gen.types import Rejected, Row, Strategy

__all__ = ["mono_system"]


def mono_system(
    row: Row,
    *,
    metric: Any = None,
    n: int = 50,
    target: str = "target",
    scoring: str = "scorer",
    also: Mapping[str, Any] | None = None,
) -> Strategy:
    """Prefer the best of n translations of one system to the worst (Gisserot-Boukhlef et al. 2024, arXiv 2409.20059, mono-system).

    The paper finds that alignment to one metric can cost another one, above all a neural metric against a lexical one. So name
    further metrics in `also`: their values for both translations are written beside the pair.

    Args:
        row: its prompt requests the translation; it has the columns that the metrics read: `chrf` reads `reference`.
        metric: the metric that decides: `module:function`, called as `score(row, answers)`, which returns a list with one number per answer;
            or `{reward_model: NAME}`; None requests the scores from the role `scoring`.
        n: translations per source, at least 2; the paper samples 50.
        target: the role that translates.
        scoring: as for `best_of_n`.
        also: further metrics by name; they write the columns `chosen_<name>` and `rejected_<name>`.

    Raises:
        ValueError: `n` is below 2, or a metric does not return n finite numbers.
    """
    check_count("mono_system", n)
    scorer = None if metric is None else resolve_scorer(metric)  # before the first request, which may cost money
    others = {name: resolve_scorer(other) for name, other in (also or {}).items()}
    answers = yield sample_answers(row, target, n)
    scores = yield from ask_scores(row, answers, scorer, scoring)
    pair = best_and_worst(row, answers, scores, "mono_system")
    if isinstance(pair, Rejected):
        return pair
    columns = dict(pair.columns)
    for name, other in others.items():
        columns[f"chosen_{name}"], columns[f"rejected_{name}"] = score_answers(other, row, [pair.chosen, pair.rejected])
    return replace(pair, columns=columns)
