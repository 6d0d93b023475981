"""Pairs by comparison: judges, stronger models, best of n, teacher and student, judgements, translations.

Every strategy is a generator of a row, as `requests` describes. The settings `target`, `judge`, ... name roles: the
engines that the recipe gives to them write the text, with the sampling that the recipe gives to the role.

What is known of a pair stands in its columns: `strategy`; `template`, the versions of the prompts; `chosen_finish_reason` and
`rejected_finish_reason`; where there is a judge `direction`, where there is a scorer `chosen_score`, `rejected_score` and
`reward_margin`. Nothing is filtered by them: that is `checks.keep`.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's data or recipe is a ValueError like any other mistake in it)

import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple, cast

from contralto.common.hub import from_pretrained
from contralto.data_gen import templates
from contralto.data_gen.ranges import check_batch, check_number
from contralto.data_gen.types import Answer, Ask, Message, Pair, Rejected, Row, Sampling, Strategy, digest

__all__ = [
    "Comparison",
    "RewardModel",
    "Scorer",
    "best_of_n",
    "chrf",
    "compare",
    "con_j",
    "direction",
    "mono_system",
    "off_policy_judge",
    "on_policy_judge",
    "scorer_of",
    "stronger_preferred",
    "teacher_student",
    "verdict",
    "verify_direction",
]

Scorer = Callable[[Row, Sequence[str]], Sequence[float]]
"""Gives each of some answers to a row a number; more is better."""
MOST_ANSWERS = 10_000
"""To one row: all of them are asked for at once."""
Verdict = Literal["A", "B", "tie"]

# --------------------------------------------------------------------------------------------------------------- judges

_SAID = r"(?P<said>[AB]|(?i:a\s+tie|tie|draw))\b"
_WINS = r"is\s+(?:clearly\s+|slightly\s+|the\s+)*(?:better|best|stronger|preferable)\b"
_REASON = r"[,;:(–—-](?![^\n]*\b(?:[AB]|tie|equal\w*|worse|weaker|not)\b)"  # noqa: RUF001
_ENDS = rf"(?=[\]\[)*_\"'`}}]*[.!]|[\s\]\[)*_\"'`}}]*(?:$|\n|wins\b|{_WINS}|{_REASON}))"
"""What may follow a verdict: the end of the sentence or line, that it wins, or a reason that does not name the other."""
_VERDICTS = [
    re.compile(
        r"(?i:verdict|winner|better\s+answer)(?i:\s+is)?[\s:*_\"'`=\-\[(<{]*(?i:assistant|answer|response)?[\s:*_\"'`\[(]*"
        + _SAID
        + _ENDS
    ),
    re.compile(rf"\[\[\s*{_SAID}\s*\]\]"),
    re.compile(rf"(?m)^\W*(?i:assistant|answer|response)?\s*{_SAID}\W*\Z"),
]


def verdict(text: str) -> Verdict | None:
    """What a judge decided, or None if that cannot be told.

    Understood are `Verdict: A` in any dress (bold, brackets, quotes, "the answer A is better"), `[[A]]`, and a last line that
    holds nothing but the letter. Where several are found, the last one counts: judges often weigh both sides first. Where a
    sentence names both ("A and B are equally good"), nothing is guessed.

    Examples:
        >>> verdict("A is short. Still, **Verdict:** B"), verdict("Verdict: A and B are equal"), verdict("Verdict: tie")
        ('B', None, 'tie')
    """
    for pattern in _VERDICTS:
        if found := list(pattern.finditer(text)):
            said = found[-1]["said"]
            return "A" if said == "A" else "B" if said == "B" else "tie"
    return None


class Comparison(NamedTuple):
    """Two answers as a judge sees them in both orders."""

    winner: Literal["first", "second"] | None
    """The answer that wins in both orders; None for ties and for verdicts that change with the order."""
    verdicts: tuple[str | None, str | None]
    """What was said when the first answer stood first, and when it stood second: `first`, `second`, `tie`, or None."""
    rationale: str
    """The judge's text of the first order."""


