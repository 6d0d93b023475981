"""Define the rules that contrast the logits of one model given different images, or none."""

import math

import torch
from torch import Tensor

from contralto.decoding.rules.base import check_strength, check_threshold, combine

__all__ = [
    "instruction_contrastive_decoding",
    "m3id",
    "one_layer_intervention",
    "pay_attention_to_image",
    "ritual",
    "ritual_vcd",
    "visual_contrastive_decoding",
]


def visual_contrastive_decoding(
    original: Tensor, distorted: Tensor, *, alpha: float = 1.0, beta: float = 0.1
) -> Tensor:
    """Score tokens by visual contrastive decoding, VCD (Leng et al. 2024, arXiv 2311.16922, equations 3 and 4).

        scores(v) = (1 + alpha) * log p(v | image) - alpha * log p(v | distorted image)    if v is plausible, else -inf

    In VCD's notation `alpha` is the contrast strength and `beta` the plausibility threshold (`cd_alpha`, `cd_beta` in its
    code, whose evaluation script sets `cd_beta` 0.2). Temperature and top-p are applied after it.

    Args:
        original: `(..., V)` logits given the image.
        distorted: `(..., V)` logits given the distorted image, see `images.diffusion_noise`.
        alpha: contrast strength, at least 0.
        beta: plausibility threshold in [0, 1] on `original`, see `plausible`.

    Raises:
        ValueError: `alpha` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> original, distorted = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> visual_contrastive_decoding(original, distorted).softmax(-1)
        tensor([[0.9000, 0.1000]])
    """
    check_strength("alpha", alpha)
    check_threshold("beta", beta)
    return combine((original, distorted), (1 + alpha, -alpha), alpha=beta)


def instruction_contrastive_decoding(
    instructed: Tensor, disturbed: Tensor, *, alpha: float = 1.0, beta: float = 0.1
) -> Tensor:
    """Score tokens by instruction contrastive decoding, ICD (Wang et al. 2024, arXiv 2403.18715).

        scores(v) = (1 + alpha) * log p(v | instruction) - alpha * log p(v | disturbed instruction)    if plausible

    This is VCD's formula with a disturbed instruction ("You are a confused object detector ...") in place of a distorted image.

    Args:
        instructed: `(..., V)` logits given the instruction.
        disturbed: `(..., V)` logits given the instruction with a disturbing prefix.
        alpha: contrast strength, at least 0.
        beta: plausibility threshold in [0, 1] on `instructed`, see `plausible`.

    Raises:
        ValueError: `alpha` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> instructed, disturbed = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.75, 0.25]]).log()
        >>> instruction_contrastive_decoding(instructed, disturbed).softmax(-1)
        tensor([[0.7500, 0.2500]])
    """
    return visual_contrastive_decoding(instructed, disturbed, alpha=alpha, beta=beta)


def ritual(
    original: Tensor, transformed: Tensor, *, kappa: float = 3.0, beta: float = 0.1, normalize: bool = False
) -> Tensor:
    """Score tokens by RITUAL, which adds the view of a randomly transformed image (Woo et al. 2024, arXiv 2405.17821).

        scores(v) = log p(v | image) + kappa * log p(v | transformed image)    if v is plausible, else -inf

    The weights sum to `1 + kappa`, so the method also sharpens: with equal branches it is sampling at temperature
    `1 / (1 + kappa)`, a quarter by default. `normalize=True` divides by that sum, which the official code does not.

    Args:
        original: `(..., V)` logits given the image.
        transformed: `(..., V)` logits given the transformed image, see `images.ritual_transform`.
        kappa: weight of the transformed view, at least 0 (`ritual_alpha_pos` in the official code).
        beta: plausibility threshold in [0, 1] on `original`, see `plausible`.
        normalize: divide by `1 + kappa`.

    Raises:
        ValueError: `kappa` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> original, transformed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
        >>> ritual(original, transformed, kappa=1).softmax(-1)
        tensor([[0.7500, 0.2500]])
    """
    check_strength("kappa", kappa)
    check_threshold("beta", beta)
    scale = 1 / (1 + kappa) if normalize else 1.0
    return combine((original, transformed), (scale, scale * kappa), alpha=beta)


def ritual_vcd(
    original: Tensor,
    transformed: Tensor,
    distorted: Tensor,
    *,
    kappa: float = 3.0,
    alpha: float = 1.0,
    beta: float = 0.1,
) -> Tensor:
    """Score tokens by RITUAL and VCD together: add the view of one image, subtract that of another.

        scores(v) = (1 + alpha) log p(v | image) + kappa log p(v | transformed) - alpha log p(v | distorted)    if plausible

    Woo et al. (arXiv 2405.17821) report the combination without a formula or code: this is the sum of the two methods'
    contrasts on one main branch.

    Args:
        original: `(..., V)` logits given the image.
        transformed: `(..., V)` logits given the transformed image.
        distorted: `(..., V)` logits given the distorted image.
        kappa: weight of the transformed view, at least 0.
        alpha: contrast strength against the distorted view, at least 0.
        beta: plausibility threshold in [0, 1] on `original`, see `plausible`.

    Raises:
        ValueError: `kappa` or `alpha` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> uniform, sure = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
        >>> ritual_vcd(sure, uniform, sure, kappa=1).softmax(-1)
        tensor([[0.7500, 0.2500]])
    """
    check_strength("kappa", kappa)
    check_strength("alpha", alpha)
    check_threshold("beta", beta)
    return combine((original, transformed, distorted), (1 + alpha, kappa, -alpha), alpha=beta)


