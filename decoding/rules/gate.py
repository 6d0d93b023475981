"""Define the gate of a contrast: where the main model is sure of the next token, its own distribution is used."""

import math

import torch
from torch import Tensor

__all__ = ["check_gate", "gated", "sure"]


def sure(logits: Tensor, *, gate: float) -> Tensor:
    """Find the distributions whose likeliest token is likely enough that no contrast is needed.

        max_w p(w) >= gate

    The criterion of M3ID (Favero et al. 2024, arXiv 2403.14003), which contrasts only where `max_w log p(w) < log gate`.

    Args:
        logits: `(..., V)` of the main model, raw or normalised.
        gate: in (0, 1]. With 1 a distribution is sure if, within rounding, it leaves a single token.

    Returns:
        `(...)` bool; False for logits that are NaN, or all `-inf`.

    Raises:
        ValueError: `gate` outside (0, 1].

    Examples:
        >>> p = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.1, 0.0]])
        >>> sure(p.log(), gate=0.8).tolist()
        [False, True]
    """
    check_gate(gate)
    return logits.amax(-1) - logits.logsumexp(-1) >= math.log(gate)


def gated(scores: Tensor, main: Tensor, *, gate: float, step: int | Tensor) -> Tensor:
    """Replace the scores of a contrast by the main model's log-probabilities where the main model is sure.

        scores(v) = log p(v)    if max_w p(w) >= gate and step > 0, else the scores of the contrast

    The gate of M3ID (arXiv 2403.14003), for any contrast. A sure distribution has no plausibility constraint either. The first
    token (step 0) is always contrasted: it is where branches read their prompts, and where short answers are decided.

    Args:
        scores: `(..., V)` of the contrast.
        main: `(..., V)` logits of the main model.
        gate: see `sure`.
        step: number of tokens generated before this one; a tensor must broadcast to `(..., 1)`, such as `(T, 1)`.

    Returns:
        `(..., V)`.

    Raises:
        ValueError: `gate` outside (0, 1], different shapes.

    Examples:
        >>> main, contrast = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log(), torch.tensor([[-1.0, 0.0], [-1.0, 0.0]])
        >>> gated(contrast, main, gate=0.8, step=1)
        tensor([[-0.1054, -2.3026],
                [-1.0000,  0.0000]])
        >>> torch.equal(gated(contrast, main, gate=0.8, step=0), contrast)
        True
    """
    if scores.shape != main.shape:
        raise ValueError(f"scores and main logits differ in shape: {[tuple(scores.shape), tuple(main.shape)]}")
    plain = sure(main, gate=gate)[..., None] & (torch.as_tensor(step, device=main.device) > 0)
    return torch.where(plain, main.log_softmax(-1), scores)


def check_gate(gate: float) -> None:
    """Raise ValueError unless a gate lies in (0, 1].

    Args:
        gate: the probability from which the main model is sure.
    """
    if isinstance(gate, str) or not 0 < gate <= 1:
        raise ValueError(
            f"gate must lie in (0, 1] (the probability from which the main model is sure), not {gate!r}: leave it out to "
            "contrast every token"
        )
