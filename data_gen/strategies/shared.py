"""Helpers of strategies: requests of a row's prompt, pairs with their columns, scored answers.

The columns of a pair are `strategy`; `template`, the versions of the prompts; `chosen_finish_reason` and
`rejected_finish_reason`; with a judge `direction`; with a scorer `chosen_score`, `rejected_score` and `reward_margin`.
Strategies filter nothing by them: filters are a part of the recipe.
"""

import math
from collections.abc import Generator, Sequence
from typing import Any

from contralto.data_gen import templates
from contralto.data_gen.ranges import check_number
from contralto.data_gen.scorers import Scorer, finite_scores, score_answers
from contralto.data_gen.types import Answer, Ask, Pair, Rejected, Row, Sampling

__all__ = [
    "MOST_ANSWERS",
    "ask_prompt",
    "ask_scores",
    "ask_template",
    "best_and_worst",
    "check_count",
    "existing_answer",
    "list_column",
    "make_pair",
    "pair_columns",
    "sample_answers",
]

MOST_ANSWERS = 10_000
"""Largest number of answers to one row, since all of them are requested at once."""


def ask_prompt(row: Row, role: str, *, seed: int = 0, sampling: Sampling | None = None) -> Ask:
    """Return the request for an answer to a row's prompt.

    Args:
        row: with `prompt` and `images`.
        role: the role that answers.
        seed: distinguishes several answers of one role.
        sampling: None is the role's sampling in the recipe.
    """
    images = row.get("images", ())
    return Ask(role=role, messages=row["prompt"], images=images, seed=seed, sampling=sampling, tag="answer")


def sample_answers(row: Row, role: str, n: int) -> list[Ask]:
    """Return the requests for `n` samples of one role.

    Args:
        row: with `prompt` and `images`.
        role: the role that answers.
        n: the number of samples; their seeds are 0 to n - 1.
    """
    return [ask_prompt(row, role, seed=seed) for seed in range(n)]


def ask_template(row: Row, role: str, template: templates.Template, *, tag: str, **values: str) -> Ask:
    """Return the request of a filled template, with the images of a row.

    Args:
        row: with `images`, if it has any.
        role: the role that answers.
        template: the template of the user's message.
        tag: the purpose of the request, as the store shows it.
        values: the fields of the template.
    """
    messages = templates.user_messages(template.render(**values))
    return Ask(role=role, messages=messages, images=row.get("images", ()), tag=tag, template=template.label)


def make_pair(row: Row, chosen: Answer, rejected: Answer, strategy: str, **columns: Any) -> Pair:
    """Make a pair of two answers to a row's prompt.

    Args:
        row: with `prompt` and `images`.
        chosen: the better answer.
        rejected: the worse answer.
        strategy: the value of the column `strategy`.
        columns: further columns.
    """
    return Pair(
        prompt=row["prompt"],
        chosen=chosen.text,
        rejected=rejected.text,
        images=row.get("images", ()),
        columns=pair_columns(strategy, chosen, rejected) | columns,
    )


def pair_columns(strategy: str, chosen: Answer, rejected: Answer) -> dict[str, Any]:
    """Return the columns that every pair of two answers has.

    Args:
        strategy: the name of the strategy.
        chosen: the better answer.
        rejected: the worse answer.
    """
    return {
        "strategy": strategy,
        "chosen_finish_reason": chosen.finish_reason,
        "rejected_finish_reason": rejected.finish_reason,
    }


def existing_answer(row: Row, column: str) -> str:
    """Return an answer that the row already contains.

    Args:
        row: the row.
        column: holds a text, or messages of which the last one is the answer.

    Raises:
        ValueError: the column holds neither.
    """
    value = row.get(column)
    if isinstance(value, list | tuple) and value:
        value = templates.content_text(value[-1]["content"])
    if not isinstance(value, str):
        raise ValueError(f"row {row['id']} has no answer in its column {column}")  # noqa: TRY004 - a mistake in the data
    return value


def list_column(row: Row, name: str, kind: Any, strategy: str) -> list[Any]:
    """Return a column of the row that holds at least two values of one type.

    Args:
        row: the row.
        name: the column.
        kind: the type of its values.
        strategy: the name of the strategy, for the error.

    Raises:
        ValueError: the column holds something else.
    """
    values = row.get(name)
    if not isinstance(values, list | tuple) or len(values) < 2 or not all(isinstance(value, kind) for value in values):
        raise ValueError(
            f"{strategy}: column {name} of row {row['id']} is not a list of at least two answers or scores"
        )
    return list(values)


def check_count(strategy: str, n: int) -> None:
    """Require at least two answers to choose from.

    Args:
        strategy: the name of the strategy, for the error.
        n: the number of answers.

    Raises:
        ValueError: `n` is below 2, too large, or not a whole number.
    """
    check_number(f"{strategy}: n", n, least=-math.inf, most=MOST_ANSWERS, whole=True)
    if n < 2:
        raise ValueError(f"{strategy}: n must be at least 2, to have a best and a worst answer, not {n}")


def ask_scores(
    row: Row, answers: Sequence[Answer], scorer: Scorer | None, role: str
) -> Generator[list[Ask], list[Answer], list[float]]:
    """Return the score of every answer, by a function or by a role.

    Args:
        row: with `prompt` and `images`.
        answers: the answers.
        scorer: the function; None requests the scores from the role.
        role: replies with a number to the prompt with an answer.

    Raises:
        ValueError: not one finite number per answer.
    """
    texts = [answer.text for answer in answers]
    if scorer is not None:
        return score_answers(scorer, row, texts)
    images = row.get("images", ())
    chats = [[*row["prompt"], {"role": "assistant", "content": text}] for text in texts]
    replies = yield [Ask(role=role, messages=chat, images=images, tag="score") for chat in chats]
    try:
        return finite_scores([reply.text for reply in replies], len(texts))
    except ValueError as error:
        given = ", ".join(repr(reply.text[:40]) for reply in replies[:3])
        raise ValueError(f"the role {role!r} must reply with a finite number and nothing else, not {given}") from error


def best_and_worst(row: Row, answers: Sequence[Answer], scores: Sequence[float], strategy: str) -> Pair | Rejected:
    """Make a pair of the best and the worst answer; among equal ones the first counts.

    Args:
        row: with `prompt` and `images`.
        answers: the answers.
        scores: one per answer.
        strategy: the value of the column `strategy`.

    Raises:
        ValueError: another number of scores than of answers.
    """
    if len(scores) != len(answers):
        raise ValueError(f"{strategy}: {len(answers)} answers have {len(scores)} scores")
    best, worst = max(scores), min(scores)
    if best == worst:
        return Rejected(f"all {len(answers)} answers score the same")
    chosen, rejected = answers[scores.index(best)], answers[scores.index(worst)]
    columns = {"chosen_score": best, "rejected_score": worst, "reward_margin": best - worst}
    return make_pair(row, chosen, rejected, strategy, **columns)
