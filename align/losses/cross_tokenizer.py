"""Divergences between the next-token distributions of models with different vocabularies, from logits and from hidden states.

`p` is the teacher, over W tokens, `q` the student, over V. The teacher gets no gradient. All values are in float32 (float64 for float64
inputs), and logits must be finite. Where several tokens of one model stand for the text of a span, their probabilities are merged: the
distribution at one of them times the probabilities of the others. Such merged probabilities, `exp(log_scale) q`, do not sum to 1.

`chunked_comparison` computes the same from hidden states, without keeping logits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contralto.align.losses.sweep import Head
from contralto.align.losses.workspace import precision_of
from contralto.common.ranges import check_positive

__all__ = [
    "Comparison",
    "MatchedTokens",
    "SpanDistributions",
    "chunked_comparison",
    "gold",
    "hybrid",
    "sorted_distance",
    "universal_logit_distance",
]

_CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**27}
"""The largest size of the logits of a chunk, of which sorting and its gradient keep about ten copies."""

Comparison = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A function of log-probabilities of student `(n, V)` and teacher `(n, W)` and their log-scales `(n,)`, which returns `(n,)`."""


class MatchedTokens(NamedTuple):
    """The tokens that both vocabularies have."""

    student: Tensor
    """`(K,)` int64 ids of the student."""
    teacher: Tensor
    """`(K,)` int64 ids of the teacher, in the same order."""


def universal_logit_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    student_log_scale: float | Tensor = 0.0,
    teacher_log_scale: float | Tensor = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Compute the distance of universal logit distillation, ULD (Boizard et al. 2024, arXiv 2402.12030, equation 5).

        D = sum_i |p_(i) - q_(i)|,    p_(1) >= p_(2) >= ..., and 0 beyond the smaller vocabulary

    It is the Wasserstein distance of the two distributions if any two tokens are equally far apart: which tokens they are does not count.

    Args:
        student: `(..., V)` logits, which get a gradient.
        teacher: `(..., W)` logits, which get none.
        student_log_scale: the logarithm by which the student's probabilities are scaled; a number or `(...)`.
        teacher_log_scale: the same of the teacher.
        temperature: both logits are divided by it.

    Returns:
        `(...)`, in [0, 2].

    Raises:
        ValueError: the shapes differ, or the temperature is not above 0.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.6])
        >>> universal_logit_distance(q.log(), p.log())  # |0.5 - 0.6| + |0.3 - 0.4| + |0.2 - 0|
        tensor(0.4000)
    """
    scales = student_log_scale, teacher_log_scale
    return _from_logits(sorted_distance, student, teacher, scales, temperature)


def gold(
    student: Tensor,
    teacher: Tensor,
    matched: MatchedTokens,
    *,
    student_log_scale: float | Tensor = 0.0,
    teacher_log_scale: float | Tensor = 0.0,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Compute the hybrid loss of GOLD (Patiño et al. 2025), which extends ULD (Boizard et al. 2024, arXiv 2402.12030).

        D = w_m JSD_beta(p_M, q_M) + w_u sum_i |p_(i) - q_(i)|    (M: the tokens of both vocabularies; i: the others, sorted)

    JSD is the generalised Jensen-Shannon divergence, see `contralto.align.losses.divergences.jensen_shannon`. p_M and q_M do not sum to 1.
    At beta 0 and 1 it is the generalised Kullback-Leibler divergence, `sum p log(p / q) - p + q`, which is never negative.

    Args:
        student: `(..., V)` logits, which get a gradient.
        teacher: `(..., W)` logits, which get none.
        matched: the tokens of both vocabularies.
        student_log_scale: the logarithm by which the student's probabilities are scaled; a number or `(...)`.
        teacher_log_scale: the same of the teacher.
        beta: the teacher's share of the mixture, in [0, 1]; at both ends see `jensen_shannon`.
        matched_weight: w_m; None takes the share of the teacher's tokens that are matched.
        unmatched_weight: w_u; None takes the rest.
        temperature: both logits are divided by it.

    Returns:
        `(...)`, in nats.

    Raises:
        ValueError: `beta` lies outside [0, 1], one weight is given without the other, the shapes differ, or the temperature is not
            above 0.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> gold(q.log(), p.log(), MatchedTokens(torch.tensor([0, 1]), torch.tensor([0, 1])))  # as jensen_shannon
        tensor(0.0338)
        >>> gold(q.log(), p.log(), MatchedTokens(torch.tensor([0]), torch.tensor([1])))  # 0.0212 / 2 + |0.5 - 0.75| / 2
        tensor(0.1356)
    """
    compare = hybrid(matched, beta=beta, matched_weight=matched_weight, unmatched_weight=unmatched_weight)
    return _from_logits(compare, student, teacher, (student_log_scale, teacher_log_scale), temperature)


