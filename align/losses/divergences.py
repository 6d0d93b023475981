"""Divergences and log-probabilities over the whole vocabulary, a few tokens at a time.

A language model's logits are tokens x vocabulary: at a vocabulary of 152 000, half a megabyte per token and copy, of which
a divergence in plain torch keeps half a dozen. Here the head is applied to a chunk of tokens, the divergence and its gradient are
worked out in closed form, and the logits are thrown away. What remains per token is a number and a vector of the size of the
hidden state.

Notation, per token: `p` is the teacher (or the reference), `q` the student (or the policy), both softmaxes over the vocabulary,
z the student's logits. Every divergence D here has a gradient of the form

    dD / dz_j = w_j - q_j sum_v w_v,    w_j = q_j dD / dq_j

so a divergence is two lines: its value and its w. The teacher gets no gradient. Because the tokens do not touch each other, the
gradient by the hidden state is found in the forward pass, with the logits at hand, and only scaled in the backward pass. A
head that is trained itself needs the incoming gradient first: then the backward pass computes the logits again.

All values are in nats, in float32 (float64 for float64 inputs), and logits must be finite.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "DIVERGENCES",
    "Compared",
    "Head",
    "TokenLogps",
    "chunked_divergence",
    "chunked_logps",
    "common_vocabulary",
    "first_tokens",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
    "vocabulary_size",
]

Gradient = Literal["full", "detached"]
_CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**28}
"""How large the logits of a chunk may get: enough tokens to keep the head's matrix product busy."""
_BLOCK_BYTES = {"cpu": 2**19, "cuda": 2**27}
"""How much of a chunk is worked on at once: on a CPU what its cache holds half a dozen copies of, on a GPU what keeps it busy."""


class Head(NamedTuple):
    """A language-model head: `logits = cap(scale * (h W^T + b))`, `cap(x) = softcap * tanh(x / softcap)` if given."""

    weight: Tensor
    """`(V, H)`."""
    bias: Tensor | None = None
    """`(V,)`."""
    scale: float = 1.0
    """Cohere's `logit_scale`, 1 / Granite's `logits_scaling`, and the like."""
    softcap: float | None = None
    """Gemma's `final_logit_softcapping`."""


class _Term(NamedTuple):
    """What is asked of every token: a divergence, or the log-probability of a target."""

    function: Callable[..., tuple[Tensor, Tensor]]
    """Of a `_Rows`, their part of `per_token` `(n, 1)`, and the constants: the values `(n,)` and w `(n, V)`."""
    per_token: Tensor | None = None
    """`(N,)` alpha, or the targets."""
    constants: tuple[Any, ...] = ()


class _Rows(NamedTuple):
    """Some tokens' distributions, `(n, V)` each. No term may change them."""

    log_q: Tensor
    q: Tensor
    log_p: Tensor
    p: Tensor


def _forward_kl(rows: _Rows) -> tuple[Tensor, Tensor]:
    """sum p (log p - log q); w = -p."""
    return (rows.log_p - rows.log_q).mul_(rows.p).sum(-1), -rows.p


def _reverse_kl(rows: _Rows) -> tuple[Tensor, Tensor]:
    """sum q (log q - log p); w = q (log q - log p)."""
    w = (rows.log_q - rows.log_p).mul_(rows.q)
    return w.sum(-1), w


def _jensen_shannon(rows: _Rows, beta: float) -> tuple[Tensor, Tensor]:
    """beta sum p (log p - log m) + (1 - beta) sum q (log q - log m), m = beta p + (1 - beta) q; w = (1 - beta) q log(q / m)."""
    log_m = _positive_(torch.lerp(rows.q, rows.p, beta)).log_()
    teacher = (rows.log_p - log_m).mul_(rows.p).sum(-1)
    w = torch.sub(rows.log_q, log_m, out=log_m).mul_(rows.q).mul_(1 - beta)
    return beta * teacher + w.sum(-1), w


def _total_variation(rows: _Rows) -> tuple[Tensor, Tensor]:
    """1/2 sum |p - q|; w = 1/2 q sign(q - p)."""
    difference = rows.q - rows.p
    return difference.abs().sum(-1) / 2, difference.sign_().mul_(rows.q).div_(2)


