"""CLAIR, contrastive learning from AI revisions: the rejected answer is the target's, the chosen one its minimal revision."""

from typing import Any, NamedTuple

from contralto.data_gen import templates
from contralto.data_gen.strategies.pairs import ask, direction, existing, judging, pair, user
from contralto.data_gen.types import Answer, Ask, Rejected, Row, Strategy

__all__ = ["Revision", "clair", "parse_revision"]


class Revision(NamedTuple):
    """What a reviser wrote."""

    text: str
    rationale: str
    """Its reasoning, or nothing."""


def clair(
    row: Row,
    *,
    target: str = "target",
    reviser: str = "reviser",
    template: str | None = None,
    worsen: bool = False,
    answer_column: str | None = None,
    judge: str | None = None,
    judge_template: str = "judge",
) -> Strategy:
    """The target model answers, a stronger model revises the answer as little as it can (D'Oosterlinck et al. 2024, arXiv
    2408.06266).

        y_l = M(x),    y_w = Reviser(x, y_l)

    The paper assumes that the revision is better. It often changes far more than it has to: the twenty pairs published with the
    code have a mean Jaccard similarity of 0.28, words split at white space. So look at the contrastiveness table, and let a judge say which answer is
    better (`judge`); the column `direction` is written beside the pair, and nothing is dropped.

    Args:
        row: the row.
        target: the role that answers.
        reviser: the role that revises; the paper takes GPT-4-turbo at temperature 0.7.
        template: with `task` and `student_solution`; None is `clair`, or `clair_worsen`.
        worsen: the opposite: the target's answer is chosen, a minimally worsened one rejected.
        answer_column: a column with the answer to revise (as the paper's notebook does); then the target is not asked.
        judge: a role that judges the pair in both orders, or nobody.
        judge_template: of the judge.

    Raises:
        ValueError: the row lacks `answer_column`; a template that does not exist or leaves out a field.
    """
    head = "worsened_student_solution" if worsen else "corrected_student_solution"
    revising = templates.load(template or ("clair_worsen" if worsen else "clair"), "task", "student_solution")
    judging(judge_template)
    if answer_column:
        answer = Answer(text=existing(row, answer_column))
    else:
        answer = yield ask(row, target)
    prompt = revising.render(task=templates.as_text(row["prompt"]), student_solution=answer.text)
    reply = yield Ask(
        role=reviser,
        messages=user(prompt),
        images=row.get("images", ()),
        tag="revision",
        template=revising.label,
    )
    revision = parse_revision(reply.text, head)
    if revision is None:
        return Rejected(f"the reviser's reply has nothing under {{{head}}} (it ended by {reply.finish_reason})")
    revised = Answer(text=revision.text, finish_reason=reply.finish_reason)
    chosen, rejected = (answer, revised) if worsen else (revised, answer)
    known: dict[str, Any] = {"template": revising.label, "rationale": revision.rationale}
    if judge:
        known |= yield from direction(row, chosen.text, rejected.text, judge=judge, template=judge_template)
    return pair(row, chosen, rejected, "clair_worsen" if worsen else "clair", **known)


def parse_revision(reply: str, head: str = "corrected_student_solution") -> Revision | None:
    """The revision in a reviser's reply, or None if it has none.

    Found are the heading with and without braces, bold or as a Markdown heading, with and without colon (in the published
    replies: 8 of 20 `{corrected_student_solution}:`, 12 without the colon), and the last one that has a text below it. The
    published parser cuts a revision off where the heading comes twice, and loses the row without a word where there is none.

    Examples:
        >>> parse_revision("{teacher_reasoning}: Too short.\\n\\n{corrected_student_solution}\\nIt is 4, since 2 + 2 = 4.")
        Revision(text='It is 4, since 2 + 2 = 4.', rationale='Too short.')
    """
    found = templates.sections(reply, "teacher_reasoning", head)
    if head not in found:
        return None
    return Revision(found[head], found.get("teacher_reasoning") or found[""])
