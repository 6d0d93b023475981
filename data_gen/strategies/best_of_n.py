"""The strategy that takes the best and the worst of n samples."""

from dataclasses import replace
from typing import Any

from contralto.data_gen.scorers import resolve_scorer
from contralto.data_gen.strategies.shared import ask_scores, best_and_worst, check_count, sample_answers
from contralto.data_gen.types import Rejected, Row, Strategy

__all__ = ["best_of_n"]


def best_of_n(
    row: Row,
    *,
    scorer: Any = None,
    n: int = 8,
    target: str = "target",
    scoring: str = "scorer",
    candidates: bool = False,
) -> Strategy:
    """Prefer the best of n answers of the target to the worst (West-of-N, Pace et al. 2024, arXiv 2401.12086).

        y_w = argmax_i r(x, y_i),    y_l = argmin_i r(x, y_i),    y_1 ... y_n ~ M(x)

    Args:
        row: the row.
        scorer: the reward r: `module:function`, called as `score(row, answers)`, which returns a list with one number per answer;
            or `{reward_model: NAME}`; None requests the scores from the role `scoring`.
        n: the number of answers, at least 2. The target's role needs a temperature, or all of them are the same.
        target: the role that answers.
        scoring: a role that replies with a number to the prompt with an answer: a reward model.
        candidates: keep all answers and their scores as the columns `candidates` and `scores`, which `contralto align brio` ranks.

    Raises:
        ValueError: `n` is below 2, or the scorer does not return n finite numbers.

    Examples:
        >>> from contralto.data_gen.types import Answer
        >>> row = {"id": "1", "prompt": [{"role": "user", "content": "Tell me."}]}
        >>> requests = best_of_n(row, n=3, scorer=lambda row, answers: [len(answer) for answer in answers])
        >>> [ask.seed for ask in next(requests)]
        [0, 1, 2]
        >>> try:
        ...     requests.send([Answer(text="long"), Answer(text="longer"), Answer(text="no")])
        ... except StopIteration as end:
        ...     print(end.value.chosen, end.value.rejected, end.value.columns["reward_margin"])
        longer no 4.0
    """
    check_count("best_of_n", n)
    reward = None if scorer is None else resolve_scorer(scorer)  # before the first request, which may cost money
    answers = yield sample_answers(row, target, n)
    scores = yield from ask_scores(row, answers, reward, scoring)
    pair = best_and_worst(row, answers, scores, "best_of_n")
    if not candidates or isinstance(pair, Rejected):
        return pair
    kept = {"candidates": [answer.text for answer in answers], "scores": list(scores)}
    return replace(pair, columns={**pair.columns, **kept})
