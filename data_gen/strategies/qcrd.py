"""QCRD: rationales of a teacher to learn, and those of its own slips and of a weaker student to avoid, each with its quality."""

import math
import re
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from contralto.data_gen import templates
from contralto.data_gen.ranges import check_number
from contralto.data_gen.scorers import Scorer, normalize_answer, resolve_scorer
from contralto.data_gen.strategies.shared import (
    MOST_ANSWERS,
    ask_scores,
    ask_template,
    existing_answer,
    make_pair,
)
from contralto.data_gen.types import Answer, Ask, Labelled, Message, Outcome, Rejected, Row, Strategy

__all__ = ["Rationale", "RationalePrompts", "majority", "parse_rationale", "qcrd"]

KEPT = ("labelled", "pairs")
NOTHING = "no reply of the teacher has a rationale and an answer, and ends by itself"


class Rationale(NamedTuple):
    """A rationale with its answer."""

    text: str
    answer: str
    """Empty for a rationale of the student."""
    source: str = "teacher"
    """`teacher` or `student`."""


def qcrd(
    row: Row,
    *,
    teacher: str = "teacher",
    student: str | None = "student",
    n: int = 5,
    negatives: int = 1,
    most: int | None = None,
    keep: str = "labelled",
    label: str | None = None,
    scorer: Any = None,
    scoring: str | None = None,
    pattern: str | None = None,
    template: str = "qcrd",
    explain: str = "qcrd_explain",
    predict: str = "qcrd_predict",
) -> Strategy:
    """Make positive and negative rationales with their qualities (QCRD, Wang et al. 2024, arXiv 2405.13014).

        S+ = {r_j : a_j = mode(a_1 ... a_n)},    S- = {r_j : a_j is another answer} and samples of an earlier student
        s(r) = sigmoid(D(x, r))

    The teacher explains and answers n times; rationales with the most frequent answer are positive (self-consistency), those with
    another one negative. A student of an earlier round, or any weaker model, writes further negative ones at a high temperature: 1.5 in
    the paper, and 0.7 for the teacher, which recipes give to the roles. A discriminator D says how good each rationale is.

    Each row makes completions of two tasks (column `task`): `predict`, the answer alone, and `explain`, the rationales, positive ones with
    the label true and negative ones with false. The column `quality` is s, which the loss `qcrd` of `contralto align` reads.

    Args:
        row: its prompt is the question.
        teacher: the role that explains and answers.
        student: the role that writes negative rationales; None has those of the teacher alone.
        n: samples of the teacher.
        negatives: samples of the student.
        most: the largest number of positive rationales of a row, those of the highest quality; None is all.
        keep: `labelled`, the completions of both tasks; `pairs`, a positive rationale as chosen and a negative one as rejected, with a
            `margin` of 0, from which `contralto align reward_margin --margin_column margin` trains a discriminator.
        label: a column with the right answer for `predict`; None takes the teacher's most frequent one.
        scorer: the discriminator D: `{reward_model: NAME}`, or `module:function`, called as `score(row, answers)` with the rationales, which
            returns their logits. None with no `scoring` counts positive rationales 1 and negative ones 0.
        scoring: a role that replies with the logit of a rationale, in place of `scorer`.
        pattern: a regular expression with one group, whose last match in a teacher's reply is the answer, and the whole reply the rationale,
            such as `####\\s*(\\S+)`; None reads the headings `{rationale}` and `{answer}`.
        template: the teacher's prompt, with `task`.
        explain: the prompt of rationales, with `task`: the student's, and that of the completions.
        predict: the prompt of answers, with `task`.

    Raises:
        ValueError: a number, `keep` or `pattern` is wrong, `scorer` and `scoring` are both set, or the row lacks `label`.
    """
    _check(n, negatives, most, keep)
    if scorer is not None and scoring:
        raise ValueError("qcrd: scorer and scoring both name the discriminator: leave one of them out")
    reading, judge = None if pattern is None else _compiled(pattern), None if scorer is None else resolve_scorer(scorer)
    prompts = RationalePrompts(*(templates.load(name, "task") for name in (template, explain, predict)))
    right = None if label is None else _right_answer(row, label)
    asks = [_ask(row, teacher, prompts.teacher, seed) for seed in range(n)]
    asks += [_ask(row, student, prompts.explain, seed) for seed in range(negatives) if student]
    replies = yield asks
    taught = [parsed for reply in replies[:n] if (parsed := parse_rationale(reply, reading))]
    answer = majority([each.answer for each in taught], least=min(n, 2))
    if answer is None:
        return Rejected("no answer of the teacher is the most frequent one" if taught else NOTHING)
    positive, negative = _sides(taught, answer, replies[n:])
    asked = {**row, "prompt": prompts.messages(row, "explain")}
    qualities = yield from _qualities(asked, [*positive, *negative], len(positive), judge, scoring)
    used = sorted(zip(positive, qualities, strict=False), key=lambda each: -each[1])[:most]
    others = list(zip(negative, qualities[len(positive) :], strict=True))
    if keep == "pairs":
        return _pairs(asked, used, others, prompts.label)
    columns = {"task": "predict", "quality": 1.0, "source": "teacher", "template": prompts.label}
    predicted = _labelled(prompts.messages(row, "predict"), right or answer, is_positive=True, **columns)
    return [predicted, *_completions(asked["prompt"], used, others, prompts.label)]


