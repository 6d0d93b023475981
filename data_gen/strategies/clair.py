"""CLAIR, contrastive learning from AI revisions: the rejected answer is the target's, the chosen one its minimal revision."""

from typing import NamedTuple

from contralto.data_gen import templates
from contralto.data_gen.strategies.shared import ask_prompt, ask_template, existing_answer, make_pair
from contralto.data_gen.strategies.verdicts import judge_direction, load_judge_template
from contralto.data_gen.types import Answer, Rejected, Row, Strategy

__all__ = ["Revision", "clair", "parse_revision"]


class Revision(NamedTuple):
    """A revision in a reviser's reply."""

    text: str
    rationale: str
    """The reviser's reasoning; may be empty."""


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
    """Prefer a minimal revision to the target's answer (D'Oosterlinck et al. 2024, arXiv 2408.06266).

        y_l = M(x),    y_w = Reviser(x, y_l)

    The paper assumes that the revision is better. It often changes far more than necessary: the twenty pairs published with
    the code have a mean Jaccard similarity of 0.28, words split at white space. So look at the table of contrasts, and let a
    judge compare the answers (`judge`): its opinion becomes the column `direction`, and nothing is dropped.

    Args:
        row: the row.
        target: the role that answers.
        reviser: the role that revises; the paper uses GPT-4-turbo at temperature 0.7.
        template: with `task` and `student_solution`; None is `clair`, or `clair_worsen`. `clair_paper` is the published prompt.
        worsen: choose the target's answer and reject a minimally worsened one.
        answer_column: a column with the answer to revise (as in the paper's notebook), in place of the target's.
        judge: a role that judges the pair in both orders; None is no judge.
        judge_template: of the judge.

    Raises:
        ValueError: the row lacks `answer_column`, or a template does not exist or lacks a field.
    """
    head, name = ("worsened_student_solution", "clair_worsen") if worsen else ("corrected_student_solution", "clair")
    revising = templates.load(template or name, "task", "student_solution")
    load_judge_template(judge_template)
    answer = Answer(text=existing_answer(row, answer_column)) if answer_column else (yield ask_prompt(row, target))
    task = templates.as_text(row["prompt"])
    reply = yield ask_template(row, reviser, revising, tag="revision", task=task, student_solution=answer.text)
    revision = parse_revision(reply.text, head)
    if revision is None:
        return Rejected(f"the reviser's reply has nothing under {{{head}}} (finish_reason {reply.finish_reason})")
    revised = Answer(text=revision.text, finish_reason=reply.finish_reason)
    chosen, rejected = (answer, revised) if worsen else (revised, answer)
    columns = {"template": revising.label, "rationale": revision.rationale}
    if judge:
        columns |= yield from judge_direction(row, chosen.text, rejected.text, judge=judge, template=judge_template)
    return make_pair(row, chosen, rejected, name, **columns)


def parse_revision(reply: str, head: str = "corrected_student_solution") -> Revision | None:
    """Return the revision in a reviser's reply, or None if it has none.

    The heading is recognized with and without braces, bold or as a Markdown heading, with and without colon (in the published
    replies: 8 of 20 `{corrected_student_solution}:`, 12 without the colon); the last one with a text below it counts. The
    published parser truncates a revision where the heading comes twice, and drops the row silently where there is none.

    Args:
        reply: the reviser's reply.
        head: the heading of the revision, without braces.

    Examples:
        >>> parse_revision("{teacher_reasoning}: Too short.\\n\\n{corrected_student_solution}\\nIt is 4, since 2 + 2 = 4.")
        Revision(text='It is 4, since 2 + 2 = 4.', rationale='Too short.')
    """
    sections = templates.sections(reply, "teacher_reasoning", head)
    if head not in sections:
        return None
    return Revision(sections[head], sections.get("teacher_reasoning") or sections[""])
