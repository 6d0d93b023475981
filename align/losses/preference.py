"""The mathematics of preference optimisation: pure functions of log-probabilities, one loss per pair.

Notation, in nats, for a prompt x with a chosen completion `y_w` and a rejected one `y_l`:

    r(y) = log pi(y | x) - log pi_ref(y | x)    the log-ratio, summed over the tokens of y; r_w, r_l for the two
    s(y) = f'(pi / pi_ref)                      the score: r itself, unless an f-divergence transforms it
    |y|                                         the number of tokens of y

Every loss takes tensors of shape `(B,)`, or `(B, T)` where tokens count, and returns `(B,)`. Reduce it by the mean. What the
arguments of a loss are called says where they come from (`objective.Pairs`); what stands after the star are its settings, in the
paper's letters. `contralto.align.losses.objective` names them all, and combines several by weight.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

__all__ = [
    "aot",
    "aot_unpaired",
    "apo_auto",
    "apo_down",
    "apo_down_norm",
    "apo_zero",
    "apo_zero_norm",
    "arpo",
    "bco_pair",
    "cpo",
    "cpo_simpo",
    "discopop",
    "exo_pair",
    "f_divergence_scores",
    "hinge",
    "ipo",
    "length_desensitized",
    "margin",
    "nca_pair",
    "odpo",
    "robust",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "sparsepo",
    "sppo_hard",
    "svco",
    "tdpo1",
    "tdpo2",
    "wpo_weights",
]


def sigmoid(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float = 0.1) -> Tensor:
    """Direct preference optimization, DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

        L = -log sigmoid(beta (s_w - s_l))

    Args:
        chosen_scores, rejected_scores: `(B,)`, in the paper the log-ratios.
        beta: how strongly the policy is held to the reference, above 0.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> sigmoid(torch.tensor([0.0]), torch.tensor([0.0]))  # log 2 where policy and reference agree
        tensor([0.6931])
    """
    check_settings(beta=beta)
    return -logsigmoid(beta * (chosen_scores - rejected_scores))


def hinge(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float = 0.1) -> Tensor:
    """The hinge loss on the normalised likelihood (SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, arXiv 2309.06657).

        L = max(0, 1 - beta (s_w - s_l))

    Args:
        chosen_scores, rejected_scores: `(B,)` log-ratios.
        beta: the reciprocal of the margin, above 0.

    Raises:
        ValueError: `beta` not above 0.

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
    """Identity preference optimization, IPO (Azar et al. 2023, arXiv 2310.12036, equation 17).

        L = (s_w / |y_w| - s_l / |y_l| - 1 / (2 beta))^2

    The paper's tau is `beta`. The mean per token is not in the paper; its authors confirmed to TRL that they used it.

    Args:
        chosen_scores, rejected_scores: `(B,)` log-ratios.
        chosen_lengths, rejected_lengths: `(B,)` tokens.
        beta: the regularisation tau, above 0.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> ipo(torch.tensor([50.0]), torch.tensor([0.0]), torch.tensor([10]), torch.tensor([10]))  # (5 - 5)^2
        tensor([0.])
    """
    check_settings(beta=beta)
    delta = per_token(chosen_scores, chosen_lengths) - per_token(rejected_scores, rejected_lengths)
    return (delta - 1 / (2 * beta)) ** 2


def exo_pair(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float = 0.1, epsilon: float = 1e-3) -> Tensor:
    """Efficient exact optimization of a pair, EXO-pref (Ji et al. 2024, arXiv 2402.00856, equation 16).

        L = KL(q || [1 - epsilon, epsilon]),    q = [sigmoid(beta (s_w - s_l)), sigmoid(beta (s_l - s_w))]

    Args:
        chosen_scores, rejected_scores: `(B,)` log-ratios.
        beta: above 0.
        epsilon: label smoothing, in (0, 0.5); the paper takes 1e-3.

    Raises:
        ValueError: `beta` or `epsilon` out of range.

    Examples:
        >>> odds = torch.tensor([3.0]).log() / 0.1  # q = [0.75, 0.25]
        >>> exo_pair(odds, torch.tensor([0.0]), epsilon=0.25).abs() < 1e-6
        tensor([True])
    """
    check_settings(beta=beta, epsilon=epsilon)
    logit = beta * (chosen_scores - rejected_scores)
    chosen = logit.sigmoid() * (logsigmoid(logit) - math.log1p(-epsilon))
    return chosen + (-logit).sigmoid() * (logsigmoid(-logit) - math.log(epsilon))