class RationalePrompts(NamedTuple):
    """The templates of a row."""

    teacher: templates.Template
    explain: templates.Template
    predict: templates.Template

    @property
    def label(self) -> str:
        """Return their names and versions."""
        return " ".join(template.label for template in self)

    def messages(self, row: Row, name: str) -> list[dict[str, Any]]:
        """Return the prompt of a row by one of the templates.

        Args:
            row: the row.
            name: `teacher`, `explain` or `predict`.
        """
        return templates.user_messages(getattr(self, name).render(task=templates.as_text(row["prompt"])))


def _check(n: int, negatives: int, most: int | None, keep: str) -> None:
    """Raise ValueError for a setting out of range."""
    check_number("qcrd: n", n, least=1, most=MOST_ANSWERS, whole=True)
    check_number("qcrd: negatives", negatives, least=0, most=MOST_ANSWERS, whole=True)
    if most is not None:
        check_number("qcrd: most", most, least=1, most=MOST_ANSWERS, whole=True)
    if keep not in KEPT:
        raise ValueError(f"qcrd: keep must be one of {', '.join(KEPT)}, not {keep!r}")


def _right_answer(row: Row, column: str) -> str:
    """Return the answer in a column, a text or a number."""
    value = row.get(column)
    return str(value) if type(value) in (int, float) else existing_answer(row, column)


