"""Losses of the difference of the two completions' scores: DPO and its variants."""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from contralto.align.losses.preference.settings import check_settings
from contralto.align.losses.preference.transforms import per_token

__all__ = [
    "cal_dpo",
    "discopop",
    "dpop",
    "exo_pair",
    "hinge",
    "ipo",
    "margin",
    "odpo",
    "robust",
    "sigmoid",
    "sigmoid_norm",
]


def sigmoid(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute the loss of direct preference optimization, DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

        L = -log sigmoid(beta (s_w - s_l))

    Args:
        chosen_scores: `(B,)` scores of the chosen completions, in the paper log-ratios.
        rejected_scores: `(B,)` scores of the rejected completions.
        beta: strength of the pull towards the reference, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> sigmoid(torch.tensor([0.0]), torch.tensor([0.0]))  # log 2 where policy and reference agree
        tensor([0.6931])
    """
    check_settings(beta=beta)
    return -logsigmoid(beta * (chosen_scores - rejected_scores))


def hinge(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute the hinge loss on the normalised likelihood (SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, arXiv 2309.06657).

        L = max(0, 1 - beta (s_w - s_l))

    Args:
        chosen_scores: `(B,)` log-ratios of the chosen completions.
        rejected_scores: `(B,)` log-ratios of the rejected completions.
        beta: the reciprocal of the margin, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> hinge(torch.tensor([5.0, 20.0]), torch.tensor([0.0, 0.0]))
        tensor([0.5000, 0.0000])
    """
    check_settings(beta=beta)
    return relu(1 - beta * (chosen_scores - rejected_scores))


def ipo(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Compute the loss of identity preference optimization, IPO (Azar et al. 2023, arXiv 2310.12036, equation 17).

        L = (s_w / |y_w| - s_l / |y_l| - 1 / (2 beta))^2

    The paper's tau is `beta`. The mean per token is not in the paper; its authors confirmed to TRL that they used it.

    Args:
        chosen_scores: `(B,)` log-ratios of the chosen completions.
        rejected_scores: `(B,)` log-ratios of the rejected completions.
        chosen_lengths: `(B,)` tokens of the chosen completions.
        rejected_lengths: `(B,)` tokens of the rejected completions.
        beta: the regularisation tau, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> ipo(torch.tensor([50.0]), torch.tensor([0.0]), torch.tensor([10]), torch.tensor([10]))  # (5 - 5)^2
        tensor([0.])
    """
    check_settings(beta=beta)
    delta = per_token(chosen_scores, chosen_lengths) - per_token(rejected_scores, rejected_lengths)
    return (delta - 1 / (2 * beta)) ** 2


def exo_pair(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float = 0.1, epsilon: float = 1e-3) -> Tensor:
    """Compute the loss of efficient exact optimization of a pair, EXO-pref (Ji et al. 2024, arXiv 2402.00856, equation 16).

        L = KL(q || [1 - epsilon, epsilon]),    q = [sigmoid(beta (s_w - s_l)), sigmoid(beta (s_l - s_w))]

    Args:
        chosen_scores: `(B,)` log-ratios of the chosen completions.
        rejected_scores: `(B,)` log-ratios of the rejected completions.
        beta: strength of the pull towards the reference, above 0.
        epsilon: label smoothing, in (0, 0.5); the paper takes 1e-3.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` or `epsilon` is out of range.

    Examples:
        >>> odds = torch.tensor([3.0]).log() / 0.1  # q = [0.75, 0.25]
        >>> exo_pair(odds, torch.tensor([0.0]), epsilon=0.25).abs() < 1e-6
        tensor([True])
    """
    check_settings(beta=beta, epsilon=epsilon)
    logit = beta * (chosen_scores - rejected_scores)
    chosen = logit.sigmoid() * (logsigmoid(logit) - math.log1p(-epsilon))
    return chosen + (-logit).sigmoid() * (logsigmoid(-logit) - math.log(epsilon))


def robust(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the DPO loss that is unbiased under flipped labels, rDPO (Chowdhury et al. 2024, arXiv 2403.00409).

        L = [-(1 - eps) log sigmoid(beta (s_w - s_l)) + eps log sigmoid(-beta (s_w - s_l))] / (1 - 2 eps)

    Args:
        chosen_scores: `(B,)` log-ratios of the chosen completions.
        rejected_scores: `(B,)` log-ratios of the rejected completions.
        beta: strength of the pull towards the reference, above 0.
        label_smoothing: eps, the share of flipped pairs, in [0, 0.5).

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` or `label_smoothing` is out of range.

    Examples:
        >>> robust(torch.tensor([0.0]), torch.tensor([0.0]), label_smoothing=0.25)
        tensor([0.6931])
    """
    check_settings(beta=beta, label_smoothing=label_smoothing)
    logit = beta * (chosen_scores - rejected_scores)
    smoothed = (1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)
    return -smoothed / (1 - 2 * label_smoothing)


def discopop(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """Compute the loss of discovered preference optimization, DiscoPOP (Lu et al. 2024, arXiv 2406.08414, equation 5).

        L = (1 - m) * -log sigmoid(rho) + m * exp(-rho),    rho = beta (s_w - s_l),  m = sigmoid(rho / tau)

    Args:
        chosen_scores: `(B,)` log-ratios of the chosen completions.
        rejected_scores: `(B,)` log-ratios of the rejected completions.
        beta: strength of the pull towards the reference, above 0.
        tau: temperature of the blend, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` or `tau` is not above 0.

    Examples:
        >>> discopop(torch.tensor([0.0]), torch.tensor([0.0]))  # (log 2 + 1) / 2
        tensor([0.8466])
    """
    check_settings(beta=beta, tau=tau)
    rho = beta * (chosen_scores - rejected_scores)
    blend = (rho / tau).sigmoid()
    return -(1 - blend) * logsigmoid(rho) + blend * (-rho).exp()


def sigmoid_norm(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Compute the length-normalised DPO loss (Tulu 3, Lambert et al. 2024, arXiv 2411.15124).

        L = -log sigmoid(beta (s_w / |y_w| - s_l / |y_l|))

    Args:
        chosen_scores: `(B,)` log-ratios of the chosen completions.
        rejected_scores: `(B,)` log-ratios of the rejected completions.
        chosen_lengths: `(B,)` tokens of the chosen completions.
        rejected_lengths: `(B,)` tokens of the rejected completions.
        beta: strength of the pull towards the reference, above 0; Tulu 3 takes 5.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> sigmoid_norm(torch.tensor([8.0]), torch.tensor([4.0]), torch.tensor([8]), torch.tensor([4]), beta=5)
        tensor([0.6931])
    """
    return sigmoid(per_token(chosen_scores, chosen_lengths), per_token(rejected_scores, rejected_lengths), beta=beta)


def margin(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute the DPO loss with a margin per pair (ODPO, Amini et al. 2024, arXiv 2402.10571, with the offset as given).

        L = -log sigmoid(beta (s_w - s_l) - m)

    Args:
        chosen_scores: `(B,)` log-ratios of the chosen completions.
        rejected_scores: `(B,)` log-ratios of the rejected completions.
        margin: `(B,)` m, in units of reward, that is of `beta s`.
        beta: strength of the pull towards the reference, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> margin(torch.tensor([10.0]), torch.tensor([0.0]), torch.tensor([1.0]))
        tensor([0.6931])
    """
    check_settings(beta=beta)
    return -logsigmoid(beta * (chosen_scores - rejected_scores) - margin)


def odpo(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor, *, beta: float = 0.1, alpha: float = 1.0
) -> Tensor:
    """Compute the loss of DPO with an offset, ODPO (Amini et al. 2024, arXiv 2402.10571).

        L = -log sigmoid(beta (s_w - s_l) - alpha log(score(y_w) - score(y_l)))

    Args:
        chosen_scores: `(B,)` log-ratios of the chosen completions.
        rejected_scores: `(B,)` log-ratios of the rejected completions.
        margin: `(B,)` difference of a judge's scores of the two completions, above 0.
        beta: strength of the pull towards the reference, above 0.
        alpha: weight of the offset, at least 0; 0 is DPO.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` or `alpha` is out of range, or a margin is not above 0.

    Examples:
        >>> odpo(torch.tensor([10.0]), torch.tensor([0.0]), torch.tensor([1.0]).exp())
        tensor([0.6931])
    """
    check_settings(beta=beta, alpha=alpha)
    if not (margin > 0).all():
        raise ValueError(f"odpo takes the logarithm of the margin, which must be above 0, not {margin.min().item():g}")
    return -logsigmoid(beta * (chosen_scores - rejected_scores) - alpha * margin.log())


def dpop(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.3, penalty: float = 50.0) -> Tensor:
    """Compute the loss of DPO-Positive, DPOP (Pal et al. 2024, arXiv 2402.13228, equation 3).

        L = -log sigmoid(beta (r_w - r_l - lambda max(0, -r_w)))

    The last term is above 0 where the policy finds the chosen completion less likely than the reference does, which DPO allows as long as
    the rejected one falls further.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        beta: strength of the pull towards the reference, above 0; 0.3 in the paper.
        penalty: the paper's lambda, at least 0; 50 in the paper. With 0 the loss is DPO's.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> dpop(torch.tensor([0.0, -0.1]), torch.tensor([0.0, -5.1]), beta=1.0)  # 5 - 50 * 0.1 = 0
        tensor([0.6931, 0.6931])
    """
    check_settings(beta=beta, penalty=penalty)
    loss_of_likelihood = relu(-chosen_logratios)
    return -logsigmoid(beta * (chosen_logratios - rejected_logratios - penalty * loss_of_likelihood))


def cal_dpo(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.001, alpha: float = 1.0) -> Tensor:
    """Compute the loss of calibrated DPO, Cal-DPO (Xiao et al. 2024, arXiv 2412.14516).

        L = -log sigmoid(r_w - r_l) + alpha [(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2]

    The rewards beta r are drawn to 1/2 and -1/2 and not only apart. There is no beta in the sigmoid. The released code
    (tengxiao1/Cal-DPO, scripts/dpo_trainer.py) has alpha = 0.5 and trains with beta from 0.001 to 0.002: log-ratios are then drawn to
    250 to 500 nats.

    Args:
        chosen_logratios: `(B,)` log-ratios of the chosen completions.
        rejected_logratios: `(B,)` log-ratios of the rejected completions.
        beta: above 0.
        alpha: weight of the calibration, at least 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> cal_dpo(torch.tensor([5.0, 4.0]), torch.tensor([-5.0, -5.0]), beta=0.1)  # log(1 + exp(-10)); that of 9, and 1^2
        tensor([4.5399e-05, 1.0001e+00])
    """
    check_settings(beta=beta, alpha=alpha)
    target = 1 / (2 * beta)
    calibration = (chosen_logratios - target) ** 2 + (rejected_logratios + target) ** 2
    return -logsigmoid(chosen_logratios - rejected_logratios) + alpha * calibration
