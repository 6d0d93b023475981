"""Divergences and log-probabilities over the whole vocabulary from hidden states, without keeping logits.

A language model's logits are tokens x vocabulary: at a vocabulary of 152 000, half a megabyte per token and copy, of which
a divergence in plain torch keeps half a dozen. Here a few tokens are processed at a time (`sweep`); what remains per token is a number
and a vector of the size of the hidden state.
"""

from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from contralto.align.losses.formulas import STATISTICS, SkewGradient, TokenTerm, divergence_term, target_term
from contralto.align.losses.sweep import Head, LogitsSource, SweepPlan

__all__ = [
    "DivergenceResult",
    "Head",
    "TokenLogps",
    "chunked_divergence",
    "chunked_logps",
    "common_vocabulary",
    "first_tokens",
    "logits_divergence",
    "vocabulary_size",
]


class DivergenceResult(NamedTuple):
    """The result of `chunked_divergence`."""

    divergence: Tensor
    """`(N,)`; differentiable with respect to the student unless there are weights."""
    logps: Tensor | None
    """`(N,)` log-probabilities of the targets under the student, differentiable; None without targets."""
    teacher_logps: Tensor | None
    """`(N,)` log-probabilities of the targets under the teacher; None without targets."""
    total: Tensor | None
    """The weighted sum, differentiable; None without weights."""


