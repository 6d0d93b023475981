"""The passes over logits as one Triton kernel: `target_passes.torch_passes` with each product read twice, and its gradient written once.

A program takes one token. It goes over the vocabulary tile by tile and keeps the largest logit m so far, the sum of exp(z - m), and what the
statistics need beside it, all relative to m, so that logits of any size lose no digits; then it goes over the same products once more and
writes their gradient, in place or in half precision to where the next product reads it. Importing this module needs Triton, which PyTorch's
builds for GPUs bring.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from contralto.align.losses.formulas import STATISTICS
from contralto.align.losses.target_passes import TargetResult, TargetTile

__all__ = ["kernel_passes"]

TILE = 4096
"""Logits that a program reads at once."""
WARPS = 16
LOWEST: Any = tl.constexpr(torch.finfo(torch.float32).min)
"""The largest logit of no logits; finite, since tiles may hold nothing but -inf."""


@triton.jit
def _logits(products, bias, at, mask, inner, outer, slope, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Return the logits of some columns, and their derivatives: outer tanh(inner z), or slope z. A masked column gives 0."""
    product = tl.load(products + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        product += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        decay = tl.exp(-2 * tl.abs(product * inner))
        tanh = (1 - decay) / (1 + decay)
        curve = 4 * decay / ((1 + decay) * (1 + decay))  # 1 - tanh^2, without its cancellation
        return outer * tl.where(product * inner < 0, -tanh, tanh), slope * curve
    else:
        return product * slope, slope


@triton.jit
def _scan(
    products,
    bias,
    target,
    vocabulary,
    inner,
    outer,
    slope,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOG_SUM_SQ_PROBS: tl.constexpr,
    HAS_MEAN_LOGITS: tl.constexpr,
    HAS_IS_TOP1: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return the largest logit m, sum exp(z - m), sum exp(z - m) (z - m), sum exp(2 (z - m)), sum z, and the largest before the target."""
    largest = LOWEST
    before_target = LOWEST
    total = 0.0
    centred = 0.0
    squares = 0.0
    plain_sum = 0.0
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < vocabulary
        logit, _slope = _logits(products, bias, columns, inside, inner, outer, slope, HAS_BIAS, HAS_SOFTCAP)
        if HAS_MEAN_LOGITS:
            plain_sum += tl.sum(logit, axis=0)
        logit = tl.where(inside, logit, -float("inf"))
        if HAS_IS_TOP1:
            earlier = tl.where(columns < target, logit, -float("inf"))
            before_target = tl.maximum(before_target, tl.max(earlier, axis=0))
        higher = tl.maximum(largest, tl.max(logit, axis=0))
        shifted = logit - higher
        power = tl.exp(shifted)
        rescale = tl.exp(largest - higher)
        if HAS_ENTROPY:
            own = tl.sum(power * tl.where(power > 0, shifted, 0.0), axis=0)  # a column of -inf adds nothing
            centred = rescale * (centred + total * (largest - higher)) + own
        if HAS_LOG_SUM_SQ_PROBS:
            squares = squares * rescale * rescale + tl.sum(power * power, axis=0)
        total = total * rescale + tl.sum(power, axis=0)
        largest = higher
    return largest, total, centred, squares, plain_sum, before_target


@triton.jit
def _write_gradient(
    gradient,
    products,
    bias,
    target,
    factor,
    largest,
    total,
    vocabulary,
    inner,
    outer,
    slope,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write factor (1[v = target] - exp(z - m) / total) times the derivative of z."""
    share = factor / total
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < vocabulary
        logit, derivative = _logits(products, bias, columns, inside, inner, outer, slope, HAS_BIAS, HAS_SOFTCAP)
        pull = tl.where(columns == target, factor, 0.0)
        change = (pull - share * tl.exp(logit - largest)) * derivative
        tl.store(gradient + columns, change.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _passes(
    products,
    gradient,
    bias,
    targets,
    factors,
    logps,
    entropy,
    log_sum_sq_probs,
    mean_logits,
    is_top1,
    vocabulary,
    inner,
    outer,
    slope,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOG_SUM_SQ_PROBS: tl.constexpr,
    HAS_MEAN_LOGITS: tl.constexpr,
    HAS_IS_TOP1: tl.constexpr,
    TILE: tl.constexpr,
):
    """Process the token of a program. Pointers of what is not wanted are not used.

    The target's logit is read before anything is overwritten; an id outside the vocabulary gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    products += row * vocabulary
    target = tl.load(targets + row).to(tl.int64)
    known = (target >= 0) & (target < vocabulary)
    target_logit, _slope = _logits(products, bias, target, known, inner, outer, slope, HAS_BIAS, HAS_SOFTCAP)
    target_logit = tl.where(known, target_logit, float("nan"))
    largest, total, centred, squares, plain_sum, before_target = _scan(
        products, bias, target, vocabulary, inner, outer, slope, HAS_BIAS, HAS_SOFTCAP,
        HAS_ENTROPY, HAS_LOG_SUM_SQ_PROBS, HAS_MEAN_LOGITS, HAS_IS_TOP1, TILE
    )  # fmt: skip
    log_total = tl.log(total)
    tl.store(logps + row, target_logit - largest - log_total)
    if HAS_ENTROPY:
        tl.store(entropy + row, log_total - centred / total)
    if HAS_LOG_SUM_SQ_PROBS:
        tl.store(log_sum_sq_probs + row, tl.log(squares) - 2 * log_total)
    if HAS_MEAN_LOGITS:
        tl.store(mean_logits + row, plain_sum / vocabulary)
    if HAS_IS_TOP1:
        tl.store(is_top1 + row, ((target_logit >= largest) & (target_logit > before_target)).to(tl.float32))
    if HAS_GRADIENT:
        _write_gradient(
            gradient + row * vocabulary, products, bias, target, tl.load(factors + row).to(tl.float32),
            largest, total, vocabulary, inner, outer, slope, HAS_BIAS, HAS_SOFTCAP, TILE
        )  # fmt: skip


def kernel_passes(tile: TargetTile) -> TargetResult:
    """Run the passes in the kernel: `target_passes.torch_passes` up to rounding.

    Two things differ beyond rounding: the entropy of a token with logits of -inf is finite here, and a target outside the vocabulary gives
    NaN, where torch raises an error.

    Args:
        tile: products in half precision or float32, of rows that follow each other in memory, as its gradient does.

    Returns:
        Log-probabilities and statistics in float32, in nats.

    Raises:
        ValueError: products or gradient have gaps.
    """
    products, source = tile.products, tile.source
    count, vocabulary = products.shape
    logps, *values = (products.new_empty(count, dtype=torch.float32) for _ in ("logps", *tile.statistics))
    statistics = dict(zip(tile.statistics, values, strict=True))
    if not products.is_contiguous() or not (tile.gradient is None or tile.gradient.is_contiguous()):
        raise ValueError("the kernel needs products and gradients without gaps between their rows")
    bias = None if source.head is None else source.head.bias
    scale, softcap = (1.0, None) if source.head is None else (source.head.scale, source.head.softcap)
    factors = torch.ones_like(logps) if tile.factors is None else tile.factors
    with torch.cuda.device_of(products):
        _passes[(count,)](
            products,
            products if tile.gradient is None else tile.gradient,
            products if bias is None else bias.contiguous(),
            tile.targets.contiguous(),
            factors.contiguous(),  # the gradient of a sum is one number with a stride of 0
            logps,
            vocabulary=vocabulary,
            inner=0.0 if softcap is None else scale / softcap,
            outer=0.0 if softcap is None else softcap / source.temperature,
            slope=scale / source.temperature,
            **{name: statistics.get(name, logps) for name in STATISTICS},
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_GRADIENT=tile.gradient is not None,
            **{f"HAS_{name.upper()}": name in tile.statistics for name in STATISTICS},
            TILE=TILE,
            num_warps=WARPS,
        )
    return TargetResult(logps, {name: each.bool() if name == "is_top1" else each for name, each in statistics.items()})