def nca_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Noise contrastive alignment of a pair, NCA (Chen et al. 2024, arXiv 2402.05369).

        L = -log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l)

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        beta: above 0.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> nca_pair(torch.tensor([0.0]), torch.tensor([0.0]))  # 2 log 2
        tensor([1.3863])
    """
    check_settings(beta=beta)
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """DPO that is unbiased under flipped labels, rDPO (Chowdhury et al. 2024, arXiv 2403.00409).

        L = [-(1 - eps) log sigmoid(beta (s_w - s_l)) + eps log sigmoid(-beta (s_w - s_l))] / (1 - 2 eps)

    Args:
        chosen_scores, rejected_scores: `(B,)` log-ratios.
        beta: above 0.
        label_smoothing: eps, the share of flipped pairs, in [0, 0.5).

    Raises:
        ValueError: `beta` or `label_smoothing` out of range.

    Examples:
        >>> robust(torch.tensor([0.0]), torch.tensor([0.0]), label_smoothing=0.25)
        tensor([0.6931])
    """
    check_settings(beta=beta, label_smoothing=label_smoothing)
    logit = beta * (chosen_scores - rejected_scores)
    smoothed = (1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)
    return -smoothed / (1 - 2 * label_smoothing)


def bco_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Binary classifier optimization of a pair, BCO (Jung et al. 2024, arXiv 2404.04656).

        L = -log sigmoid(beta r_w) - log sigmoid(-beta r_l)

    Without the paper's running reward shift, as in TRL.

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        beta: above 0.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> bco_pair(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.3863])
    """
    check_settings(beta=beta)
    return -logsigmoid(beta * chosen_logratios) - logsigmoid(-beta * rejected_logratios)