def hybrid(
    matched: MatchedTokens, *, beta: float, matched_weight: float | None, unmatched_weight: float | None
) -> Comparison:
    """Return the comparison that `gold` makes.

    Args:
        matched: see `gold`.
        beta: see `gold`.
        matched_weight: see `gold`.
        unmatched_weight: see `gold`.

    Raises:
        ValueError: see `gold`.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1] (the teacher's share of the mixture), not {beta}")
    if (matched_weight is None) != (unmatched_weight is None):
        raise ValueError("matched_weight and unmatched_weight belong together: set both, or neither")

    def compare(log_q: Tensor, log_p: Tensor, log_c: Tensor, log_d: Tensor) -> Tensor:
        """Return the weighted sum of both parts `(n,)`, see `gold`."""
        share = len(matched.teacher) / log_p.shape[-1]
        of_matched = share if matched_weight is None else matched_weight
        of_others = 1 - share if unmatched_weight is None else unmatched_weight
        own, other = (ids.to(log_q.device) for ids in matched)
        divergence = _generalised_divergence(log_q[:, own] + log_c[:, None], log_p[:, other] + log_d[:, None], beta)
        if not of_others:
            return of_matched * divergence
        rest = sorted_distance(_without(log_q, own), _without(log_p, other), log_c, log_d)
        return of_matched * divergence + of_others * rest

    return compare


def sorted_distance(log_q: Tensor, log_p: Tensor, log_c: Tensor, log_d: Tensor) -> Tensor:
    """Compute the distance of ULD from log-probabilities: the comparison that `universal_logit_distance` makes.

    Args:
        log_q: `(n, V)` of the student.
        log_p: `(n, W)` of the teacher.
        log_c: `(n,)` log-scales of the student.
        log_d: `(n,)` log-scales of the teacher.

    Returns:
        `(n,)`.
    """
    q, p = (
        (log + scale[:, None]).exp().sort(-1, descending=True).values for log, scale in ((log_q, log_c), (log_p, log_d))
    )
    size = max(q.shape[-1], p.shape[-1])
    q, p = (torch.nn.functional.pad(each, (0, size - each.shape[-1])) for each in (q, p))
    return (p - q).abs().sum(-1)


def _generalised_divergence(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence `(n,)` of measures, and at its ends the Kullback-Leibler divergence."""
    q, p = log_q.exp(), log_p.exp()
    if beta in (0, 1):
        of_teacher, of_student = p * (log_p - log_q) - p + q, q * (log_q - log_p) - q + p
        return (of_student if beta else of_teacher).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def _without(log: Tensor, ids: Tensor) -> Tensor:
    """Return the columns of `(n, V)` that are not among ids."""
    kept = torch.ones(log.shape[-1], dtype=torch.bool, device=log.device)
    kept[ids] = False
    return log[:, kept]


def _from_logits(
    compare: Comparison,
    student: Tensor,
    teacher: Tensor,
    log_scales: tuple[float | Tensor, float | Tensor],
    temperature: float,
) -> Tensor:
    """Apply a comparison to logits of any shape."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student and teacher logits differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    shape = student.shape[:-1]
    own, other = (torch.as_tensor(scale).to(student).expand(shape).reshape(-1) for scale in log_scales)
    check_positive("temperature", temperature)
    log_q, log_p = (
        _log_probabilities(each.reshape(-1, each.shape[-1]), None, temperature) for each in (student, teacher.detach())
    )
    return compare(log_q, log_p, own, other.detach()).view(shape)


class SpanDistributions(NamedTuple):
    """The distributions of one model at N spans."""

    hidden: Tensor
    """`(N, H)` hidden states, or logits `(N, V)` if there is no head."""
    head: Head | None
    log_scale: Tensor
    """`(N,)` the logarithm of the probabilities of the span's other tokens."""


