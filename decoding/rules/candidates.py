"""Define the rules that rerank a few candidate tokens: by a critic, or by their hidden states."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from contralto.decoding.rules.base import rule_out_

__all__ = [
    "check_candidates",
    "check_penalty_weight",
    "contrastive_search",
    "critic_guided",
    "degeneration_penalty",
    "largest_cosine",
    "unit_vectors",
]


def check_candidates(*, k: int = 10) -> None:
    """Raise ValueError unless critic-guided decoding has a candidate.

    Args:
        k: number of candidate tokens that the critic reads, at least 1.

    Raises:
        ValueError: `k` below 1.
    """
    if k < 1 or k != int(k):
        raise ValueError(f"k must be at least 1 (candidate tokens), not {k}")


def critic_guided(logits: Tensor, values: Tensor, candidates: Tensor) -> Tensor:
    """Score tokens by critic-guided decoding: weight the likeliest by a critic (Kim et al. 2023, arXiv 2212.10938, section 3).

        scores(v) = log p(v) + log sigmoid(Q(v))    for the k candidates, else -inf

    so that `softmax(scores)` is proportional to `p(v) * sigmoid(Q(v))`. The paper divides by `sigmoid` of the state's own
    value, a constant per row, which has no effect.

    Args:
        logits: `(..., V)` of the language model.
        values: `(..., k)` the critic's logit for the row with each candidate appended.
        candidates: `(..., k)` int64, the candidates, such as the k likeliest tokens.

    Raises:
        ValueError: `values` and `candidates` of different shapes.

    Examples:
        >>> log_p, candidates = torch.tensor([[0.5, 0.4, 0.1]]).log(), torch.tensor([[0, 1]])
        >>> critic_guided(log_p, torch.tensor([[-3.0, 3.0]]), candidates).softmax(-1)
        tensor([[0.0586, 0.9414, 0.0000]])
    """
    if values.shape != candidates.shape:
        raise ValueError(
            f"critic_guided needs one value per candidate, not values of shape {tuple(values.shape)} for "
            f"candidates of shape {tuple(candidates.shape)}"
        )
    log_p = rule_out_(logits.log_softmax(-1))
    weighted = log_p.gather(-1, candidates) + torch.nn.functional.logsigmoid(values.to(log_p))
    return torch.full_like(log_p, -math.inf).scatter(-1, candidates, weighted)


def contrastive_search(logits: Tensor, candidates: Tensor, penalty: Tensor, *, alpha: float = 0.6) -> Tensor:
    """Return the scores of contrastive search (Su et al. 2022, arXiv 2202.06417, equation 5).

        scores(v) = (1 - alpha) * p(v) - alpha * max_j cos(h_v, h_{x_j})    if v is a candidate, else -inf

    with `p = softmax(logits)` over the whole vocabulary. The token of the largest score comes next. The scores are not
    log-probabilities: there is nothing to sample from, and no sum of them that beams could compare.

    Args:
        logits: `(..., V)`.
        candidates: `(..., k)` int64, different tokens of each row, usually the k likeliest.
        penalty: `(..., k)`, the largest cosine of each candidate, see `degeneration_penalty`.
        alpha: weight of the penalty, in [0, 1]. The paper uses 0.6; 0 is greedy search.

    Returns:
        `(..., V)` in the dtype of `logits`. A candidate of probability zero (logit `-inf`) stays at `-inf`.

    Raises:
        ValueError: `alpha` outside [0, 1].

    Examples:
        The likelier of two tokens repeats the context, the other one is new.

        >>> logits, candidates = torch.tensor([0.6, 0.4]).log(), torch.tensor([0, 1])
        >>> contrastive_search(logits, candidates, torch.tensor([1.0, 0.5]), alpha=0.5)
        tensor([-0.2000, -0.0500])
    """
    check_penalty_weight(alpha)
    log_p = logits.log_softmax(-1).gather(-1, candidates)
    scores = (1 - alpha) * log_p.exp() - alpha * penalty.to(log_p.dtype)
    scores = scores.masked_fill(logits.gather(-1, candidates) == -torch.inf, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, candidates, scores)


def degeneration_penalty(hidden: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the cosine of each candidate with the most similar token of the context: `max_j cos(h_v, h_{x_j})`.

    Su et al. 2022 (arXiv 2202.06417), equation 5, second term. The context is the prompt and all tokens generated so far.

    Args:
        hidden: `(..., k, d)`, the last layer's hidden state of each candidate as the next token of the context.
        context: `(..., T, d)`, those of the context's tokens.
        mask: `(..., T)`, 0 for padding, which is excluded.

    Returns:
        `(..., k)` in [-1, 1], float32 at least.

    Examples:
        >>> penalty = degeneration_penalty(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> penalty  # the cosines are 0.6 and 0.8
        tensor([0.8000])
    """
    return largest_cosine(unit_vectors(hidden), unit_vectors(context), mask)


def unit_vectors(hidden: Tensor) -> Tensor:
    """Scale vectors to length 1, in float32 at least.

    Args:
        hidden: `(..., d)`.
    """
    return normalize(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=-1)


def largest_cosine(candidates: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """Return `degeneration_penalty` of unit vectors.

    Args:
        candidates: `(..., k, d)`.
        context: `(..., T, d)`.
        mask: `(..., T)`, 0 for padding; None if there is none.
    """
    cosines = candidates @ context.mT  # (..., k, T)
    if mask is not None:
        cosines = cosines.masked_fill(mask[..., None, :].to(cosines.device) == 0, -torch.inf)
    return cosines.amax(-1)


def check_penalty_weight(alpha: float) -> None:
    """Raise ValueError unless the weight of a degeneration penalty lies in [0, 1].

    Args:
        alpha: the weight.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1] (the weight of the degeneration penalty), not {alpha}")