def compare(
    row: Row, first: str, second: str, *, judge: str = "judge", template: str = "judge"
) -> Generator[list[Ask], list[Answer], Comparison]:
    """Let a judge compare two answers to a row's prompt, in both orders, because judges favour a place (Zheng et al. 2023,
    arXiv 2306.05685).

    Args:
        row: with `prompt` and `images`.
        first, second: the answers.
        judge: the role that judges.
        template: with `task`, `first` and `second`; the judge has to say `Verdict: A`, `Verdict: B` or `Verdict: tie`.

    Returns:
        A part of a strategy: `comparison = yield from compare(row, one, other)`.
    """
    judged = judging(template)
    task = templates.as_text(row["prompt"])
    asks = [
        Ask(
            role=judge,
            messages=user(judged.render(task=task, first=one, second=other)),
            images=row.get("images", ()),
            tag="verdict",
            template=judged.label,
        )
        for one, other in ((first, second), (second, first))
    ]
    ahead, behind = yield asks
    decided = [_decided(reply) for reply in (ahead, behind)]
    said = (
        {"A": "first", "B": "second"}.get(decided[0] or "", decided[0]),
        {"A": "second", "B": "first"}.get(decided[1] or "", decided[1]),
    )
    agreed = said[0] if said[0] == said[1] else None
    return Comparison(agreed if agreed in ("first", "second") else None, said, ahead.text)  # type: ignore[arg-type]


def _decided(reply: Answer) -> Verdict | None:
    """Return the verdict of a judge's reply. One that was cut off amid its reasons may have come to another."""
    return None if reply.is_cut and len(reply.text.split()) > 3 else verdict(reply.text)


def judging(template: str) -> templates.Template:
    """The template of a judge. Strategies call it before they ask anybody, so that a mistake in it costs nothing."""
    return templates.load(template, "task", "first", "second")


def direction(
    row: Row, chosen: str, rejected: str, *, judge: str, template: str = "judge"
) -> Generator[list[Ask], list[Answer], dict[str, Any]]:
    """The column `direction` of a pair: which of its answers a judge prefers in both orders.

    `chosen` if the pair is right, `rejected` if it is the wrong way round, `unclear` for ties, for verdicts that change with
    the order, and for replies without a verdict. Part of a strategy: `columns |= yield from direction(...)`.
    """
    comparison = yield from compare(row, chosen, rejected, judge=judge, template=template)
    names = {"first": "chosen", "second": "rejected", None: "unclear"}
    return {"direction": names[comparison.winner], "direction_rationale": comparison.rationale}


def verify_direction(row: Row, *, judge: str = "judge", template: str = "judge") -> Strategy:
    """An existing pair, with a judge's opinion of its direction. The row has `prompt`, `chosen` and `rejected`, as
    `rows.load_pairs` gives them, and keeps its other columns."""
    chosen, rejected = existing(row, "chosen"), existing(row, "rejected")
    judged = yield from direction(row, chosen, rejected, judge=judge, template=template)
    fields = ("id", "prompt", "chosen", "rejected", "images", "rejected_images")
    kept = {name: value for name, value in row.items() if name not in fields}
    return Pair(
        prompt=row["prompt"],
        chosen=chosen,
        rejected=rejected,
        images=row.get("images", ()),
        rejected_images=row.get("rejected_images") or (),
        columns={**kept, **judged},
    )


def on_policy_judge(row: Row, *, target: str = "target", judge: str = "judge", template: str = "judge") -> Strategy:
    """Two answers of the target model, and a judge decides: y_w, y_l ~ M(x) (arXiv 2408.06266, the baseline "on-policy judge").

    The judge reads the pair in both orders. If its verdicts differ, or one is a tie or cannot be read, there is no pair.
    """
    judging(template)
    first, second = yield [ask(row, target, seed=seed) for seed in (0, 1)]
    made = yield from _judged(row, (first, second), "on_policy_judge", judge=judge, template=template)
    return made