def chunked_comparison(
    compare: Comparison,
    student: SpanDistributions,
    teacher: SpanDistributions,
    *,
    weights: Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare two models of different vocabularies at N spans, from their last hidden states, without keeping logits.

    All gradients are computed in the forward pass, a few spans at a time: to the student's hidden states and scales, and to its head's
    weight and bias if these require one.

    Args:
        compare: `sorted_distance` or the result of `hybrid`.
        student: the student's distributions.
        teacher: the teacher's distributions, which get no gradient.
        weights: `(N,)` weights of the spans.
        temperature: both logits are divided by it.
        chunk_size: spans per chunk; None limits the logits to 16 MiB on a CPU and 128 MiB on a GPU.

    Returns:
        The weighted sum, which has a gradient, and the values `(N,)`, which have none.

    Raises:
        ValueError: the temperature is not above 0.
    """
    check_positive("temperature", temperature)
    plan, head = _Plan(compare, student.head, teacher, weights, temperature, chunk_size), student.head
    weight, bias = (None, None) if head is None else (head.weight, head.bias)
    return _Compared.apply(student.hidden, weight, bias, student.log_scale, plan)  # type: ignore[no-any-return, no-untyped-call]


class _Plan(NamedTuple):
    """Arguments of a comparison besides the tensors that get a gradient."""

    compare: Comparison
    head: Head | None
    teacher: SpanDistributions
    weights: Tensor
    temperature: float
    chunk_size: int | None

    def values(
        self, rows: slice, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, log_scale: Tensor
    ) -> Tensor:
        """Return the values of some spans, differentiable with respect to the student's tensors."""
        head = None if self.head is None or weight is None else self.head._replace(weight=weight, bias=bias)
        log_q = _log_probabilities(hidden, head, self.temperature)
        with torch.no_grad():
            log_p = _log_probabilities(self.teacher.hidden[rows], self.teacher.head, self.temperature)
        return self.compare(log_q, log_p, log_scale.to(log_q), self.teacher.log_scale[rows].to(log_p))

    def chunks(self, hidden: Tensor) -> list[slice]:
        """Return the spans of each chunk."""
        sides = (hidden, self.head), (self.teacher.hidden, self.teacher.head)
        widest = max(states.shape[-1] if head is None else len(head.weight) for states, head in sides)
        budget = _CHUNK_BYTES.get(hidden.device.type, _CHUNK_BYTES["cuda"])
        size = self.chunk_size or max(1, budget // (4 * widest))
        return [slice(start, start + size) for start in range(0, len(hidden), size)]


class _Compared(torch.autograd.Function):
    """sum_n weight_n D_n, and the values D_n, which get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, log_scale: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        """Compute the values in chunks, and all gradients of their weighted sum."""
        tensors, wanted = (hidden, weight, bias, log_scale), ctx.needs_input_grad[:4]
        precision = precision_of(hidden)
        sums = [
            torch.zeros_like(each, dtype=precision) if want and each is not None else None
            for each, want in zip(tensors, wanted, strict=True)
        ]
        values = [hidden.new_empty(0, dtype=precision)]
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in plan.chunks(hidden):
                values.append(_add_gradients(plan, rows, tensors, sums))
        found = torch.cat(values)
        ctx.grads, ctx.dtypes = sums, [None if each is None else each.dtype for each in tensors]
        ctx.mark_non_differentiable(found)
        return (plan.weights.to(found) * found).sum(), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass computed."""
        if ctx.grads is None:
            raise RuntimeError("a comparison gives its gradients once: they are handed on, not copied")
        grads, ctx.grads = ctx.grads, None
        scaled = (None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return (*scaled, None)


def _add_gradients(
    plan: _Plan, rows: slice, tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor], sums: list[Tensor | None]
) -> Tensor:
    """Return the values of some spans, and add the gradients of their weighted sum to `sums`."""
    hidden, weight, bias, log_scale = tensors
    parts = [hidden[rows], weight, bias, log_scale[rows]]
    leaves = [
        None if part is None else part.detach().requires_grad_(total is not None)
        for part, total in zip(parts, sums, strict=True)
    ]
    with torch.enable_grad():
        values = plan.values(rows, *leaves)  # type: ignore[arg-type]
        total = (plan.weights[rows].to(values) * values).sum()
    learned = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(total, learned) if learned else ())
    for i, whole in enumerate(sums):
        if whole is not None:
            target = whole[rows] if i in (0, 3) else whole
            target += next(found)
    return values.detach()


def _log_probabilities(hidden: Tensor, head: Head | None, temperature: float) -> Tensor:
    """Return log-probabilities `(n, V)` of hidden states, or of logits without a head."""
    z = hidden if head is None else torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    z = z.to(precision_of(hidden))
    if head is not None:
        z = head.scale * z
        z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return (z / temperature).log_softmax(-1)
