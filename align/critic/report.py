"""Measure a critic on held-out prompts: how well its values at several points of a text predict the reward at its end."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from contralto.align.critic.texts import ScoredText
from contralto.align.critic.training import collate_texts

__all__ = ["PLACES", "CriticFigures", "concordance", "measure_critic"]

PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of a completion after which values are read; 0 is the end of the prompt."""
BATCH = 32


class CriticFigures(NamedTuple):
    """Figures of a critic on held-out texts."""

    texts: int
    reward: float
    """The mean reward."""
    brier: list[float]
    """The mean squared error of the values at each of `PLACES`."""
    order: list[float | None]
    """The concordance of the values with the rewards at each of `PLACES`; None if all rewards are equal."""
    base: float
    """The mean squared error of the mean reward of the training texts."""


def concordance(values: Sequence[float], rewards: Sequence[float]) -> float | None:
    """Return the share of pairs of texts with different rewards that the values put in the right order; a tie counts half.

    For rewards of 0 and 1 this is the area under the ROC curve.

    Args:
        values: one per text.
        rewards: one per text.

    Returns:
        In [0, 1], 0.5 by chance; None if all rewards are equal.

    Examples:
        >>> concordance([0.1, 0.4, 0.3], [0, 1, 0]), concordance([0.2, 0.2], [0, 1]), concordance([0.1, 0.2], [1, 1])
        (1.0, 0.5, None)
    """
    value, reward = (torch.tensor(list(map(float, each)), dtype=torch.float64) for each in (values, rewards))
    right = total = 0.0
    for v, r in zip(value, reward, strict=True):  # one row of the comparison at a time
        better = reward > r
        total += float(better.sum())
        right += float((value[better] > v).sum()) + 0.5 * float((value[better] == v).sum())
    return right / total if total else None


@torch.no_grad()
def measure_critic(critic: Any, texts: Sequence[ScoredText], mean: float) -> CriticFigures:
    """Return the figures of a critic.

    Args:
        critic: the token classifier.
        texts: held-out texts.
        mean: the mean reward of the training texts.
    """
    columns: list[list[float]] = [[] for _ in PLACES]
    device = next(critic.parameters()).device
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    for batch in tqdm(batches, desc="held-out texts", unit="batch", disable=None):
        inputs = {name: value.to(device) for name, value in collate_texts(batch).items()}
        logits = critic(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[..., 0]
        for values, text in zip(logits.float().sigmoid().cpu(), batch, strict=True):
            for column, place in zip(columns, PLACES, strict=True):
                column.append(float(values[len(text.prompt) - 1 + round(place * len(text.completion))]))
    rewards = [text.reward for text in texts]
    return CriticFigures(
        texts=len(texts),
        reward=sum(rewards) / len(rewards),
        brier=[_squares(column, rewards) for column in columns],
        order=[concordance(column, rewards) for column in columns],
        base=_squares([mean] * len(rewards), rewards),
    )


def _squares(values: Sequence[float], rewards: Sequence[float]) -> float:
    return sum((v - r) ** 2 for v, r in zip(values, rewards, strict=True)) / len(rewards)