def _compiled(pattern: str) -> re.Pattern[str]:
    """Return a regular expression with one group."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"qcrd: pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(f"qcrd: pattern {pattern!r} must have one group, the answer, not {compiled.groups}")
    return compiled


def _ask(row: Row, role: str, template: templates.Template, seed: int) -> Ask:
    asked = ask_template(row, role, template, tag="rationale", task=templates.as_text(row["prompt"]))
    return replace(asked, seed=seed)


def parse_rationale(reply: Answer, pattern: re.Pattern[str] | None = None) -> Rationale | None:
    """Return the rationale and the answer of a teacher's reply; None without either, or for a truncated reply.

    Args:
        reply: with the headings `{rationale}` and `{answer}`; a text before the first heading is the rationale, too.
        pattern: its last match holds the answer, and the whole reply is the rationale; None reads the headings.

    Examples:
        >>> parse_rationale(Answer(text="9 and 4 make 13.\\n{answer}: 13"))
        Rationale(text='9 and 4 make 13.', answer='13', source='teacher')
        >>> parse_rationale(Answer(text="9 + 4 = 13. #### 13"), re.compile(r"#### (\\d+)"))
        Rationale(text='9 + 4 = 13. #### 13', answer='13', source='teacher')
    """
    if reply.is_cut:
        return None
    if pattern is not None:
        found = pattern.findall(reply.text)
        text, answer = reply.text.strip(), found[-1] if found else ""
    else:
        parts = templates.sections(reply.text, "rationale", "answer")
        text, answer = parts.get("rationale") or parts[""], parts.get("answer", "")
    return Rationale(text, answer) if text and answer else None


def _sides(
    taught: Sequence[Rationale], answer: str, written: Sequence[Answer]
) -> tuple[list[Rationale], list[Rationale]]:
    """Return the positive and the negative rationales; a text that is both is positive."""
    positive = [each for each in taught if normalize_answer(each.answer) == normalize_answer(answer)]
    negative = [each for each in taught if each not in positive]
    negative += [Rationale(reply.text.strip(), "", "student") for reply in written if not reply.is_cut]
    texts = {each.text for each in positive}
    return positive, [each for each in negative if each.text and each.text not in texts]


def majority(answers: Sequence[str], *, least: int = 2) -> str | None:
    """Return the most frequent answer in the form that came first, for self-consistency.

    Args:
        answers: compared by `scorers.normalize_answer`.
        least: the smallest number of times.

    Returns:
        None if two answers are equally frequent, or none is given `least` times.

    Examples:
        >>> majority(["13", "The 13.", "11"]), majority(["13", "11"]), majority(["13"], least=1)
        ('13', None, '13')
    """
    counted = Counter(map(normalize_answer, answers)).most_common(2)
    if not counted or counted[0][1] < least or (len(counted) > 1 and counted[0][1] == counted[1][1]):
        return None
    return next(answer for answer in answers if normalize_answer(answer) == counted[0][0])


def _qualities(
    row: Row, rationales: Sequence[Rationale], positive: int, scorer: Scorer | None, role: str | None
) -> Generator[list[Ask], list[Answer], list[float]]:
    """Return the quality of each rationale, in [0, 1]; without a discriminator 1 for the first `positive` ones and 0 for the others."""
    if scorer is None and role is None:
        return [float(at < positive) for at in range(len(rationales))]
    logits = yield from ask_scores(row, [Answer(text=each.text) for each in rationales], scorer, role or "")
    return [0.5 + 0.5 * math.tanh(logit / 2) for logit in logits]  # the sigmoid, without overflow


def _completions(
    prompt: Sequence[Message],
    positive: Sequence[tuple[Rationale, float]],
    negative: Sequence[tuple[Rationale, float]],
    template: str,
) -> list[Outcome]:
    """Return rationales as completions with labels."""
    shared = {"task": "explain", "template": template}
    return [
        _labelled(prompt, each.text, is_positive=rationales is positive, quality=s, source=each.source, **shared)
        for rationales in (positive, negative)
        for each, s in rationales
    ]


def _labelled(prompt: Sequence[Message], text: str, *, is_positive: bool, **columns: Any) -> Labelled:
    return Labelled(prompt=prompt, completion=text, label=is_positive, columns={"strategy": "qcrd", **columns})


def _pairs(
    row: Row, positive: Sequence[tuple[Rationale, float]], negative: Sequence[tuple[Rationale, float]], template: str
) -> Sequence[Outcome] | Rejected:
    """Return pairs of a positive and a negative rationale, each of them in one pair."""
    pairs = [
        make_pair(
            row,
            Answer(text=good.text),
            Answer(text=bad.text),
            "qcrd",
            template=template,
            chosen_quality=s,
            rejected_quality=t,
            margin=0.0,
            source=bad.source,
        )
        for (good, s), (bad, t) in zip(positive, negative, strict=False)
    ]
    return pairs or Rejected("there is no negative rationale: all samples of the teacher have one answer")
