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
from torch import Tensor

from contralto.align.losses.formulas import STATISTICS
from contralto.align.losses.target_passes import TargetResult, TargetTile

__all__ = ["kernel_passes"]

TILE = 4096
"""Logits that a program reads at once."""
WARPS = 16
LOWEST: Any = tl.constexpr(torch.finfo(torch.float32).min)
"""The largest logit of no logits; finite, since tiles may hold nothing but -inf."""


@triton.jit
def _logit(product, inner, outer, slope, HAS_SOFTCAP: tl.constexpr):
    """Return the logit of a product, and the derivative: outer tanh(inner z), or slope z."""
    if HAS_SOFTCAP:
        decay = tl.exp(-2 * tl.abs(product * inner))
        tanh = (1 - decay) / (1 + decay)
        curve = 4 * decay / ((1 + decay) * (1 + decay))  # 1 - tanh^2, without its cancellation
        return outer * tl.where(product * inner < 0, -tanh, tanh), slope * curve
    else:
        return product * slope, slope


@triton.jit
def _passes(
    products,
    product_stride,
    gradient,
    gradient_stride,
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
    HAS_FACTORS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOG_SUM_SQ_PROBS: tl.constexpr,
    HAS_MEAN_LOGITS: tl.constexpr,
    HAS_IS_TOP1: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    products += row * product_stride
    target = tl.load(targets + row).to(tl.int64)
    is_known = (target >= 0) & (target < vocabulary)
    # The product of the target is read before any is overwritten; an id outside the vocabulary gives NaN.
    target_product = tl.load(products + target, mask=is_known, other=float("nan")).to(tl.float32)
    if HAS_BIAS:
        target_product += tl.load(bias + target, mask=is_known, other=0.0).to(tl.float32)
    target_logit, _ = _logit(target_product, inner, outer, slope, HAS_SOFTCAP)

    largest = LOWEST
    before_target = LOWEST
    total = 0.0
    centred = 0.0
    squares = 0.0
    plain_sum = 0.0
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < vocabulary
        product = tl.load(products + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            product += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        logit, _ = _logit(product, inner, outer, slope, HAS_SOFTCAP)
        if HAS_MEAN_LOGITS:
            plain_sum += tl.sum(tl.where(inside, logit, 0.0), axis=0)
        logit = tl.where(inside, logit, -float("inf"))
        if HAS_IS_TOP1:
            earlier = tl.where(columns < target, logit, -float("inf"))
            before_target = tl.maximum(before_target, tl.max(earlier, axis=0))
        higher = tl.maximum(largest, tl.max(logit, axis=0))
        shifted = logit - higher
        power = tl.exp(shifted)
        rescale = tl.exp(largest - higher)
        if HAS_ENTROPY:
            # sum exp(z - m) (z - m), carried to the new m; a column of -inf adds nothing
            own = tl.sum(tl.where(power > 0, power * shifted, 0.0), axis=0)
            centred = rescale * (centred + total * (largest - higher)) + own
        if HAS_LOG_SUM_SQ_PROBS:
            squares = squares * rescale * rescale + tl.sum(power * power, axis=0)
        total = total * rescale + tl.sum(power, axis=0)
        largest = higher

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
        gradient += row * gradient_stride
        factor = 1.0
        if HAS_FACTORS:
            factor = tl.load(factors + row).to(tl.float32)
        share = factor / total
        for start in range(0, vocabulary, TILE):
            columns = start + tl.arange(0, TILE)
            inside = columns < vocabulary
            product = tl.load(products + columns, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                product += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
            logit, derivative = _logit(product, inner, outer, slope, HAS_SOFTCAP)
            pull = tl.where(columns == target, factor, 0.0)
            change = (pull - share * tl.exp(logit - largest)) * derivative
            tl.store(gradient + columns, change.to(gradient.dtype.element_ty), mask=inside)


def kernel_passes(tile: TargetTile) -> TargetResult:
    """Run the passes in the kernel: `target_passes.torch_passes` up to rounding.

    Two things differ beyond rounding: the entropy of a token with logits of -inf is finite here, and a target outside the vocabulary gives
    NaN, where torch raises an error.

    Args:
        tile: products in half precision or float32.

    Returns:
        Log-probabilities and statistics in float32, in nats.
    """
    products, source = tile.products, tile.source
    count, vocabulary = products.shape
    logps, *values = (products.new_empty(count, dtype=torch.float32) for _ in ("logps", *tile.statistics))
    statistics = dict(zip(tile.statistics, values, strict=True))
    bias = None if source.head is None else source.head.bias
    scale, softcap = (1.0, None) if source.head is None else (source.head.scale, source.head.softcap)
    gradient = products if tile.gradient is None else tile.gradient
    with torch.cuda.device_of(products):
        _passes[(count,)](
            products,
            products.stride(0),
            gradient,
            gradient.stride(0),
            _contiguous(bias, products),
            tile.targets.contiguous(),
            _contiguous(tile.factors, products),
            logps,
            vocabulary=vocabulary,
            inner=0.0 if softcap is None else scale / softcap,
            outer=0.0 if softcap is None else softcap / source.temperature,
            slope=scale / source.temperature,
            **{name: statistics.get(name, logps) for name in STATISTICS},
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_FACTORS=tile.factors is not None,
            HAS_GRADIENT=tile.gradient is not None,
            **{f"HAS_{name.upper()}": name in tile.statistics for name in STATISTICS},
            TILE=TILE,
            num_warps=WARPS,
        )
    return TargetResult(logps, {name: each.bool() if name == "is_top1" else each for name, each in statistics.items()})


def _contiguous(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """Return a vector without gaps: the gradient of a sum is one number with a stride of 0. `instead` stands for none and is not read."""
    return instead if tensor is None else tensor.contiguous()
