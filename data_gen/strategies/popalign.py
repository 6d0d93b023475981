"""The six contrasts of PopAlign (Wang et al. 2024, arXiv 2410.13785): by prompt, by model, by pipeline.

In the paper's own test on 200 prompts, GPT-4 confirms the direction of elicitive pairs in 91.5%, of nparam 88, leaderboard
84, demonstration 76.5, prefix 75.5 and refine 55.5: refine is close to chance. Each contrast also has the settings `judge` and
`judge_template`, see `verdicts.judged`: every pair is judged then, the judge's opinion becomes the column `direction`, and nothing is dropped.

The templates in `prompts/` are our own, for the same purpose: the paper has no released code, and its prompts no licence that we
know of. A user's file can replace each of them.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from contralto.data_gen import templates
from contralto.data_gen.strategies.shared import ask_prompt
from contralto.data_gen.strategies.verdicts import AnswerContrast, Contrasting, judged
from contralto.data_gen.types import Answer, Ask, Outcome, Rejected, Row, Strategy, drive

__all__ = ["demonstration", "elicitive", "leaderboard", "nparam", "popalign", "prefix", "refine"]


@judged
def prefix(
    row: Row,
    *,
    target: str = "target",
    good: str = "prefix_good",
    bad: str = "prefix_bad",
) -> Contrasting:
    """Contrast a good with a bad prefix: r+ = M([p+, q]), r- = M([p-, q]), as RLCD does (arXiv 2307.12950).

    Args:
        row: the row. The templates are put around its last message; the pair keeps the row's own prompt.
        target: the role that answers.
        good: the template of the chosen answer, with `task`.
        bad: the template of the rejected answer, with `task`.
    """
    return (yield from _of_two_prompts(row, target, good, bad))


@judged
def demonstration(
    row: Row,
    *,
    target: str = "target",
    good: str = "demonstration_good",
    bad: str = "demonstration_bad",
) -> Contrasting:
    """Contrast good with bad examples before the prompt: r+ = M([d+, q]), r- = M([d-, q]).

    Args:
        row: the row. The templates are put around its last message; the pair keeps the row's own prompt.
        target: the role that answers.
        good: the template of the chosen answer, with `task`.
        bad: the template of the rejected answer, with `task`.
    """
    return (yield from _of_two_prompts(row, target, good, bad))


@judged
def elicitive(
    row: Row,
    *,
    target: str = "target",
    good: str = "elicitive_good",
    bad: str = "elicitive_bad",
) -> Contrasting:
    """Contrast answers after thoughts about a good and about a bad answer: (t+, r+) = M(T+(q)), (t-, r-) = M(T-(q)).

    The templates ask for the headings `{thought}` and `{answer}`; the pair holds the answers, its column `rationale` the good
    thought. There is no pair if a reply has no answer under its heading.

    Args:
        row: the row. The templates are put around its last message; the pair keeps the row's own prompt.
        target: the role that answers.
        good: the template of the chosen answer, with `task`.
        bad: the template of the rejected answer, with `task`.
    """
    replies = yield _ask_both(row, target, good, bad)
    parsed = [templates.sections(reply.text, "thought", "answer") for reply in replies]
    for parts, reply, kind in zip(parsed, replies, ("good", "bad"), strict=True):
        if "answer" not in parts:
            return Rejected(f"the {kind} reply has nothing under {{answer}} (finish_reason {reply.finish_reason})")
    chosen, rejected = (
        Answer(text=parts["answer"], finish_reason=reply.finish_reason)
        for parts, reply in zip(parsed, replies, strict=True)
    )
    columns = {"rationale": parsed[0].get("thought", ""), "template": _labels(good, bad)}
    return AnswerContrast(chosen, rejected, columns)


@judged
def nparam(
    row: Row,
    *,
    larger: str = "larger",
    smaller: str = "smaller",
) -> Contrasting:
    """Contrast a larger with a smaller model of one family (in the paper Yi-34B-Chat and Yi-6B-Chat).

    Args:
        row: the row.
        larger: the role of the chosen answer.
        smaller: the role of the rejected answer.
    """
    chosen, rejected = yield [ask_prompt(row, role) for role in (larger, smaller)]
    return AnswerContrast(chosen, rejected)


@judged
def leaderboard(
    row: Row,
    *,
    higher: str = "higher",
    lower: str = "lower",
) -> Contrasting:
    """Contrast a model that ranks higher with one that ranks lower (in the paper Yi-34B-Chat and Vicuna-33B).

    Args:
        row: the row.
        higher: the role of the chosen answer.
        lower: the role of the rejected answer.
    """
    chosen, rejected = yield [ask_prompt(row, role) for role in (higher, lower)]
    return AnswerContrast(chosen, rejected)


@judged
def refine(
    row: Row,
    *,
    target: str = "target",
    template: str = "refine",
) -> Contrasting:
    """Contrast an answer with the same model's improvement in a second turn: r- = M(q), r+ = M([q, r-, refine]).

    Close to chance without a stronger reviser; `clair` is the same with one.

    Args:
        row: the row.
        target: the role that answers twice.
        template: the second turn, without fields.

    Examples:
        >>> requests = refine({"id": "1", "prompt": [{"role": "user", "content": "2 + 2?"}]})
        >>> [message["content"] for message in next(requests).messages]
        ['2 + 2?']
        >>> [message["role"] for message in requests.send(Answer(text="5")).messages]
        ['user', 'assistant', 'user']
    """
    refining = templates.load(template)
    first = yield ask_prompt(row, target)
    second_turn = templates.user_messages(refining.render())
    turns = [*row["prompt"], {"role": "assistant", "content": first.text}, *second_turn]
    images = row.get("images", ())
    better = yield Ask(role=target, messages=turns, images=images, tag="refined", template=refining.label)
    return AnswerContrast(better, first, {"template": refining.label})


SIX: dict[str, Callable[..., Strategy]] = {
    "prefix": prefix,
    "demonstration": demonstration,
    "elicitive": elicitive,
    "nparam": nparam,
    "leaderboard": leaderboard,
    "refine": refine,
}


def popalign(row: Row, *, contrasts: Sequence[str] = tuple(SIX), judge: str | None = None) -> Strategy:
    """Pool all six contrasts of a row, as in PopAlign (Wang et al. 2024, arXiv 2410.13785): up to six pairs.

    Args:
        row: the row.
        contrasts: some of the six.
        judge: a role that judges every pair in both orders; None is no judge.

    Raises:
        ValueError: a contrast that is none of the six.
    """
    if unknown := [name for name in contrasts if name not in SIX]:
        raise ValueError(f"popalign has the contrasts {', '.join(SIX)}, not {', '.join(unknown)}")
    pairs = yield from _in_step([SIX[name](row, judge=judge) for name in contrasts])
    return pairs


def _in_step(strategies: Sequence[Strategy]) -> Generator[list[Ask], list[Answer], list[Outcome]]:
    """Run strategies in parallel, so that requests are answered together; return their pairs in order."""
    driven = [drive(strategy) for strategy in strategies]
    finished: dict[int, list[Outcome]] = {}
    waiting: dict[int, list[Ask]] = {}

    def step(at: int, answers: Any) -> None:
        waiting.pop(at, None)
        try:
            waiting[at] = driven[at].send(answers)
        except StopIteration as end:
            finished[at] = end.value

    for at in range(len(driven)):
        step(at, None)
    while waiting:
        asked = dict(waiting)
        answers = iter((yield [one for group in asked.values() for one in group]))
        for at, group in asked.items():
            step(at, [next(answers) for _ in group])
    return [item for at in range(len(driven)) for item in finished[at]]


def _ask_both(row: Row, target: str, good: str, bad: str) -> list[Ask]:
    """Return the requests of the row's prompt with its last message in the good and in the bad template."""
    *before, last = row["prompt"]
    return [
        Ask(
            role=target,
            messages=[*before, {**last, "content": _filled(template, last["content"])}],
            images=row.get("images", ()),
            tag=template.name,
            template=template.label,
        )
        for template in (templates.load(name, "task") for name in (good, bad))
    ]


def _filled(template: templates.Template, content: Any) -> Any:
    """Fill a template with a message's content; images stay before the text."""
    text = template.render(task=templates.content_text(content))
    if isinstance(content, str):
        return text
    return [part for part in content if part["type"] != "text"] + [{"type": "text", "text": text}]


def _of_two_prompts(row: Row, target: str, good: str, bad: str) -> Contrasting:
    """Contrast the answers to a good and to a bad prompt."""
    chosen, rejected = yield _ask_both(row, target, good, bad)
    return AnswerContrast(chosen, rejected, {"template": _labels(good, bad)})


def _labels(*names: str) -> str:
    """Return names and versions of templates."""
    return " ".join(templates.load(name, "task").label for name in names)
