"""Strategies in which a judge compares existing answers, or answers of other models."""

from contralto.data_gen.strategies.shared import ask_prompt, best_and_worst, existing_answer, list_column
from contralto.data_gen.strategies.verdicts import judge_direction, judged_pair, load_judge_template
from contralto.data_gen.types import Answer, Pair, Row, Strategy

__all__ = ["off_policy_judge", "verify_direction"]


def verify_direction(row: Row, *, judge: str = "judge", template: str = "judge") -> Strategy:
    """Add a judge's opinion to an existing pair.

    Args:
        row: with `prompt`, `chosen` and `rejected`, as `load_pairs` returns them; the other columns are kept.
        judge: the role that judges, in both orders.
        template: of the judge.

    Raises:
        ValueError: the row lacks an answer.
    """
    chosen, rejected = existing_answer(row, "chosen"), existing_answer(row, "rejected")
    judged = yield from judge_direction(row, chosen, rejected, judge=judge, template=template)
    fields = ("id", "prompt", "chosen", "rejected", "images", "rejected_images")
    kept = {name: value for name, value in row.items() if name not in fields}
    return Pair(
        prompt=row["prompt"],
        chosen=chosen,
        rejected=rejected,
        images=row.get("images", ()),
        rejected_images=row.get("rejected_images") or (),
        columns={**kept, **judged},
    )


def off_policy_judge(
    row: Row,
    *,
    first: str = "first",
    second: str = "second",
    judge: str = "judge",
    template: str = "judge",
    responses: str | None = None,
    scores: str | None = None,
) -> Strategy:
    """Let a judge decide between answers of two other models: M'(x), M''(x) (arXiv 2408.06266, the baseline "off-policy judge").

    Args:
        row: the row.
        first: the role of the first answer.
        second: the role of the second answer.
        judge: the role that judges, in both orders.
        template: of the judge.
        responses: a column with a list of existing answers, in place of the two roles; the first two are judged.
        scores: a column with the scores of these answers (as in UltraFeedback): nothing is requested then, and the best answer
            is chosen, the worst rejected.

    Raises:
        ValueError: the row lacks a column, or the column is no list of at least two values.
    """
    if scores and not responses:
        raise ValueError("off_policy_judge: scores needs responses: set the column of the responses too")
    load_judge_template(template)
    if not responses:
        answers = yield [ask_prompt(row, first), ask_prompt(row, second)]
        pair = yield from judged_pair(row, answers, "off_policy_judge", judge=judge, template=template)
        return pair
    answers = [Answer(text=text) for text in list_column(row, responses, str, "off_policy_judge")]
    if scores:
        return best_and_worst(
            row, answers, list_column(row, scores, int | float, "off_policy_judge"), "off_policy_judge"
        )
    pair = yield from judged_pair(row, answers[:2], "off_policy_judge", judge=judge, template=template)
    return pair
