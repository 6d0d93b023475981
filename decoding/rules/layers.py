"""Define the rules of DoLa, which contrast the last layer of a model with an earlier one."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from contralto.decoding.rules.base import check_threshold, combine

__all__ = ["dola", "dola_jsd"]


def dola(final: Tensor, layers: Tensor, *, relative_top: float = 0.1) -> Tensor:
    """Score tokens by DoLa: the last layer against the earlier layer that differs most from it (Chuang et al. 2024).

        A_j = (p_final + p_j) / 2,    M = argmax_j [KL(A_j || p_final) + KL(A_j || p_j)] / 2
        scores(v) = log p_final(v) - log p_M(v)    if v is plausible, else -inf

    arXiv 2309.03883. The divergence is the one that the official code ranks layers by. The paper's equation 4 has the Jensen-Shannon
    divergence, whose terms are `KL(p || A_j)`, see `dola_jsd`; the two often choose different layers. It is computed over
    the tokens that are possible in `final`. Every row chooses its own layer: the official code averages the divergence over
    the batch and masks only its first row, so that a completion would depend on the other rows.

    Args:
        final: `(..., V)` logits of the last layer.
        layers: `(..., L, V)` logits of the candidate layers, from the same head.
        relative_top: plausibility threshold in [0, 1] on `final`, see `plausible`.

    Raises:
        ValueError: no candidate layer, `relative_top` outside [0, 1], different shapes.

    Examples:
        >>> final = torch.tensor([[0.6, 0.4]]).log()
        >>> layers = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]).log()
        >>> dola(final, layers).exp()  # the second layer: 0.6 / 0.9, 0.4 / 0.1
        tensor([[0.6667, 4.0000]])
    """
    return _dola(final, layers, relative_top, lambda p, log_p, a, log_a: _kl(a, log_a, log_p))


def dola_jsd(final: Tensor, layers: Tensor, *, relative_top: float = 0.1) -> Tensor:
    """Score tokens by DoLa with the paper's choice of the layer (Chuang et al. 2024, arXiv 2309.03883, equations 3 to 6).

        M = argmax_j JSD(p_final || p_j),    scores(v) = log p_final(v) - log p_M(v)    if v is plausible, else -inf

    See `dola`, which chooses as the official code does.

    Args:
        final: `(..., V)` logits of the last layer.
        layers: `(..., L, V)` logits of the candidate layers, from the same head.
        relative_top: plausibility threshold in [0, 1] on `final`, see `plausible`.

    Raises:
        ValueError: no candidate layer, `relative_top` outside [0, 1], different shapes.

    Examples:
        The two choose different layers here.

        >>> final = torch.tensor([[0.6, 0.3, 0.1]]).log()
        >>> layers = torch.tensor([[[0.2, 0.4, 0.4], [0.3, 0.2, 0.5]]]).log()
        >>> dola_jsd(final, layers).exp(), dola(final, layers).exp()
        (tensor([[3.0000, 0.7500, 0.2500]]), tensor([[2.0000, 1.5000, 0.2000]]))
    """
    return _dola(final, layers, relative_top, lambda p, log_p, a, log_a: _kl(p, log_p, log_a))


def _dola(final: Tensor, layers: Tensor, relative_top: float, distance: Callable[..., Tensor]) -> Tensor:
    """Score tokens by DoLa.

    `distance(p, log_p, a, log_a)` is that of a distribution `p` from the average `a` of two distributions.
    """
    check_threshold("relative_top", relative_top)
    if layers.ndim != final.ndim + 1 or not layers.shape[-2]:
        raise ValueError(f"dola needs layers of shape (..., L, V) with L >= 1, not {tuple(layers.shape)}")
    main = final.unsqueeze(-2)  # (..., 1, V) beside layers (..., L, V)
    log_p, log_q = main.log_softmax(-1), layers.masked_fill(main == -math.inf, -math.inf).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    average = (p + q) / 2
    log_average = average.log()
    divergence = distance(p, log_p, average, log_average) + distance(q, log_q, average, log_average)
    chosen = divergence.argmax(-1)[..., None, None].expand(*layers.shape[:-2], 1, layers.shape[-1])  # (..., 1, V)
    return combine((final, layers.gather(-2, chosen).squeeze(-2)), (1, -1), alpha=relative_top)


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return sum p (log p - log q), where 0 log 0 = 0."""
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