def chunked_divergence(
    divergence: str | Mapping[str, int],
    hidden: Tensor,
    head: Head | None,
    teacher_hidden: Tensor,
    teacher_head: Head | None,
    *,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    alpha: float | Tensor = 0.1,
    beta: float = 0.5,
    srkl: SkewGradient = "full",
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> DivergenceResult:
    """Compute a divergence between two models at N tokens, from their last hidden states, without keeping logits.

    The formulas are those of `contralto.align.losses.divergences`. The gradient flows to `hidden`, and to the head's weight and bias if
    these require one; then the logits are computed twice, unless `weights` are given.

    Args:
        divergence: a key of `formulas.DIVERGENCES`; or several, each with its number of tokens, in the order of the tokens, as
            `{"skew_kl": 120, "skew_reverse_kl": 136}` for the completions of the teacher and of the student.
        hidden: `(N, H)` inputs of the student's head, of the tokens that count.
        head: the student's head; None if `hidden` are logits. For vocabularies of different sizes see `common_vocabulary`.
        teacher_hidden: `(N, H')` inputs of the teacher's head.
        teacher_head: the teacher's head; None if `teacher_hidden` are logits.
        targets: `(N,)` int64 ids whose log-probabilities are returned too: TDPO needs all three, and this way each head runs once.
        weights: `(N,)` weights of the tokens, if they are known beforehand, as in distillation. Then nothing is computed twice for a
            trained head either; only `total`, the weighted sum, has a gradient. Not together with targets.
        alpha: the skew of `skew_kl` and `skew_reverse_kl`, in [0, 1); a number, or `(N,)`.
        beta: the teacher's share of the mixture of `jsd`, in [0, 1].
        srkl: the gradient of `skew_reverse_kl`, "full" or "detached".
        temperature: both logits are divided by it, for the divergence and the log-probabilities.
        chunk_size: tokens per chunk; None limits the logits to 128 MiB on a CPU and 256 MiB on a GPU.

    Returns:
        Divergences, log-probabilities and total, in nats.

    Raises:
        ValueError: a divergence is unknown, a parameter is out of range, or shapes do not match.

    Examples:
        >>> h, student, teacher = torch.ones(3, 2), Head(torch.eye(4, 2)), Head(torch.zeros(4, 2))
        >>> result = chunked_divergence("reverse_kl", h, student, h, teacher, targets=torch.tensor([0, 1, 2]))
        >>> result.divergence
        tensor([0.1109, 0.1109, 0.1109])
        >>> result.teacher_logps.exp()
        tensor([0.2500, 0.2500, 0.2500])
    """
    for each, states in ((head, hidden), (teacher_head, teacher_hidden)):
        _check_shapes(each, states, len(hidden), targets)
    if weights is not None and (targets is not None or weights.shape != (len(hidden),)):
        raise ValueError(f"weights must be of shape ({len(hidden)},), one per hidden state, and without targets")
    counts = {divergence: len(hidden)} if isinstance(divergence, str) else divergence
    if sum(counts.values()) != len(hidden) or not counts:
        raise ValueError(f"the divergences {dict(counts)} must be for {len(hidden)} tokens, one per hidden state")
    target_terms = [] if targets is None else [target_term(targets)]
    terms = [divergence_term(name, (len(hidden),), alpha=alpha, beta=beta, gradient=srkl) for name in counts]
    parts = [(stop, [term, *target_terms]) for stop, term in zip(accumulate(counts.values()), terms, strict=True)]
    size = min(vocabulary_size(hidden, head), vocabulary_size(teacher_hidden, teacher_head))
    teacher_hidden, teacher_head = first_tokens(teacher_hidden.detach(), teacher_head, size)
    hidden, head = first_tokens(hidden, head, size)
    teacher = LogitsSource(teacher_head, temperature, teacher_hidden)
    plan = SweepPlan(LogitsSource(head, temperature), teacher, parts, chunk_size, targets)
    if weights is not None:
        total, values = plan.run(hidden, weights.detach())
        return DivergenceResult(values, None, None, total)
    values, *logps = plan.run(hidden)
    if not logps:
        return DivergenceResult(values, None, None, None)
    return DivergenceResult(values, logps[0], plan.recorded("teacher_logps"), None)


class TokenLogps(NamedTuple):
    """The result of `chunked_logps`; statistics that were not requested are None."""

    logps: Tensor
    """`(N,)` log-probabilities of the targets, differentiable."""
    entropy: Tensor | None
    """`(N,)` entropy of the distribution; no gradient, like all that follows."""
    log_sum_sq_probs: Tensor | None
    """`(N,)` log sum_v q(v)^2, for WPO."""
    mean_logits: Tensor | None
    """`(N,)` mean over the vocabulary."""
    is_top1: Tensor | None
    """`(N,)` bool: the target is the likeliest token, the first of equals."""


def chunked_logps(
    hidden: Tensor,
    head: Head | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    also: Collection[str] = (),
    chunk_size: int | None = None,
) -> TokenLogps:
    """Compute the log-probabilities of given tokens, from the last hidden states, without keeping logits.

        log q(y_t) = z_t(y_t) - log sum_v exp z_t(v)

    Args:
        hidden: `(N, H)` inputs of the head, of the tokens that count.
        head: the head, which gets a gradient if it requires one (then the logits are computed twice); None if `hidden` are logits.
        targets: `(N,)` int64 ids.
        temperature: the logits are divided by it.
        also: further statistics, of `entropy`, `log_sum_sq_probs`, `mean_logits`, `is_top1`. Each costs a pass over the logits.
        chunk_size: see `chunked_divergence`.

    Returns:
        Log-probabilities and statistics, in nats.

    Raises:
        ValueError: shapes do not match, the temperature is not above 0, or a name in `also` is unknown.

    Examples:
        >>> result = chunked_logps(torch.ones(2, 3), Head(torch.zeros(4, 3)), torch.tensor([0, 3]), also=["entropy"])
        >>> result.logps, result.entropy
        (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    _check_shapes(head, hidden, len(hidden), targets)
    if unknown := sorted(set(also) - set(STATISTICS)):
        raise ValueError(f"`also` may hold {', '.join(STATISTICS)}, not {', '.join(unknown)}")
    parts = [(len(hidden), [target_term(targets)])]
    plan = SweepPlan(LogitsSource(head, temperature), None, parts, chunk_size, targets, also)
    (logps,) = plan.run(hidden)
    return TokenLogps(logps, **{name: plan.recorded(name) if name in also else None for name in STATISTICS})


def logits_divergence(term: TokenTerm, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute a divergence between two tensors of logits.

    Args:
        term: the divergence.
        student: `(..., V)` logits, which get a gradient.
        teacher: `(..., V')` logits, which get none.
        temperature: both logits are divided by it.

    Returns:
        `(...)`.

    Raises:
        ValueError: the shapes differ, or the temperature is not above 0.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student and teacher logits differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    q, p = (logits.reshape(-1, logits.shape[-1]) for logits in common_vocabulary(student, teacher.detach()))
    plan = SweepPlan(LogitsSource(None, temperature), LogitsSource(None, temperature, p), [(len(q), [term])])
    (values,) = plan.run(q)
    return values.view(student.shape[:-1])


def common_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Cut logits, or the weights of heads, to the tokens that both vocabularies have.

    Models of one family often pad their vocabulary to different sizes (Qwen2.5: 151 936 and 152 064) and share the tokens
    below. The rows beyond the smaller size are left out of both softmaxes, which are normalised over the rest. Whether
    the two tokenizers agree on the rest is not checked here.

    Args:
        student: logits `(..., V)`; weights `(V, H)` have to be transposed.
        teacher: logits `(..., V')`.

    Returns:
        Both, as views.

    Examples:
        >>> [logits.shape[-1] for logits in common_vocabulary(torch.zeros(2, 7), torch.zeros(2, 5))]
        [5, 5]
    """
    size = min(student.shape[-1], teacher.shape[-1])
    return student[..., :size], teacher[..., :size]


def vocabulary_size(hidden: Tensor, head: Head | None) -> int:
    """Return the number of rows of a head, or the width of logits without a head.

    Args:
        hidden: `(N, H)`, or logits `(N, V)` if there is no head.
        head: the head, or None.
    """
    return hidden.shape[-1] if head is None else len(head.weight)


def first_tokens(hidden: Tensor, head: Head | None, size: int) -> tuple[Tensor, Head | None]:
    """Return hidden states and the head of the first tokens of the vocabulary, or logits of these tokens.

    Args:
        hidden: `(N, H)`, or logits `(N, V)` if there is no head.
        head: the head, or None.
        size: the number of tokens.
    """
    if size == vocabulary_size(hidden, head):  # the gradient of a slice is a copy of the whole
        return hidden, head
    if head is None:
        return hidden[:, :size], None
    return hidden, head._replace(weight=head.weight[:size], bias=None if head.bias is None else head.bias[:size])


def _check_shapes(head: Head | None, hidden: Tensor, tokens: int, targets: Tensor | None) -> None:
    width = hidden.shape[-1] if head is None else head.weight.shape[-1]
    if hidden.shape != (tokens, width):
        raise ValueError(f"hidden states must be of shape ({tokens}, {width}) for this head, not {tuple(hidden.shape)}")
    if targets is not None and targets.shape != (tokens,):
        raise ValueError(f"targets must be of shape ({tokens},), one per hidden state, not {tuple(targets.shape)}")
