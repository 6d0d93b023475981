"""Losses that sort the scores of the batch: alignment via optimal transport."""

from torch import Tensor

from contralto.align.losses.preference.settings import check_settings
from contralto.align.losses.preference.transforms import smoothed_logistic

__all__ = ["aot", "aot_unpaired"]


def aot(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_ref_logps: Tensor,
    rejected_ref_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss of alignment via optimal transport, paired (Melnyk et al. 2024, arXiv 2406.05882).

        L_i = -(1 - eps) log sigmoid(beta d_i) - eps log sigmoid(-beta d_i)
        d = sort(log pi(y_w) - log pi(y_l)) - sort(log pi_ref(y_w) - log pi_ref(y_l))

    The sort is over the batch, so the loss of a pair depends on the other pairs.

    Args:
        chosen_logps: `(B,)` summed log-probabilities of the chosen completions under the policy.
        rejected_logps: `(B,)` summed log-probabilities of the rejected completions under the policy.
        chosen_ref_logps: `(B,)` summed log-probabilities of the chosen completions under the reference.
        rejected_ref_logps: `(B,)` summed log-probabilities of the rejected completions under the reference.
        beta: strength of the pull towards the reference, above 0.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        `(B,)` loss per rank in the sorted batch.

    Raises:
        ValueError: `beta` or `label_smoothing` is out of range.

    Examples:
        >>> policy, reference = torch.tensor([0.0, 10.0]), torch.tensor([10.0, 0.0])
        >>> aot(policy, torch.zeros(2), reference, torch.zeros(2))  # the sorted gaps agree
        tensor([0.6931, 0.6931])
    """
    check_settings(beta=beta, label_smoothing=label_smoothing)
    policy, reference = chosen_logps - rejected_logps, chosen_ref_logps - rejected_ref_logps
    return smoothed_logistic(beta * (policy.sort(0).values - reference.sort(0).values), label_smoothing)


def aot_unpaired(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the loss of alignment via optimal transport, unpaired (Melnyk et al. 2024, arXiv 2406.05882).

        L_i = -(1 - eps) log sigmoid(beta d_i) - eps log sigmoid(-beta d_i),    d = sort(r_w) - sort(r_l)

    The sort is over the batch, so the loss of a pair depends on the other pairs.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        beta: strength of the pull towards the reference, above 0.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        `(B,)` loss per rank in the sorted batch.

    Raises:
        ValueError: `beta` or `label_smoothing` is out of range.

    Examples:
        >>> aot_unpaired(torch.tensor([0.0, 10.0]), torch.tensor([10.0, 0.0]))
        tensor([0.6931, 0.6931])
    """
    check_settings(beta=beta, label_smoothing=label_smoothing)
    delta = chosen_logratios.sort(0).values - rejected_logratios.sort(0).values
    return smoothed_logistic(beta * delta, label_smoothing)
