"""Define the rules on whole sequences: diverse beams, the similarity of source and candidate, and the score that ranks candidates."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from contralto.decoding.rules.base import rule_out_

__all__ = [
    "candidate_scores",
    "check_diversity_penalty",
    "check_similarity_weight",
    "diverse_tokens",
    "mean_state",
    "similarities",
]


def check_diversity_penalty(diversity_penalty: float) -> None:
    """Raise ValueError unless a diversity penalty is at least 0.

    Args:
        diversity_penalty: the penalty.

    Raises:
        ValueError: it is below 0.
    """
    if not diversity_penalty >= 0:
        raise ValueError(f"diversity_penalty must be at least 0, not {diversity_penalty}")


def check_similarity_weight(alpha: float) -> None:
    """Raise ValueError unless the weight of a similarity lies in [0, 1].

    Args:
        alpha: the weight.

    Raises:
        ValueError: it lies outside.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1] (the weight of the similarity), not {alpha}")


def diverse_tokens(logits: Tensor, unfinished: Tensor | None = None, *, diversity_penalty: float = 1.0) -> Tensor:
    """Choose the next tokens of diverse beams with one beam per group (Vijayakumar et al. 2016, arXiv 1610.02424, Hamming diversity).

        token_g = argmax_v log p_g(v) - diversity_penalty * #{h < g: token_h = v}

    The groups of a prompt choose one after the other, and each pays for tokens that groups before it have chosen at this step.

    Args:
        logits: `(B, G, V)` of the G groups of each prompt.
        unfinished: `(B, G)`, false for groups that have ended, whose tokens no other group pays for; None if none has.
        diversity_penalty: at least 0; the released codes of CoNT and BRIO take 1 or 2.

    Returns:
        `(B, G)` int64.

    Raises:
        ValueError: the penalty is below 0.

    Examples:
        >>> diverse_tokens(torch.tensor([[[0.0, -0.5, -9.0], [0.0, -0.5, -9.0]]]), diversity_penalty=1.0)
        tensor([[0, 1]])
    """
    check_diversity_penalty(diversity_penalty)
    log_p = rule_out_(logits.log_softmax(-1))
    taken = torch.zeros_like(log_p[:, 0])
    tokens = []
    for group in range(log_p.shape[1]):
        token = (log_p[:, group] - diversity_penalty * taken).argmax(-1, keepdim=True)
        paid = torch.ones_like(token) if unfinished is None else unfinished[:, group, None]
        taken = taken.scatter_add(-1, token, paid.to(taken))
        tokens.append(token)
    return torch.cat(tokens, -1)


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Average the states of the tokens of a sequence.

    Args:
        states: `(..., T, H)`.
        mask: `(..., T)`, true for tokens that count, at least one per sequence.

    Returns:
        `(..., H)`, float32 at least.

    Examples:
        >>> mean_state(torch.tensor([[1.0, 3.0], [3.0, 5.0], [9.0, 9.0]]), torch.tensor([True, True, False]))
        tensor([2., 4.])
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    kept = mask.to(states)[..., None]
    return (states * kept).sum(-2) / kept.sum(-2)


def similarities(source: Tensor, candidates: Tensor) -> Tensor:
    """Compute the similarity of a source and its candidates in CoNT (An et al. 2022, arXiv 2205.14690): the cosine of their mean states.

        s_i = cos(z_x, z_i)

    Args:
        source: `(..., H)`, z of the source, see `mean_state`.
        candidates: `(..., n, H)`, z of each candidate.

    Returns:
        `(..., n)` in [-1, 1].

    Examples:
        >>> similarities(torch.tensor([1.0, 0.0]), torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([0.6000, 0.0000])
    """
    return cosine_similarity(source[..., None, :], candidates, dim=-1)


def candidate_scores(log_probs: Tensor, similarity: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Score whole candidates by CoNT (An et al. 2022, arXiv 2205.14690): similarity to the source and likelihood.

        score_i = alpha * s_i + (1 - alpha) * l_i / sum_j |l_j|

    `l_i` is the length-normalised log-probability of candidate i. As in the released code, it is divided by the sum over the candidates,
    by which both terms have one scale; without that, likelihood would decide alone.

    Args:
        log_probs: `(..., n)` length-normalised log-probabilities, at most 0.
        similarity: `(..., n)`, see `similarities`.
        alpha: the weight of the similarity, in [0, 1]. 0 ranks by likelihood, as beam search does.

    Returns:
        `(..., n)`; the candidate of the largest score is the answer.

    Raises:
        ValueError: `alpha` outside [0, 1].

    Examples:
        >>> candidate_scores(torch.tensor([-1.0, -3.0]), torch.tensor([0.2, 0.9]))
        tensor([-0.0250,  0.0750])
    """
    check_similarity_weight(alpha)
    return alpha * similarity + (1 - alpha) * log_probs / log_probs.abs().sum(-1, keepdim=True).clamp(min=1e-9)
