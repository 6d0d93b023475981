"""The passes over the logits of some tokens that give log-probabilities of targets, statistics, and the gradient.

They lie between the two products with the head: what comes in is hidden states times weight, what goes out is the gradient of that product.
With the logits z of a token, its target y and the factor c of its log-probability in the loss,

    log q(y) = z_y - log sum_v exp z_v        c d log q(y) / dz_v = c (1[v = y] - q_v)
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from contralto.align.losses.formulas import Distributions, log_softmax, statistic
from contralto.align.losses.workspace import Workspace

if TYPE_CHECKING:
    from contralto.align.losses.sweep import LogitsSource

__all__ = ["Passes", "TargetResult", "TargetTile", "torch_passes", "write_gradient"]


class TargetTile(NamedTuple):
    """Products of hidden states and weight for n tokens, and what is computed of them."""

    products: Tensor
    """`(n, V)`; the passes may overwrite it."""
    targets: Tensor
    """`(n,)` int64 ids."""
    source: "LogitsSource"
    """Bias, scale, softcap and temperature, which turn products into logits."""
    factors: Tensor | None
    """`(n,)` the factor of each log-probability in the loss; None stands for 1."""
    gradient: Tensor | None
    """`(n, V)` memory for the gradient of the products, which may be `products` itself; None computes no gradient."""
    statistics: tuple[str, ...]
    """Names of `formulas.STATISTICS`."""

    def part(self, rows: slice) -> "TargetTile":
        """Return the tile of some of its tokens.

        Args:
            rows: the tokens.
        """
        factors, gradient = (None if each is None else each[rows] for each in (self.factors, self.gradient))
        products, targets = self.products[rows], self.targets[rows]
        return self._replace(products=products, targets=targets, factors=factors, gradient=gradient)


class TargetResult(NamedTuple):
    """The result of the passes besides the gradient."""

    logps: Tensor
    """`(n,)` log-probabilities of the targets."""
    statistics: dict[str, Tensor]
    """`(n,)` by name."""


Passes = Callable[[TargetTile], TargetResult]


def torch_passes(tile: TargetTile, work: Workspace) -> TargetResult:
    """Run the passes in torch, over a block of tokens at a time.

    Args:
        tile: products in half or full precision.
        work: the memory of the sweep.

    Returns:
        Log-probabilities and statistics in full precision, in nats.
    """
    results = [_block_passes(block, work) for block in _blocks(tile, work.step)]
    names = tile.statistics
    statistics = {name: torch.cat([result.statistics[name] for result in results]) for name in names}
    return TargetResult(torch.cat([result.logps for result in results]), statistics)


def _blocks(tile: TargetTile, size: int) -> Iterator[TargetTile]:
    for start in range(0, len(tile.products), size):
        yield tile.part(slice(start, start + size))


def _block_passes(tile: TargetTile, work: Workspace) -> TargetResult:
    z = work.read("student", tile.products)
    slope = tile.source.finish(z)
    targets = tile.targets[:, None]
    if tile.statistics:
        log_q, q = log_softmax(z, work.block("log q", len(z)), work.block("q", len(z)))
        tokens = Distributions(log_q, q, log_q, q)
        statistics = {name: statistic(name, z, tokens, targets) for name in tile.statistics}
        logps, total = log_q.gather(-1, targets), torch.ones_like(z[:, :1])
    else:
        largest = z.amax(-1, keepdim=True)
        shifted = z.gather(-1, targets) - largest
        q, statistics = z.sub_(largest).exp_(), {}
        total = q.sum(-1, keepdim=True)
        logps = shifted - total.log()
    if tile.gradient is not None:
        factors = torch.ones_like(total) if tile.factors is None else tile.factors[:, None].to(total.dtype)
        write_gradient(q.mul_(-factors / total).scatter_add_(-1, targets, factors), slope, out=tile.gradient)
    return TargetResult(logps.squeeze(-1), statistics)


def write_gradient(gradient: Tensor, slope: Tensor | float, *, out: Tensor) -> None:
    """Write the gradient of logits times the derivative of the logits to `out`.

    Args:
        gradient: `(n, V)`, which is overwritten.
        slope: the derivative of the logits with respect to the products, a number or `(n, V)`.
        out: `(n, V)`, where the gradient may lie already.
    """
    if isinstance(slope, Tensor) or slope != 1:
        gradient.mul_(slope)
    if gradient.data_ptr() != out.data_ptr():
        out.copy_(gradient)
