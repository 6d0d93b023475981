"""Judges of answers: their prompts, their verdicts, and pairs made of what they prefer.

Judges favour a position (Zheng et al. 2023, arXiv 2306.05685), so every comparison is made in both orders.
"""

import inspect
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import wraps
from typing import Any, Literal, NamedTuple

from contralto.data_gen import templates
from contralto.data_gen.strategies.replies import VERDICT
from contralto.data_gen.strategies.shared import ask_template, make_pair
from contralto.data_gen.types import Answer, Ask, Pair, Rejected, Row, Strategy

__all__ = [
    "AnswerContrast",
    "Comparison",
    "Contrasting",
    "compare_answers",
    "is_readable",
    "judge_direction",
    "judged",
    "judged_pair",
    "load_judge_template",
    "parse_verdict",
    "verdict_of",
]

Verdict = Literal["A", "B", "tie"]

_VERDICT = r"(?P<verdict>[AB]|(?i:a\s+tie|tie|draw))\b"
_WINS = r"is\s+(?:clearly\s+|slightly\s+|the\s+)*(?:better|best|stronger|preferable)\b"
_REASON = r"[,;:(–—-](?![^\n]*\b(?:[AB]|tie|equal\w*|worse|weaker|not)\b)"  # noqa: RUF001
_ENDS = rf"(?=[\]\[)*_\"'`}}]*[.!]|[\s\]\[)*_\"'`}}]*(?:$|\n|wins\b|{_WINS}|{_REASON}))"
"""Text that may follow a verdict: the end of the sentence or line, "wins", or a reason that does not name the other answer."""
_VERDICTS = [
    re.compile(
        r"(?i:verdict|winner|better\s+answer)(?i:\s+is)?[\s:*_\"'`=\-\[(<{]*(?i:assistant|answer|response)?[\s:*_\"'`\[(]*"
        + _VERDICT
        + _ENDS
    ),
    re.compile(rf"\[\[\s*{_VERDICT}\s*\]\]"),
    re.compile(rf"(?m)^[^\w\n]*+(?:(?i:assistant|answer|response)\s*+)?{_VERDICT}\W*+\Z"),  # linear in white space
]


def parse_verdict(text: str) -> Verdict | None:
    """Return the verdict in a judge's reply, or None if there is none or it is ambiguous.

    Recognized are `Verdict: A` in any form (bold, brackets, quotes, "the answer A is better"), `[[A]]`, and a last line that
    holds nothing but the letter. The last match counts, since judges often weigh both sides first. A sentence that names both
    ("A and B are equally good") is no verdict.

    Args:
        text: the judge's reply.

    Examples:
        >>> parse_verdict("A is short. Still, **Verdict:** B"), parse_verdict("Verdict: A and B are equal"), parse_verdict("Verdict: tie")
        ('B', None, 'tie')
    """
    for pattern in _VERDICTS:
        if matches := list(pattern.finditer(text)):
            word = matches[-1]["verdict"]
            return "A" if word == "A" else "B" if word == "B" else "tie"
    return None


class Comparison(NamedTuple):
    """A judge's comparison of two answers in both orders."""

    winner: Literal["first", "second"] | None
    """The answer that wins in both orders; None for ties and for verdicts that change with the order."""
    verdicts: tuple[str | None, str | None]
    """The verdicts with the first answer in first and in second position: `first`, `second`, `tie`, or None."""
    rationale: str
    """The judge's reply in the first order."""


def load_judge_template(name: str) -> templates.Template:
    """Load the template of a judge.

    Strategies call it before their first request, so that a mistake in the template costs nothing.

    Args:
        name: a packaged template, or a path that ends in `.txt`; its fields are `task`, `first` and `second`.

    Raises:
        ValueError: there is no such template, or its fields are others.
    """
    return templates.load(name, "task", "first", "second")


def compare_answers(
    row: Row, first: str, second: str, *, judge: str = "judge", template: str = "judge"
) -> Generator[list[Ask], list[Answer], Comparison]:
    """Let a judge compare two answers to a row's prompt in both orders.

    Args:
        row: with `prompt` and `images`.
        first: one answer.
        second: the other answer.
        judge: the role that judges.
        template: with `task`, `first` and `second`; the judge has to reply `Verdict: A`, `Verdict: B` or `Verdict: tie`.

    Returns:
        A part of a strategy: `comparison = yield from compare_answers(row, one, other)`.
    """
    judging = load_judge_template(template)
    task = templates.as_text(row["prompt"])
    in_order, reversed_order = yield [
        ask_template(row, judge, judging, tag="verdict", task=task, first=one, second=other)
        for one, other in ((first, second), (second, first))
    ]
    verdicts = (
        _as_position(verdict_of(in_order), a="first", b="second"),
        _as_position(verdict_of(reversed_order), a="second", b="first"),
    )
    agreed = verdicts[0] if verdicts[0] == verdicts[1] else None
    winner = agreed if agreed in ("first", "second") else None
    return Comparison(winner, verdicts, in_order.text)  # type: ignore[arg-type]