def off_policy_judge(
    row: Row,
    *,
    first: str = "first",
    second: str = "second",
    judge: str = "judge",
    template: str = "judge",
    responses: str | None = None,
    scores: str | None = None,
) -> Strategy:
    """Answers of other models, and a judge decides: M'(x), M''(x) (arXiv 2408.06266, the baseline "off-policy judge").

    Args:
        row: the row.
        first, second: the roles that answer.
        judge: the role that judges, in both orders.
        template: of the judge.
        responses: a column with a list of answers that exist already, instead of the two roles; the first two are judged.
        scores: a column with the scores of these answers (as in UltraFeedback): then nobody is asked, and the best answer is
            chosen, the worst rejected.

    Raises:
        ValueError: the row lacks a column, or the column holds no list of at least two.
    """
    if scores and not responses:
        raise ValueError("off_policy_judge: scores are of responses: name the column of the responses too")
    judging(template)
    if not responses:
        answers = yield [ask(row, first), ask(row, second)]
        made = yield from _judged(row, answers, "off_policy_judge", judge=judge, template=template)
        return made
    texts = _column(row, responses, str)
    answers = [Answer(text=text) for text in texts]
    if scores:
        return _extremes(row, answers, _column(row, scores, int | float), "off_policy_judge")
    made = yield from _judged(row, answers[:2], "off_policy_judge", judge=judge, template=template)
    return made


def _judged(
    row: Row, answers: Sequence[Answer], strategy: str, *, judge: str, template: str
) -> Generator[list[Ask], list[Answer], Pair | Rejected]:
    first, second = answers
    if first.text.strip() == second.text.strip():
        return Rejected("both answers are the same")
    comparison = yield from compare(row, first.text, second.text, judge=judge, template=template)
    if comparison.winner is None:
        return Rejected(_undecided(comparison.verdicts))
    chosen, rejected = (first, second) if comparison.winner == "first" else (second, first)
    return pair(
        row,
        chosen,
        rejected,
        strategy,
        template=judging(template).label,
        rationale=comparison.rationale,
        direction="chosen",
    )


def _undecided(verdicts: tuple[str | None, str | None]) -> str:
    if None in verdicts:
        return "the judge's verdict could not be read"
    if verdicts == ("tie", "tie"):
        return "the judge sees a tie"
    return "the judge's verdict changes with the order of the answers"


# ------------------------------------------------------------------------------------------------------- stronger, weaker


def stronger_preferred(row: Row, *, target: str = "target", stronger: str = "stronger") -> Strategy:
    """A stronger model's answer against the target's: y_l = M(x), y_w = Stronger(x) (arXiv 2408.06266, the baseline "stronger
    preferred"). Nobody checks that the stronger answer is better: `verify_direction` does.

    Examples:
        >>> asking = stronger_preferred({"id": "1", "prompt": [{"role": "user", "content": "2 + 2?"}]})
        >>> [ask.role for ask in next(asking)]
        ['target', 'stronger']
        >>> try:
        ...     asking.send([Answer(text="5"), Answer(text="4")])
        ... except StopIteration as end:
        ...     print(end.value.chosen, end.value.rejected)
        4 5
    """
    weak, strong = yield [ask(row, target), ask(row, stronger)]
    return pair(row, strong, weak, "stronger_preferred")


def teacher_student(
    row: Row,
    *,
    teacher: str = "teacher",
    student: str = "student",
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_new_tokens: int = 1024,
) -> Strategy:
    """What DistiLLM-2 trains on: chosen is the teacher's text, rejected the student's (Ko et al. 2025, arXiv 2503.07067,
    algorithm 1). The sampling is that of the released code. The released script joins both by the text of the prompt and
    loses what does not match; here both belong to one row."""
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    taught, learned = yield [ask(row, teacher, sampling=sampling), ask(row, student, sampling=sampling)]
    return pair(row, taught, learned, "teacher_student")


# ------------------------------------------------------------------------------------------------------------- best of n


def best_of_n(row: Row, *, scorer: Any = None, n: int = 8, target: str = "target", scoring: str = "scorer") -> Strategy:
    """The best of n answers of the target against the worst (West-of-N, Pace et al. 2024, arXiv 2401.12086).

        y_w = argmax_i r(x, y_i),    y_l = argmin_i r(x, y_i),    y_1 ... y_n ~ M(x)

    Args:
        row: the row.
        scorer: the reward r, see `scorer_of`; None asks the role `scoring`.
        n: how many answers, at least 2. The target's role needs a temperature, or they are all the same.
        target: the role that answers.
        scoring: a role that replies to the prompt with an answer by a number: a reward model.

    Raises:
        ValueError: `n` below 2, or the scorer returns something else than n finite numbers.

    Examples:
        >>> row = {"id": "1", "prompt": [{"role": "user", "content": "Tell me."}]}
        >>> asking = best_of_n(row, n=3, scorer=lambda row, answers: [len(answer) for answer in answers])
        >>> [ask.seed for ask in next(asking)]
        [0, 1, 2]
        >>> try:
        ...     asking.send([Answer(text="long"), Answer(text="longer"), Answer(text="no")])
        ... except StopIteration as end:
        ...     print(end.value.chosen, end.value.rejected, end.value.columns["reward_margin"])
        longer no 4.0
    """
    check_n("best_of_n", n)
    scorer = None if scorer is None else scorer_of(scorer)  # before anything is spent
    answers = yield [ask(row, target, seed=seed) for seed in range(n)]
    scores = yield from _scores(row, answers, scorer, scoring)
    return _extremes(row, answers, scores, "best_of_n")


