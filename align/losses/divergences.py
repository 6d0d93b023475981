"""Divergences between the next-token distributions of two models, from logits.

`p` is the teacher (or the reference), `q` the student (or the policy). The teacher gets no gradient. All values are in nats, in float32
(float64 for float64 inputs), and logits must be finite. `contralto.align.losses.chunked` computes the same divergences from hidden states,
without keeping logits.
"""

from torch import Tensor

from contralto.align.losses.chunked import logits_divergence
from contralto.align.losses.formulas import SkewGradient, divergence_term

__all__ = ["forward_kl", "jensen_shannon", "reverse_kl", "skew_kl", "skew_reverse_kl", "total_variation"]


def forward_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the forward Kullback-Leibler divergence, KL(p || q) = sum_v p(v) (log p(v) - log q(v)).

    It is the divergence of knowledge distillation (Hinton et al. 2015, arXiv 1503.02531), and, with the reference for a teacher, of TDPO
    and SparsePO.

    Args:
        student: `(..., V)` logits, which get a gradient.
        teacher: `(..., V')` logits, which get none. For `V' != V` see `chunked.common_vocabulary`.
        temperature: both logits are divided by it.

    Returns:
        `(...)`, in nats.

    Raises:
        ValueError: the shapes differ, or the temperature is not above 0.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> forward_kl(q.log(), p.log())  # log 2 / 2 + log(2/3) / 2
        tensor(0.1438)
    """
    return logits_divergence(divergence_term("forward_kl"), student, teacher, temperature)


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the reverse Kullback-Leibler divergence, KL(q || p) = sum_v q(v) (log q(v) - log p(v)).

    It is the divergence of MiniLLM (Gu et al. 2024, arXiv 2306.08543), here per token.

    Args:
        student: see `forward_kl`.
        teacher: see `forward_kl`.
        temperature: see `forward_kl`.

    Returns:
        `(...)`, in nats.

    Raises:
        ValueError: the shapes differ, or the temperature is not above 0.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> reverse_kl(q.log(), p.log())
        tensor(0.1308)
    """
    return logits_divergence(divergence_term("reverse_kl"), student, teacher, temperature)


def jensen_shannon(student: Tensor, teacher: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, arXiv 2306.13649).

        D = beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

    Args:
        student: see `forward_kl`.
        teacher: see `forward_kl`.
        beta: in [0, 1]. At both ends the formula is 0; there, as in TRL, 0 stands for the forward KL and 1 for the reverse one, the
            limits of D / beta and of D / (1 - beta).
        temperature: see `forward_kl`.

    Returns:
        `(...)`, in nats.

    Raises:
        ValueError: `beta` lies outside [0, 1], the shapes differ, or the temperature is not above 0.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> jensen_shannon(q.log(), p.log()), jensen_shannon(p.log(), q.log())  # symmetric at 1/2
        (tensor(0.0338), tensor(0.0338))
    """
    return logits_divergence(divergence_term("jsd", beta=beta), student, teacher, temperature)


def total_variation(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the total variation distance, 1/2 sum_v |p(v) - q(v)| (f-distill, Wen et al. 2023, arXiv 2307.15190).

    Where both models give a token the same probability, its subgradient is 0.

    Args:
        student: see `forward_kl`.
        teacher: see `forward_kl`.
        temperature: see `forward_kl`.

    Returns:
        `(...)`, in [0, 1].

    Raises:
        ValueError: the shapes differ, or the temperature is not above 0.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> total_variation(q.log(), p.log())
        tensor(0.2500)
    """
    return logits_divergence(divergence_term("tvd"), student, teacher, temperature)


def skew_kl(student: Tensor, teacher: Tensor, *, alpha: float | Tensor = 0.1, temperature: float = 1.0) -> Tensor:
    """Compute the skew KL divergence of DistiLLM, SKL (Ko et al. 2024, arXiv 2402.03898; DistiLLM-2, arXiv 2503.07067).

        D = KL(p || alpha p + (1 - alpha) q)

    Args:
        student: see `forward_kl`.
        teacher: see `forward_kl`.
        alpha: in [0, 1); 0 is the forward KL. A number, or one per token, of the shape of the result.
        temperature: see `forward_kl`.

    Returns:
        `(...)`, in nats.

    Raises:
        ValueError: `alpha` lies outside [0, 1), the shapes differ, or the temperature is not above 0.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> skew_kl(q.log(), p.log())  # the mixture is [0.275, 0.725]
        tensor(0.1131)
    """
    return logits_divergence(divergence_term("skew_kl", student.shape[:-1], alpha=alpha), student, teacher, temperature)


def skew_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float | Tensor = 0.1,
    gradient: SkewGradient = "full",
    temperature: float = 1.0,
) -> Tensor:
    """Compute the skew reverse KL divergence, SRKL (Ko et al. 2024, arXiv 2402.03898; DistiLLM-2, arXiv 2503.07067).

        D = KL(q || (1 - alpha) p + alpha q)

    The official code of DistiLLM-2 detaches the q in the mixture. Its gradient is then that of the Jensen-Shannon divergence with
    beta 1 - alpha, divided by alpha, and not that of D.

    Args:
        student: see `forward_kl`.
        teacher: see `forward_kl`.
        alpha: in [0, 1); 0 is the reverse KL. A number, or one per token, of the shape of the result.
        gradient: "full" for the gradient of the formula, "detached" for that of the official code. The values are the same.
        temperature: see `forward_kl`.

    Returns:
        `(...)`, in nats.

    Raises:
        ValueError: `alpha` lies outside [0, 1), `gradient` is unknown, the shapes differ, or the temperature is not above 0.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> skew_reverse_kl(q.log(), p.log())  # the mixture is [0.475, 0.525]
        tensor(0.1070)
    """
    term = divergence_term("skew_reverse_kl", student.shape[:-1], alpha=alpha, gradient=gradient)
    return logits_divergence(term, student, teacher, temperature)
