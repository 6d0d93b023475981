"""Losses with a divergence or a mask per token: TDPO and SparsePO."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from contralto.align.losses.preference.settings import check_settings

__all__ = ["sparsepo", "tdpo1", "tdpo2"]


def tdpo1(
    chosen_logratios: Tensor, rejected_logratios: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, *, beta: float = 0.1
) -> Tensor:
    """Compute the first objective of token-level DPO, TDPO1 (Zeng et al. 2024, arXiv 2404.11999).

        L = -log sigmoid(beta (r_w - r_l - (KL_l - KL_w))),    KL = sum_t KL(pi_ref(. | y_<t) || pi(. | y_<t))

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        chosen_kl: `(B,)` forward KL over the whole vocabulary, summed over the chosen completion, at least 0.
        rejected_kl: `(B,)` the same for the rejected completion.
        beta: strength of the pull towards the reference, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> tdpo1(torch.tensor([0.0]), torch.tensor([5.0]), torch.tensor([7.0]), torch.tensor([2.0]))
        tensor([0.6931])
    """
    check_settings(beta=beta)
    return -logsigmoid(beta * (chosen_logratios - rejected_logratios - (rejected_kl - chosen_kl)))


def tdpo2(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> Tensor:
    """Compute the second objective of token-level DPO, TDPO2 (Zeng et al. 2024, arXiv 2404.11999).

        L = -log sigmoid(beta (r_w - r_l - alpha (KL_l - sg[KL_w])))

    `sg` stops the gradient, so that training does not raise the divergence on the chosen completion.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        chosen_kl: `(B,)`, see `tdpo1`.
        rejected_kl: `(B,)`, see `tdpo1`.
        beta: strength of the pull towards the reference, above 0.
        alpha: weight of the divergence, at least 0; 0 is DPO.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` or `alpha` is out of range.

    Examples:
        >>> tdpo2(torch.tensor([0.0]), torch.tensor([5.0]), torch.tensor([12.0]), torch.tensor([2.0]))
        tensor([0.6931])
    """
    check_settings(beta=beta, alpha=alpha)
    delta = chosen_logratios - rejected_logratios - alpha * (rejected_kl - chosen_kl.detach())
    return -logsigmoid(beta * delta)


def sparsepo(
    chosen_token_logratios: Tensor,
    rejected_token_logratios: Tensor,
    chosen_token_kl: Tensor,
    rejected_token_kl: Tensor,
    chosen_reward_mask: Tensor,
    rejected_reward_mask: Tensor,
    chosen_kl_mask: Tensor,
    rejected_kl_mask: Tensor,
    *,
    beta: float = 0.1,
    lambda_u: float = 0.0,
    lambda_d: float = 0.0,
) -> Tensor:
    """Compute the loss of sparse token-level preference optimization, SparsePO (Christopoulou et al. 2024, arXiv 2410.05102).

        L = -log sigmoid(beta (u - delta)) + lambda_u (|m_u(y_w)|_1 + |m_u(y_l)|_1) + lambda_d (|m_d(y_w)|_1 + |m_d(y_l)|_1)
        u     = sum_t m_u(y_w)_t r(y_w)_t - sum_t m_u(y_l)_t r(y_l)_t
        delta = sum_t m_d(y_l)_t KL(y_l)_t - sum_t m_d(y_w)_t KL(y_w)_t,    KL_t = KL(pi_ref || pi) at token t

    Masks of ones and lambdas of 0 give `tdpo1`. Where `m_u` and `m_d` are one and the same tensor (a common mask) both
    lambdas count half, as in the official code.

    Args:
        chosen_token_logratios: `(B, T)` log-ratios of the tokens of the chosen completions.
        rejected_token_logratios: `(B, T)` log-ratios of the tokens of the rejected completions.
        chosen_token_kl: `(B, T)` forward KL at the tokens of the chosen completions.
        rejected_token_kl: `(B, T)` forward KL at the tokens of the rejected completions.
        chosen_reward_mask: `(B, T)` m_u, at least 0, and 0 outside the completion.
        rejected_reward_mask: `(B, T)` m_u of the rejected completions.
        chosen_kl_mask: `(B, T)` m_d, at least 0, and 0 outside the completion.
        rejected_kl_mask: `(B, T)` m_d of the rejected completions.
        beta: above 0. It multiplies masked sums: for a mask with mean 0.1 it should be ten times that for ones.
        lambda_u: weight of the L1 norm of m_u, at least 0; the paper's 1e-3 for dialogue.
        lambda_d: weight of the L1 norm of m_d, at least 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> r_w, r_l, kl, ones = torch.tensor([[3.0, 4.0]]), torch.tensor([[7.0, 0.0]]), torch.ones(1, 2), torch.ones(1, 2)
        >>> sparsepo(r_w, r_l, kl, kl, ones, ones, ones, ones)
        tensor([0.6931])
    """
    check_settings(beta=beta, lambda_u=lambda_u, lambda_d=lambda_d)
    u = (chosen_reward_mask * chosen_token_logratios).sum(-1) - (rejected_reward_mask * rejected_token_logratios).sum(
        -1
    )
    delta = (rejected_kl_mask * rejected_token_kl).sum(-1) - (chosen_kl_mask * chosen_token_kl).sum(-1)
    share = 0.5 if chosen_reward_mask is chosen_kl_mask else 1.0
    norm_u = chosen_reward_mask.abs().sum(-1) + rejected_reward_mask.abs().sum(-1)
    norm_d = chosen_kl_mask.abs().sum(-1) + rejected_kl_mask.abs().sum(-1)
    return -logsigmoid(beta * (u - delta)) + share * (lambda_u * norm_u + lambda_d * norm_d)
