"""Measure how much a model attends to the text of its prompt and to the image, per token (Wu et al. 2025, arXiv 2508.10552)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from contralto.eval.stats.counts import Array

__all__ = ["AttentionMass", "Dominance", "dominance", "stages", "summary"]


class AttentionMass(NamedTuple):
    """The attention of the queries that predict an answer to the tokens of its prompt, the mean over heads, summed over queries."""

    text: Array
    """`(L,)`, to the text, by layer."""
    image: Array
    """`(L,)`, to the image."""
    first: Array
    """`(L,)`, to the first token, a part of `text`: many models rest their attention there."""
    text_tokens: int
    image_tokens: int


class Dominance(NamedTuple):
    """The indices of attention to a text and an image."""

    mdi: float
    """Modality dominance index; 1 is balance, above it the text dominates."""
    aei_text: float
    """Attention efficiency index of the text."""
    aei_image: float
    """Attention efficiency index of the image."""


def dominance(text: float, image: float, text_tokens: int, image_tokens: int) -> Dominance:
    """Return the modality dominance index and the attention efficiency indices (Wu et al. 2025, arXiv 2508.10552).

        MDI = (A_T / |T|) / (A_O / |O|),    AEI_T = P_T / Q_T,    P_T = A_T / (A_T + A_O),  Q_T = |T| / (|T| + |O|)

    and AEI_O likewise.

    Args:
        text: A_T, attention to the text.
        image: A_O, attention to the image.
        text_tokens: |T|, at least 1.
        image_tokens: |O|, at least 1.

    Raises:
        ValueError: There are no tokens of one of them, or no attention to the image.

    Examples:
        >>> dominance(0.75, 0.25, 8, 8)
        Dominance(mdi=3.0, aei_text=1.5, aei_image=0.5)
    """
    if text_tokens < 1 or image_tokens < 1:
        raise ValueError(f"the indices compare text and image, and there are {text_tokens} and {image_tokens} tokens")
    if not image > 0:
        raise ValueError("the image has no attention at all, so that the index of dominance is infinite")
    total, count = text + image, text_tokens + image_tokens
    return Dominance(
        (text / text_tokens) / (image / image_tokens),
        (text / total) / (text_tokens / count),
        (image / total) / (image_tokens / count),
    )


def stages(depth: int) -> dict[str, list[int]]:
    """Return the layers of each stage: the first two, two in the middle, and the last two, as in the paper's tables.

    Args:
        depth: The number of layers.

    Examples:
        >>> stages(32)
        {'early': [0, 1], 'middle': [15, 16], 'late': [30, 31]}
        >>> stages(2)
        {'early': [0, 1], 'middle': [0, 1], 'late': [0, 1]}
    """
    layers = list(range(depth))
    middle = max(0, depth // 2 - 1)
    return {"early": layers[:2], "middle": layers[middle : middle + 2], "late": layers[-2:]}


def summary(masses: Sequence[AttentionMass]) -> dict[str, Mapping[str, float]]:
    """Return the mean indices over documents by stage, of the mean attention of the layers of a stage.

    Args:
        masses: The attention of each document.

    Returns:
        For `early`, `middle`, `late` and `all` layers: `mdi`, `aei_text`, `aei_image`, and `mdi_without_first`, in which the first token of the
        prompt does not count.

    Raises:
        ValueError: There are no documents, or see `dominance`.
    """
    if not masses:
        raise ValueError("no document has an image")
    found: dict[str, Mapping[str, float]] = {}
    for name, layers in {**stages(len(masses[0].text)), "all": list(range(len(masses[0].text)))}.items():
        values = []
        for each in masses:
            text, image, first = (float(np.mean(part[layers])) for part in (each.text, each.image, each.first))
            indices = dominance(text, image, each.text_tokens, each.image_tokens)
            rest = dominance(text - first, image, max(1, each.text_tokens - 1), each.image_tokens)
            values.append((*indices, rest.mdi))
        means = np.mean(values, axis=0)
        found[name] = {
            **dict(zip(Dominance._fields, means[:3].tolist(), strict=True)),
            "mdi_without_first": float(means[3]),
        }
    return found