def mono_system(
    row: Row,
    *,
    metric: Any = None,
    n: int = 50,
    target: str = "target",
    scoring: str = "scorer",
    also: Mapping[str, Any] | None = None,
) -> Strategy:
    """Translation pairs of one system: of n candidates the best and the worst by a metric (Gisserot-Boukhlef et al. 2024, arXiv
    2409.20059, the mono-system setting).

    The paper finds that aligning to one metric can cost another one, a neural one against a lexical one above all. So name
    further metrics in `also`: what they say of both translations is written beside the pair.

    Args:
        row: whose prompt asks for the translation, and with the columns that the metrics read: `chrf` reads `reference`.
        metric: which decides, see `scorer_of`; None asks the role `scoring`.
        n: candidates per source, at least 2; the paper draws 50.
        target: the role that translates.
        scoring: as in `best_of_n`.
        also: further metrics by name; columns `chosen_<name>` and `rejected_<name>`.

    Raises:
        ValueError: `n` below 2, or a metric returns something else than n finite numbers.
    """
    check_n("mono_system", n)
    metric = None if metric is None else scorer_of(metric)  # before anything is spent
    others = {name: scorer_of(other) for name, other in (also or {}).items()}
    answers = yield [ask(row, target, seed=seed) for seed in range(n)]
    scores = yield from _scores(row, answers, metric, scoring)
    made = _extremes(row, answers, scores, "mono_system")
    if isinstance(made, Rejected):
        return made
    known = dict(made.columns)
    for name, other in others.items():
        known[f"chosen_{name}"], known[f"rejected_{name}"] = checked_scores(other, row, [made.chosen, made.rejected])
    return replace(made, columns=known)


def _scores(
    row: Row, answers: Sequence[Answer], scorer: Any, scoring: str
) -> Generator[list[Ask], list[Answer], list[float]]:
    """Every answer's score: by a function, or by a role."""
    texts = [answer.text for answer in answers]
    if scorer is not None:
        return checked_scores(scorer, row, texts)
    images = row.get("images", ())
    chats = [[*row["prompt"], {"role": "assistant", "content": text}] for text in texts]
    replies = yield [Ask(role=scoring, messages=chat, images=images, tag="score") for chat in chats]
    return _finite([reply.text for reply in replies], len(texts))


def _extremes(row: Row, answers: Sequence[Answer], scores: Sequence[float], strategy: str) -> Pair | Rejected:
    """The pair of the best and the worst answer; the first ones, where several are equally good."""
    if len(scores) != len(answers):
        raise ValueError(f"{strategy}: {len(answers)} answers have {len(scores)} scores")
    best, worst = max(scores), min(scores)
    if best == worst:
        return Rejected(f"all {len(answers)} answers score the same")
    chosen, rejected = answers[scores.index(best)], answers[scores.index(worst)]
    known = {"chosen_score": best, "rejected_score": worst, "reward_margin": best - worst}
    return pair(row, chosen, rejected, strategy, **known)


def checked_scores(scorer: Any, row: Row, answers: Sequence[str]) -> list[float]:
    """The scores of some answers by a scorer as a recipe names it; ValueError if they are not finite, one each."""
    return _finite(scorer_of(scorer)(row, answers), len(answers))


def _finite(scores: Sequence[Any], count: int) -> list[float]:
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise ValueError(f"a scorer gives numbers, not {scores!r:.80}") from error
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a scorer gives one finite number for each of the {count} answers, not {numbers}")
    return numbers


