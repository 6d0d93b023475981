"""Texts with rewards, from which a critic learns: completions that the model samples and a scorer scores, or those of a file.

Answers and scores are recorded before they are used, so that an interrupted run goes on with the same ones.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contralto.align.critic.settings import CriticConfig
from contralto.common.files import read_json_lines
from contralto.common.options import Option, OptionError
from contralto.common.texts import without_bos
from contralto.data_gen.engines.base import Engine
from contralto.data_gen.engines.recorded import recorded_answers
from contralto.data_gen.rows import RowSource, read_rows
from contralto.data_gen.score_memory import remembered_scores
from contralto.data_gen.scorers import score_answers
from contralto.data_gen.store import Store
from contralto.data_gen.types import Ask, Row, Sampling
from contralto.decoding.inputs import Prompt, render
from contralto.decoding.loading import Models

__all__ = ["ScoredText", "read_prompts", "read_texts", "split_rows", "write_texts"]


class ScoredText(NamedTuple):
    """A completion with its reward, in tokens."""

    row: str
    """The id of its prompt."""
    prompt: list[int]
    completion: list[int]
    """With the end-of-text token, if the model ended the completion."""
    reward: float
    """In [0, 1]."""


class _WrittenText(NamedTuple):
    text: str
    is_whole: bool


def read_prompts(config: CriticConfig) -> list[Row]:
    """Return the rows whose prompts the model answers.

    Args:
        config: what to make.

    Raises:
        OSError: there is no such file or data set.
        ValueError: a row has no prompt, or images.
    """
    rows = read_rows(RowSource(source=str(config.prompts), prompt=config.prompt_column), folder=Path())
    _check_rows(rows, config)
    return list(rows)


def _check_rows(rows: Sequence[Row], config: CriticConfig) -> None:
    """Raise ValueError for rows with images, and for too few prompts."""
    if row := next((row for row in rows if row.get("images")), None):
        raise ValueError(f"row {row['id']} has images, and a critic reads texts alone")
    if len(rows) < 2:
        raise ValueError(
            f"{config.prompts or config.texts} has one prompt: a critic needs one to learn from and one to measure on"
        )


def write_texts(
    config: CriticConfig, tokenizer: Any, engine: Engine, store: Store, rows: Sequence[Row]
) -> list[ScoredText]:
    """Let the model answer prompts, score the answers, and return them.

    Args:
        config: what to make.
        tokenizer: of the model.
        engine: the model.
        store: where answers and scores are recorded before they are used.
        rows: the prompts.

    Raises:
        ValueError: the scorer does not return one number per completion, or one outside [0, 1] without a `threshold` or `sigmoid`.
    """
    count = config.samples
    asks = [
        Ask(role="model", messages=row["prompt"], seed=at * count + i, tag="text")
        for at, row in enumerate(rows)
        for i in range(count)
    ]
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    answers = recorded_answers(
        engine,
        store,
        asks,
        rows=[f"{ask.tag}-{ask.seed}" for ask in asks],
        strategy="critic",
        sampling=sampling,
        seed=config.seed,
        title="texts",
    )
    texts: list[ScoredText] = []
    with remembered_scores(store):
        for at, row in enumerate(rows):
            given = [answer for answer in answers[at * count : (at + 1) * count] if answer is not None]
            completions = [_WrittenText(answer.text, answer.is_whole) for answer in given]
            texts += _scored(config, tokenizer, row, completions)
    return _checked(texts, config)


def read_texts(config: CriticConfig, tokenizer: Any, store: Store) -> list[ScoredText]:
    """Return the texts of a file, scored unless they have rewards.

    Args:
        config: what to make, with `texts`.
        tokenizer: of the model.
        store: where scores are recorded before they are used.

    Raises:
        ValueError: a row lacks a column, or its reward is no number in [0, 1].
    """
    path = Path(str(config.texts))
    rows = read_rows(RowSource(source=str(path), prompt=config.prompt_column), folder=Path())
    numbers = [number for number, _ in read_json_lines(path)] if path.suffix == ".jsonl" else range(1, len(rows) + 1)
    _check_rows(rows, config)
    texts: list[ScoredText] = []
    with remembered_scores(store):
        for number, row in zip(numbers, rows, strict=True):
            where = f"{path}, row {number}"
            if not isinstance(row.get("completion"), str):
                raise ValueError(  # noqa: TRY004 (a mistake in a file)
                    f"{where} has no text in column 'completion'; it has {', '.join(row)}"
                )
            if not isinstance(finished := row.get("finished", True), bool):
                raise ValueError(f"{where}: finished must be true or false, not {finished!r}")  # noqa: TRY004
            completion = _WrittenText(row["completion"], finished)
            given = None if config.score_source is not None else [_reward_of(row, where)]
            texts += _scored(config, tokenizer, row, [completion], given)
    return _checked(texts, config)


def _reward_of(row: Row, where: str) -> float:
    """Return the score in a row of a file."""
    value = row.get("reward")
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise OptionError(
            "{where} has no number in column 'reward': add it, or give {scorer}", where=where, scorer=Option("scorer")
        )
    return float(value)


def _scored(
    config: CriticConfig,
    tokenizer: Any,
    row: Row,
    completions: Sequence[_WrittenText],
    scores: Sequence[float] | None = None,
) -> Iterator[ScoredText]:
    """Yield the completions of a row with their rewards; those without tokens are left out."""
    if not completions:
        return
    if scores is None:
        scores = score_answers(config.score_source, row, [each.text for each in completions])
    prompt = _prompt_ids(tokenizer, row, raw=config.raw)
    for each, score in zip(completions, scores, strict=True):
        ids = list(tokenizer(each.text, add_special_tokens=False)["input_ids"])
        ids += [tokenizer.eos_token_id] if each.is_whole and tokenizer.eos_token_id is not None else []
        if ids:
            yield ScoredText(_key(row), prompt, ids, _reward(config, score, row))


def _key(row: Row) -> str:
    """Return a text that rows of equal prompts share, so that none of them is held out alone."""
    return repr([(message.get("role"), message.get("content")) for message in row["prompt"]])


def _prompt_ids(tokenizer: Any, row: Row, *, raw: bool) -> list[int]:
    """Return the tokens of a prompt as the decoding commands read it."""
    messages: list[Mapping[str, Any]] = [dict(message) for message in row["prompt"]]
    is_bare = raw or tokenizer.chat_template is None
    content: Any = messages[0]["content"] if is_bare and len(messages) == 1 else messages
    text = render(Prompt(content), Models(None, (), tokenizer), raw=raw)
    text = without_bos(text, tokenizer) if is_bare else text
    ids = list(tokenizer(text, add_special_tokens=is_bare)["input_ids"])
    if not ids:
        raise ValueError(f"row {row['id']}: the prompt has no tokens")
    return ids


def _reward(config: CriticConfig, score: float, row: Row) -> float:
    """Return the reward of a score."""
    if config.threshold is not None:
        return float(score >= config.threshold)
    if config.sigmoid:
        return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))
    if not 0 <= score <= 1:
        raise OptionError(
            "row {row}: the score {score} lies outside [0, 1], and a critic learns rewards in it: give {threshold}, the score "
            "from which the reward is 1, or {sigmoid}",
            row=row["id"],
            score=score,
            threshold=Option("threshold"),
            sigmoid=Option("sigmoid", True),
        )
    return float(score)


def _checked(texts: list[ScoredText], config: CriticConfig) -> list[ScoredText]:
    """Return the texts, or raise ValueError if there is nothing to learn from them."""
    rewards = {text.reward for text in texts}
    if len(rewards) < 2:
        what = f"all {len(texts):,} texts have the reward {rewards.pop():g}" if rewards else "there are no texts"
        raise ValueError(
            f"{what}, so that a critic has nothing to learn: change the scorer, the prompts, or the temperature ({config.temperature:g})"
        )
    return texts


def split_rows(texts: Sequence[ScoredText], share: float) -> tuple[list[ScoredText], list[ScoredText]]:
    """Split texts by their prompts, so that no prompt is in both parts.

    Args:
        texts: the texts, in their order.
        share: of the prompts in the first part, which has at least one.

    Returns:
        The held-out texts, and the others.
    """
    prompts = list(dict.fromkeys(text.row for text in texts))
    held = set(prompts[: max(1, min(len(prompts) - 1, round(len(prompts) * share)))])
    return [text for text in texts if text.row in held], [text for text in texts if text.row not in held]
