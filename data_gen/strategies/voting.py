"""Several judges that vote on the answers to a prompt, as synthetic annotators."""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from contralto.data_gen import templates
from contralto.data_gen.ranges import check_number
from contralto.data_gen.strategies.shared import (
    MOST_ANSWERS,
    ask_template,
    existing_answer,
    list_column,
    make_pair,
    sample_answers,
)
from contralto.data_gen.strategies.verdicts import load_judge_template, verdict_of
from contralto.data_gen.types import Answer, Ask, Pair, Rejected, Row, Strategy

__all__ = ["vote"]

DIVIDED = "the votes are divided equally"


class Annotator(NamedTuple):
    """A judge with a prompt; several samples of it are several annotators."""

    name: str
    role: str
    template: templates.Template
    seed: int


def vote(
    row: Row,
    *,
    target: str = "target",
    judges: Sequence[str] = ("judge",),
    judge_templates: Sequence[str] = ("judge",),
    n: int = 1,
    responses: str | None = None,
    labelled: bool = False,
    ties: bool = False,
) -> Strategy:
    """Let several judges vote on two answers (Padmakumar et al. 2024, arXiv 2412.03822, "Beyond the Binary": synthetic annotators).

    An annotator is a judge with a template and a sample; judges differ by their models and their temperatures, which are those of
    their roles. Each reads the answers in both orders and votes for an answer that it prefers in both, otherwise for a tie. A reply
    without a verdict is no vote.

    The pair has the columns `votes`, a list of `chosen`, `rejected` and `tie`, one per annotator, `annotators` with their names,
    and `margin`, (votes for chosen - votes for rejected) / votes. The recipe `reward_margin` reads `votes`, the loss `odpo` reads
    `margin`.

    Args:
        row: the row.
        target: the role that answers twice, unless there are answers.
        judges: the roles that judge.
        judge_templates: the templates of judges; every judge reads every one.
        n: samples of each judge with each template; above 1, its role needs a temperature.
        responses: a column with a list of existing answers, of which the first two are judged.
        labelled: judge the row's `chosen` and `rejected`, and keep them as they are, whatever the votes: `margin` may be below 0.
        ties: keep answers between which the votes are divided equally, with a margin of 0; `odpo` cannot read it.

    Raises:
        ValueError: there are no judges or templates, `n` is below 1, or the row lacks answers.
    """
    annotators = _annotators(judges, judge_templates, n)
    if responses and labelled:
        raise ValueError("vote: responses and labelled both name the answers: leave one of them out")
    if labelled:
        answers = [Answer(text=existing_answer(row, name)) for name in ("chosen", "rejected")]
    elif responses:
        answers = [Answer(text=text) for text in list_column(row, responses, str, "vote")[:2]]
    else:
        answers = yield sample_answers(row, target, 2)
    first, second = answers
    if first.text.strip() == second.text.strip():
        return Rejected("both answers are the same")
    votes = yield from _votes(row, first.text, second.text, annotators)
    if not any(votes):
        return Rejected("no judge has a readable verdict in both orders")
    return _voted_pair(row, answers, annotators, votes, labelled=labelled, ties=ties)


def _annotators(judges: Sequence[str], judge_templates: Sequence[str], n: int) -> list[Annotator]:
    """Return the annotators; each judge has seeds of its own, so that two roles with one engine sample twice."""
    for name, value in (("judges", judges), ("judge_templates", judge_templates)):
        if isinstance(value, str) or not value:
            raise ValueError(f"vote: {name} must be a list of names, not {value!r}")
    check_number("vote: n", n, least=1, most=MOST_ANSWERS, whole=True)
    loaded = [load_judge_template(name) for name in judge_templates]
    return [
        Annotator(f"{judge} {template.name}{f' {sample + 1}' if n > 1 else ''}", judge, template, number * n + sample)
        for number, judge in enumerate(judges)
        for template in loaded
        for sample in range(n)
    ]


def _votes(
    row: Row, first: str, second: str, annotators: Sequence[Annotator]
) -> Generator[list[Ask], list[Answer], list[str | None]]:
    """Return the vote of each annotator: first, second, tie, or None for a reply without a verdict."""
    task = templates.as_text(row["prompt"])
    replies = yield [
        _asked(row, annotator, task, *pair) for annotator in annotators for pair in ((first, second), (second, first))
    ]
    verdicts = [verdict_of(reply) for reply in replies]
    return [_vote(*verdicts[2 * at : 2 * at + 2]) for at in range(len(annotators))]


def _asked(row: Row, annotator: Annotator, task: str, one: str, other: str) -> Ask:
    values = {"task": task, "first": one, "second": other}
    request = ask_template(row, annotator.role, annotator.template, tag="verdict", **values)
    return Ask(**{**vars(request), "seed": annotator.seed})


def _vote(in_order: str | None, swapped: str | None) -> str | None:
    """Return the answer that an annotator prefers in both orders.

    Examples:
        >>> _vote("A", "B"), _vote("B", "A"), _vote("A", "A"), _vote("A", None)
        ('first', 'second', 'tie', None)
    """
    if in_order is None or swapped is None:
        return None
    return {("A", "B"): "first", ("B", "A"): "second"}.get((in_order, swapped), "tie")


def _voted_pair(
    row: Row,
    answers: Sequence[Answer],
    annotators: Sequence[Annotator],
    votes: Sequence[str | None],
    *,
    labelled: bool,
    ties: bool,
) -> Pair | Rejected:
    """Return the pair with its votes, the answer with more of them chosen, or the labelled one."""
    net = votes.count("first") - votes.count("second")
    if not net and not labelled and not ties:
        return Rejected(DIVIDED)
    is_first = labelled or net >= 0
    names = {
        "first": "chosen" if is_first else "rejected",
        "second": "rejected" if is_first else "chosen",
        "tie": "tie",
    }
    read = [(annotator.name, names[each]) for annotator, each in zip(annotators, votes, strict=True) if each]
    given = [each for _, each in read]
    columns: dict[str, Any] = {
        "votes": given,
        "annotators": [name for name, _ in read],
        "margin": (given.count("chosen") - given.count("rejected")) / len(given),
        "template": " ".join(dict.fromkeys(annotator.template.label for annotator in annotators)),
    }
    chosen, rejected = answers if is_first else reversed(answers)
    return make_pair(row, chosen, rejected, "vote", **columns)