def scorer_of(scorer: Any) -> Scorer:
    """A scorer as a recipe names it.

    Strategies are run again whenever a data set is exported, so a costly reward model is better a role than a scorer.

    Args:
        scorer: a function of a row and its answers; its name as `module:function`; or `{"reward_model": NAME}` with the
            options of `RewardModel`.

    Raises:
        ValueError: there is no such function.

    Examples:
        >>> scorer_of("contralto.data_gen.strategies.pairs:chrf") is chrf
        True
    """
    if callable(scorer):
        return cast(Scorer, scorer)
    if isinstance(scorer, Mapping) and "reward_model" in scorer:
        return _reward_model(scorer["reward_model"], *(item for item in scorer.items() if item[0] != "reward_model"))
    if not isinstance(scorer, str):
        raise ValueError(f"a scorer is a function, its name as module:function, or reward_model: NAME, not {scorer!r}")
    from contralto.data_gen.engines import find_function

    return find_function(scorer)


@cache
def _reward_model(name: str, *options: tuple[str, Any]) -> "RewardModel":
    return RewardModel(name, **dict(options))


class RewardModel:
    """A reward model of the Hub as a scorer: a sequence classifier with one output, read at the end of the conversation.

    The answers to a row are one batch, so that a score does not depend on which other rows are at work.

    Args:
        name: a folder or a hub id, for `AutoModelForSequenceClassification` and `AutoTokenizer`.
        device: where it goes; None is a GPU if there is one.
        max_length: longer conversations are cut off at their beginning; None is the tokenizer's own limit.

    Raises:
        ValueError: the model has more than one output, or its tokenizer no chat template or no padding token; a length below 1.
    """

    def __init__(self, name: str, *, device: str | None = None, max_length: int | None = None) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        check_batch(1, max_length)
        self.tokenizer: Any = from_pretrained(AutoTokenizer, name, padding_side="right", truncation_side="left")
        self.model: Any = from_pretrained(AutoModelForSequenceClassification, name, dtype="auto").eval()
        self.max_length = max_length
        if self.model.config.num_labels != 1:
            raise ValueError(f"{name} has {self.model.config.num_labels} outputs: a reward model has one")
        if not self.tokenizer.chat_template or self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer of {name} has no chat template or no padding token: a reward model needs both"
            )
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def __call__(self, row: Row, answers: Sequence[str]) -> list[float]:
        """The reward of each answer."""
        import torch

        from contralto.decoding.placement import input_device

        chats = [[*row["prompt"], {"role": "assistant", "content": answer}] for answer in answers]
        inputs = self.tokenizer.apply_chat_template(
            chats,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            truncation=self.max_length is not None,
            max_length=self.max_length,
        )
        with torch.inference_mode():
            rewards = self.model(**inputs.to(input_device(self.model))).logits[:, 0]
        scores: list[float] = rewards.float().tolist()
        return scores


def chrf(row: Row, answers: Sequence[str]) -> list[float]:
    """Sentence chrF of translations (Popovic 2015, W15-3049), by sacrebleu with its defaults; the row has `reference`.

    Examples:
        >>> [round(score) for score in chrf({"id": "1", "reference": "the cat sat"}, ["the cat sat", "a dog"])]
        [100, 3]
    """
    from sacrebleu.metrics import CHRF  # type: ignore[attr-defined]

    if not isinstance(row.get("reference"), str):
        raise ValueError(f"chrf compares with the column reference, which row {row.get('id')} does not have")
    metric = CHRF()
    return [metric.sentence_score(answer, [row["reference"]]).score for answer in answers]


# ------------------------------------------------------------------------------------------------------------ judgements

_BETTER = re.compile(r"[\"'“”]?better(?:[_ ]answer)?[\"'“”]?\s*[:=]\s*[\"'“”]?(?:answer\s*)?([12])\b", re.IGNORECASE)


