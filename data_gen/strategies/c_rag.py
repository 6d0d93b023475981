"""C-RAG: demonstrations that say of each retrieved passage whether it helps to answer a question, and why."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from contralto.data_gen import templates
from contralto.data_gen.ranges import check_number
from contralto.data_gen.scorers import answer_matches, resolve_scorer, score_answers
from contralto.data_gen.strategies.shared import MOST_ANSWERS, make_pair
from contralto.data_gen.types import Answer, Ask, Labelled, Outcome, Rejected, Row, Strategy

__all__ = ["Demonstration", "answer_forms", "c_rag", "c_rag_messages", "gold_passages", "parse_demonstration"]

HEADS = ("evidence", "contrast", "explanation", "answer")
KEPT = ("right", "all", "pairs")
_CITED = re.compile(r"\[\s*(\d+(?:\s*[,;]\s*\d+)*)\s*\]")
_JUDGED = re.compile(
    r"(?im)^[^\w\[\n]*+\[?[^\S\n]*+(?:passage\s*+)?(\d++)\s*+\]?[^\w]*+(?:is\s++)?(not\s+relevant|relevant|irrelevant)\b"
)
"""Quantifiers that give nothing back: a reply of white space would take a time quadratic in its length."""


class Demonstration(NamedTuple):
    """A reply with its four steps. Passages are named by their positions, from 0."""

    evidence: str
    contrast: str
    explanation: str
    answer: str
    relevant: tuple[int, ...]
    """The passages that the contrast calls relevant."""
    cited: tuple[int, ...]
    """The passages that the explanation names."""


def c_rag(
    row: Row,
    *,
    teacher: str = "teacher",
    n: int = 1,
    keep: str = "right",
    passages: str = "passages",
    answers: str | None = "answers",
    gold: str | None = None,
    scorer: Any = None,
    template: str = "c_rag",
) -> Strategy:
    """Make demonstrations of contrastive explanations (C-RAG, Ranaldi et al. 2024, arXiv 2410.22874).

    The teacher collects evidence from retrieved passages, says of each passage whether it is relevant and why, sums this up in an
    argument, and answers. Demonstrations with a right answer are completions from which a smaller model learns to do the same; the
    prompt is the teacher's. The columns are `answer`; `relevant` and `cited`, the positions of passages that the demonstration calls
    relevant and that its argument names; and `support`, the share of the cited passages that are gold ones.

    Args:
        row: its prompt is the question.
        teacher: the role that explains and answers.
        n: demonstrations per row; above 1, the role needs a temperature.
        keep: `right`, demonstrations with a right answer; `all`, also those with a wrong one, with the label false; `pairs`, a right one as
            chosen and a wrong one as rejected.
        passages: a column with the passages, texts or objects with `text` and perhaps `title`.
        answers: a column with the right answer, or a list of its forms, of which a reply must contain one; None with no scorer keeps
            every readable demonstration, unchecked.
        gold: a column with the passages that hold the answer, as positions from 0 or as true or false for each passage.
        scorer: decides in place of `answers`: `module:function`, called as `score(row, answers)` with the answers alone; an answer is right
            if its score is above 0.5.
        template: with `task` and `passages`; the reply has `{contrast}`, `{explanation}` and `{answer}`.

    Raises:
        ValueError: `n` or `keep` is out of range, or a column is missing or has another form.
    """
    check_number("c_rag: n", n, least=1, most=MOST_ANSWERS, whole=True)
    if keep not in KEPT:
        raise ValueError(f"c_rag: keep must be one of {', '.join(KEPT)}, not {keep!r}")
    if scorer is None and answers is None and keep != "right":
        raise ValueError(f"c_rag: keep is {keep}, and without answers or a scorer no answer is wrong: set one of them")
    judge = resolve_scorer(scorer) if scorer is not None else None
    loaded = templates.load(template, "task", "passages")
    messages = c_rag_messages(row, passages=passages, template=template)
    helpful, forms = (
        gold_passages(row, gold, passages),
        None if answers is None or judge else answer_forms(row, answers),
    )
    shared = {"images": row.get("images", ()), "tag": "demonstration", "template": loaded.label}
    replies = yield [Ask(role=teacher, messages=messages, seed=seed, **shared) for seed in range(n)]
    read = [(reply, parse_demonstration(reply.text, len(row[passages]))) for reply in replies if not reply.is_cut]
    shown = [(reply, demonstration) for reply, demonstration in read if demonstration is not None]
    if not shown:
        return Rejected("no reply has a text under {contrast}, {explanation} and {answer}, and ends by itself")
    texts = [demonstration.answer for _, demonstration in shown]
    if judge is not None:
        is_right = [score > 0.5 for score in score_answers(judge, row, texts)]
    else:
        is_right = [forms is None or answer_matches(text, forms) for text in texts]
    columns = [_columns(demonstration, helpful) | {"template": loaded.label} for _, demonstration in shown]
    made = [(right, reply, more) for right, (reply, _), more in zip(is_right, shown, columns, strict=True)]
    asked = {**row, "prompt": messages}
    return _pairs(asked, made) if keep == "pairs" else _completions(asked, made, keep)


def _completions(
    row: Row, made: Sequence[tuple[bool, Answer, Mapping[str, Any]]], keep: str
) -> Sequence[Outcome] | Rejected:
    """Return demonstrations as completions with labels."""
    shared = {"prompt": row["prompt"], "images": row.get("images", ())}
    kept = [
        Labelled(completion=reply.text, label=right, columns={"strategy": "c_rag", **columns}, **shared)
        for right, reply, columns in made
        if right or keep == "all"
    ]
    return kept or Rejected("no demonstration has a right answer")


def _pairs(row: Row, made: Sequence[tuple[bool, Answer, Mapping[str, Any]]]) -> Sequence[Outcome] | Rejected:
    """Return pairs of a right and a wrong demonstration, each of them in one pair."""
    right, wrong = ([each[1:] for each in made if each[0] is side] for side in (True, False))
    pairs = [
        make_pair(row, good, bad, "c_rag", **columns, rejected_answer=others["answer"])
        for (good, columns), (bad, others) in zip(right, wrong, strict=False)
    ]
    return pairs or Rejected(f"{len(right)} demonstrations have a right answer, and {len(wrong)} a wrong one: no pair")


def _columns(demonstration: Demonstration, gold: Sequence[int] | None) -> dict[str, Any]:
    """Return the columns about a demonstration."""
    cited = demonstration.cited
    support = None if gold is None or not cited else len({*cited} & {*gold}) / len(cited)
    return {
        "answer": demonstration.answer,
        "relevant": list(demonstration.relevant),
        "cited": list(cited),
        "support": support,
    }


def c_rag_messages(row: Row, *, passages: str = "passages", template: str = "c_rag") -> list[dict[str, Any]]:
    """Return the prompt of a demonstration, for the teacher and for the model that learns from it.

    Args:
        row: with the question as `prompt`, and passages.
        passages: the column with the passages.
        template: with `task` and `passages`.

    Raises:
        ValueError: the column holds no passages, or there is no such template.

    Examples:
        >>> row = {"id": "1", "prompt": [{"role": "user", "content": "Who?"}], "passages": ["Ann.", {"title": "B", "text": "Ben."}]}
        >>> print(c_rag_messages(row)[0]["content"][111:161])
        {question}:
        Who?
        <BLANKLINE>
        {passages}:
        [1] Ann.
        <BLANKLINE>
        [2] B
        Ben.
    """
    loaded = templates.load(template, "task", "passages")
    texts = _passage_texts(row, passages)
    numbered = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))
    return templates.user_messages(loaded.render(task=templates.as_text(row["prompt"]), passages=numbered))


def _passage_texts(row: Row, column: str) -> list[str]:
    """Return the texts of passages, each with its title in a line of its own."""
    values = row.get(column)
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"c_rag: column {column} of row {row['id']} is not a list of passages")
    texts = []
    for number, value in enumerate(values):
        parts = [value.get("title"), value.get("text")] if isinstance(value, Mapping) else [None, value]
        if not isinstance(parts[1], str) or not parts[1].strip() or not isinstance(parts[0], str | None):
            raise ValueError(
                f"c_rag: passage {number} in column {column} of row {row['id']} must be a text, or an object with text and perhaps title"
            )
        texts.append("\n".join(part for part in parts if part))
    return texts


def gold_passages(row: Row, gold: str | None, passages: str = "passages") -> tuple[int, ...] | None:
    """Return the positions of the passages that hold the answer; None without a column for them.

    Args:
        row: the row.
        gold: the column, with positions from 0 or with true or false for each passage.
        passages: the column with the passages.

    Raises:
        ValueError: the column has another form.

    Examples:
        >>> gold_passages({"passages": ["a", "b"], "gold": [False, True]}, "gold"), gold_passages({"passages": ["a", "b"], "gold": [0]}, "gold")
        ((1,), (0,))
    """
    if gold is None:
        return None
    values, count = row.get(gold), len(row[passages])
    if isinstance(values, list | tuple) and values and all(isinstance(value, bool) for value in values):
        if len(values) == count:
            return tuple(at for at, value in enumerate(values) if value)
    elif isinstance(values, list | tuple) and all(type(value) is int and 0 <= value < count for value in values):
        return tuple(sorted(set(values)))
    raise ValueError(
        f"c_rag: column {gold} of row {row.get('id')} must be a list of positions of its {count} passages, from 0, or of true or false for each, not "
        f"{values!r:.80}"
    )


def answer_forms(row: Row, column: str) -> list[str]:
    """Return the forms of the right answer in a column: a text, a number, or a list of texts.

    Args:
        row: the row.
        column: the column.

    Raises:
        ValueError: the column holds something else.
    """
    value = row.get(column)
    forms = value if isinstance(value, list | tuple) else [str(value) if type(value) in (int, float) else value]
    if not forms or not all(isinstance(form, str) and form.strip() for form in forms):
        raise ValueError(
            f"c_rag: column {column} of row {row.get('id')} must hold the answer, a text or a list of texts, not {value!r:.80}; answers: null "
            "keeps demonstrations unchecked"
        )
    return list(forms)


def parse_demonstration(reply: str, count: int) -> Demonstration | None:
    """Return the steps of a reply, or None if it lacks the contrast, the explanation or the answer.

    Args:
        reply: the reply.
        count: the number of passages; numbers of others are left out.

    Examples:
        >>> reply = "{contrast}:\\n[1] irrelevant: another Ann.\\n[2] relevant: it names her.\\n{explanation}: [2] says so.\\n{answer}: Ann"
        >>> demonstration = parse_demonstration(reply, 2)
        >>> demonstration.answer, demonstration.relevant, demonstration.cited
        ('Ann', (1,), (1,))
    """
    parts = templates.sections(reply, *HEADS)
    if not {*HEADS[1:]} <= parts.keys():
        return None
    judged = {int(number) - 1: word.lower() == "relevant" for number, word in _JUDGED.findall(parts["contrast"])}
    cited = [int(number) - 1 for group in _CITED.findall(parts["explanation"]) for number in re.findall(r"\d+", group)]
    return Demonstration(
        evidence=parts.get("evidence", ""),
        contrast=parts["contrast"],
        explanation=parts["explanation"],
        answer=parts["answer"],
        relevant=tuple(sorted(at for at, relevant in judged.items() if relevant and 0 <= at < count)),
        cited=tuple(sorted({at for at in cited if 0 <= at < count})),
    )