def verdict_of(reply: Answer) -> Verdict | None:
    """Return the verdict of a judge's reply; None for a truncated reply, whose reasons may name either.

    Args:
        reply: the reply; see `parse_verdict`.
    """
    return parse_verdict(reply.text) if is_readable(reply) else None


def is_readable(reply: Answer) -> bool:
    """Return False for a truncated reply, whose reasons may name either answer.

    Args:
        reply: a judge's reply.
    """
    return not reply.is_cut or len(reply.text.split()) <= 3


def _as_position(verdict: Verdict | None, *, a: str, b: str) -> str | None:
    """Return the answer that was shown as `A` or `B`; ties and missing verdicts are returned unchanged."""
    return {"A": a, "B": b}.get(verdict or "", verdict)


def judge_direction(
    row: Row, chosen: str, rejected: str, *, judge: str, template: str = "judge"
) -> Generator[list[Ask], list[Answer], dict[str, Any]]:
    """Return the columns `direction` and `direction_rationale` of a pair: the answer that a judge prefers in both orders.

    `direction` is `chosen` if the judge confirms the pair, `rejected` if it prefers the rejected answer, and `unclear` for ties,
    verdicts that change with the order, and replies without a verdict. It is a part of a strategy:
    `columns |= yield from judge_direction(...)`.

    Args:
        row: with `prompt` and `images`.
        chosen: the chosen answer.
        rejected: the rejected answer.
        judge: the role that judges.
        template: of the judge.
    """
    comparison = yield from compare_answers(row, chosen, rejected, judge=judge, template=template)
    directions = {"first": "chosen", "second": "rejected", None: "unclear"}
    return {"direction": directions[comparison.winner], "direction_rationale": comparison.rationale}


class AnswerContrast(NamedTuple):
    """The answers of a contrast, of which the chosen one is expected to be better."""

    chosen: Answer
    rejected: Answer
    columns: Mapping[str, Any] = {}
    """Columns of the pair."""


Contrasting = Generator[Ask | list[Ask], Any, AnswerContrast | Rejected]
"""The generator that a contrast returns."""
JUDGE_SETTINGS = """
    judge: a role that judges the pair in both orders; None is no judge.
    judge_template: of the judge."""


def judged(contrast: Callable[..., Contrasting]) -> Callable[..., Strategy]:
    """Make a strategy of a contrast: the pair of its answers, with the opinion of a judge if there is one.

    Args:
        contrast: a generator function of a row and keyword-only settings. The strategy has its name, its settings, and `judge`, a role
            that judges the pair in both orders (None is no judge), and `judge_template`, the template of the judge.
    """

    @wraps(contrast)
    def strategy(row: Row, *, judge: str | None = None, judge_template: str = "judge", **settings: Any) -> Strategy:
        """Make the pair of a contrast, judged if there is a judge."""
        load_judge_template(judge_template)
        made = yield from contrast(row, **settings)
        if isinstance(made, Rejected):
            return made
        columns = dict(made.columns)
        if judge:
            texts = (made.chosen.text, made.rejected.text)
            columns |= yield from judge_direction(row, *texts, judge=judge, template=judge_template)
        return make_pair(row, made.chosen, made.rejected, contrast.__name__, **columns)

    own, added = (
        list(inspect.signature(each, follow_wrapped=False).parameters.values()) for each in (contrast, strategy)
    )
    parameters = [*own, *(each for each in added if each.name in ("judge", "judge_template"))]
    strategy.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    before, _, after = (inspect.getdoc(contrast) or "").partition("Args:\n")
    listed, *rest = after.split("\n\n", 1)
    strategy.__doc__ = "\n\n".join([f"{before}Args:\n{listed}{JUDGE_SETTINGS}", *rest])
    return strategy


def judged_pair(
    row: Row, answers: Sequence[Answer], strategy: str, *, judge: str, template: str
) -> Generator[list[Ask], list[Answer], Pair | Rejected]:
    """Make a pair of two answers by a judge's preference, if it is the same in both orders.

    Args:
        row: with `prompt` and `images`.
        answers: two answers.
        strategy: the value of the column `strategy`.
        judge: the role that judges.
        template: of the judge.
    """
    first, second = answers
    if first.text.strip() == second.text.strip():
        return Rejected("both answers are the same")
    comparison = yield from compare_answers(row, first.text, second.text, judge=judge, template=template)
    if comparison.winner is None:
        return Rejected(_undecided(comparison.verdicts))
    chosen, rejected = (first, second) if comparison.winner == "first" else (second, first)
    label = load_judge_template(template).label
    columns = {"template": label, "rationale": comparison.rationale, "direction": "chosen"}
    return make_pair(row, chosen, rejected, strategy, **columns)


def _undecided(verdicts: tuple[str | None, str | None]) -> str:
    """Return the reason why two verdicts are no preference."""
    if None in verdicts:
        return f"the judge's reply has no verdict, or was cut off: it must have {VERDICT}"
    if verdicts == ("tie", "tie"):
        return "the judge sees a tie"
    return "the judge's verdict changes with the order of the answers"
