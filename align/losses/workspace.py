"""The memory of a sweep over the logits, and its products with a head in the precision of each device."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from contralto.common.head import Head

__all__ = [
    "Workspace",
    "add_product",
    "cast_for_now",
    "compute_dtype",
    "precision_of",
    "product",
    "project_back",
    "tokens_per_chunk",
]

_CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**28}
"""The largest size of the logits of a chunk: enough tokens for an efficient product with the head's matrix."""
_BLOCK_BYTES = {"cpu": 2**19, "cuda": 2**27}
"""The part of a chunk that is processed at once: on a CPU its cache holds half a dozen copies, on a GPU it occupies the device."""


class Workspace:
    """The memory of a sweep, which all chunks use.

    On a CPU products in half precision stay in it, and a block at a time is read into full precision and written back.

    Args:
        hidden: `(N, H)` hidden states, for dtype and device.
        shape: the tokens of a chunk and the vocabulary.
        tiles: number of tensors of that shape which the terms need.
        in_full: the tiles must be in full precision: a trained head has a gradient, or the teacher is in full precision.
        sums: gradients of logits are summed as they are, for a bias, and not only multiplied.
    """

    def __init__(
        self, hidden: Tensor, shape: tuple[int, int], *, tiles: int, in_full: bool, sums: bool = False
    ) -> None:
        precision = precision_of(hidden)
        in_full = in_full or _is_half_on_gpu(hidden)
        self.tiles = hidden.new_empty(tiles, *shape, dtype=precision if in_full else hidden.dtype)
        self._gradient_dtype = hidden.dtype if _is_half_on_gpu(hidden) and not sums else self.tiles.dtype
        self.step = max(1, _budget(_BLOCK_BYTES, hidden) // (shape[1] * precision.itemsize))
        self._shape, self._precision = (min(self.step, shape[0]), shape[1]), precision
        self._blocks: dict[str, Tensor] = {}
        self._gradients: Tensor | None = None

    def block(self, name: str, count: int) -> Tensor:
        """Return memory `(count, V)` in full precision for a block.

        Args:
            name: of its use; each is memory of its own.
            count: the tokens of the block.
        """
        if name not in self._blocks:
            self._blocks[name] = self.tiles.new_empty(self._shape, dtype=self._precision)
        return self._blocks[name][:count]

    def gradients(self, tile: Tensor) -> Tensor:
        """Return memory for the gradient of a tile, in the dtype in which it is multiplied: the tile itself, or memory of its own.

        Args:
            tile: `(n, V)`, of `tiles`.
        """
        if tile.dtype == self._gradient_dtype:
            return tile
        if self._gradients is None:
            self._gradients = self.tiles.new_empty(self.tiles.shape[1:], dtype=self._gradient_dtype)
        return self._gradients[: len(tile)]

    def read(self, name: str, block: Tensor) -> Tensor:
        """Return a block of a tile in full precision: itself, or a copy.

        Args:
            name: of its use.
            block: `(n, V)`.
        """
        return block if block.dtype == self._precision else self.block(name, len(block)).copy_(block)


def tokens_per_chunk(hidden: Tensor, vocabulary: int) -> int:
    """Return the number of tokens per chunk that divides the tokens evenly: a small last chunk is slow to multiply.

    Args:
        hidden: `(N, H)`.
        vocabulary: V.
    """
    most = max(1, _budget(_CHUNK_BYTES, hidden) // (vocabulary * precision_of(hidden).itemsize))
    return max(1, math.ceil(len(hidden) / max(1, math.ceil(len(hidden) / most))))


def precision_of(tensor: Tensor) -> torch.dtype:
    """Return the dtype of softmax and sums: float64 for float64, else float32.

    Args:
        tensor: hidden states, or logits.
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the product with the head: that of autocast where it is on.

    Args:
        hidden: `(N, H)`.
    """
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


_KEPT: dict[torch.dtype, list[Tensor]] = {}
"""Memory on the CPU for cast weights: one for each that is cast at the same time, such as a student's and a teacher's."""


@contextmanager
def cast_for_now(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Cast a weight for the time of a `with` block.

    On a CPU the memory is kept for the next weight, since the pages of new memory take longer than the cast; the values are not, since a
    weight may change unseen. On a GPU the allocator keeps memory.

    Args:
        weight: a weight that gets no gradient.
        dtype: the dtype of the product.

    Yields:
        The weight in the dtype, itself if it has it.
    """
    if weight.dtype == dtype or weight.device.type != "cpu":
        yield weight.to(dtype)
        return
    kept = _KEPT.setdefault(dtype, [])
    memory = kept.pop() if kept else None
    if memory is None or len(memory) < weight.numel():
        with torch.inference_mode(False):  # else only inference could write to it
            memory = torch.empty(weight.numel(), dtype=dtype)
    try:
        yield memory[: weight.numel()].view(weight.shape).copy_(weight)
    finally:
        kept.append(memory)


def _budget(bytes_by_device: dict[str, int], tensor: Tensor) -> int:
    return bytes_by_device.get(tensor.device.type) or bytes_by_device["cuda"]


def _is_half_on_gpu(a: Tensor) -> bool:
    """Return whether a GPU can multiply the tensor in half precision without rounding the result to it."""
    return a.is_cuda and a.dtype in (torch.float16, torch.bfloat16)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write `a @ b` to `out`; on a GPU half precision is not rounded on the way to float32.

    Args:
        a: `(n, k)`.
        b: `(k, m)`, in the dtype of `a`.
        out: `(n, m)`.
    """
    if _is_half_on_gpu(a) and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def project_back(gradient: Tensor, head: Head | None, out: Tensor) -> None:
    """Backpropagate the gradient of the logits to the hidden states.

    Args:
        gradient: `(n, V)`.
        head: the head; None copies the gradient.
        out: `(n, H)`.
    """
    if head is None:
        out.copy_(gradient)
    else:
        product(gradient.to(head.weight.dtype), head.weight, out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to `total`, in the precision of `total`.

    Args:
        total: `(m, k)`.
        a: `(m, n)`.
        b: `(n, k)`.
    """
    if _is_half_on_gpu(b):
        torch.addmm(total, a.to(b.dtype), b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b.to(a.dtype))