def con_j(
    row: Row,
    *,
    target: str = "target",
    n: int = 8,
    most: int = 3,
    template: str = "con_j",
    hint_template: str = "con_j_hint",
) -> Strategy:
    """Judgement pairs for a model that learns to judge (Con-J, Ye et al. 2024, arXiv 2410.03742).

    The model compares two answers of which it is known which is better, n times. A judgement that ends in the right verdict is
    chosen, one that ends in the wrong verdict rejected. Where all n agree, it is asked twice more with a hint, for the right
    and for the wrong answer; the pair's prompt is the one without a hint. Judgements without a readable verdict are not used
    (the released code uses some as rejected).

    Args:
        row: with `prompt`, and the known answers `chosen` and `rejected` (texts or messages, as `rows.load_pairs` gives them).
            Which one stands first is drawn from the row's id.
        target: the role that judges, and learns to.
        n: judgements per row, at least 2.
        most: pairs per row at most, each of two judgements of its own.
        template: with `task`, `first`, `second`; the reply says `"better": 1` or `"better": 2`.
        hint_template: with `judgement_prompt` and `better`.

    Raises:
        ValueError: `n` below 2, or the row lacks an answer.
    """
    check_n("con_j", n)
    check_number("con_j: most", most, least=1, most=MOST_ANSWERS, whole=True)
    asking, hinting = judging(template), templates.load(hint_template, "judgement_prompt", "better")
    right = 1 + int(digest(["con_j", row["id"]]), 16) % 2
    first, second = (existing(row, name) for name in (("chosen", "rejected") if right == 1 else ("rejected", "chosen")))
    prompt = asking.render(task=templates.as_text(row["prompt"]), first=first, second=second)
    asked = [Ask(role=target, messages=user(prompt), seed=i, tag="judgement", template=asking.label) for i in range(n)]
    judgements = yield asked
    good = [j for j in judgements if _better(j.text) == right]
    bad = [j for j in judgements if _better(j.text) == 3 - right]
    source = "sampled"
    if not good or not bad:
        source = "hinted"
        hinted = [hinting.render(judgement_prompt=prompt, better=str(better)) for better in (right, 3 - right)]
        asked = [Ask(role=target, messages=user(h), seed=n, tag="hinted", template=hinting.label) for h in hinted]
        led, misled = yield asked
        good = [led] if _better(led.text) == right else []
        bad = [misled] if _better(misled.text) == 3 - right else []
    used = f"{asking.label} {hinting.label}" if source == "hinted" else asking.label
    known: dict[str, Any] = {"template": used, "judgement_source": source, "better": right}
    of_prompt = {**row, "prompt": user(prompt)}
    pairs = [pair(of_prompt, *both, "con_j", **known) for both in zip(good[:most], bad[:most], strict=False)]
    return pairs or Rejected("no right and wrong judgement, not even with a hint")


def _better(judgement: str) -> int | None:
    """Which answer a judgement finds better, 1 or 2; the last word counts."""
    found = _BETTER.findall(judgement)
    return int(found[-1]) if found else None


# ---------------------------------------------------------------------------------------------------------------- common


def pair(row: Row, chosen: Answer, rejected: Answer, strategy: str, **columns: Any) -> Pair:
    """The pair of a row, with what is known of it."""
    known = {
        "strategy": strategy,
        "chosen_finish_reason": chosen.finish_reason,
        "rejected_finish_reason": rejected.finish_reason,
    }
    return Pair(
        prompt=row["prompt"],
        chosen=chosen.text,
        rejected=rejected.text,
        images=row.get("images", ()),
        columns=known | columns,
    )


def ask(row: Row, role: str, *, seed: int = 0, sampling: Sampling | None = None) -> Ask:
    """A row's prompt, to be answered."""
    images = row.get("images", ())
    return Ask(role=role, messages=row["prompt"], images=images, seed=seed, sampling=sampling, tag="answer")


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def check_n(strategy: str, n: int) -> None:
    """Raise ValueError unless there are at least two answers to choose from."""
    check_number(f"{strategy}: n", n, least=-math.inf, most=MOST_ANSWERS, whole=True)
    if n < 2:
        raise ValueError(f"{strategy}: n must be at least 2, to have a best and a worst answer, not {n}")


def existing(row: Row, name: str) -> str:
    """An answer that the row brings: a text, or messages of which the last one is the answer."""
    value = row.get(name)
    if isinstance(value, list | tuple) and value:
        value = templates.content_text(value[-1]["content"])
    if not isinstance(value, str):
        raise ValueError(f"row {row['id']} has no answer in its column {name}")
    return value


def _column(row: Row, name: str, kind: Any) -> list[Any]:
    """A list that the row brings, of at least two values of a kind."""
    values = row.get(name)
    if not isinstance(values, list | tuple) or len(values) < 2 or not all(isinstance(value, kind) for value in values):
        raise ValueError(
            f"off_policy_judge: column {name} of row {row['id']} is not a list of at least two answers or scores"
        )
    return list(values)
