"""The divergences over the vocabulary and their gradients, for the distributions of some tokens.

Notation, per token: `p` is the teacher (or the reference), `q` the student (or the policy), both softmaxes over the vocabulary,
z the student's logits. Every divergence D here has a gradient of the form

    dD / dz_j = w_j - q_j sum_v w_v,    w_j = q_j dD / dq_j

so a divergence is two lines: its value and its w. The teacher gets no gradient. All values are in nats.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from contralto.common.suggestions import did_you_mean

__all__ = [
    "DIVERGENCES",
    "STATISTICS",
    "Distributions",
    "SkewGradient",
    "TokenTerm",
    "divergence_term",
    "log_softmax",
    "statistic",
    "target_term",
]

SkewGradient = Literal["full", "detached"]


class Distributions(NamedTuple):
    """The distributions of n tokens, `(n, V)` each. Formulas must not change them in place."""

    log_q: Tensor
    q: Tensor
    log_p: Tensor
    p: Tensor


def log_softmax(z: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Write log softmax and softmax of logits to the given memory, and return both.

    Args:
        z: `(n, V)` logits.
        log_q: `(n, V)` memory for the log softmax.
        q: `(n, V)` memory for the softmax.
    """
    torch.sub(z, z.amax(-1, keepdim=True), out=log_q)
    total = torch.exp(log_q, out=q).sum(-1, keepdim=True)
    return log_q.sub_(total.log()), q.div_(total)


class TokenTerm(NamedTuple):
    """A term of the loss that is computed at every token: a divergence, or the log-probability of a target."""

    function: Callable[..., tuple[Tensor, Tensor]]
    """Maps `Distributions`, their part of `per_token` `(n, 1)` and the constants to the values `(n,)` and w `(n, V)`."""
    per_token: Tensor | None = None
    """`(N,)` alpha, or the targets."""
    constants: tuple[Any, ...] = ()


def _forward_kl(tokens: Distributions) -> tuple[Tensor, Tensor]:
    """Compute sum p (log p - log q); w = -p."""
    return (tokens.log_p - tokens.log_q).mul_(tokens.p).sum(-1), -tokens.p


def _reverse_kl(tokens: Distributions) -> tuple[Tensor, Tensor]:
    """Compute sum q (log q - log p); w = q (log q - log p)."""
    w = (tokens.log_q - tokens.log_p).mul_(tokens.q)
    return w.sum(-1), w


def _jensen_shannon(tokens: Distributions, beta: float) -> tuple[Tensor, Tensor]:
    """Compute beta sum p (log p - log m) + (1 - beta) sum q (log q - log m), m = beta p + (1 - beta) q; w = (1 - beta) q log(q / m)."""
    log_m = _positive_(torch.lerp(tokens.q, tokens.p, beta)).log_()
    teacher = (tokens.log_p - log_m).mul_(tokens.p).sum(-1)
    w = torch.sub(tokens.log_q, log_m, out=log_m).mul_(tokens.q).mul_(1 - beta)
    return beta * teacher + w.sum(-1), w


def _total_variation(tokens: Distributions) -> tuple[Tensor, Tensor]:
    """Compute 1/2 sum |p - q|; w = 1/2 q sign(q - p)."""
    difference = tokens.q - tokens.p
    return difference.abs().sum(-1) / 2, difference.sign_().mul_(tokens.q).div_(2)


def _skew_kl(tokens: Distributions, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sum p (log p - log m), m = alpha p + (1 - alpha) q; w = -(1 - alpha) q p / m."""
    m = _positive_(torch.lerp(tokens.q, tokens.p, alpha))
    w = torch.div(tokens.p, m).mul_(tokens.q).mul_(alpha - 1)
    return torch.sub(tokens.log_p, m.log_(), out=m).mul_(tokens.p).sum(-1), w


def _skew_reverse_kl(tokens: Distributions, alpha: Tensor, gradient: SkewGradient) -> tuple[Tensor, Tensor]:
    """Compute sum q (log q - log m), m = (1 - alpha) p + alpha q; w = q (log q - log m - alpha q / m), or without the last term."""
    m = _positive_(torch.lerp(tokens.p, tokens.q, alpha))
    share = None if gradient == "detached" else torch.div(tokens.q, m).mul_(tokens.q).mul_(alpha)
    w = torch.sub(tokens.log_q, m.log_(), out=m).mul_(tokens.q)
    return w.sum(-1), w if share is None else w.sub_(share)


def _positive_(mixture: Tensor) -> Tensor:
    """Clamp a mixture of probabilities to the smallest normal number, in place.

    Where both probabilities underflow their mixture is 0, and 0 times its logarithm would be NaN.
    """
    return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny)


def _target(tokens: Distributions, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log q(target); w = 1 at the target."""
    return tokens.log_q.gather(-1, targets).squeeze(-1), torch.zeros_like(tokens.q).scatter_(-1, targets, 1.0)


DIVERGENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jensen_shannon,
    "tvd": _total_variation,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}
