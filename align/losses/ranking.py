"""Losses that rank whole sequences: better candidates get higher scores, by a margin that grows with the distance of their ranks.

Notation, for the candidates of one prompt, sorted by their quality, the best first:

    f_i    the score of candidate i by the model: its likelihood (BRIO), or its similarity to the source (CoNT)
    q_i    its quality by a metric, q_1 >= q_2 >= ...
"""

import torch
from torch import Tensor
from torch.nn.functional import relu

__all__ = ["check_ranking", "length_penalised", "ranking_loss"]


def check_ranking(*, margin: float, tolerance: float = 0.0) -> None:
    """Raise ValueError unless margin and tolerance of `ranking_loss` are at least 0.

    Args:
        margin: see `ranking_loss`.
        tolerance: see `ranking_loss`.

    Raises:
        ValueError: one is below 0.
    """
    for name, value in (("margin", margin), ("tolerance", tolerance)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, not {value}")


def ranking_loss(
    scores: Tensor, quality: Tensor, *, margin: float, tolerance: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Compute the loss of ranked candidates (BRIO: Liu et al. 2022, arXiv 2203.16804; CoNT: An et al. 2022, arXiv 2205.14690).

        L = sum_{d = 1}^{n - 1} mean over pairs (i, i + d) of max(0, f_{i + d} - f_i + d margin)

    Both papers sum over pairs; both released codes take the mean over the pairs of one distance in all rows of the batch, as here. Pairs of
    equal quality are left out, as in CoNT's code, where `tolerance` is 0.01. BRIO's code gives them a margin in the order of the data.

    Args:
        scores: `(B, n)` f of the candidates, in any order.
        quality: `(B, n)` q.
        margin: the margin per rank; lambda in BRIO, 0.01 in the released CoNT.
        tolerance: pairs count whose qualities differ by more.
        mask: `(B, n)`, false for places without a candidate; None if there are none.

    Returns:
        The loss, a scalar in the dtype of `scores`, 0 where no pair counts.

    Raises:
        ValueError: shapes differ, or a setting is below 0.

    Examples:
        >>> f, q = torch.tensor([[-1.0, -1.5, -1.2]]), torch.tensor([[0.9, 0.5, 0.1]])
        >>> ranking_loss(f, q, margin=0.1)  # (0 + 0.4) / 2 at distance 1, 0 at distance 2
        tensor(0.2000)
    """
    check_ranking(margin=margin, tolerance=tolerance)
    if scores.shape != quality.shape or scores.ndim != 2 or (mask is not None and mask.shape != scores.shape):
        shapes = [tuple(each.shape) for each in (scores, quality, mask) if each is not None]
        raise ValueError(f"scores, quality and mask must have one shape (B, n), not {', '.join(map(str, shapes))}")
    present = torch.ones_like(quality, dtype=torch.bool) if mask is None else mask.bool()
    order = quality.masked_fill(~present, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    scores, quality, present = (each.gather(-1, order) for each in (scores, quality, present))
    total = scores.new_zeros(())
    for distance in range(1, scores.shape[1]):
        counts = present[:, distance:] & (quality[:, :-distance] - quality[:, distance:] > tolerance)
        lost = relu(scores[:, distance:] - scores[:, :-distance] + distance * margin)
        total = total + torch.where(counts, lost, 0).sum() / counts.sum().clamp(min=1)
    return total


def length_penalised(logps: Tensor, lengths: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Compute BRIO's score of a candidate (Liu et al. 2022, arXiv 2203.16804): its log-probability with a length penalty.

        f(S) = sum_t log p(s_t | x, s_<t) / |S|^alpha

    Args:
        logps: `(..., n)` summed log-probabilities.
        lengths: `(..., n)` tokens, end tokens included, at least 1.
        alpha: the exponent; the released settings are 2.0 for CNN/DailyMail and 0.6 for XSum.

    Returns:
        `(..., n)`.

    Raises:
        ValueError: `alpha` is below 0.

    Examples:
        >>> length_penalised(torch.tensor([-8.0, -8.0]), torch.tensor([2, 4]), alpha=2.0)
        tensor([-2.0000, -0.5000])
    """
    if not alpha >= 0:
        raise ValueError(f"alpha must be at least 0 (the exponent of the length), not {alpha}")
    return logps / lengths.to(logps) ** alpha
