"""The six contrasts of PopAlign (Wang et al. 2024, arXiv 2410.13785): by prompt, by model, by pipeline, without a judge.

In the paper's own test on 200 prompts, GPT-4 agrees with the direction of elicitive pairs in 91.5%, of nparam 88, leaderboard
84, demonstration 76.5, prefix 75.5 and refine 55.5: refine is nearly chance. `judge` asks for such an opinion on every pair; the
column `direction` is written beside it, and nothing is dropped.

The paper's prompts are not reproduced: `prompts/` has texts of our own to the same purpose, and a user's file can replace each.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from contralto.data_gen import templates
from contralto.data_gen.strategies.pairs import ask, direction, judging, pair, user
from contralto.data_gen.types import Answer, Ask, Pair, Rejected, Row, Strategy, drive

__all__ = ["demonstration", "elicitive", "leaderboard", "nparam", "popalign", "prefix", "refine"]


def prefix(
    row: Row,
    *,
    target: str = "target",
    good: str = "prefix_good",
    bad: str = "prefix_bad",
    judge: str | None = None,
    judge_template: str = "judge",
) -> Strategy:
    """The same model with a good and with a bad prefix: r+ = M([p+, q]), r- = M([p-, q]), as RLCD does (arXiv 2307.12950).

    Args:
        row: the row. The templates are put around its last message; the pair keeps the row's own prompt.
        target: the role that answers.
        good, bad: the templates, with `task`.
        judge, judge_template: see the module.
    """
    judging(judge_template)
    answers = yield _both_ways(row, target, good, bad)
    made = yield from _finish(row, answers, "prefix", (good, bad), judge, judge_template)
    return made


def demonstration(
    row: Row,
    *,
    target: str = "target",
    good: str = "demonstration_good",
    bad: str = "demonstration_bad",
    judge: str | None = None,
    judge_template: str = "judge",
) -> Strategy:
    """The same model after good and after bad examples: r+ = M([d+, q]), r- = M([d-, q]). Arguments as in `prefix`."""
    judging(judge_template)
    answers = yield _both_ways(row, target, good, bad)
    made = yield from _finish(row, answers, "demonstration", (good, bad), judge, judge_template)
    return made


def elicitive(
    row: Row,
    *,
    target: str = "target",
    good: str = "elicitive_good",
    bad: str = "elicitive_bad",
    judge: str | None = None,
    judge_template: str = "judge",
) -> Strategy:
    """The same model, thinking first how to answer well or how to answer badly: (t+, r+) = M(T+(q)), (t-, r-) = M(T-(q)).

    The templates ask for the headings `{thought}` and `{answer}`; the pair holds the answers, the column `rationale` the good
    thought. Without an answer under its heading there is no pair. Arguments as in `prefix`.
    """
    judging(judge_template)
    replies = yield _both_ways(row, target, good, bad)
    found = [templates.sections(reply.text, "thought", "answer") for reply in replies]
    for parts, reply, which in zip(found, replies, ("good", "bad"), strict=True):
        if "answer" not in parts:
            return Rejected(f"the {which} reply has nothing under {{answer}} (it ended by {reply.finish_reason})")
    answers = [
        Answer(text=parts["answer"], finish_reason=r.finish_reason) for parts, r in zip(found, replies, strict=True)
    ]
    thought = found[0].get("thought", "")
    made = yield from _finish(row, answers, "elicitive", (good, bad), judge, judge_template, rationale=thought)
    return made


def nparam(
    row: Row,
    *,
    larger: str = "larger",
    smaller: str = "smaller",
    judge: str | None = None,
    judge_template: str = "judge",
) -> Strategy:
    """A larger against a smaller model of one family (in the paper Yi-34B-Chat and Yi-6B-Chat).

    Args:
        row: the row.
        larger, smaller: the roles that answer.
        judge, judge_template: see the module.
    """
    judging(judge_template)
    answers = yield [ask(row, larger), ask(row, smaller)]
    made = yield from _finish(row, answers, "nparam", (), judge, judge_template)
    return made


def leaderboard(
    row: Row,
    *,
    higher: str = "higher",
    lower: str = "lower",
    judge: str | None = None,
    judge_template: str = "judge",
) -> Strategy:
    """A model that ranks higher against one that ranks lower (in the paper Yi-34B-Chat and Vicuna-33B). As `nparam`."""
    judging(judge_template)
    answers = yield [ask(row, higher), ask(row, lower)]
    made = yield from _finish(row, answers, "leaderboard", (), judge, judge_template)
    return made


def refine(
    row: Row,
    *,
    target: str = "target",
    template: str = "refine",
    judge: str | None = None,
    judge_template: str = "judge",
) -> Strategy:
    """The same model, asked in a second turn to do better: r- = M(q), r+ = M([q, r-, refine]).

    Args:
        row: the row.
        target: the role that answers twice.
        template: the second turn, without fields.
        judge, judge_template: see the module. Near chance without a stronger reviser: `clair` is this with one.

    Examples:
        >>> asking = refine({"id": "1", "prompt": [{"role": "user", "content": "2 + 2?"}]})
        >>> [message["content"] for message in next(asking).messages]
        ['2 + 2?']
        >>> [message["role"] for message in asking.send(Answer(text="5")).messages]
        ['user', 'assistant', 'user']
    """
    judging(judge_template)
    refining = templates.load(template)
    first = yield ask(row, target)
    turns = [*row["prompt"], {"role": "assistant", "content": first.text}, *user(refining.render())]
    images = row.get("images", ())
    better = yield Ask(role=target, messages=turns, images=images, tag="refined", template=refining.label)
    made = yield from _finish(row, (better, first), "refine", (), judge, judge_template, template=refining.label)
    return made


SIX: dict[str, Callable[..., Strategy]] = {
    "prefix": prefix,
    "demonstration": demonstration,
    "elicitive": elicitive,
    "nparam": nparam,
    "leaderboard": leaderboard,
    "refine": refine,
}


def popalign(row: Row, *, contrasts: Sequence[str] = tuple(SIX), judge: str | None = None) -> Strategy:
    """All six contrasts of a row at once, pooled as in the paper: up to six pairs.

    Args:
        row: the row.
        contrasts: which of the six.
        judge: a role that judges every pair in both orders, or nobody.

    Raises:
        ValueError: another contrast than the six.
    """
    if unknown := [name for name in contrasts if name not in SIX]:
        raise ValueError(f"popalign has the contrasts {', '.join(SIX)}, not {', '.join(unknown)}")
    made = yield from _together([SIX[name](row, judge=judge) for name in contrasts])
    return made


def _together(strategies: Sequence[Strategy]) -> Generator[list[Ask], list[Answer], list[Pair | Rejected]]:
    """Drive strategies side by side, so that what they ask can be answered together; their pairs in the given order."""
    driven = [drive(strategy) for strategy in strategies]
    made: dict[int, list[Pair | Rejected]] = {}
    waiting: dict[int, list[Ask]] = {}

    def step(at: int, answers: Any) -> None:
        waiting.pop(at, None)
        try:
            waiting[at] = driven[at].send(answers)
        except StopIteration as end:
            made[at] = end.value

    for at in range(len(driven)):
        step(at, None)
    while waiting:
        asked = dict(waiting)
        answers = iter((yield [one for group in asked.values() for one in group]))
        for at, group in asked.items():
            step(at, [next(answers) for _ in group])
    return [item for at in range(len(driven)) for item in made[at]]


def _both_ways(row: Row, target: str, good: str, bad: str) -> list[Ask]:
    """The row's prompt, its last message put into the good and into the bad template."""
    *before, last = row["prompt"]
    used = [templates.load(name, "task") for name in (good, bad)]
    return [
        Ask(
            role=target,
            messages=[*before, {**last, "content": _filled(template, last["content"])}],
            images=row.get("images", ()),
            tag=template.name,
            template=template.label,
        )
        for template in used
    ]


def _filled(template: templates.Template, content: Any) -> Any:
    """A message's content in a template; images keep their place before the text."""
    text = template.render(task=templates.content_text(content))
    if isinstance(content, str):
        return text
    return [part for part in content if part["type"] != "text"] + [{"type": "text", "text": text}]


def _finish(
    row: Row,
    answers: Sequence[Answer],
    strategy: str,
    used: Sequence[str],
    judge: str | None,
    judge_template: str,
    **known: Any,
) -> Generator[list[Ask], list[Answer], Pair]:
    """The pair of the good and the bad answer, judged if somebody judges."""
    chosen, rejected = answers
    if used:
        known["template"] = " ".join(templates.load(name, "task").label for name in used)
    if judge:
        known |= yield from direction(row, chosen.text, rejected.text, judge=judge, template=judge_template)
    return pair(row, chosen, rejected, strategy, **known)
