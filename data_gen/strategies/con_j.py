"""Pairs of judgements, for models that learn to judge."""

import re
from collections.abc import Generator, Sequence
from typing import Any

from contralto.data_gen import templates
from contralto.data_gen.ranges import check_number
from contralto.data_gen.strategies.replies import BETTER
from contralto.data_gen.strategies.shared import MOST_ANSWERS, check_count, existing_answer, make_pair
from contralto.data_gen.strategies.verdicts import load_judge_template
from contralto.data_gen.types import Answer, Ask, Rejected, Row, Strategy, digest

__all__ = ["con_j", "parse_better"]

_BETTER = re.compile(
    r"[\"'“”]?(?:better(?:[_ ]answer)?|更好的回答)[\"'“”]?\s*[:=：]\s*[\"'“”]?(?:answer\s*|回答\s*)?([12])\b",  # noqa: RUF001
    re.IGNORECASE,
)
"""The verdict of a judgement, in English, or in Chinese as the template `con_j_paper` requests it."""


def con_j(
    row: Row,
    *,
    target: str = "target",
    n: int = 8,
    most: int = 3,
    template: str = "con_j",
    hint_template: str = "con_j_hint",
) -> Strategy:
    """Make pairs of judgements (Con-J, Ye et al. 2024, arXiv 2410.03742).

    The model compares two answers n times; which of them is better is known. A judgement with the right verdict is chosen, one
    with the wrong verdict rejected. If all n agree, two more are requested with a hint, for the right and for the wrong answer;
    the pair's prompt is the one without a hint. Judgements without a readable verdict are not used (the released code uses some
    as rejected).

    Args:
        row: with `prompt`, and the answers `chosen` and `rejected` (texts or messages, as `load_pairs` returns them). Their
            order in the prompt is derived from the row's id.
        target: the role that judges, and learns to.
        n: judgements per row, at least 2.
        most: the largest number of pairs per row, each of two judgements of its own.
        template: with `task`, `first`, `second`; the reply holds `"better": 1` or `"better": 2`. `con_j_paper` is the published prompt,
            in Chinese.
        hint_template: with `judgement_prompt` and `better`.

    Raises:
        ValueError: `n` is below 2, or the row lacks an answer.
    """
    check_count("con_j", n)
    check_number("con_j: most", most, least=1, most=MOST_ANSWERS, whole=True)
    judging, hinting = load_judge_template(template), templates.load(hint_template, "judgement_prompt", "better")
    right = 1 + int(digest(["con_j", row["id"]]), 16) % 2
    first, second = (
        existing_answer(row, name) for name in (("chosen", "rejected") if right == 1 else ("rejected", "chosen"))
    )
    prompt = judging.render(task=templates.as_text(row["prompt"]), first=first, second=second)
    judgements = yield [_ask(target, prompt, i, "judgement", judging) for i in range(n)]
    good, bad = _with_verdict(judgements, right), _with_verdict(judgements, 3 - right)
    columns: dict[str, Any] = {"template": judging.label, "judgement_source": "sampled", "better": right}
    if not good or not bad:
        good, bad = yield from _hinted(prompt, right, target=target, seed=n, template=hinting)
        columns |= {"template": f"{judging.label} {hinting.label}", "judgement_source": "hinted"}
    judged = {**row, "prompt": templates.user_messages(prompt)}
    pairs = [make_pair(judged, *both, "con_j", **columns) for both in zip(good[:most], bad[:most], strict=False)]
    return pairs or Rejected(_without_pairs(judgements))


def _without_pairs(judgements: Sequence[Answer]) -> str:
    """Return the reason why judgements make no pair."""
    if all(parse_better(judgement.text) is None for judgement in judgements):
        return f"no judgement holds {BETTER}"
    return "no right and wrong judgement, not even with a hint"


def _hinted(
    prompt: str, right: int, *, target: str, seed: int, template: templates.Template
) -> Generator[list[Ask], list[Answer], tuple[list[Answer], list[Answer]]]:
    """Return the judgements with a hint at the right and at the wrong answer; [] for an ignored hint."""
    prompts = [template.render(judgement_prompt=prompt, better=str(better)) for better in (right, 3 - right)]
    led, misled = yield [_ask(target, hinted, seed, "hinted", template) for hinted in prompts]
    return _with_verdict([led], right), _with_verdict([misled], 3 - right)


def _ask(role: str, prompt: str, seed: int, tag: str, template: templates.Template) -> Ask:
    """Return the request for a judgement, without the images of the row."""
    messages = templates.user_messages(prompt)
    return Ask(role=role, messages=messages, seed=seed, tag=tag, template=template.label)


def _with_verdict(judgements: Sequence[Answer], better: int) -> list[Answer]:
    """Return the judgements that prefer answer `better`, 1 or 2."""
    return [judgement for judgement in judgements if parse_better(judgement.text) == better]


def parse_better(judgement: str) -> int | None:
    """Return the answer that a judgement prefers, 1 or 2, by its last statement; None without one.

    Args:
        judgement: the judge's reply.

    Examples:
        >>> parse_better('{"reason": "It names the cause.", "better": 2}'), parse_better("Both are fine.")
        (2, None)
        >>> parse_better('{"原因": "It names the cause.", "更好的回答": 1}')
        1
    """
    statements = _BETTER.findall(judgement)
    return int(statements[-1]) if statements else None
