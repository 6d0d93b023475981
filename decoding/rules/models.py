"""Define the rules that contrast the logits of different models."""

from torch import Tensor

from contralto.common.ranges import check_positive
from contralto.decoding.rules.base import check_strength, combine

__all__ = ["contrastive_decoding", "contrastive_decoding_li", "proxy_tuning"]


def contrastive_decoding(
    expert: Tensor, amateur: Tensor, *, beta: float = 0.5, alpha: float = 0.1, min_tokens_to_keep: int = 1
) -> Tensor:
    """Score tokens by contrastive decoding as in O'Brien & Lewis 2023 (arXiv 2309.09117, section 2.2).

        scores(v) = (1 + beta) * log p_expert(v) - beta * log p_amateur(v)    if v is plausible, else -inf

    so that `softmax(scores)` is proportional to `p_expert * (p_expert / p_amateur) ** beta` on the plausible tokens. The
    paper uses raw logits; log-probabilities differ by a constant per row, which has no effect on softmax and argmax, but
    would bias the sums that beam search compares.

    Args:
        expert: `(..., V)` logits of the stronger model.
        amateur: `(..., V)` logits of the weaker model, same vocabulary.
        beta: contrast strength, at least 0; 0 is the expert with the constraint alone.
        alpha: plausibility threshold in [0, 1], see `plausible`.
        min_tokens_to_keep: see `plausible`.

    Raises:
        ValueError: `beta` negative, `alpha` outside [0, 1], different shapes.

    Examples:
        With odds 3:1 for the expert, 1:1 for the amateur, and beta 1, the odds become 3^2 / 1 = 9:1.

        >>> expert, amateur = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> contrastive_decoding(expert, amateur, beta=1).softmax(-1)
        tensor([[0.9000, 0.1000]])
    """
    check_strength("beta", beta)
    return combine((expert, amateur), (1 + beta, -beta), alpha=alpha, min_tokens_to_keep=min_tokens_to_keep)


def contrastive_decoding_li(
    expert: Tensor,
    amateur: Tensor,
    *,
    alpha: float = 0.1,
    amateur_temperature: float = 1.0,
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Score tokens by contrastive decoding as in Li et al. 2022 (arXiv 2210.15097, equation 3).

        scores(v) = log p_expert(v) - log p_amateur(v; tau)    if v is plausible, else -inf

    with `p_amateur(.; tau) = softmax(amateur / tau)`. The expert's own probability enters only through the constraint:
    among plausible tokens the log-ratio alone decides. The official code divides after the softmax, which differs by a constant
    per row that biases beams; this is the paper's formula.

    Args:
        expert: `(..., V)` logits of the stronger model.
        amateur: `(..., V)` logits of the weaker model, same vocabulary.
        alpha: plausibility threshold in [0, 1], see `plausible`.
        amateur_temperature: `tau` > 0; the paper uses 0.5 for GPT-2 and 1.0 for OPT.
        min_tokens_to_keep: see `plausible`; the official code keeps 2 under beam search.

    Raises:
        ValueError: `amateur_temperature` not positive, `alpha` outside [0, 1], different shapes.

    Examples:
        >>> expert, amateur = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.75, 0.15, 0.1]]).log()
        >>> contrastive_decoding_li(expert, amateur, alpha=0.25).exp()  # 0.6 / 0.75, 0.3 / 0.15, implausible
        tensor([[0.8000, 2.0000, 0.0000]])
    """
    check_positive("amateur_temperature", amateur_temperature)
    branches = (expert, amateur / amateur_temperature)
    return combine(branches, (1, -1), alpha=alpha, min_tokens_to_keep=min_tokens_to_keep)


def proxy_tuning(base: Tensor, expert: Tensor, antiexpert: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Score tokens by proxy tuning: apply the effect of tuning a small model to a large one (Liu et al. 2024, arXiv 2401.08565).

        scores(v) = log p_base(v) + alpha * (log p_expert(v) - log p_antiexpert(v))

    DExperts (Liu et al. 2021, arXiv 2105.03023) is the same sum. No plausibility constraint, as in the paper.

    Args:
        base: `(..., V)` logits of the large model.
        expert: `(..., V)` logits of the small tuned model.
        antiexpert: `(..., V)` logits of the small model before tuning.
        alpha: strength, at least 0.

    Raises:
        ValueError: `alpha` negative, different shapes.

    Examples:
        >>> base, tuned, untuned = (torch.tensor([p]).log() for p in ([0.5, 0.5], [0.75, 0.25], [0.5, 0.5]))
        >>> proxy_tuning(base, tuned, untuned).softmax(-1)
        tensor([[0.7500, 0.2500]])
    """
    check_strength("alpha", alpha)
    return combine((base, expert, antiexpert), (1, alpha, -alpha))
