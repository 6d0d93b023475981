"""Games: two systems' answers to one prompt, to be compared."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from contralto.eval.judging.answers import EvalQuestion, SystemAnswer

__all__ = ["Game", "pair_answers"]


class Game(NamedTuple):
    """Two answers to one turn of a question."""

    id: str
    question: str
    """The id of the question, which all its turns share."""
    turns: tuple[str, ...]
    """The turns of the user up to this one."""
    first: tuple[str, ...]
    """The first system's answer to each of them."""
    second: tuple[str, ...]
    category: str = ""
    references: tuple[str, ...] = ()

    @property
    def is_same(self) -> bool:
        """Return True if both answers are the same text, which needs no judge."""
        return [text.strip() for text in self.first] == [text.strip() for text in self.second]


def pair_answers(
    first: Sequence[SystemAnswer],
    second: Sequence[SystemAnswer],
    *,
    names: tuple[str, str] = ("A", "B"),
    questions: Sequence[EvalQuestion] = (),
    is_common: bool = False,
    limit: int | None = None,
) -> list[Game]:
    """Return the games of two systems on the same prompts, in the order of the questions, or of the first system.

    Answers belong together if they have the same id, or, without ids, the same prompt. A question of two turns makes two games.

    Args:
        first: the answers of one system.
        second: the answers of the other.
        names: the names of the systems, for errors.
        questions: the question set, if prompts, categories or references are in a file of their own.
        is_common: leave out prompts that only one system has answered; False rejects them.
        limit: the largest number of questions; None is all.

    Raises:
        ValueError: an answer or its prompt is missing, an id or a prompt occurs twice, or one id has two prompts.

    Examples:
        >>> one, other = SystemAnswer("1", ("Why?",), ("So.",)), SystemAnswer("1", ("Why?",), ("Because.",))
        >>> [(game.id, game.first, game.second) for game in pair_answers([one], [other])]
        [('1', ('So.',), ('Because.',))]
    """
    has_ids = None not in [each.id for each in first] + [each.id for each in second] + [each.id for each in questions]
    answers = [_by_key(rows, has_ids, name) for rows, name in zip((first, second), names, strict=True)]
    known = _by_key(questions, has_ids, "the question set")
    keys = list(known or answers[0])
    keys += [key for key in answers[1] if key not in answers[0] and key not in known and not known]
    complete = [key for key in keys if all(key in table for table in answers)]
    if len(complete) < len(keys) and not is_common:
        lacking = next(
            (name, key) for key in keys for table, name in zip(answers, names, strict=True) if key not in table
        )
        count = len(keys) - len(complete)
        raise ValueError(
            f"{lacking[0]} has no answer to {lacking[1]!r:.60}, and {count} prompts of {len(keys)} are not answered by both: "
            "add the answers, or judge the common ones alone with --common"
        )
    if not complete:
        raise ValueError(f"{names[0]} and {names[1]} have no prompt in common")
    games = []
    for key in complete[:limit]:
        games += _games(key, answers[0][key], answers[1][key], known.get(key), names)
    return games


def _by_key(rows: Sequence[Any], has_ids: bool, name: str) -> dict[str, Any]:
    """Return rows by id, or by prompt."""
    keys = [row.id if has_ids else "\n\n".join(row.turns) for row in rows]
    if "" in keys:
        raise ValueError(
            f"{name}: row {keys.index('') + 1} has no prompt, and the rows are not matched by id: give the questions with --questions"
        )
    if double := next((key for key, count in Counter(keys).items() if count > 1), None):
        what = "the id" if has_ids else "the prompt"
        raise ValueError(
            f"{name}: {what} {double!r:.60} occurs twice: give each answer an id of its own (--columns id=COLUMN)"
        )
    return dict(zip(keys, rows, strict=True))


def _games(
    key: str, one: SystemAnswer, other: SystemAnswer, question: EvalQuestion | None, names: tuple[str, str]
) -> list[Game]:
    """Return the games of one question, one for each turn."""
    prompts = {each.turns for each in (one, other, question) if each is not None and each.turns}
    if len(prompts) > 1:
        raise ValueError(
            f"the answers of {names[0]} and {names[1]} with the id {key!r:.60} belong to different prompts"
        )
    if not prompts:
        raise ValueError(f"no row with the id {key!r:.60} has the prompt: give the questions with --questions FILE")
    turns = prompts.pop()
    counts = {len(one.texts), len(other.texts)}
    if len(counts) > 1 or max(counts) > len(turns):
        raise ValueError(
            f"question {key!r:.60} has {len(turns)} turns, {names[0]} {len(one.texts)} answers and {names[1]} {len(other.texts)}"
        )
    category, references = (question.category, question.references) if question else ("", ())
    # a single answer to a conversation is the answer to its last turn
    spans = [(turns, 1)] if counts == {1} else [(turns[:count], count) for count in range(1, len(one.texts) + 1)]
    return [
        Game(
            id=key if count == 1 else f"{key}, turn {count}",
            question=key,
            turns=shown,
            first=one.texts[:count],
            second=other.texts[:count],
            category=category,
            references=references[: len(shown)],
        )
        for shown, count in spans
    ]
