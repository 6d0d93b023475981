"""Transforms of log-probabilities that several losses share: f-divergence scores, LD-DPO's sums, WPO's weights, label smoothing."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from contralto.common.suggestions import did_you_mean

__all__ = [
    "F_DIVERGENCES",
    "f_divergence_scores",
    "length_desensitized",
    "per_token",
    "smoothed_logistic",
    "wpo_weights",
]

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_LARGEST_EXPONENT = {torch.float16: 11.0, torch.bfloat16: 80.0, torch.float32: 80.0}


def f_divergence_scores(logratios: Tensor, *, divergence: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """Compute the scores of f-DPO, f'(pi / pi_ref) up to a constant (Wang et al. 2023, arXiv 2309.16240, table 1).

        reverse_kl: r    forward_kl: 1 - exp(-r)    js_divergence: log 2 + log sigmoid(r)
        alpha_divergence: (exp((alpha - 1) r) - 1) / (alpha - 1), which is r where alpha = 1

    The names and constants are TRL's. The exponent is clamped below the largest that the dtype can represent.

    Args:
        logratios: log-ratios, of any shape.
        divergence: one of `F_DIVERGENCES`.
        alpha: the alpha of the alpha-divergence.

    Returns:
        Scores of the shape and dtype of `logratios`.

    Raises:
        ValueError: `divergence` is not one of `F_DIVERGENCES`.

    Examples:
        >>> f_divergence_scores(torch.tensor([0.0, 1.0]), divergence="forward_kl")
        tensor([0.0000, 0.6321])
    """
    if divergence not in F_DIVERGENCES:
        raise ValueError(
            f"divergence must be one of {', '.join(F_DIVERGENCES)}, not {divergence!r}{did_you_mean(divergence, F_DIVERGENCES)}"
        )
    if divergence == "forward_kl":
        return 1 - (-logratios).exp()
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(logratios)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        wide = logratios.float() if logratios.dtype in _LARGEST_EXPONENT else logratios
        exponent = ((alpha - 1) * wide).clamp(max=_LARGEST_EXPONENT.get(logratios.dtype, 700.0))
        return (exponent.exp() - 1).to(logratios.dtype) / (alpha - 1)
    return logratios


def length_desensitized(token_logps: Tensor, mask: Tensor, shared_lengths: Tensor, *, alpha: float) -> Tensor:
    """Sum log-probabilities with a lower weight for the tokens by which one completion is longer, LD-DPO (arXiv 2409.06411).

        sum_{t <= n} log pi(y_t) + alpha sum_{t > n} log pi(y_t),    n = min(|y_w|, |y_l|)

    Args:
        token_logps: `(B, T)` log-probabilities.
        mask: `(B, T)`, true at the tokens of the completion.
        shared_lengths: `(B,)` n, in tokens.
        alpha: in [0, 1]; 1 is the plain sum, 0 cuts the longer completion to the length of the shorter one.

    Returns:
        `(B,)` weighted sums.

    Raises:
        ValueError: `alpha` lies outside [0, 1].

    Examples:
        >>> length_desensitized(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]]), torch.tensor([1]), alpha=0.5)
        tensor([-2.])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"ld_alpha must lie in [0, 1] (the weight of the longer text's tail), not {alpha}")
    tail = mask.long().cumsum(-1) > shared_lengths[..., None]
    return (token_logps * mask * torch.where(tail, alpha, 1.0)).sum(-1)


@torch.no_grad()
def wpo_weights(token_logps: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """Compute the weight of a completion by its likelihood under the policy, WPO (Zhou et al. 2024, arXiv 2406.11827, equation 2).

        w(y) = exp(1 / |y| sum_t (log pi(y_t) - log sum_v pi(v)^2))

    The weight of a pair is the product of the weights of its two completions. There is no gradient.

    Args:
        token_logps: `(B, T)` log-probabilities.
        log_sum_sq_probs: `(B, T)` the logarithm of the sum of squared probabilities at each position.
        mask: `(B, T)`, true at the tokens of the completion.

    Returns:
        `(B,)` weights.

    Examples:
        >>> p = torch.tensor([[0.5, 0.5]])
        >>> wpo_weights(p.log(), p.log(), torch.tensor([[True, True]]))  # p = sum_v p(v)^2
        tensor([1.])
    """
    aligned = torch.where(mask.bool(), token_logps - log_sum_sq_probs, 0.0)
    return (aligned.sum(-1) / mask.sum(-1).clamp(min=1)).exp()


def per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    """Divide sums by lengths; an empty completion counts as one token, as in TRL.

    Args:
        sums: `(B,)` sums over tokens.
        lengths: `(B,)` tokens.

    Returns:
        `(B,)` means.
    """
    return sums / lengths.clamp(min=1)


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """Compute the logistic loss with label smoothing.

    Args:
        logits: `(B,)`.
        label_smoothing: the weight of the opposite label, in [0, 0.5).

    Returns:
        `(B,)` loss.
    """
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