"""The divergences by name: each maps the distributions of some tokens to values and w."""


def target_term(targets: Tensor) -> TokenTerm:
    """Return the term of the targets' log-probabilities.

    Args:
        targets: `(N,)` int64 ids.
    """
    return TokenTerm(_target, targets)


def divergence_term(
    divergence: str,
    shape: tuple[int, ...] = (),
    *,
    alpha: float | Tensor = 0.1,
    beta: float = 0.5,
    gradient: SkewGradient = "full",
) -> TokenTerm:
    """Return the sum over the vocabulary that makes a divergence, for every token, with its parameters.

    Args:
        divergence: a key of `DIVERGENCES`.
        shape: the shape of the tokens; only the skewed divergences read it.
        alpha: the skew of `skew_kl` and `skew_reverse_kl`, in [0, 1); a number or of the shape of the tokens.
        beta: the teacher's share of the mixture of `jsd`, in [0, 1].
        gradient: the gradient of `skew_reverse_kl`, "full" or "detached".

    Raises:
        ValueError: the divergence is unknown, or a parameter is out of range.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"there is no divergence {divergence!r}{did_you_mean(divergence, DIVERGENCES)}; there are {', '.join(DIVERGENCES)}"
        )
    function = DIVERGENCES[divergence]
    if function is _jensen_shannon:
        return _jensen_shannon_term(beta)
    if function not in (_skew_kl, _skew_reverse_kl):
        return TokenTerm(function)
    skew = torch.as_tensor(alpha, dtype=torch.float64)
    if skew.shape not in ((), shape):
        raise ValueError(f"alpha must be a number or of the shape {tuple(shape)}, not {tuple(skew.shape)}")
    if not ((skew >= 0) & (skew < 1)).all():
        raise ValueError(f"alpha must lie in [0, 1) (the share that skews the mixture), not {alpha}")
    if gradient not in ("full", "detached"):
        raise ValueError(f'the gradient of the skew reverse KL must be "full" or "detached", not {gradient!r}')
    if not skew.any():  # exact where q or p alone is too small for the dtype
        return TokenTerm(_forward_kl if function is _skew_kl else _reverse_kl)
    return TokenTerm(function, skew.expand(shape).reshape(-1), (gradient,) if function is _skew_reverse_kl else ())


def _jensen_shannon_term(beta: float) -> TokenTerm:
    """Return the term of the generalised Jensen-Shannon divergence; at both ends that of its limit, a KL divergence."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1] (the teacher's share of the mixture), not {beta}")
    ends: dict[float, Callable[..., tuple[Tensor, Tensor]]] = {0: _forward_kl, 1: _reverse_kl}
    return TokenTerm(ends[beta]) if beta in ends else TokenTerm(_jensen_shannon, None, (beta,))


_STATISTICS: dict[str, Callable[[Tensor, Distributions, Tensor], Tensor]] = {
    "entropy": lambda z, tokens, targets: -torch.linalg.vecdot(tokens.q, tokens.log_q),
    "log_sum_sq_probs": lambda z, tokens, targets: (2 * tokens.log_q).logsumexp(-1),
    "mean_logits": lambda z, tokens, targets: z.mean(-1),
    "is_top1": lambda z, tokens, targets: z.max(-1).indices == targets.squeeze(-1),  # on a CPU faster than argmax
}
STATISTICS = tuple(_STATISTICS)
"""Names of the numbers per token that have no gradient."""


def statistic(name: str, logits: Tensor, tokens: Distributions, targets: Tensor) -> Tensor:
    """Return a number per token that has no gradient.

    Args:
        name: one of `STATISTICS`.
        logits: `(n, V)` the student's logits.
        tokens: their distributions.
        targets: `(n, 1)` ids.

    Returns:
        `(n,)`.
    """
    return _STATISTICS[name](logits, tokens, targets)