def sppo_hard(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Self-play preference optimization with hard labels, SPPO (Wu et al. 2024, arXiv 2405.00675, equation 4.7).

        L = (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2

    The equation with win probability 1 for the chosen text and 0 for the rejected one.

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        beta: above 0; the paper's 1 / eta.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> sppo_hard(torch.tensor([5.0]), torch.tensor([-4.0]))
        tensor([1.])
    """
    check_settings(beta=beta)
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2


def aot(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_ref_logps: Tensor,
    rejected_ref_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Alignment via optimal transport, paired (Melnyk et al. 2024, arXiv 2406.05882).

        L_i = -(1 - eps) log sigmoid(beta d_i) - eps log sigmoid(-beta d_i)
        d = sort(log pi(y_w) - log pi(y_l)) - sort(log pi_ref(y_w) - log pi_ref(y_l))

    The sort is over the batch, so the loss of a pair depends on the pairs beside it.

    Args:
        chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps: `(B,)` summed log-probabilities.
        beta: above 0.
        label_smoothing: eps in [0, 0.5).

    Raises:
        ValueError: `beta` or `label_smoothing` out of range.

    Examples:
        >>> policy, reference = torch.tensor([0.0, 10.0]), torch.tensor([10.0, 0.0])
        >>> aot(policy, torch.zeros(2), reference, torch.zeros(2))  # the sorted gaps agree
        tensor([0.6931, 0.6931])
    """
    check_settings(beta=beta, label_smoothing=label_smoothing)
    policy, reference = chosen_logps - rejected_logps, chosen_ref_logps - rejected_ref_logps
    return _smoothed(beta * (policy.sort(0).values - reference.sort(0).values), label_smoothing)


def aot_unpaired(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """Alignment via optimal transport, unpaired (Melnyk et al. 2024, arXiv 2406.05882).

        L_i = -(1 - eps) log sigmoid(beta d_i) - eps log sigmoid(-beta d_i),    d = sort(r_w) - sort(r_l)

    The sort is over the batch, so the loss of a pair depends on the pairs beside it.

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        beta: above 0.
        label_smoothing: eps in [0, 0.5).

    Raises:
        ValueError: `beta` or `label_smoothing` out of range.

    Examples:
        >>> aot_unpaired(torch.tensor([0.0, 10.0]), torch.tensor([10.0, 0.0]))
        tensor([0.6931, 0.6931])
    """
    check_settings(beta=beta, label_smoothing=label_smoothing)
    delta = chosen_logratios.sort(0).values - rejected_logratios.sort(0).values
    return _smoothed(beta * delta, label_smoothing)


def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Anchored preference optimization, zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7).

        L = 1 - sigmoid(beta r_w) + sigmoid(beta r_l)

    Raises the chosen text and lowers the rejected one, each against the reference: for chosen texts that are better than
    what the model writes. The paper has no constant 1; TRL adds it, and gradients do not see it.

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        beta: above 0. The sum over a long text saturates: where `beta |r|` is far above 1 nothing pulls any more.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> apo_zero(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.])
    """
    check_settings(beta=beta)
    return 1 - (beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Anchored preference optimization, down (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8).

        L = sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l))

    Lowers both texts, the rejected one more: for chosen texts that are worse than what the model writes.

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        beta: above 0.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> apo_down(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.])
    """
    check_settings(beta=beta)
    return (beta * chosen_logratios).sigmoid() + 1 - (beta * (chosen_logratios - rejected_logratios)).sigmoid()


def apo_auto(chosen_logratios: Tensor, rejected_logratios: Tensor, advantage: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-zero or APO-down for each pair, by the paper's rule of thumb (arXiv 2408.06266).

        L = apo_zero where advantage > 0, apo_down elsewhere

    The paper takes APO-zero where the chosen text is better than what the model would write, APO-down where it is worse.
    The advantage says which: a judge's score of `y_w` less its score of a text that the model itself wrote for the prompt.

    Where no such scores are at hand `Pairs` puts a proxy in their place, which is ours and not the paper's: of the two
    texts of a pair, the one that the reference finds likelier per token stands for what the model writes. If that is the
    rejected one, the chosen one is better than it:

        advantage = log pi_ref(y_l) / |y_l| - log pi_ref(y_w) / |y_w|

    The reference alone decides, so a pair does not change sides in training. Where both texts were written by the model
    itself the proxy is a coin toss; say `apo_zero` there.

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        advantage: `(B,)`, any unit; only its sign counts. 0 is not an advantage.
        beta: above 0.

    Raises:
        ValueError: `beta` not above 0.

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
    """APO-zero of the mean log-ratio per token, in which long texts do not saturate.

        L = 1 - sigmoid(beta r_w / |y_w|) + sigmoid(beta r_l / |y_l|)

    The length normalisation is ours, after DPO's in Tulu 3 (arXiv 2411.15124). A mean log-ratio is small, so `beta` wants to be
    larger: Tulu 3 takes 5 for DPO.

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        chosen_lengths, rejected_lengths: `(B,)` tokens.
        beta: above 0.

    Raises:
        ValueError: `beta` not above 0.

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
    """APO-down of the mean log-ratio per token, see `apo_zero_norm`.

        L = sigmoid(beta r_w / |y_w|) + 1 - sigmoid(beta (r_w / |y_w| - r_l / |y_l|))

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        chosen_lengths, rejected_lengths: `(B,)` tokens.
        beta: above 0.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> lengths = torch.tensor([100])
        >>> apo_down_norm(torch.tensor([-20.0]), torch.tensor([-60.0]), lengths, lengths, beta=5)
        tensor([0.3881])
    """
    return apo_down(
        per_token(chosen_logratios, chosen_lengths), per_token(rejected_logratios, rejected_lengths), beta=beta
    )


def discopop(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """Discovered preference optimization, DiscoPOP (Lu et al. 2024, arXiv 2406.08414, equation 5).

        L = (1 - m) * -log sigmoid(rho) + m * exp(-rho),    rho = beta (s_w - s_l),  m = sigmoid(rho / tau)

    Args:
        chosen_scores, rejected_scores: `(B,)` log-ratios.
        beta: above 0.
        tau: temperature of the blend, above 0.

    Raises:
        ValueError: `beta` or `tau` not above 0.

    Examples:
        >>> discopop(torch.tensor([0.0]), torch.tensor([0.0]))  # (log 2 + 1) / 2
        tensor([0.8466])
    """
    check_settings(beta=beta, tau=tau)
    rho = beta * (chosen_scores - rejected_scores)
    blend = (rho / tau).sigmoid()
    return -(1 - blend) * logsigmoid(rho) + blend * (-rho).exp()


def sft(chosen_token_logps: Tensor, chosen_mask: Tensor) -> Tensor:
    """The negative log-likelihood of the chosen texts, per token of the batch.

        L = -sum_{i,t} log pi(y_w,it) / sum_i |y_w,i|

    The mean over all tokens of the batch, not of means, and so the same number for every pair.

    Args:
        chosen_token_logps: `(B, T)`.
        chosen_mask: `(B, T)`, true at the tokens of the completion.

    Examples:
        >>> sft(torch.tensor([[-1.0, -3.0], [-2.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
        tensor([2., 2.])
    """
    tokens = chosen_mask.sum().clamp(min=1)
    return (-(chosen_token_logps * chosen_mask).sum() / tokens).expand(len(chosen_mask))


def sigmoid_norm(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Length-normalised DPO, with the reference (Tulu 3, Lambert et al. 2024, arXiv 2411.15124).

        L = -log sigmoid(beta (s_w / |y_w| - s_l / |y_l|))

    Args:
        chosen_scores, rejected_scores: `(B,)` log-ratios.
        chosen_lengths, rejected_lengths: `(B,)` tokens.
        beta: above 0; Tulu 3 takes 5.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> sigmoid_norm(torch.tensor([8.0]), torch.tensor([4.0]), torch.tensor([8]), torch.tensor([4]), beta=5)
        tensor([0.6931])
    """
    return sigmoid(per_token(chosen_scores, chosen_lengths), per_token(rejected_scores, rejected_lengths), beta=beta)


def margin(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor, *, beta: float = 0.1) -> Tensor:
    """DPO that asks for a margin, pair by pair (ODPO, Amini et al. 2024, arXiv 2402.10571, with the offset as given).

        L = -log sigmoid(beta (s_w - s_l) - m)

    Args:
        chosen_scores, rejected_scores: `(B,)` log-ratios.
        margin: `(B,)` m, in units of reward, that is of `beta s`.
        beta: above 0.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> margin(torch.tensor([10.0]), torch.tensor([0.0]), torch.tensor([1.0]))
        tensor([0.6931])
    """
    check_settings(beta=beta)
    return -logsigmoid(beta * (chosen_scores - rejected_scores) - margin)


def odpo(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor, *, beta: float = 0.1, alpha: float = 1.0
) -> Tensor:
    """DPO with an offset, ODPO (Amini et al. 2024, arXiv 2402.10571).

        L = -log sigmoid(beta (s_w - s_l) - alpha log(score(y_w) - score(y_l)))

    Args:
        chosen_scores, rejected_scores: `(B,)` log-ratios.
        margin: `(B,)` the difference of the two texts' scores by a judge, above 0.
        beta: above 0.
        alpha: weight of the offset, at least 0; 0 is DPO.

    Raises:
        ValueError: `beta` or `alpha` out of range, a margin that is not above 0.

    Examples:
        >>> odpo(torch.tensor([10.0]), torch.tensor([0.0]), torch.tensor([1.0]).exp())
        tensor([0.6931])
    """
    check_settings(beta=beta, alpha=alpha)
    if not (margin > 0).all():
        raise ValueError(f"odpo takes the logarithm of the margin, which must be above 0, not {margin.min().item():g}")
    return -logsigmoid(beta * (chosen_scores - rejected_scores) - alpha * margin.log())


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
    """Contrastive preference optimization, CPO (Xu et al. 2024, arXiv 2401.08417, equation 3). No reference model.

        L = -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d) + alpha NLL(y_w),    d = log pi(y_w) - log pi(y_l)

    `NLL` is `sft`: the paper writes -log pi(y_w), its code takes the mean over the tokens of the batch, and so do we.

    Args:
        chosen_logps, rejected_logps: `(B,)` summed log-probabilities.
        chosen_token_logps, chosen_mask: `(B, T)`, see `sft`.
        beta: above 0.
        alpha: weight of the likelihood of the chosen texts, at least 0.
        label_smoothing: eps in [0, 0.5); not in the paper.

    Raises:
        ValueError: a setting out of range.

    Examples:
        >>> cpo(torch.tensor([-2.0]), torch.tensor([-2.0]), torch.tensor([[-2.0]]), torch.tensor([[True]]))
        tensor([2.6931])
    """
    check_settings(beta=beta, alpha=alpha, label_smoothing=label_smoothing)
    preference = _smoothed(beta * (chosen_logps - rejected_logps), label_smoothing)
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
    """Simple preference optimization, SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6). No reference model.

        L = -(1 - eps) log sigmoid(d) - eps log sigmoid(-d),    d = beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma

    Args:
        chosen_logps, rejected_logps: `(B,)` summed log-probabilities.
        chosen_lengths, rejected_lengths: `(B,)` tokens.
        beta: above 0; 2.0 to 2.5 in the paper.
        gamma: the reward margin, at least 0; 0.3 to 1.6 in the paper.
        label_smoothing: eps in [0, 0.5).

    Raises:
        ValueError: a setting out of range.

    Examples:
        >>> simpo(torch.tensor([-10.0]), torch.tensor([-20.0]), torch.tensor([10]), torch.tensor([10]), gamma=2)
        tensor([0.6931])
    """
    check_settings(beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    delta = per_token(chosen_logps, chosen_lengths) - per_token(rejected_logps, rejected_lengths)
    return _smoothed(beta * delta - gamma, label_smoothing)


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
    """SimPO with CPO's likelihood of the chosen texts (CPO-SimPO, as in the code of fe1ixxu/CPO_SIMPO and in TRL).

        L = simpo + alpha NLL(y_w)

    Args:
        chosen_logps, rejected_logps: `(B,)` summed log-probabilities.
        chosen_lengths, rejected_lengths: `(B,)` tokens.
        chosen_token_logps, chosen_mask: `(B, T)`, see `sft`.
        beta, gamma, label_smoothing: see `simpo`.
        alpha: at least 0.

    Raises:
        ValueError: a setting out of range.

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
    """Adaptive-rejection preference optimization, ARPO (X-ALMA, Xu et al. 2024, arXiv 2410.03115). No reference model.

        L = -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d) + alpha NLL(y_w),    d = log pi(y_w) - tau log pi(y_l)
        tau = min(scale * exp(eta |log pi(y_w) / |y_w| - log pi(y_l) / |y_l||) - 1, 1)

    A rejected text that is nearly as likely as the chosen one is hardly rejected. `scale` and the mean per token are of the
    official code (fe1ixxu/ALMA, utils/cpo_trainer.py), and so is the gradient through tau. With its scale 0.9 tau is -0.1 for
    equally likely texts: these are pulled up a little.

    Args:
        chosen_logps, rejected_logps: `(B,)` summed log-probabilities.
        chosen_lengths, rejected_lengths: `(B,)` tokens.
        chosen_token_logps, chosen_mask: `(B, T)`, see `sft`.
        beta: above 0.
        alpha: weight of the likelihood of the chosen texts, at least 0.
        eta: how fast tau grows with the gap, at least 0.
        scale: above 0.
        label_smoothing: eps in [0, 0.5).

    Raises:
        ValueError: a setting out of range.

    Examples:
        >>> logps, one, text = torch.tensor([-10.0]), torch.tensor([1]), torch.tensor([[-10.0]])
        >>> arpo(logps, logps, one, one, text, torch.tensor([[True]]), alpha=0)  # -log sigmoid(0.1 (-10 + 0.1 * -10))
        tensor([1.3873])
    """
    check_settings(beta=beta, alpha=alpha, eta=eta, scale=scale, label_smoothing=label_smoothing)
    gap = (per_token(chosen_logps, chosen_lengths) - per_token(rejected_logps, rejected_lengths)).abs()
    tau = (scale * (eta * gap).exp() - 1).clamp(max=1)
    preference = _smoothed(beta * (chosen_logps - tau * rejected_logps), label_smoothing)
    return preference + alpha * sft(chosen_token_logps, chosen_mask)


def tdpo1(
    chosen_logratios: Tensor, rejected_logratios: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, *, beta: float = 0.1
) -> Tensor:
    """Token-level DPO, the first objective, TDPO1 (Zeng et al. 2024, arXiv 2404.11999).

        L = -log sigmoid(beta (r_w - r_l - (KL_l - KL_w))),    KL = sum_t KL(pi_ref(. | y_<t) || pi(. | y_<t))

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        chosen_kl, rejected_kl: `(B,)` the forward KL over the whole vocabulary, summed over the completion, at least 0.
        beta: above 0.

    Raises:
        ValueError: `beta` not above 0.

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
    """Token-level DPO, the second objective, TDPO2 (Zeng et al. 2024, arXiv 2404.11999).

        L = -log sigmoid(beta (r_w - r_l - alpha (KL_l - sg[KL_w])))

    `sg` stops the gradient, so that the divergence on the chosen text is not driven up.

    Args:
        chosen_logratios, rejected_logratios: `(B,)`.
        chosen_kl, rejected_kl: `(B,)`, see `tdpo1`.
        beta: above 0.
        alpha: weight of the divergence, at least 0; 0 is DPO.

    Raises:
        ValueError: `beta` or `alpha` out of range.

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
    """Sparse token-level preference optimization, SparsePO (Christopoulou et al. 2024, arXiv 2410.05102).

        L = -log sigmoid(beta (u - delta)) + lambda_u (|m_u(y_w)|_1 + |m_u(y_l)|_1) + lambda_d (|m_d(y_w)|_1 + |m_d(y_l)|_1)
        u     = sum_t m_u(y_w)_t r(y_w)_t - sum_t m_u(y_l)_t r(y_l)_t
        delta = sum_t m_d(y_l)_t KL(y_l)_t - sum_t m_d(y_w)_t KL(y_w)_t,    KL_t = KL(pi_ref || pi) at token t

    Masks of ones and lambdas of 0 give `tdpo1`. Where `m_u` and `m_d` are one and the same tensor (a common mask) both
    lambdas count half, as in the official code.

    Args:
        chosen_token_logratios, rejected_token_logratios: `(B, T)` log-ratios of the tokens.
        chosen_token_kl, rejected_token_kl: `(B, T)` forward KL at the tokens.
        chosen_reward_mask, rejected_reward_mask: `(B, T)` m_u, at least 0, and 0 outside the completion.
        chosen_kl_mask, rejected_kl_mask: `(B, T)` m_d, likewise.
        beta: above 0. It acts on masked sums: what suits a mask whose mean is 0.1 is ten times what suits ones.
        lambda_u, lambda_d: weights of the L1 norms, at least 0; the paper's 1e-3 for dialogue.

    Raises:
        ValueError: a setting out of range.

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


def svco(
    chosen_logratios: Tensor,
    chosen_blind_logratios: Tensor,
    chosen_swapped_logratios: Tensor,
    rejected_logratios: Tensor,
    rejected_blind_logratios: Tensor,
    rejected_swapped_logratios: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Symmetrical visual contrastive optimization, S-VCO (Wu et al. 2025, arXiv 2502.13928).

        L = sum over y in (y_w, y_l) of  -log sigmoid(beta (r(y | its image) - r(y | no image)))
                                         -log sigmoid(beta (r(y | no image) - r(y | the other image)))

    Both texts are true of one image of the pair and false of the other: each is preferred under its own.

    Args:
        chosen_logratios, rejected_logratios: `(B,)` of each text under its own image.
        chosen_blind_logratios, rejected_blind_logratios: `(B,)` without an image.
        chosen_swapped_logratios, rejected_swapped_logratios: `(B,)` under the other text's image.
        beta: of all four terms, above 0.

    Raises:
        ValueError: `beta` not above 0.

    Examples:
        >>> svco(*torch.zeros(6, 1))  # 4 log 2
        tensor([2.7726])
    """
    check_settings(beta=beta)
    chosen = logsigmoid(beta * (chosen_logratios - chosen_blind_logratios))
    chosen = chosen + logsigmoid(beta * (chosen_blind_logratios - chosen_swapped_logratios))
    rejected = logsigmoid(beta * (rejected_logratios - rejected_blind_logratios))
    rejected = rejected + logsigmoid(beta * (rejected_blind_logratios - rejected_swapped_logratios))
    return -(chosen + rejected)


def f_divergence_scores(logratios: Tensor, *, divergence: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """The scores of f-DPO: f'(pi / pi_ref) up to a constant (Wang et al. 2023, arXiv 2309.16240, table 1).

        reverse_kl: r    forward_kl: 1 - exp(-r)    js_divergence: log 2 + log sigmoid(r)
        alpha_divergence: (exp((alpha - 1) r) - 1) / (alpha - 1), which is r where alpha = 1

    The names and constants are TRL's. The exponent is held below the largest that the dtype can represent.

    Args:
        logratios: any shape.
        divergence: one of the four.
        alpha: of the alpha-divergence alone.

    Raises:
        ValueError: no such divergence.

    Examples:
        >>> f_divergence_scores(torch.tensor([0.0, 1.0]), divergence="forward_kl")
        tensor([0.0000, 0.6321])
    """
    if divergence not in F_DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(F_DIVERGENCES)}, not {divergence!r}")
    if divergence == "forward_kl":
        return 1 - (-logratios).exp()
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(logratios)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        wide = logratios.float() if logratios.dtype in _LARGEST_EXPONENT else logratios
        exponent = ((alpha - 1) * wide).clamp(max=_LARGEST_EXPONENT.get(logratios.dtype, 700.0))
        return (exponent.exp() - 1).to(logratios.dtype) / (alpha - 1)
    return logratios


F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_LARGEST_EXPONENT = {torch.float16: 11.0, torch.bfloat16: 80.0, torch.float32: 80.0}


def length_desensitized(token_logps: Tensor, mask: Tensor, shared_lengths: Tensor, *, alpha: float) -> Tensor:
    """Sums of log-probabilities in which what the longer text has more counts less, LD-DPO (arXiv 2409.06411).

        sum_{t <= n} log pi(y_t) + alpha sum_{t > n} log pi(y_t),    n = min(|y_w|, |y_l|)

    Args:
        token_logps: `(B, T)`.
        mask: `(B, T)`, true at the tokens of the completion.
        shared_lengths: `(B,)` n.
        alpha: in [0, 1]; 1 is the plain sum, 0 cuts the longer text to the shorter one.

    Returns:
        `(B,)`.

    Raises:
        ValueError: `alpha` outside [0, 1].

    Examples:
        >>> length_desensitized(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]]), torch.tensor([1]), alpha=0.5)
        tensor([-2.])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"ld_alpha must lie in [0, 1] (the weight of the longer text's tail), not {alpha}")
    tail = mask.long().cumsum(-1) > shared_lengths[:, None]
    return (token_logps * mask * torch.where(tail, alpha, 1.0)).sum(-1)


@torch.no_grad()
def wpo_weights(token_logps: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """How much a text looks like the policy's own, WPO (Zhou et al. 2024, arXiv 2406.11827, equation 2).

        w(y) = exp(1 / |y| sum_t (log pi(y_t) - log sum_v pi(v)^2))

    The weight of a pair is the product of its two texts'. No gradient.

    Args:
        token_logps: `(B, T)`.
        log_sum_sq_probs: `(B, T)` the logarithm of the sum of squared probabilities at each position.
        mask: `(B, T)`, true at the tokens of the completion.

    Returns:
        `(B,)`.

    Examples:
        >>> p = torch.tensor([[0.5, 0.5]])
        >>> wpo_weights(p.log(), p.log(), torch.tensor([[True, True]]))  # p = sum_v p(v)^2
        tensor([1.])
    """
    aligned = torch.where(mask.bool(), token_logps - log_sum_sq_probs, 0.0)
    return (aligned.sum(-1) / mask.sum(-1).clamp(min=1)).exp()


def per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    """Per token; an empty text counts as one token, as in TRL."""
    return sums / lengths.clamp(min=1)


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """The logistic loss under label smoothing."""
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


class _Range(NamedTuple):
    holds: Callable[[float], bool]
    words: str


_POSITIVE = _Range(lambda x: 0 < x < math.inf, "be a finite number above 0")
_WEIGHT = _Range(lambda x: 0 <= x < math.inf, "be a finite number of at least 0")
_RANGES = {
    "beta": _POSITIVE,
    "tau": _POSITIVE,
    "scale": _POSITIVE,
    "epsilon": _Range(lambda x: 0 < x < 0.5, "lie in (0, 0.5), such as EXO's 1e-3"),
    "label_smoothing": _Range(lambda x: 0 <= x < 0.5, "lie in [0, 0.5)"),
    "alpha": _WEIGHT,
    "gamma": _WEIGHT,
    "eta": _WEIGHT,
    "lambda_u": _WEIGHT,
    "lambda_d": _WEIGHT,
}


def check_settings(**settings: float) -> None:
    """Raise ValueError unless every setting, by its letter, lies in its range."""
    for letter, value in settings.items():
        check_setting(letter, letter, value)


def check_setting(option: str, letter: str, value: float) -> None:
    """Raise ValueError unless a setting, an option of that name, lies in its letter's range."""
    if not _RANGES[letter].holds(value):
        raise ValueError(f"{option} must {_RANGES[letter].words}, not {value}")
