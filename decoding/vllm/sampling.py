"""Draw tokens of many completions at once, each by its own sampling parameters. This module does not import vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contralto.decoding.sampling import gumbel_noise, wrapped_seed

__all__ = ["RequestSampling", "Warp", "draw", "end_broken", "seeds_of"]


@dataclass(frozen=True)
class RequestSampling:
    """Sampling parameters of a request. Temperature 0 takes the best token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class Warp:
    """The sampling parameters of several completions as columns `(P, 1)`, made once for many steps."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    cuts: bool
    """True if any of them has top-k or top-p."""
    floors: bool
    """True if any of them has min-p."""

    @classmethod
    def of(cls, samplings: Sequence[RequestSampling], device: Any) -> "Warp":
        """Return the columns of several requests.

        Args:
            samplings: of the requests.
            device: where the columns go.
        """

        def column(name: str, dtype: torch.dtype) -> Tensor:
            values = torch.tensor([getattr(sampling, name) for sampling in samplings], dtype=dtype)
            return values.to(device, non_blocking=True)[:, None]

        return cls(
            column("temperature", torch.float32),
            column("top_k", torch.int64),
            column("top_p", torch.float32),
            column("min_p", torch.float32),
            cuts=any(sampling.top_k or sampling.top_p < 1 for sampling in samplings),
            floors=any(sampling.min_p for sampling in samplings),
        )


def draw(scores: Tensor, warp: Warp, seeds: Tensor, steps: Tensor) -> Tensor:
    """Return scores whose argmax is a draw, for every completion by its own sampling parameters, seed and step.

    Temperature, top-k, top-p, min-p, then Gumbel noise, as `contralto.decoding.SeededSampling`, with the same noise: so a
    completion depends neither on its batch nor on where it was resumed.

    Args:
        scores: `(P, V)`.
        warp: of `P` completions; rows of temperature 0 stay as they are.
        seeds: `(P,)` int64.
        steps: `(P,)` int64, number of tokens of each completion.

    Returns:
        `(P, V)` float32.

    Examples:
        >>> from contralto.decoding import SeededSampling
        >>> scores, ids = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.zeros(1, 4, dtype=torch.long)
        >>> warp = Warp.of([RequestSampling(temperature=0.7, top_k=2)], "cpu")
        >>> mine = draw(scores, warp, torch.tensor([9]), torch.tensor([0]))
        >>> torch.equal(mine, SeededSampling([9], temperature=0.7, top_k=2)(ids, scores))
        True
    """
    size, samples = scores.shape[-1], warp.temperature > 0
    warm = scores / torch.where(samples, warp.temperature, 1.0)
    if warp.cuts:
        ordered, order = warm.sort(dim=-1)
        rank = torch.where(warp.top_k > 0, warp.top_k.clamp(max=size), size)
        warm = warm.masked_fill(warm < ordered.gather(-1, size - rank), -torch.inf)
        removed = warm.gather(-1, order).softmax(-1).cumsum(-1) <= 1 - warp.top_p
        removed[..., -1] = False
        removed &= warp.top_p < 1  # the sum may miss 1 by a rounding
        warm = warm.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -torch.inf)
    if warp.floors:
        p = warm.softmax(-1)
        warm = warm.masked_fill(p < warp.min_p * p.amax(-1, keepdim=True), -torch.inf)
    drawn = (warm.double().log_softmax(-1) + gumbel_noise(seeds, steps, size)).float()
    return torch.where(samples, drawn, scores.float())


def end_broken(scores: Tensor, branches: Tensor, markers: Tensor) -> Tensor:
    """End completions whose logits cannot be contrasted with their marker token: NaN, `+inf`, or no possible token.

    Such a completion is reported as one that does not get on. There is no synchronisation with the device, and other completions go on.

    Args:
        scores: `(P, V)` of the rule.
        branches: `(K, P, V)` logits.
        markers: `(P, 1)` tokens.

    Returns:
        `(P, V)`.

    Examples:
        >>> branches = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 1.0, torch.nan]]])
        >>> end_broken(branches[0], branches, torch.tensor([[0], [1]]))
        tensor([[0., 1., 2.],
                [-inf, 0., -inf]])
    """
    fine = branches.amax(-1).isfinite().all(0)[:, None]
    ends = torch.full_like(scores, -torch.inf).scatter_(1, markers, 0.0)
    return torch.where(fine, scores, ends)


def seeds_of(seeds: Sequence[int]) -> Tensor:
    """Return seeds of any size as int64.

    Args:
        seeds: whole numbers.
    """
    return torch.tensor([wrapped_seed(seed) for seed in seeds])
