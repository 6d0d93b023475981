"""The targets of a critic: Monte-Carlo and bootstrapped returns, and the loss against them."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["critic_loss", "lambda_returns"]


def lambda_returns(values: Tensor, rewards: Tensor, mask: Tensor, *, lam: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Return the lambda-returns of the states of texts with a reward at their end (Sutton & Barto 2018, section 12.1).

        G_T = R,      G_t = gamma * ((1 - lam) * v_{t+1} + lam * G_{t+1})    for t < T

    where `T` is the last state of a text. `lam=1` gives Monte-Carlo returns, `gamma^(T - t) R`; `lam=0` one-step bootstrapped (TD)
    targets. Kim et al. (arXiv 2212.10938) train their critic with generalised advantages of `lam=0.95`, whose targets are these.

    Args:
        values: `(B, T)` values in [0, 1], the critic's own predictions; no gradient passes through them.
        rewards: `(B,)` in [0, 1].
        mask: `(B, T)`, 1 for the states of a text, which lie next to each other.
        lam: weight of later returns against the next value, in [0, 1].
        gamma: discount per token, in (0, 1].

    Returns:
        `(B, T)`, 0 where `mask` is 0.

    Raises:
        ValueError: `lam` or `gamma` outside its range, or a text without states.

    Examples:
        >>> values, mask = torch.tensor([[0.5, 0.25, 0.75]]), torch.ones(1, 3)
        >>> lambda_returns(values, torch.tensor([1.0]), mask, lam=0.0)
        tensor([[0.2500, 0.7500, 1.0000]])
        >>> lambda_returns(values, torch.tensor([1.0]), mask, gamma=0.5)
        tensor([[0.2500, 0.5000, 1.0000]])
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], not {lam}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], not {gamma}")
    inside = mask.bool()
    if not inside.any(-1).all():
        raise ValueError("a text has no states: its completion is empty")
    values, returns = values.detach(), torch.zeros_like(values)
    later = torch.zeros_like(rewards)
    for t in reversed(range(values.shape[1])):
        is_last = inside[:, t] & ~(inside[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(inside[:, t]))
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(rewards)
        target = torch.where(is_last, rewards, gamma * ((1 - lam) * next_value + lam * later))
        returns[:, t] = later = torch.where(inside[:, t], target, 0.0)
    return returns


def critic_loss(logits: Tensor, rewards: Tensor, mask: Tensor, *, lam: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Return the cross-entropy of the values of all states against their returns.

        L = - mean over states of (G log sigmoid(V) + (1 - G) log(1 - sigmoid(V)))

    Its minimum is `sigmoid(V) = E[G]`, the expected reward of the finished text.

    Args:
        logits: `(B, T)` of the critic.
        rewards: `(B,)` in [0, 1].
        mask: `(B, T)`, 1 for the states that are trained.
        lam: see `lambda_returns`.
        gamma: see `lambda_returns`.

    Returns:
        A scalar.

    Raises:
        ValueError: see `lambda_returns`.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    targets = lambda_returns(logits.sigmoid(), rewards.to(logits), mask, lam=lam, gamma=gamma)
    return binary_cross_entropy_with_logits(logits, targets, weight=mask.to(logits), reduction="sum") / mask.sum()
