"""Define the rules that contrast the logits of different models."""

import torch
from torch import Tensor

from contralto.common.ranges import check_positive
from contralto.decoding.rules.base import check_strength, combine, plausible

__all__ = [
    "contrastive_decoding",
    "contrastive_decoding_li",
    "contrastive_decoding_released",
    "propose_by_expert",
    "proxy_tuning",
]


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


def contrastive_decoding_released(
    expert: Tensor,
    amateur: Tensor,
    *,
    alpha: float = 0.1,
    amateur_temperature: float = 1.0,
    st_coef: float = 1.0,
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Score tokens by contrastive decoding as in the beam search of the code that Li et al. 2022 (arXiv 2210.15097) released.

        scores(v) = log p_expert(v) - st_coef * log p_amateur(v) / tau    if v is plausible, else -inf

    The amateur's log-probabilities are divided after the softmax and not normalised again, so that `tau` weights them, as
    `st_coef` does. In beam search the expert proposes the candidates, see `propose_by_expert`.

    Args:
        expert: `(..., V)` logits of the stronger model.
        amateur: `(..., V)` logits of the weaker model, same vocabulary.
        alpha: plausibility threshold in [0, 1], see `plausible`.
        amateur_temperature: `tau` > 0 (`student_temperature`); the released scripts use 0.5 for GPT-2 and 1.0 for OPT.
        st_coef: weight of the amateur, at least 0; the released scripts use 1.0 or 0.8.
        min_tokens_to_keep: see `plausible`; the released code keeps 2 under beam search.

    Raises:
        ValueError: `amateur_temperature` not positive, `st_coef` negative, `alpha` outside [0, 1], different shapes.

    Examples:
        >>> expert, amateur = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.75, 0.15, 0.1]]).log()
        >>> contrastive_decoding_released(expert, amateur, alpha=0.25, amateur_temperature=0.5).exp()  # 0.6 / 0.75^2, ...
        tensor([[ 1.0667, 13.3333,  0.0000]])
    """
    check_positive("amateur_temperature", amateur_temperature)
    check_strength("st_coef", st_coef)
    weights = (1, -st_coef / amateur_temperature)
    return combine((expert, amateur), weights, alpha=alpha, min_tokens_to_keep=min_tokens_to_keep)


def propose_by_expert(
    expert: Tensor, scores: Tensor, rows: Tensor, *, beams: int, alpha: float, min_tokens_to_keep: int
) -> Tensor:
    """Keep the scores of the candidates that the expert proposes, as the beam search released by Li et al. does.

    Of the tokens of all beams of a prompt the expert proposes the `2 * beams` with the highest `log p_expert` of this step; the sums of
    the beams take no part. They alone are ranked by sum and score. At the first step, in which all beams are equal, the proposals
    are plausible ones of the first beam, then of its copies, whose sums begin at -1e9.

    Args:
        expert: `(R, V)` log-probabilities of the expert, the beams of a prompt next to each other.
        scores: `(R, V)` of the method, `-inf` for implausible tokens.
        rows: `(R, T)` int64, the tokens of the beams.
        beams: number of beams per prompt.
        alpha: plausibility threshold.
        min_tokens_to_keep: see `plausible`.

    Returns:
        `(R, V)`, `-inf` except for proposals.

    Raises:
        ValueError: the rows are not a multiple of the beams.

    Examples:
        >>> expert = torch.tensor([[0.5, 0.4, 0.1], [0.7, 0.2, 0.1]]).log()
        >>> scores = propose_by_expert(
        ...     expert, torch.zeros(2, 3), torch.tensor([[1], [2]]), beams=2, alpha=0.0, min_tokens_to_keep=1
        ... )
        >>> scores[:, :2]
        tensor([[0., 0.],
                [0., 0.]])
    """
    if len(rows) % beams:
        raise ValueError(f"{len(rows)} rows are no multiple of {beams} beams: pass beams= as num_beams of generate()")
    groups, vocabulary = len(rows) // beams, expert.shape[-1]
    tokens = rows.view(groups, beams, -1)
    is_first = (tokens == tokens[:, :1]).all(-1).all(-1)
    possible = plausible(expert, alpha=alpha, min_tokens_to_keep=min_tokens_to_keep)
    first = expert.double().masked_fill(~possible, -torch.inf).view(groups, beams, vocabulary)
    first = first - 1e9 * (torch.arange(beams, device=expert.device) > 0)[:, None]
    ranks = torch.where(is_first[:, None, None], first, expert.double().view(groups, beams, vocabulary))
    proposed = ranks.flatten(1).topk(min(2 * beams, beams * vocabulary)).indices
    kept = torch.zeros(groups, beams * vocabulary, dtype=torch.bool, device=expert.device).scatter(1, proposed, True)
    return scores.masked_fill(~kept.view_as(scores), -torch.inf)


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
