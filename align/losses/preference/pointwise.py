"""Losses that compare each completion with the reference, and not only the two with each other: APO, BCO, NCA, SPPO."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from contralto.align.losses.preference.settings import check_settings
from contralto.align.losses.preference.transforms import per_token

__all__ = [
    "apo_auto",
    "apo_down",
    "apo_down_norm",
    "apo_zero",
    "apo_zero_norm",
    "bco_pair",
    "nca_pair",
    "sppo_hard",
]


def nca_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute the loss of noise contrastive alignment of a pair, NCA (Chen et al. 2024, arXiv 2402.05369).

        L = -log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l)

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        beta: strength of the pull towards the reference, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> nca_pair(torch.tensor([0.0]), torch.tensor([0.0]))  # 2 log 2
        tensor([1.3863])
    """
    check_settings(beta=beta)
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute the loss of binary classifier optimization of a pair, BCO (Jung et al. 2024, arXiv 2404.04656).

        L = -log sigmoid(beta r_w) - log sigmoid(-beta r_l)

    The paper's running reward shift is left out, as in TRL.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        beta: strength of the pull towards the reference, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> bco_pair(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.3863])
    """
    check_settings(beta=beta)
    return -logsigmoid(beta * chosen_logratios) - logsigmoid(-beta * rejected_logratios)


def sppo_hard(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute the loss of self-play preference optimization, SPPO, with hard labels (Wu et al. 2024, arXiv 2405.00675, equation 4.7).

        L = (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2

    This is the equation with win probability 1 for the chosen completion and 0 for the rejected one.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        beta: the paper's 1 / eta, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> sppo_hard(torch.tensor([5.0]), torch.tensor([-4.0]))
        tensor([1.])
    """
    check_settings(beta=beta)
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2


def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute the loss of anchored preference optimization, zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7).

        L = 1 - sigmoid(beta r_w) + sigmoid(beta r_l)

    It raises the chosen completion and lowers the rejected one, each against the reference: for chosen completions that are better
    than the model's own. The paper has no constant 1; TRL adds it, and gradients do not depend on it.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        beta: above 0. The log-ratio of a long completion saturates: where `beta |r|` is far above 1 the gradient vanishes.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> apo_zero(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.])
    """
    check_settings(beta=beta)
    return 1 - (beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute the loss of anchored preference optimization, down (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8).

        L = sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l))

    It lowers both completions, the rejected one more: for chosen completions that are worse than the model's own.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        beta: strength of the pull towards the reference, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> apo_down(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.])
    """
    check_settings(beta=beta)
    return (beta * chosen_logratios).sigmoid() + 1 - (beta * (chosen_logratios - rejected_logratios)).sigmoid()


def apo_auto(chosen_logratios: Tensor, rejected_logratios: Tensor, advantage: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute APO-zero or APO-down for each pair, by the paper's rule of thumb (arXiv 2408.06266).

        L = apo_zero where advantage > 0, apo_down elsewhere

    The paper takes APO-zero where the chosen completion is better than the model's own, and APO-down where it is worse. The
    advantage decides: a judge's score of `y_w` minus its score of a completion that the model itself generated for the prompt.

    Without such scores `Pairs` computes a proxy, which is ours and not the paper's: of the two completions of a pair, the one that
    is likelier per token under the reference stands for the model's own. If that is the rejected one, the chosen one is better:

        advantage = log pi_ref(y_l) / |y_l| - log pi_ref(y_w) / |y_w|

    It depends on the reference alone, so a pair keeps its side throughout training. Where the model itself generated both completions
    the proxy is a coin toss; use `apo_zero` there.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        advantage: `(B,)`, in any unit; only its sign counts. 0 is not an advantage.
        beta: strength of the pull towards the reference, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> r_w, r_l = torch.tensor([10.0, 10.0]), torch.tensor([0.0, 0.0])
        >>> apo_auto(r_w, r_l, torch.tensor([1.0, -1.0]))  # zero: rising r_w helps; down: it hurts as much
        tensor([0.7689, 1.0000])
    """
    zero = apo_zero(chosen_logratios, rejected_logratios, beta=beta)
    return torch.where(advantage > 0, zero, apo_down(chosen_logratios, rejected_logratios, beta=beta))


def apo_zero_norm(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Compute APO-zero of the mean log-ratio per token, which does not saturate for long completions.

        L = 1 - sigmoid(beta r_w / |y_w|) + sigmoid(beta r_l / |y_l|)

    The length normalisation is ours, after DPO's in Tulu 3 (arXiv 2411.15124). A mean log-ratio is small, so `beta` should be larger:
    Tulu 3 takes 5 for DPO.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        chosen_lengths: `(B,)` tokens of the chosen completions.
        rejected_lengths: `(B,)` tokens of the rejected completions.
        beta: strength of the pull towards the reference, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> lengths = torch.tensor([100])
        >>> apo_zero_norm(torch.tensor([20.0]), torch.tensor([-20.0]), lengths, lengths, beta=5)
        tensor([0.5379])
    """
    return apo_zero(
        per_token(chosen_logratios, chosen_lengths), per_token(rejected_logratios, rejected_lengths), beta=beta
    )


def apo_down_norm(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Compute APO-down of the mean log-ratio per token, see `apo_zero_norm`.

        L = sigmoid(beta r_w / |y_w|) + 1 - sigmoid(beta (r_w / |y_w| - r_l / |y_l|))

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        chosen_lengths: `(B,)` tokens of the chosen completions.
        rejected_lengths: `(B,)` tokens of the rejected completions.
        beta: strength of the pull towards the reference, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> lengths = torch.tensor([100])
        >>> apo_down_norm(torch.tensor([-20.0]), torch.tensor([-60.0]), lengths, lengths, beta=5)
        tensor([0.3881])
    """
    return apo_down(
        per_token(chosen_logratios, chosen_lengths), per_token(rejected_logratios, rejected_lengths), beta=beta
    )
