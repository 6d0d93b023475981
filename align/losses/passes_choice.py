"""The choice between the passes over logits in torch and in a kernel, made where they run.

On a GPU the first tile of each kind is processed by both, and the kernel is kept if its results are those of torch up to rounding and it took less
time. Otherwise the torch passes are kept, and one sentence says why.
"""

import importlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from contralto.align.losses.target_passes import Passes, TargetResult, TargetTile, torch_passes
from contralto.align.losses.workspace import Workspace

__all__ = ["KERNEL", "PassesChoice", "cuda_milliseconds", "load_kernel", "run_passes"]

logger = logging.getLogger(__name__)

VALUES_WITHIN = 1e-4
"""The largest difference of log-probabilities and statistics, absolute below 1 and relative above."""
GRADIENTS_WITHIN = 1e-4
"""The largest difference of the gradient of a token, as a share of its sum of absolute values; half of this sum is the target's."""
ROUNDING = 1e-6
"""The difference beyond that by which the target's gradient may be rounded, 1 - q being a small difference: of the factor and the slope."""
ROUNDS = 5
"""Times are the least of so many."""


class _Kind(NamedTuple):
    """Distinguishes tiles for which the kernel is compiled apart, or meets other sizes."""

    device: torch.device
    vocabulary: int
    products: torch.dtype
    gradient: torch.dtype | None
    bias: torch.dtype | None
    has_softcap: bool
    statistics: tuple[str, ...]


class PassesChoice:
    """Processes tiles by a kernel where it is right and faster, else in torch.

    Args:
        load: returns the kernel; may raise ImportError.
        milliseconds: returns the time that a call takes.
        least_tokens: tiles of fewer tokens are left to torch, and decide nothing: a kernel with a program per token would not occupy a GPU.
    """

    def __init__(
        self, load: Callable[[], Passes], milliseconds: Callable[[Callable[[], object]], float], least_tokens: int = 128
    ) -> None:
        self.load, self.milliseconds, self.least_tokens = load, milliseconds, least_tokens
        self._reasons: dict[_Kind, str | None] = {}
        self._logged: set[str] = set()

    @property
    def reasons(self) -> list[str | None]:
        """Return for each kind of tile so far why the kernel is not taken, or None."""
        return list(self._reasons.values())

    def run(self, tile: TargetTile, work: Workspace) -> TargetResult:
        """Run the passes over a tile.

        Args:
            tile: products and what is computed of them.
            work: the memory of the sweep.

        Returns:
            Log-probabilities and statistics; the gradient is in the tile's memory.
        """
        if len(tile.products) >= self.least_tokens and self.reason_against(tile, work) is None:
            return self.load()(tile)
        return torch_passes(tile, work)

    def reason_against(self, tile: TargetTile, work: Workspace) -> str | None:
        """Return why the kernel is not taken for tiles of this kind, or None; the first tile of a kind is tried, and left as it is.

        Args:
            tile: products and what is computed of them.
            work: the memory of the sweep.
        """
        kind = _kind_of(tile)
        if kind not in self._reasons:
            reason = self._reasons[kind] = self._try(tile.part(slice(work.step)), work)
            if reason is not None and reason not in self._logged:
                self._logged.add(reason)
                logger.warning("log-probabilities at the head are computed in torch and not by a kernel: %s", reason)
        return self._reasons[kind]

    def _try(self, tile: TargetTile, work: Workspace) -> str | None:
        try:
            kernel = self.load()
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        try:
            mine, theirs = _copy(tile), _copy(tile)
            difference = _difference(kernel(mine), mine, torch_passes(theirs, work), theirs)
            if difference is not None:
                return difference
            took = self.milliseconds(lambda: kernel(mine))
            in_torch = self.milliseconds(lambda: torch_passes(theirs, work))
        except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything, and torch can do the work
            return f"it failed with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if took < in_torch:
            return None
        return f"it took {took:.3g} ms for {len(tile.products)} tokens, and torch {in_torch:.3g} ms"


def _kind_of(tile: TargetTile) -> _Kind:
    head = tile.source.head
    return _Kind(
        tile.products.device,
        tile.products.shape[-1],
        tile.products.dtype,
        None if tile.gradient is None else tile.gradient.dtype,
        None if head is None or head.bias is None else head.bias.dtype,
        head is not None and head.softcap is not None,
        tile.statistics,
    )


def _copy(tile: TargetTile) -> TargetTile:
    """Return a tile with memory of its own for products and gradient."""
    products = tile.products.clone()
    if tile.gradient is None:
        return tile._replace(products=products)
    is_in_place = tile.gradient.data_ptr() == tile.products.data_ptr()
    return tile._replace(products=products, gradient=products if is_in_place else torch.empty_like(tile.gradient))


def _difference(mine: TargetResult, tile: TargetTile, theirs: TargetResult, reference: TargetTile) -> str | None:
    """Return how the results of a kernel differ from those of torch, or None if they are equal up to rounding."""
    pairs = {"log-probabilities": (mine.logps, theirs.logps)}
    pairs |= {name: (mine.statistics[name], theirs.statistics[name]) for name in tile.statistics}
    for name, (found, expected) in pairs.items():
        if not torch.allclose(found.float(), expected.float(), rtol=VALUES_WITHIN, atol=VALUES_WITHIN, equal_nan=True):
            return f"its {name} are not those of torch"
    if tile.gradient is None or reference.gradient is None:
        return None
    for row in range(len(tile.gradient)):  # one at a time: differences need memory, too
        found, expected = tile.gradient[row].float(), reference.gradient[row].float()
        bound = GRADIENTS_WITHIN * expected.abs().sum() + ROUNDING * _largest_slope(tile, row)
        if not (found - expected).abs().sum() <= bound:
            return "its gradients are not those of torch"
    return None


def _largest_slope(tile: TargetTile, row: int) -> Tensor | float:
    """Return the factor of a token times the largest derivative of its logits with respect to the products."""
    slope = (1.0 if tile.source.head is None else abs(tile.source.head.scale)) / tile.source.temperature
    return slope if tile.factors is None else slope * tile.factors[row].abs()


def load_kernel() -> Passes:
    """Return the Triton kernel.

    Raises:
        ImportError: Triton is not installed.
    """
    passes: Passes = importlib.import_module("contralto.align.losses.target_kernel").kernel_passes
    return passes


def cuda_milliseconds(call: Callable[[], object]) -> float:
    """Return the least time of a few calls, by CUDA events.

    Args:
        call: what is timed; it has run before.
    """
    times: list[float] = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


KERNEL = PassesChoice(load_kernel, cuda_milliseconds)
"""The choice of this process on GPUs."""


def run_passes(tile: TargetTile, work: Workspace) -> TargetResult:
    """Run the passes over a tile: on a GPU by the kernel, where that is right and faster, else in torch.

    Args:
        tile: products and what is computed of them.
        work: the memory of the sweep.
    """
    if tile.products.is_cuda and tile.products.dtype == torch.float32:
        return KERNEL.run(tile, work)
    return torch_passes(tile, work)