def _skew_kl(rows: _Rows, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """sum p (log p - log m), m = alpha p + (1 - alpha) q; w = -(1 - alpha) q p / m."""
    m = _positive_(torch.lerp(rows.q, rows.p, alpha))
    w = torch.div(rows.p, m).mul_(rows.q).mul_(alpha - 1)
    return torch.sub(rows.log_p, m.log_(), out=m).mul_(rows.p).sum(-1), w


def _skew_reverse_kl(rows: _Rows, alpha: Tensor, gradient: Gradient) -> tuple[Tensor, Tensor]:
    """sum q (log q - log m), m = (1 - alpha) p + alpha q; w = q (log q - log m - alpha q / m), or without the last term."""
    m = _positive_(torch.lerp(rows.p, rows.q, alpha))
    share = None if gradient == "detached" else torch.div(rows.q, m).mul_(rows.q).mul_(alpha)
    w = torch.sub(rows.log_q, m.log_(), out=m).mul_(rows.q)
    return w.sum(-1), w if share is None else w.sub_(share)


def _positive_(mixture: Tensor) -> Tensor:
    """Where both probabilities are too small for the dtype their mixture is 0, and 0 times its logarithm would be NaN."""
    return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny)


def _target(rows: _Rows, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log q(target); w = 1 at the target."""
    return rows.log_q.gather(-1, targets).squeeze(-1), torch.zeros_like(rows.q).scatter_(-1, targets, 1.0)


DIVERGENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jensen_shannon,
    "tvd": _total_variation,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}
"""The divergences by name: each gives the values and the w of some tokens."""


def forward_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The forward Kullback-Leibler divergence, KL(p || q) = sum_v p(v) (log p(v) - log q(v)).

    Of knowledge distillation (Hinton et al. 2015, arXiv 1503.02531), and, with the reference for a teacher, the divergence in
    TDPO and SparsePO.

    Args:
        student: `(..., V)` logits, which get a gradient.
        teacher: `(..., V')` logits, which get none. For `V' != V` see `common_vocabulary`.
        temperature: both logits are divided by it.

    Returns:
        `(...)`.

    Raises:
        ValueError: other shapes, or a temperature that is not above 0.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> forward_kl(q.log(), p.log())  # log 2 / 2 + log(2/3) / 2
        tensor(0.1438)
    """
    return _of_logits(_term("forward_kl", student.shape[:-1]), student, teacher, temperature)


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The reverse Kullback-Leibler divergence, KL(q || p) = sum_v q(v) (log q(v) - log p(v)).

    Of MiniLLM (Gu et al. 2024, arXiv 2306.08543), here per token.

    Args:
        student, teacher, temperature: see `forward_kl`.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> reverse_kl(q.log(), p.log())
        tensor(0.1308)
    """
    return _of_logits(_term("reverse_kl", student.shape[:-1]), student, teacher, temperature)


def jensen_shannon(student: Tensor, teacher: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, arXiv 2306.13649).

        D = beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

    Args:
        student, teacher, temperature: see `forward_kl`.
        beta: in [0, 1]. At both ends the formula is 0; there, as in TRL, 0 stands for the forward KL and 1 for the reverse one, the
            limits of D / beta and of D / (1 - beta).

    Raises:
        ValueError: `beta` outside [0, 1].

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> jensen_shannon(q.log(), p.log()), jensen_shannon(p.log(), q.log())  # symmetric at 1/2
        (tensor(0.0338), tensor(0.0338))
    """
    return _of_logits(_term("jsd", student.shape[:-1], beta=beta), student, teacher, temperature)


def total_variation(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The total variation distance, 1/2 sum_v |p(v) - q(v)| (f-distill, Wen et al. 2023, arXiv 2307.15190).

    Where the two agree on a token its subgradient is 0.

    Args:
        student, teacher, temperature: see `forward_kl`.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> total_variation(q.log(), p.log())
        tensor(0.2500)
    """
    return _of_logits(_term("tvd", student.shape[:-1]), student, teacher, temperature)


def skew_kl(student: Tensor, teacher: Tensor, *, alpha: float | Tensor = 0.1, temperature: float = 1.0) -> Tensor:
    """The skew Kullback-Leibler divergence of DistiLLM, SKL (Ko et al. 2024, arXiv 2402.03898; DistiLLM-2, arXiv 2503.07067).

        D = KL(p || alpha p + (1 - alpha) q)

    Args:
        student, teacher, temperature: see `forward_kl`.
        alpha: in [0, 1); 0 is the forward KL. A number, or one per token, of the shape of the result.

    Raises:
        ValueError: `alpha` outside [0, 1).

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> skew_kl(q.log(), p.log())  # the mixture is [0.275, 0.725]
        tensor(0.1131)
    """
    return _of_logits(_term("skew_kl", student.shape[:-1], alpha=alpha), student, teacher, temperature)


def skew_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float | Tensor = 0.1,
    gradient: Gradient = "full",
    temperature: float = 1.0,
) -> Tensor:
    """The skew reverse Kullback-Leibler divergence, SRKL (Ko et al. 2024, arXiv 2402.03898; DistiLLM-2, arXiv 2503.07067).

        D = KL(q || (1 - alpha) p + alpha q)

    The official code of DistiLLM-2 detaches the q in the mixture. Its gradient is then that of the Jensen-Shannon divergence with
    beta 1 - alpha, divided by alpha, and not that of D.

    Args:
        student, teacher, temperature: see `forward_kl`.
        alpha: in [0, 1); 0 is the reverse KL. A number, or one per token, of the shape of the result.
        gradient: "full" for the gradient of the formula, "detached" for that of the official code. The values are the same.

    Raises:
        ValueError: `alpha` outside [0, 1), or another `gradient`.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> skew_reverse_kl(q.log(), p.log())  # the mixture is [0.475, 0.525]
        tensor(0.1070)
    """
    term = _term("skew_reverse_kl", student.shape[:-1], alpha=alpha, gradient=gradient)
    return _of_logits(term, student, teacher, temperature)


def common_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, or the weights of heads, cut to the tokens that both vocabularies have.

    Models of one family often pad their vocabulary to different sizes (Qwen2.5: 151 936 and 152 064) and share the tokens
    below. The rows beyond the smaller size are left out of both softmaxes, which are normalised over what is left. Whether
    the two tokenizers agree on the rest cannot be seen from here.

    Args:
        student, teacher: the vocabulary comes last in logits `(..., V)`, first in weights `(V, H)`: pass weights transposed.

    Returns:
        Both, as views.

    Examples:
        >>> [logits.shape[-1] for logits in common_vocabulary(torch.zeros(2, 7), torch.zeros(2, 5))]
        [5, 5]
    """
    size = min(student.shape[-1], teacher.shape[-1])
    return student[..., :size], teacher[..., :size]


class Compared(NamedTuple):
    """What `chunked_divergence` finds at each token."""

    divergence: Tensor
    """`(N,)`, differentiable by the student, if there are no weights."""
    logps: Tensor | None
    """`(N,)` the student's log-probabilities of the targets, differentiable; None without targets."""
    teacher_logps: Tensor | None
    """`(N,)` the teacher's; None without targets."""
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
    srkl: Gradient = "full",
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Compared:
    """A divergence between two models at N tokens, from their last hidden states, without logits being kept.

    The formulas are those of the functions of this module. The gradient goes to `hidden`, and to the head's weight and bias if
    these require one; then the logits are computed twice, unless `weights` are given.

    Args:
        divergence: a key of `DIVERGENCES`; or several, each with the number of tokens that it is for, in their order, as
            `{"skew_kl": 120, "skew_reverse_kl": 136}` for the teacher's texts and the student's.
        hidden, teacher_hidden: `(N, H)` and `(N, H')` what goes into the heads; only the tokens that count.
        head, teacher_head: for vocabularies of different sizes see `common_vocabulary`. With None the hidden states are logits.
        targets: `(N,)` ids whose log-probabilities are wanted too: TDPO needs all three, and this way each head runs once.
        weights: `(N,)` what each token counts, where that is known beforehand, as in distillation. Then nothing is computed
            twice for a trained head either; only `total`, the weighted sum, has a gradient. Not together with targets.
        alpha: of `skew_kl` and `skew_reverse_kl`, in [0, 1); a number, or `(N,)`.
        beta: of `jsd`, in [0, 1].
        srkl: the gradient of `skew_reverse_kl`, "full" or "detached".
        temperature: both logits are divided by it, for the divergence and the log-probabilities.
        chunk_size: tokens at a time; None takes what gives logits of at most 128 MiB on a CPU and 256 MiB on a GPU.

    Raises:
        ValueError: an unknown divergence, a parameter out of range, shapes that do not belong together.

    Examples:
        >>> h, student, teacher = torch.ones(3, 2), Head(torch.eye(4, 2)), Head(torch.zeros(4, 2))
        >>> found = chunked_divergence("reverse_kl", h, student, h, teacher, targets=torch.tensor([0, 1, 2]))
        >>> found.divergence
        tensor([0.1109, 0.1109, 0.1109])
        >>> found.teacher_logps.exp()
        tensor([0.2500, 0.2500, 0.2500])
    """
    for each, states in ((head, hidden), (teacher_head, teacher_hidden)):
        _check_shapes(each, states, len(hidden), targets)
    if weights is not None and (targets is not None or weights.shape != (len(hidden),)):
        raise ValueError(f"weights must be of shape ({len(hidden)},), one per hidden state, and without targets")
    counts = {divergence: len(hidden)} if isinstance(divergence, str) else divergence
    if sum(counts.values()) != len(hidden) or not counts:
        raise ValueError(f"the divergences {dict(counts)} must be for {len(hidden)} tokens, one per hidden state")
    more = [] if targets is None else [_Term(_target, targets)]
    terms = [_term(name, (len(hidden),), alpha=alpha, beta=beta, gradient=srkl) for name in counts]
    parts = [(stop, [term, *more]) for stop, term in zip(accumulate(counts.values()), terms, strict=True)]
    size = min(vocabulary_size(hidden, head), vocabulary_size(teacher_hidden, teacher_head))
    teacher_hidden, teacher_head = first_tokens(teacher_hidden.detach(), teacher_head, size)
    hidden, head = first_tokens(hidden, head, size)
    teacher = _Source(teacher_head, temperature, teacher_hidden)
    plan = _Plan(_Source(head, temperature), teacher, parts, chunk_size, targets)
    if weights is not None:
        total, values = plan.run(hidden, weights.detach())
        return Compared(values, None, None, total)
    found = plan.run(hidden)
    if targets is None:
        return Compared(found[0], None, None, None)
    return Compared(found[0], found[1], plan.found("teacher_logps"), None)


class TokenLogps(NamedTuple):
    """What `chunked_logps` finds at each token; what was not asked for is None."""

    logps: Tensor
    """`(N,)` log-probabilities of the targets, differentiable."""
    entropy: Tensor | None
    """`(N,)` of the distribution; no gradient, like all that follows."""
    log_sum_sq_probs: Tensor | None
    """`(N,)` log sum_v q(v)^2, for WPO."""
    mean_logits: Tensor | None
    """`(N,)` the mean over the vocabulary."""
    is_top1: Tensor | None
    """`(N,)` whether the target is the likeliest token, the first of equals."""


STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def chunked_logps(
    hidden: Tensor,
    head: Head | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    also: Collection[str] = (),
    chunk_size: int | None = None,
) -> TokenLogps:
    """The log-probabilities of chosen tokens, from the last hidden states, without logits being kept.

        log q(y_t) = z_t(y_t) - log sum_v exp z_t(v)

    Args:
        hidden: `(N, H)` what goes into the head; only the tokens that count.
        head: the head, which gets a gradient if it requires one (then the logits are computed twice); None if `hidden` are logits.
        targets: `(N,)` int64 ids.
        temperature: the logits are divided by it.
        also: further numbers, of `entropy`, `log_sum_sq_probs`, `mean_logits`, `is_top1`. Each costs a pass over the logits.
        chunk_size: see `chunked_divergence`.

    Raises:
        ValueError: shapes that do not belong together, a temperature not above 0, an unknown name in `also`.

    Examples:
        >>> found = chunked_logps(torch.ones(2, 3), Head(torch.zeros(4, 3)), torch.tensor([0, 3]), also=["entropy"])
        >>> found.logps, found.entropy
        (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    _check_shapes(head, hidden, len(hidden), targets)
    if unknown := sorted(set(also) - set(STATISTICS)):
        raise ValueError(f"also knows {', '.join(STATISTICS)}, not {', '.join(unknown)}")
    parts = [(len(hidden), [_Term(_target, targets)])]
    plan = _Plan(_Source(head, temperature), None, parts, chunk_size, targets, also)
    (logps,) = plan.run(hidden)
    return TokenLogps(logps, *(plan.found(name) if name in also else None for name in STATISTICS))


class _Source:
    """Where a model's logits come from: hidden states and a head, or ready-made logits where there is no head."""

    def __init__(self, head: Head | None, temperature: float, hidden: Tensor | None = None) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, not {temperature}")
        self.head, self.temperature, self.hidden = head, temperature, hidden

    def at(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> "_Source":
        """The same with these tensors, as autograd hands them out."""
        head = None if weight is None or self.head is None else self.head._replace(weight=weight, bias=bias)
        return _Source(head, self.temperature, hidden)

    def logits(self, rows: slice, tile: Tensor) -> Tensor | float:
        """Write them to the tile `(n, V)`. Their derivative by the product of hidden state and weight."""
        assert self.hidden is not None
        if self.head is None:
            tile.copy_(self.hidden[rows]).div_(self.temperature)
            return 1 / self.temperature
        _product(self.hidden[rows], self.head.weight.t(), tile)
        if self.head.bias is not None:
            tile += self.head.bias
        slope = self.head.scale / self.temperature
        if self.head.softcap is None:
            if slope != 1:
                tile *= slope
            return slope
        tile.mul_(self.head.scale / self.head.softcap).tanh_()
        curve = tile.square().neg_().add_(1).mul_(slope)
        tile *= self.head.softcap / self.temperature
        return curve


class _Plan:
    """What is to be computed, for the forward and the backward pass: of each part of the tokens, up to its end, the terms."""

    def __init__(
        self,
        student: _Source,
        teacher: _Source | None,
        parts: Sequence[tuple[int, list[_Term]]],
        chunk_size: int | None = None,
        targets: Tensor | None = None,
        also: Collection[str] = (),
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, not {chunk_size}")
        self.student, self.teacher, self.parts, self.chunk_size = student, teacher, parts, chunk_size
        self.targets, self.also = targets, also
        self._found: dict[str, list[Tensor]] = {}

    def run(self, hidden: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
        """The values of all terms, `(N,)` each; with weights, the weighted sum of the first, and its values."""
        head, dtype = self.student.head, _compute_dtype(hidden)
        tensors: list[Tensor | None] = [hidden, None, None]
        if head is not None:
            tensors = [None if each is None else each.to(dtype) for each in (hidden, head.weight, head.bias)]
        if weights is None:
            return _PerToken.apply(*tensors, self)  # type: ignore[no-any-return, no-untyped-call]
        return _Weighted.apply(*tensors, self, weights)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def values(self) -> int:
        """How many there are per token."""
        return len(self.parts[0][1])

    def blocks(self, chunk: slice, size: int) -> Iterator[tuple[slice, list[_Term]]]:
        """A chunk in blocks of at most so many tokens that all belong to one part, and its terms."""
        start = chunk.start
        for stop, terms in self.parts:
            while start < min(stop, chunk.stop):
                end = min(start + size, stop, chunk.stop)
                yield slice(start, end), terms
                start = end

    def found(self, name: str) -> Tensor:
        """`(N,)` what was taken down in the forward pass."""
        assert self.targets is not None
        return torch.cat(self._found[name]) if name in self._found else self.targets.new_zeros(0)

    def take_down(self, rows: slice, z: Tensor, here: _Rows) -> None:
        """What is wanted without a gradient, of some tokens."""
        if self.targets is None:
            return
        targets = self.targets[rows, None]
        if self.teacher is not None:
            self._take("teacher_logps", here.log_p.gather(-1, targets).squeeze(-1))
        for name in self.also:
            self._take(name, _statistic(name, z, here, targets))

    def _take(self, name: str, values: Tensor) -> None:
        self._found.setdefault(name, []).append(values)


class _Swept(NamedTuple):
    """What a sweep over the tokens gives."""

    values: list[Tensor]
    """`(N,)` per term."""
    units: list[Tensor]
    """`(N, H)` per term: its gradient by the hidden state."""
    grads: list[Tensor | None]
    """By hidden states, weight and bias, of the terms' sum by the factors."""


def _sweep(
    plan: _Plan,
    tensors: Sequence[Tensor | None],
    *,
    units: bool = False,
    factors: Sequence[Tensor] | None = None,
    wanted: Sequence[bool] = (False, False, False),
    first: bool = False,
) -> _Swept:
    """Once over all tokens, chunk by chunk.

    Args:
        plan: the terms, and the teacher.
        tensors: hidden states, weight and bias of the student, in what the head multiplies in.
        units: give the gradient of each term by the hidden states.
        factors: `(N,)` per term; give the gradients of sum_n factor_n value_n.
        wanted: which of these.
        first: take down the plan's statistics too.
    """
    hidden, weight, bias = tensors
    assert hidden is not None
    student, precision = plan.student.at(hidden, weight, bias), _precision(hidden)
    vocabulary = hidden.shape[-1] if weight is None else len(weight)
    most = max(1, _budget(_CHUNK_BYTES, hidden) // (vocabulary * precision.itemsize))
    even = math.ceil(len(hidden) / max(1, math.ceil(len(hidden) / most)))  # a small rest is slow to multiply
    size = plan.chunk_size or max(1, even)
    count = 1 + (plan.teacher is not None) + (plan.values - 1) * units
    buffers = hidden.new_empty(count, min(size, len(hidden)), vocabulary, dtype=precision)
    swept = _Swept(
        [hidden.new_empty(len(hidden), dtype=precision) for _ in range(plan.values)],
        [torch.empty_like(hidden, dtype=precision) for _ in range(plan.values)] if units else [],
        [
            torch.zeros_like(tensor, dtype=precision if tensor is not hidden else None)
            if want and tensor is not None
            else None
            for tensor, want in zip(tensors, wanted, strict=True)
        ],
    )
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), size):
            chunk = slice(start, min(start + size, len(hidden)))
            _one_chunk(plan, student, chunk, list(buffers[:, : chunk.stop - start]), swept, factors, first=first)
    return swept


def _one_chunk(
    plan: _Plan,
    student: _Source,
    chunk: slice,
    tiles: list[Tensor],
    swept: _Swept,
    factors: Sequence[Tensor] | None,
    *,
    first: bool,
) -> None:
    """Fill in a chunk's part of what is swept. The tiles hold logits at first, gradients in the end."""
    slope = student.logits(chunk, tiles[0])
    given = tiles[: 1 + (plan.teacher is not None)]
    if plan.teacher is not None:
        plan.teacher.logits(chunk, tiles[1])
    into = [tiles[0], *tiles[len(given) :]] if swept.units else tiles[:1]
    step = max(1, _budget(_BLOCK_BYTES, tiles[0]) // (tiles[0].shape[-1] * tiles[0].itemsize))
    for rows, terms in plan.blocks(chunk, step):
        block = slice(rows.start - chunk.start, rows.stop - chunk.start)
        gradients = _block(plan, terms, rows, [tile[block] for tile in given], swept, factors, first=first)
        for tile, gradient in zip(into, gradients, strict=False):
            torch.mul(gradient, slope[block] if isinstance(slope, Tensor) else slope, out=tile[block])
    for unit, tile in zip(swept.units, into, strict=False):
        _project_back(tile, student.head, unit[chunk])
    by_hidden, by_weight, by_bias = swept.grads
    if by_hidden is not None:
        _project_back(tiles[0], student.head, by_hidden[chunk])
    if by_weight is not None and student.hidden is not None:
        _add_product(by_weight, tiles[0].t(), student.hidden[chunk])
    if by_bias is not None:
        by_bias += tiles[0].sum(0)


def _block(
    plan: _Plan,
    terms: list[_Term],
    rows: slice,
    logits: list[Tensor],
    swept: _Swept,
    factors: Sequence[Tensor] | None,
    *,
    first: bool,
) -> list[Tensor]:
    """Of some tokens, the values, and dD / dz `(n, V)`: of every term, or of their sum by the factors."""
    if plan.teacher is None and not (first and plan.also):
        return _block_of_targets(terms[0], rows, logits[0], swept, factors)
    logs = [z.log_softmax(-1) for z in logits]
    probabilities = [log.exp() for log in logs]
    here = _Rows(logs[0], probabilities[0], logs[-1], probabilities[-1])
    if first:
        plan.take_down(rows, logits[0], here)
    gradients: list[Tensor] = []
    for k, term in enumerate(terms):
        own = () if term.per_token is None else (_like(term.per_token[rows, None], here.q),)
        swept.values[k][rows], w = term.function(here, *own, *term.constants)
        if not swept.units and factors is None:
            continue
        gradient = w.addcmul_(here.q, w.sum(-1, keepdim=True), value=-1)
        if factors is not None:
            gradient *= factors[k][rows, None]
        gradients.append(gradient)
    return (
        gradients
        if factors is None or not gradients
        else [torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0]]
    )


def _block_of_targets(
    term: _Term, rows: slice, z: Tensor, swept: _Swept, factors: Sequence[Tensor] | None
) -> list[Tensor]:
    """The same where log-probabilities of targets are all that is wanted, in as few passes over the logits as can be."""
    assert term.per_token is not None
    log_q, targets = z.log_softmax(-1), term.per_token[rows, None]
    swept.values[0][rows] = log_q.gather(-1, targets).squeeze(-1)
    if not swept.units and factors is None:
        return []
    gradient = log_q.exp_().neg_()
    gradient.scatter_add_(-1, targets, torch.ones_like(targets, dtype=gradient.dtype))
    return [gradient if factors is None else gradient.mul_(factors[0][rows, None])]


class _PerToken(torch.autograd.Function):
    """The values of a plan's terms at every token.

    With a frozen head the gradients by the hidden states are made in the forward pass. Otherwise the backward pass starts over:
    the gradient of a trained head sums over tokens, each with its incoming gradient, and that of ready-made logits is as large as
    they are.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, ...]:
        ctx.starts_over = weight is None or any(ctx.needs_input_grad[1:3])
        units = ctx.needs_input_grad[0] and not ctx.starts_over
        swept = _sweep(plan, (hidden, weight, bias), units=units, first=True)
        ctx.plan, ctx.dtype = plan, hidden.dtype
        ctx.save_for_backward(*([hidden, weight, bias] if ctx.starts_over else swept.units))
        return tuple(swept.values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.starts_over:
            swept = _sweep(ctx.plan, ctx.saved_tensors, factors=grads, wanted=ctx.needs_input_grad[:3])
            return (*(None if g is None else g.to(ctx.dtype) for g in swept.grads), None)
        total = sum(grad[:, None] * unit for grad, unit in zip(grads, ctx.saved_tensors, strict=True))
        return torch.as_tensor(total).to(ctx.dtype), None, None, None


class _Weighted(torch.autograd.Function):
    """sum_n weight_n D_n and the values D_n, which get no gradient. All gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, plan: _Plan, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        factors = [weights.to(_precision(hidden))]
        swept = _sweep(
            plan, (hidden, weight, bias), factors=factors if any(wanted) else None, wanted=wanted, first=True
        )
        (values,) = swept.values
        ctx.dtype, ctx.grads = hidden.dtype, swept.grads
        ctx.mark_non_differentiable(values)
        return (factors[0] * values).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("a weighted divergence gives its gradients once: they are handed on, not copied")
        grads, ctx.grads = ctx.grads, None
        return (*(None if g is None else g.mul_(grad).to(ctx.dtype) for g in grads), None, None)


def _of_logits(term: _Term, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """A divergence of two tensors of logits."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student and teacher logits differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    q, p = (logits.reshape(-1, logits.shape[-1]) for logits in common_vocabulary(student, teacher.detach()))
    (values,) = _Plan(_Source(None, temperature), _Source(None, temperature, p), [(len(q), [term])]).run(q)
    return values.view(student.shape[:-1])


def _term(
    divergence: str,
    shape: tuple[int, ...],
    *,
    alpha: float | Tensor = 0.1,
    beta: float = 0.5,
    gradient: Gradient = "full",
) -> _Term:
    """The term of a divergence at tokens of that shape, its parameters checked."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"there is no divergence {divergence!r}; there are {', '.join(DIVERGENCES)}")
    function = DIVERGENCES[divergence]
    if divergence == "jsd":
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must lie in [0, 1] (the teacher's share of the mixture), not {beta}")
        ends: dict[float, Callable[..., tuple[Tensor, Tensor]]] = {0: _forward_kl, 1: _reverse_kl}
        return _Term(ends[beta]) if beta in ends else _Term(function, None, (beta,))
    if not divergence.startswith("skew"):
        return _Term(function)
    skew = torch.as_tensor(alpha, dtype=torch.float64)
    if skew.shape not in ((), shape):
        raise ValueError(f"alpha must be a number or of the shape {tuple(shape)}, not {tuple(skew.shape)}")
    if not ((skew >= 0) & (skew < 1)).all():
        raise ValueError(f"alpha must lie in [0, 1) (the share that skews the mixture), not {alpha}")
    if gradient not in ("full", "detached"):
        raise ValueError(f'the gradient of the skew reverse KL must be "full" or "detached", not {gradient!r}')
    if not skew.any():  # exact where q or p alone is too small for the dtype
        return _Term(_forward_kl if divergence == "skew_kl" else _reverse_kl)
    return _Term(function, skew.expand(shape).reshape(-1), (gradient,) if divergence == "skew_reverse_kl" else ())


def _statistic(name: str, z: Tensor, here: _Rows, targets: Tensor) -> Tensor:
    """One of `STATISTICS` `(n,)`."""
    match name:
        case "entropy":
            return -(here.q * here.log_q).sum(-1)
        case "log_sum_sq_probs":
            return (2 * here.log_q).logsumexp(-1)
        case "mean_logits":
            return z.mean(-1)
        case _:
            return z.argmax(-1) == targets.squeeze(-1)


def _like(per_token: Tensor, q: Tensor) -> Tensor:
    """Alpha in the precision of the work; targets stay what they are."""
    return per_token.to(q) if per_token.is_floating_point() else per_token


def vocabulary_size(hidden: Tensor, head: Head | None) -> int:
    """Return the number of tokens that a head knows, or logits without a head."""
    return hidden.shape[-1] if head is None else len(head.weight)


def first_tokens(hidden: Tensor, head: Head | None, size: int) -> tuple[Tensor, Head | None]:
    """Return the head of the first tokens alone with its hidden states, or logits of these tokens.

    Args:
        hidden: `(N, H)`, or logits `(N, V)` where there is no head.
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


def _precision(tensor: Tensor) -> torch.dtype:
    """In what softmax and sums are done."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """In what the head multiplies."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _budget(bytes_by_device: dict[str, int], tensor: Tensor) -> int:
    return bytes_by_device.get(tensor.device.type) or bytes_by_device["cuda"]


def _halves(a: Tensor) -> bool:
    """Whether a GPU multiplies these in half precision, which it can without rounding the result to it."""
    return a.is_cuda and a.dtype in (torch.float16, torch.bfloat16)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """A matrix product, kept in the precision of the work."""
    if _halves(a):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _project_back(gradient: Tensor, head: Head | None, out: Tensor) -> None:
    """The gradient by the hidden states, of that by the logits."""
    if head is None:
        out.copy_(gradient)
    elif out.dtype == _precision(head.weight):
        _product(gradient.to(head.weight.dtype), head.weight, out)
    else:
        out.copy_(torch.mm(gradient.to(head.weight.dtype), head.weight))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, kept in the precision of the work."""
    if _halves(b):
        torch.addmm(total, a.to(b.dtype), b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b.to(a.dtype))
