"""Losses without a reference model: SFT, CPO, SimPO, ARPO, ORPO, AlphaPO, SimPER."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from contralto.align.losses.preference.settings import check_settings
from contralto.align.losses.preference.transforms import per_token, smoothed_logistic

__all__ = ["alphapo", "arpo", "cpo", "cpo_simpo", "orpo", "sft", "simper", "simpo"]


def sft(chosen_token_logps: Tensor, chosen_mask: Tensor) -> Tensor:
    """Compute the negative log-likelihood of the chosen completions, per token of the batch.

        L = -sum_{i,t} log pi(y_w,it) / sum_i |y_w,i|

    This is the mean over all tokens of the batch, not a mean of means, and so the same number for every pair.

    Args:
        chosen_token_logps: `(B, T)` log-probabilities of the tokens of the chosen completions.
        chosen_mask: `(B, T)`, true at the tokens of the completion.

    Returns:
        `(B,)` the loss, once per pair.

    Examples:
        >>> sft(torch.tensor([[-1.0, -3.0], [-2.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
        tensor([2., 2.])
    """
    tokens = chosen_mask.sum().clamp(min=1)
    return (-(chosen_token_logps * chosen_mask).sum() / tokens).expand(len(chosen_mask))


def cpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_token_logps: Tensor,
    chosen_mask: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss of contrastive preference optimization, CPO (Xu et al. 2024, arXiv 2401.08417, equation 3).

        L = -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d) + alpha NLL(y_w),    d = log pi(y_w) - log pi(y_l)

    `NLL` is `sft`: the paper writes -log pi(y_w); its code, and this function, take the mean over the tokens of the batch.

    Args:
        chosen_logps: `(B,)` summed log-probabilities of the chosen completions.
        rejected_logps: `(B,)` summed log-probabilities of the rejected completions.
        chosen_token_logps: `(B, T)` log-probabilities of the tokens of the chosen completions.
        chosen_mask: `(B, T)`, true at the tokens of the completion.
        beta: above 0.
        alpha: weight of the likelihood of the chosen completions, at least 0.
        label_smoothing: eps, in [0, 0.5); not in the paper.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> cpo(torch.tensor([-2.0]), torch.tensor([-2.0]), torch.tensor([[-2.0]]), torch.tensor([[True]]))
        tensor([2.6931])
    """
    check_settings(beta=beta, alpha=alpha, label_smoothing=label_smoothing)
    preference = smoothed_logistic(beta * (chosen_logps - rejected_logps), label_smoothing)
    return preference + alpha * sft(chosen_token_logps, chosen_mask)


def simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss of simple preference optimization, SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6).

        L = -(1 - eps) log sigmoid(d) - eps log sigmoid(-d),    d = beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma

    Args:
        chosen_logps: `(B,)` summed log-probabilities of the chosen completions.
        rejected_logps: `(B,)` summed log-probabilities of the rejected completions.
        chosen_lengths: `(B,)` tokens of the chosen completions.
        rejected_lengths: `(B,)` tokens of the rejected completions.
        beta: above 0; 2.0 to 2.5 in the paper.
        gamma: the reward margin, at least 0; 0.3 to 1.6 in the paper.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> simpo(torch.tensor([-10.0]), torch.tensor([-20.0]), torch.tensor([10]), torch.tensor([10]), gamma=2)
        tensor([0.6931])
    """
    check_settings(beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    delta = per_token(chosen_logps, chosen_lengths) - per_token(rejected_logps, rejected_lengths)
    return smoothed_logistic(beta * delta - gamma, label_smoothing)


def cpo_simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    chosen_token_logps: Tensor,
    chosen_mask: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute SimPO plus CPO's likelihood of the chosen completions (CPO-SimPO, as in the code of fe1ixxu/CPO_SIMPO and in TRL).

        L = simpo + alpha NLL(y_w)

    Args:
        chosen_logps: `(B,)` summed log-probabilities of the chosen completions.
        rejected_logps: `(B,)` summed log-probabilities of the rejected completions.
        chosen_lengths: `(B,)` tokens of the chosen completions.
        rejected_lengths: `(B,)` tokens of the rejected completions.
        chosen_token_logps: `(B, T)` log-probabilities of the tokens of the chosen completions.
        chosen_mask: `(B, T)`, true at the tokens of the completion.
        beta: see `simpo`.
        gamma: see `simpo`.
        alpha: weight of the likelihood of the chosen completions, at least 0.
        label_smoothing: see `simpo`.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> logps, one = torch.tensor([-2.0]), torch.tensor([1])
        >>> cpo_simpo(logps, logps, one, one, torch.tensor([[-2.0]]), torch.tensor([[True]]), gamma=0)
        tensor([2.6931])
    """
    check_settings(alpha=alpha)
    settings = {"beta": beta, "gamma": gamma, "label_smoothing": label_smoothing}
    preference = simpo(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, **settings)
    return preference + alpha * sft(chosen_token_logps, chosen_mask)


def arpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    chosen_token_logps: Tensor,
    chosen_mask: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    eta: float = 0.4,
    scale: float = 0.9,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss of adaptive-rejection preference optimization, ARPO (X-ALMA, Xu et al. 2024, arXiv 2410.03115).

        L = -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d) + alpha NLL(y_w),    d = log pi(y_w) - tau log pi(y_l)
        tau = min(scale * exp(eta |log pi(y_w) / |y_w| - log pi(y_l) / |y_l||) - 1, 1)

    A rejected completion that is nearly as likely as the chosen one is hardly rejected. `scale`, the mean per token and the gradient
    through tau are those of the official code (fe1ixxu/ALMA, utils/cpo_trainer.py). With its scale of 0.9 tau is -0.1 for equally
    likely completions: their likelihood is raised a little.

    Args:
        chosen_logps: `(B,)` summed log-probabilities of the chosen completions.
        rejected_logps: `(B,)` summed log-probabilities of the rejected completions.
        chosen_lengths: `(B,)` tokens of the chosen completions.
        rejected_lengths: `(B,)` tokens of the rejected completions.
        chosen_token_logps: `(B, T)` log-probabilities of the tokens of the chosen completions.
        chosen_mask: `(B, T)`, true at the tokens of the completion.
        beta: above 0.
        alpha: weight of the likelihood of the chosen completions, at least 0.
        eta: growth of tau with the gap, at least 0.
        scale: above 0.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> logps, one, tokens = torch.tensor([-10.0]), torch.tensor([1]), torch.tensor([[-10.0]])
        >>> arpo(logps, logps, one, one, tokens, torch.tensor([[True]]), alpha=0)  # -log sigmoid(0.1 (-10 + 0.1 * -10))
        tensor([1.3873])
    """
    check_settings(beta=beta, alpha=alpha, eta=eta, scale=scale, label_smoothing=label_smoothing)
    gap = (per_token(chosen_logps, chosen_lengths) - per_token(rejected_logps, rejected_lengths)).abs()
    tau = (scale * (eta * gap).exp() - 1).clamp(max=1)
    preference = smoothed_logistic(beta * (chosen_logps - tau * rejected_logps), label_smoothing)
    return preference + alpha * sft(chosen_token_logps, chosen_mask)


def orpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    chosen_token_logps: Tensor,
    chosen_mask: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Compute the loss of odds ratio preference optimization, ORPO (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7).

        L = NLL(y_w) - beta log sigmoid(log odds(y_w) - log odds(y_l))
        odds(y) = p(y) / (1 - p(y)),    p(y) = exp(log pi(y) / |y|)

    The paper calls the weight lambda, TRL `beta`. `NLL` is `sft`, of the completion as in the paper's equation; the default of the official
    code (xfactlab/orpo), and TRL, also count the tokens of the prompt.

    Args:
        chosen_logps: `(B,)` summed log-probabilities of the chosen completions.
        rejected_logps: `(B,)` summed log-probabilities of the rejected completions.
        chosen_lengths: `(B,)` tokens of the chosen completions.
        rejected_lengths: `(B,)` tokens of the rejected completions.
        chosen_token_logps: `(B, T)` log-probabilities of the tokens of the chosen completions.
        chosen_mask: `(B, T)`, true at the tokens of the completion.
        beta: weight of the odds ratio, above 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> logps, one, tokens = torch.tensor([-2.0]), torch.tensor([1]), torch.tensor([[-2.0]])
        >>> orpo(logps, logps, one, one, tokens, torch.tensor([[True]]), beta=1.0)  # 2 + log 2
        tensor([2.6931])
    """
    check_settings(beta=beta)
    ratio = _log_odds(chosen_logps, chosen_lengths) - _log_odds(rejected_logps, rejected_lengths)
    return sft(chosen_token_logps, chosen_mask) - beta * logsigmoid(ratio)


def _log_odds(logps: Tensor, lengths: Tensor) -> Tensor:
    """Compute log p - log(1 - p) of mean probabilities p; p that rounds to 1 becomes the number before it, so that the odds stay finite."""
    mean = per_token(logps, lengths)
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - (-torch.expm1(mean)).log()


def alphapo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.5,
    alpha: float = 0.25,
    gamma: float = 0.5,
) -> Tensor:
    """Compute the loss of AlphaPO, SimPO with another shape of the reward (Gupta et al. 2025, arXiv 2501.03884).

        L = -log sigmoid(beta (r(y_w) - r(y_l)) - gamma)
        r(y) = (1 - p(y)^(-alpha)) / alpha,    p(y) = exp(log pi(y) / |y|)

    In the limit alpha = 0 the reward is log p, and the loss is SimPO's. The paper also looks at alpha below 0.

    Args:
        chosen_logps: `(B,)` summed log-probabilities of the chosen completions.
        rejected_logps: `(B,)` summed log-probabilities of the rejected completions.
        chosen_lengths: `(B,)` tokens of the chosen completions.
        rejected_lengths: `(B,)` tokens of the rejected completions.
        beta: above 0.
        alpha: the shape of the reward, at least 0; 0.25 in the paper's table 3 for Mistral-Instruct.
        gamma: the reward margin, at least 0.

    Returns:
        `(B,)` loss per pair.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> two, four, one = torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([1])
        >>> alphapo(two, four, one, one, beta=1.0, alpha=1.0, gamma=2.0)  # (1 - 2) - (1 - 4) - 2 = 0
        tensor([0.6931])
    """
    check_settings(beta=beta, alpha=alpha, gamma=gamma)
    means = per_token(chosen_logps, chosen_lengths), per_token(rejected_logps, rejected_lengths)
    chosen, rejected = (-torch.expm1(-alpha * mean) / alpha if alpha else mean for mean in means)
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def simper(chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
    """Compute the loss of SimPER, which has no settings (Xiao et al. 2025, arXiv 2502.00883).

        L = -exp(log pi(y_w) / |y_w|) + exp(log pi(y_l) / |y_l|)

    These are inverse perplexities, so the loss lies in [-1, 1]. A rejected completion that is already unlikely has hardly any gradient,
    and neither has a chosen one.

    Args:
        chosen_logps: `(B,)` summed log-probabilities of the chosen completions.
        rejected_logps: `(B,)` summed log-probabilities of the rejected completions.
        chosen_lengths: `(B,)` tokens of the chosen completions.
        rejected_lengths: `(B,)` tokens of the rejected completions.

    Returns:
        `(B,)` loss per pair.

    Examples:
        >>> two, eight = torch.tensor([0.5]).log(), torch.tensor([0.125]).log()
        >>> simper(2 * two, eight, torch.tensor([2]), torch.tensor([1]))  # -1/2 + 1/8
        tensor([-0.3750])
    """
    return per_token(rejected_logps, rejected_lengths).exp() - per_token(chosen_logps, chosen_lengths).exp()
