"""Scorers of answers that recipes can name: functions, reward models and translation metrics."""

# ruff: noqa: TRY004 (a wrong type in a recipe is a ValueError like any other mistake in it)

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from contralto.common.hashing import weights_digest
from contralto.common.hub import from_pretrained
from contralto.data_gen.functions import find_function
from contralto.data_gen.ranges import check_batch
from contralto.data_gen.score_memory import is_computing, remembered
from contralto.data_gen.types import Row

__all__ = [
    "RewardModel",
    "Scorer",
    "answer_matches",
    "chrf",
    "finite_scores",
    "normalize_answer",
    "resolve_scorer",
    "score_answers",
]

Scorer = Callable[[Row, Sequence[str]], Sequence[float]]
"""A function that returns one number per answer to a row; higher is better."""


def resolve_scorer(scorer: Any) -> Scorer:
    """Return the scorer that a recipe names.

    Strategies run again whenever a data set is exported; scores are then taken from the store, see `score_memory`.

    Args:
        scorer: a function of a row and its answers; its name as `module:function`; or `{"reward_model": NAME}` with the
            options of `RewardModel`.

    Raises:
        ValueError: there is no such function.

    Examples:
        >>> resolve_scorer("contralto.data_gen.scorers:chrf") is chrf
        True
    """
    if callable(scorer):
        return cast(Scorer, scorer)
    if isinstance(scorer, Mapping) and "reward_model" in scorer:
        model = _reward_model(scorer["reward_model"], *(item for item in scorer.items() if item[0] != "reward_model"))
        if is_computing():
            model.load()
        return model
    if not isinstance(scorer, str):
        raise ValueError(
            f"a scorer must be a function, its name as module:function, or reward_model: NAME, not {scorer!r}"
        )
    return find_function(scorer)


def score_answers(scorer: Any, row: Row, answers: Sequence[str]) -> list[float]:
    """Return the scores of some answers.

    Args:
        scorer: as for `resolve_scorer`.
        row: the row that the answers belong to.
        answers: the answers.

    Raises:
        ValueError: there is no such scorer, or it does not return one finite number per answer.
    """
    function = resolve_scorer(scorer)
    return remembered(function, row, answers, lambda: finite_scores(function(row, answers), len(answers)))


def finite_scores(scores: Sequence[Any], count: int) -> list[float]:
    """Return scores as floats.

    Args:
        scores: numbers, or texts that hold one.
        count: the number of answers.

    Raises:
        ValueError: not one finite number per answer.
    """
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a scorer must return a list with one number for each of the {count} answers, not {scores!r:.80}"
        ) from error
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a scorer must return one finite number for each of the {count} answers, not {numbers}")
    return numbers


@cache
def _reward_model(name: str, *options: tuple[str, Any]) -> "RewardModel":
    return RewardModel(name, **dict(options))


class RewardModel:
    """A reward model of the Hub as a scorer: a sequence classifier with one output, read at the end of the conversation.

    The answers to a row form one batch, so that a score does not depend on the other rows in progress.

    Args:
        name: a folder or a hub id, for `AutoModelForSequenceClassification` and `AutoTokenizer`.
        device: the model's device; None is a GPU if there is one.
        max_length: tokens; longer conversations are truncated at their beginning. None is the tokenizer's own limit.

    Raises:
        ValueError: a length below 1.
    """

    def __init__(self, name: str, *, device: str | None = None, max_length: int | None = None) -> None:
        check_batch(1, max_length)
        self.identity = ["reward model", weights_digest(name), max_length]
        """The name, the digest and the limit that determine a score."""
        self.max_length = max_length
        self.model: Any = None
        """The model, None until it is loaded."""
        self.name, self._device = name, device

    def load(self) -> None:
        """Load model and tokenizer, unless they are loaded.

        Raises:
            ValueError: the model has more than one output, or its tokenizer has no chat template or no padding token.
        """
        if self.model is not None:
            return
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        name = self.name
        self.tokenizer: Any = from_pretrained(AutoTokenizer, name, padding_side="right", truncation_side="left")
        model = from_pretrained(AutoModelForSequenceClassification, name, dtype="auto").eval()
        if model.config.num_labels != 1:
            raise ValueError(f"{name} has {model.config.num_labels} outputs, but a reward model must have one")
        if not self.tokenizer.chat_template or self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer of {name} has no chat template or no padding token: a reward model needs both"
            )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def __call__(self, row: Row, answers: Sequence[str]) -> list[float]:
        """Return the reward of each answer.

        Args:
            row: with `prompt` as messages.
            answers: the answers.
        """
        import torch

        from contralto.common.placement import input_device

        self.load()
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


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Return a short answer in lower case, without punctuation, articles and repeated spaces, as SQuAD compares answers.

    Args:
        text: the answer.

    Examples:
        >>> normalize_answer("The  U.S. Army!")
        'us army'
    """
    words = re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()
    return " ".join(words)


def answer_matches(text: str, forms: Sequence[str]) -> bool:
    """Return True if a text contains one of the forms of an answer, as whole words, both normalised by `normalize_answer`.

    Args:
        text: the text.
        forms: the forms, such as "US" and "United States".

    Examples:
        >>> answer_matches("It was the U.S. Army.", ["US Army", "army of the US"]), answer_matches("13 coins", ["3"])
        (True, False)
    """
    words = f" {normalize_answer(text)} "
    return any(f" {form} " in words for form in map(normalize_answer, forms) if form)


def chrf(row: Row, answers: Sequence[str]) -> list[float]:
    """Return the sentence chrF of translations (Popovic 2015, W15-3049), by sacrebleu with its defaults.

    Args:
        row: with `reference`.
        answers: the translations.

    Returns:
        One number in [0, 100] per translation.

    Raises:
        ValueError: the row has no reference.

    Examples:
        >>> [round(score) for score in chrf({"id": "1", "reference": "the cat sat"}, ["the cat sat", "a dog"])]
        [100, 3]
    """
    from sacrebleu.metrics import CHRF  # type: ignore[attr-defined]

    if not isinstance(row.get("reference"), str):
        raise ValueError(f"chrf needs the column reference, which row {row.get('id')} does not have")
    metric = CHRF()
    return [metric.sentence_score(answer, [row["reference"]]).score for answer in answers]
