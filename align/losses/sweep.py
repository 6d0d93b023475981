"""The memory engineering of the divergences: terms and their gradients over chunks of tokens, from hidden states.

The head is applied to a chunk of tokens, the terms and their gradients are computed in closed form, and the logits are discarded.
Because tokens do not depend on each other, the gradient with respect to the hidden states is computed in the forward pass, while the
logits exist, and only scaled in the backward pass. A trained head needs the incoming gradient first: then the backward pass computes
the logits again.

Softmax and sums are in float32 (float64 for float64 inputs); logits must be finite.

On a CPU the passes over `(n, V)` cost as much as the products in half precision, and new memory costs more than a pass. So they write to
buffers that a sweep allocates once, and log-probabilities of targets turn the logits into their gradient in place (`target_passes`; on a
GPU in a kernel where `passes_choice` finds it right and faster).
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contralto.align.losses.formulas import Distributions, TokenTerm, log_softmax
from contralto.align.losses.passes_choice import run_passes
from contralto.align.losses.target_passes import TargetTile, write_gradient
from contralto.align.losses.workspace import (
    Workspace,
    add_product,
    cast_for_now,
    compute_dtype,
    precision_of,
    product,
    project_back,
    tokens_per_chunk,
)
from contralto.common.head import Head
from contralto.common.ranges import check_positive

__all__ = ["Head", "LogitsSource", "SweepPlan"]


class LogitsSource:
    """The source of a model's logits: hidden states and a head, or logits themselves if there is no head.

    Args:
        head: the head, or None.
        temperature: the logits are divided by it.
        hidden: `(N, H)` hidden states, or `(N, V)` logits; None until `with_tensors`.

    Raises:
        ValueError: the temperature is not above 0.
    """

    def __init__(self, head: Head | None, temperature: float, hidden: Tensor | None = None) -> None:
        check_positive("temperature", temperature)
        self.head, self.temperature, self.hidden = head, temperature, hidden

    def with_tensors(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> "LogitsSource":
        """Return the source with the tensors that autograd passes to a function.

        Args:
            hidden: `(N, H)`.
            weight: `(V, H)`, or None without a head.
            bias: `(V,)`, or None.
        """
        head = None if weight is None or self.head is None else self.head._replace(weight=weight, bias=bias)
        return LogitsSource(head, self.temperature, hidden)

    @property
    def product_dtype(self) -> torch.dtype | None:
        """Return the dtype of the product with the head: that of autocast where it is on; None without hidden states."""
        if self.head is None or self.hidden is None:
            return None if self.hidden is None else self.hidden.dtype
        return compute_dtype(self.hidden)

    @contextmanager
    def cast(self, dtype: torch.dtype | None) -> Iterator["LogitsSource"]:
        """Cast hidden states and a head that get no gradient for the time of a `with` block.

        Args:
            dtype: the dtype of the product.

        Yields:
            The source in the dtype; logits as they are.
        """
        if self.head is None or self.hidden is None or dtype is None:
            yield self
            return
        bias = None if self.head.bias is None else self.head.bias.detach().to(dtype)
        with cast_for_now(self.head.weight.detach(), dtype) as weight:
            yield self.with_tensors(self.hidden.to(dtype), weight, bias)

    def multiply(self, rows: slice, out: Tensor) -> None:
        """Write the product of hidden states and weight for some tokens to `out`, or logits as they are if there is no head.

        Args:
            rows: the tokens.
            out: `(n, V)`.
        """
        assert self.hidden is not None
        if self.head is None:
            out.copy_(self.hidden[rows])
        else:
            product(self.hidden[rows], self.head.weight.t(), out)

    def finish(self, z: Tensor) -> Tensor | float:
        """Turn products into logits in place: bias, scale, softcap, temperature.

        Args:
            z: `(n, V)` products.

        Returns:
            The derivative of the logits with respect to the product: a number, or `(n, V)`.
        """
        if self.head is None:
            slope, softcap = 1 / self.temperature, None
        else:
            slope, softcap = self.head.scale / self.temperature, self.head.softcap
            if self.head.bias is not None:
                z += self.head.bias
        if self.head is None or softcap is None:
            if slope != 1:
                z *= slope
            return slope
        z.mul_(self.head.scale / softcap).tanh_()
        curve = z.square().neg_().add_(1).mul_(slope)  # the derivative of tanh is 1 - tanh^2
        z *= softcap / self.temperature
        return curve


class SweepPlan:
    """The terms that are computed at every token, for the forward and the backward pass.

    Args:
        student: the logits that get a gradient.
        teacher: the logits of the other distribution, or None.
        parts: for each part of the tokens its end and its terms; all parts have the same number of terms.
        chunk_size: tokens per chunk; None chooses by memory.
        targets: `(N,)` ids, for the statistics.
        statistics: names of `formulas.STATISTICS` to compute in the forward pass.

    Raises:
        ValueError: `chunk_size` is below 1.
    """

    def __init__(
        self,
        student: LogitsSource,
        teacher: LogitsSource | None,
        parts: Sequence[tuple[int, list[TokenTerm]]],
        chunk_size: int | None = None,
        targets: Tensor | None = None,
        statistics: Collection[str] = (),
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, not {chunk_size}")
        self.student, self.teacher, self.parts, self.chunk_size = student, teacher, parts, chunk_size
        self.targets, self.statistics = targets, statistics
        self._recorded: dict[str, list[Tensor]] = {}
        self.teacher_dtype: torch.dtype | None = None
        """The dtype of the teacher's product in the forward pass, for the backward pass, where autocast is off."""

    def run(self, hidden: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute the terms.

        Args:
            hidden: `(N, H)` hidden states of the student, or `(N, V)` logits.
            weights: `(N,)` weights of the tokens, for a plan with one term.

        Returns:
            The values of each term, `(N,)`; with weights the weighted sum of the values, and the values.
        """
        head, dtype = self.student.head, compute_dtype(hidden)
        self.teacher_dtype = None if self.teacher is None else self.teacher.product_dtype
        if head is None:
            return self._apply((hidden, None, None), weights)
        hidden, bias = hidden.to(dtype), None if head.bias is None else head.bias.to(dtype)
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (head.weight, bias)):
            weight = head.weight.to(dtype)  # for the backward pass, too
            return self._apply((hidden, weight, bias), weights)
        with cast_for_now(head.weight.detach(), dtype) as weight:
            return self._apply((hidden, weight, bias), weights)

    def _apply(
        self, tensors: tuple[Tensor, Tensor | None, Tensor | None], weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        if weights is None:
            return _PerToken.apply(*tensors, self)  # type: ignore[no-any-return, no-untyped-call]
        return _Weighted.apply(*tensors, self, weights)  # type: ignore[no-any-return, no-untyped-call]

    @contextmanager
    def with_cast_teacher(self) -> Iterator["SweepPlan"]:
        """Yield the plan with the teacher in the dtype of its product, for the time of a `with` block."""
        if self.teacher is None:
            yield self
            return
        plan = copy(self)  # it records in the same place
        with self.teacher.cast(self.teacher_dtype) as plan.teacher:
            yield plan

    @property
    def terms_per_token(self) -> int:
        """Return the number of terms."""
        return len(self.parts[0][1])

    def blocks(self, chunk: slice, size: int) -> Iterator[tuple[slice, list[TokenTerm]]]:
        """Divide a chunk into blocks of tokens that have the same terms.

        Args:
            chunk: the tokens of the chunk.
            size: the largest number of tokens in a block.

        Yields:
            The tokens of a block and its terms.
        """
        start = chunk.start
        for stop, terms in self.parts:
            while start < min(stop, chunk.stop):
                end = min(start + size, stop, chunk.stop)
                yield slice(start, end), terms
                start = end

    def recorded(self, name: str) -> Tensor:
        """Return a statistic that was recorded in the forward pass.

        Args:
            name: one of `statistics`, or `teacher_logps`.

        Returns:
            `(N,)`.
        """
        assert self.targets is not None
        return torch.cat(self._recorded[name]) if name in self._recorded else self.targets.new_zeros(0)

    def record(self, name: str, values: Tensor) -> None:
        """Record a statistic of some tokens, which follow those of the last call.

        Args:
            name: one of `statistics`, or `teacher_logps`.
            values: `(n,)`.
        """
        self._recorded.setdefault(name, []).append(values)


class _SweepResult(NamedTuple):
    """The tensors that a sweep over the tokens fills."""

    values: list[Tensor]
    """`(N,)` per term."""
    hidden_grads: list[Tensor]
    """`(N, H)` per term: its gradient with respect to the hidden states."""
    sum_grads: list[Tensor | None]
    """Gradients of the sum of the terms, weighted by the factors, with respect to hidden states, weight and bias."""


def _sweep(
    plan: SweepPlan,
    tensors: Sequence[Tensor | None],
    *,
    per_term: bool = False,
    factors: Sequence[Tensor] | None = None,
    wanted: Sequence[bool] = (False, False, False),
    records: bool = False,
) -> _SweepResult:
    """Process all tokens in chunks.

    Args:
        plan: the terms, and the teacher.
        tensors: hidden states, weight and bias of the student, in the dtype of the product.
        per_term: compute the gradient of each term with respect to the hidden states.
        factors: `(N,)` per term; compute the gradients of sum_n factor_n value_n.
        wanted: the tensors whose gradient of that sum is computed.
        records: record the statistics of the plan.
    """
    hidden, weight, bias = tensors
    assert hidden is not None
    student, precision = plan.student.with_tensors(hidden, weight, bias), precision_of(hidden)
    vocabulary = hidden.shape[-1] if weight is None else len(weight)
    size = plan.chunk_size or tokens_per_chunk(hidden, vocabulary)
    count = 1 + (plan.teacher is not None) + (plan.terms_per_token - 1) * per_term
    mixed = plan.teacher is not None and plan.teacher_dtype != hidden.dtype
    shape = min(size, len(hidden)), vocabulary
    work = Workspace(hidden, shape, tiles=count, in_full=wanted[1] or mixed, sums=wanted[2])
    result = _SweepResult(
        [hidden.new_empty(len(hidden), dtype=precision) for _ in range(plan.terms_per_token)],
        [torch.empty_like(hidden, dtype=precision) for _ in range(plan.terms_per_token)] if per_term else [],
        [
            torch.zeros_like(tensor, dtype=precision if tensor is not hidden else None)
            if want and tensor is not None
            else None
            for tensor, want in zip(tensors, wanted, strict=True)
        ],
    )
    with torch.autocast(hidden.device.type, enabled=False), plan.with_cast_teacher() as cast:
        for start in range(0, len(hidden), size):
            chunk = slice(start, min(start + size, len(hidden)))
            _sweep_chunk(cast, student, chunk, work, result, factors, records=records)
    return result


def _sweep_chunk(
    plan: SweepPlan,
    student: LogitsSource,
    chunk: slice,
    work: Workspace,
    result: _SweepResult,
    factors: Sequence[Tensor] | None,
    *,
    records: bool,
) -> None:
    """Fill in a chunk's part of the result."""
    tiles = list(work.tiles[:, : chunk.stop - chunk.start])
    student.multiply(chunk, tiles[0])
    fill = _sweep_targets if plan.teacher is None else _sweep_divergences
    gradients = fill(plan, student, chunk, tiles, work, result, factors, records=records)
    for hidden_grad, gradient in zip(result.hidden_grads, gradients, strict=False):
        project_back(gradient, student.head, hidden_grad[chunk])
    by_hidden, by_weight, by_bias = result.sum_grads
    if by_hidden is not None:
        project_back(gradients[0], student.head, by_hidden[chunk])
    if by_weight is not None and student.hidden is not None:
        add_product(by_weight, gradients[0].t(), student.hidden[chunk])
    if by_bias is not None:
        by_bias += gradients[0].sum(0, dtype=by_bias.dtype)


def _sweep_targets(
    plan: SweepPlan,
    student: LogitsSource,
    chunk: slice,
    tiles: list[Tensor],
    work: Workspace,
    result: _SweepResult,
    factors: Sequence[Tensor] | None,
    *,
    records: bool,
) -> list[Tensor]:
    """Fill in the log-probabilities of a chunk's targets and the statistics, and return the gradient of the products, if it is wanted."""
    ((_, (term,)),) = plan.parts
    assert term.per_token is not None
    is_wanted = bool(result.hidden_grads) or factors is not None
    tile = TargetTile(
        tiles[0],
        term.per_token[chunk],
        student,
        None if factors is None else factors[0][chunk],
        work.gradients(tiles[0]) if is_wanted else None,
        tuple(plan.statistics) if records else (),
    )
    found = run_passes(tile, work)
    result.values[0][chunk] = found.logps
    for name, values in found.statistics.items():
        plan.record(name, values)
    return [] if tile.gradient is None else [tile.gradient]


def _sweep_divergences(
    plan: SweepPlan,
    student: LogitsSource,
    chunk: slice,
    tiles: list[Tensor],
    work: Workspace,
    result: _SweepResult,
    factors: Sequence[Tensor] | None,
    *,
    records: bool,
) -> list[Tensor]:
    """Fill in the terms of a chunk, and return their gradients `(n, V)`, in tiles that held logits: of every term, or of their weighted sum."""
    assert plan.teacher is not None
    plan.teacher.multiply(chunk, tiles[1])
    outputs = [tiles[0], *tiles[2:]] if result.hidden_grads else tiles[:1]
    for rows, terms in plan.blocks(chunk, work.step):
        block = slice(rows.start - chunk.start, rows.stop - chunk.start)
        z, x = work.read("student", tiles[0][block]), work.read("teacher", tiles[1][block])
        slope = student.finish(z)
        plan.teacher.finish(x)
        count = rows.stop - rows.start
        log_q, q = log_softmax(z, work.block("log q", count), work.block("q", count))
        log_p, p = log_softmax(x, work.block("log p", count), work.block("p", count))
        tokens = Distributions(log_q, q, log_p, p)
        if records and plan.targets is not None:
            plan.record("teacher_logps", log_p.gather(-1, plan.targets[rows, None]).squeeze(-1))
        gradients = _sweep_block(terms, rows, tokens, result, factors)
        for tile, gradient in zip(outputs, gradients, strict=False):
            write_gradient(gradient, slope, out=tile[block])
    return outputs


def _sweep_block(
    terms: list[TokenTerm],
    rows: slice,
    tokens: Distributions,
    result: _SweepResult,
    factors: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Fill in the values of some tokens, and return dD / dz `(n, V)`: of every term, or of their sum weighted by the factors."""
    gradients: list[Tensor] = []
    for k, term in enumerate(terms):
        per_token = () if term.per_token is None else (_cast(term.per_token[rows, None], tokens.q),)
        result.values[k][rows], w = term.function(tokens, *per_token, *term.constants)
        if not result.hidden_grads and factors is None:
            continue
        gradient = w.addcmul_(tokens.q, w.sum(-1, keepdim=True), value=-1)
        if factors is not None:
            gradient *= factors[k][rows, None]
        gradients.append(gradient)
    if factors is None or len(gradients) < 2:
        return gradients
    return [torch.stack(gradients).sum(0)]


class _PerToken(torch.autograd.Function):
    """The values of a plan's terms at every token.

    With a frozen head the gradients with respect to the hidden states are computed in the forward pass. Otherwise the backward pass
    computes the logits again: the gradient of a trained head sums over tokens, each with its incoming gradient, and the gradient of
    logits without a head is as large as the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, plan: SweepPlan
    ) -> tuple[Tensor, ...]:
        """Compute the values, with a frozen head also the gradients of each term with respect to the hidden states."""
        ctx.recomputes = weight is None or any(ctx.needs_input_grad[1:3])
        per_term = ctx.needs_input_grad[0] and not ctx.recomputes
        result = _sweep(plan, (hidden, weight, bias), per_term=per_term, records=True)
        ctx.plan, ctx.dtype = plan, hidden.dtype
        ctx.save_for_backward(*([hidden, weight, bias] if ctx.recomputes else result.hidden_grads))
        return tuple(result.values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Weight these gradients by the incoming ones, or compute the logits again."""
        if ctx.recomputes:
            result = _sweep(ctx.plan, ctx.saved_tensors, factors=grads, wanted=ctx.needs_input_grad[:3])
            return (*(None if g is None else g.to(ctx.dtype) for g in result.sum_grads), None)
        total = sum(grad[:, None] * unit for grad, unit in zip(grads, ctx.saved_tensors, strict=True))
        return torch.as_tensor(total).to(ctx.dtype), None, None, None


class _Weighted(torch.autograd.Function):
    """sum_n weight_n D_n, and the values D_n, which get no gradient. All gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, plan: SweepPlan, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the values, and all gradients of their weighted sum."""
        wanted = ctx.needs_input_grad[:3]
        factors = [weights.to(precision_of(hidden))]
        result = _sweep(
            plan, (hidden, weight, bias), factors=factors if any(wanted) else None, wanted=wanted, records=True
        )
        (values,) = result.values
        ctx.dtype, ctx.grads = hidden.dtype, result.sum_grads
        ctx.mark_non_differentiable(values)
        return (factors[0] * values).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass computed."""
        if ctx.grads is None:
            raise RuntimeError("a weighted divergence gives its gradients once: they are handed on, not copied")
        grads, ctx.grads = ctx.grads, None
        return (*(None if g is None else g.mul_(grad).to(ctx.dtype) for g in grads), None, None)


def _cast(per_token: Tensor, q: Tensor) -> Tensor:
    """Return alpha in the dtype of `q`, and targets unchanged."""
    return per_token.to(q) if per_token.is_floating_point() else per_token