def m3id(
    conditioned: Tensor, unconditioned: Tensor, *, step: int | Tensor, lam: float = 0.02, beta: float = 0.1
) -> Tensor:
    """Score tokens by M3ID, whose contrast with the view without an image grows with the length (Favero et al. 2024).

        scores(v) = log p(v | image) + (1 - g) / g * (log p(v | image) - log p(v | no image)),    g = exp(-lam * step)

    arXiv 2403.14003. The paper applies the contrast only where the main model is uncertain and has no official code; this is
    the form of its reimplementations, with VCD's plausibility constraint instead. The first token (step 0) has no contrast.

    Args:
        conditioned: `(..., V)` logits given the image.
        unconditioned: `(..., V)` logits of the same model without the image.
        step: number of tokens generated before this one; a tensor must broadcast, such as `(T, 1)`.
        lam: rate at which the contrast grows, at least 0.
        beta: plausibility threshold in [0, 1] on `conditioned`, see `plausible`.

    Raises:
        ValueError: `lam` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> seen, unseen = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> m3id(seen, unseen, step=0).softmax(-1), m3id(seen, unseen, step=50).softmax(-1)
        (tensor([[0.7500, 0.2500]]), tensor([[0.9520, 0.0480]]))
    """
    check_strength("lam", lam)
    check_threshold("beta", beta)
    exponent = lam * torch.as_tensor(step, dtype=torch.float64, device=conditioned.device)
    weight = torch.expm1(exponent).to(conditioned.dtype)
    return combine((conditioned, unconditioned), (1 + weight, -weight), alpha=beta)


def pay_attention_to_image(
    original: Tensor, amplified: Tensor, unconditioned: Tensor, *, gamma: float = 1.1, beta: float = 0.1
) -> Tensor:
    """Score tokens by PAI: an image that is attended to more, against no image (Liu et al. 2024, arXiv 2407.21771).

        scores(v) = gamma * log p_a(v) - (gamma - 1) * log p(v | no image)    if v is plausible under p_a, else -inf

    where `p_a` is the model with amplified attention to its image. The main model's own distribution has no part in it; only tokens that are
    impossible there, such as those that a logits processor has ruled out, stay so.

    Args:
        original: `(..., V)` logits of the model given the image.
        amplified: `(..., V)` logits of the model with amplified attention to the image.
        unconditioned: `(..., V)` logits without the image.
        gamma: guidance scale, at least 1; 1 is no contrast. 1.1 in the released commands.
        beta: plausibility threshold in [0, 1] on `amplified`, see `plausible`. 0.1 in the released code.

    Raises:
        ValueError: `gamma` below 1, `beta` outside [0, 1], different shapes.

    Examples:
        >>> seen, unseen = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> pay_attention_to_image(unseen, seen, unseen, gamma=2).softmax(-1)
        tensor([[0.9000, 0.1000]])
    """
    if isinstance(gamma, str) or not 1 <= gamma < math.inf:
        raise ValueError(f"gamma must be a finite number of at least 1 (the guidance scale), not {gamma!r}")
    check_threshold("beta", beta)
    _check_shapes(original, amplified)
    possible = amplified.masked_fill(original == -math.inf, -math.inf)
    is_empty = possible.amax(-1, keepdim=True) == -math.inf
    main = torch.where(is_empty, amplified, possible)
    return combine((main, unconditioned), (gamma, 1 - gamma), alpha=beta)


def one_layer_intervention(
    original: Tensor,
    enhanced: Tensor,
    *,
    alpha_pos: float = 3.0,
    alpha_neg: float = 1.0,
    gamma: float = 0.2,
    beta: float = 0.1,
) -> Tensor:
    """Score tokens by ONLY, which adds or subtracts a branch that hears the text more (Wan et al. 2025, arXiv 2507.00898).

        scores(v) = log p + alpha_pos * log p_e                        if sum_v |p - p_e| < gamma
                    (1 + alpha_neg) * log p - alpha_neg * log p_e      otherwise,          on the plausible tokens of p

    Args:
        original: `(..., V)` logits of the model.
        enhanced: `(..., V)` logits of the text-enhanced branch, see `contralto.decoding.branches.TextEnhanced`.
        alpha_pos: weight of the branch where the two agree, at least 0.
        alpha_neg: contrast strength where they differ, at least 0.
        gamma: distance from which they differ, at least 0. Default 0.2, that of the released script for POPE; 0.25 for CHAIR and MME.
        beta: plausibility threshold in [0, 1] on `original`, see `plausible`.

    Raises:
        ValueError: a strength or `gamma` negative, `beta` outside [0, 1], different shapes.

    Examples:
        >>> p, near, far = (torch.tensor([row]).log() for row in ([0.75, 0.25], [0.7, 0.3], [0.25, 0.75]))
        >>> one_layer_intervention(p, near).softmax(-1), one_layer_intervention(p, far).softmax(-1)
        (tensor([[0.9744, 0.0256]]), tensor([[0.9643, 0.0357]]))
    """
    check_strength("alpha_pos", alpha_pos)
    check_strength("alpha_neg", alpha_neg)
    check_strength("gamma", gamma)
    check_threshold("beta", beta)
    _check_shapes(original, enhanced)
    distance = (original.softmax(-1) - enhanced.softmax(-1)).abs().sum(-1, keepdim=True)
    weight = torch.where(distance < gamma, alpha_pos, -alpha_neg).to(original)
    own = torch.where(distance < gamma, 1.0, 1 + alpha_neg).to(original)
    return combine((original, enhanced), (own, weight), alpha=beta)


def _check_shapes(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(f"the branches' logits differ in shape: {[tuple(one.shape), tuple(other.shape)]}")
