"""Measure how much each layer of a model changes its input."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from contralto.common.head import find_layers
from contralto.common.head.hooks import hooked, in_this_thread

__all__ = ["block_influence"]


@torch.no_grad()
def block_influence(model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """Return how much each layer changes its input (ShortGPT, arXiv 2403.03853, equation 1).

        BI_i = 1 - E_t[ x_{i,t} . x_{i+1,t} / (|x_{i,t}| |x_{i+1,t}|) ]

    Args:
        model: a decoder-only transformers model.
        batches: ids and masks `(B, T)` of texts; the mean is over their tokens, without padding.

    Returns:
        A number for each layer: 0 for a layer that changes lengths alone.
    """
    layers = find_layers(model)
    sums, tokens = torch.zeros(layers.depth, dtype=torch.float64), 0
    current: dict[str, Tensor] = {}

    def note(index: int) -> Any:
        def add(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            similar = cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += float((similar * current["mask"]).sum())

        return in_this_thread(add)

    parts: Any = model.get_submodule(layers.name)
    handles = [layer.register_forward_hook(note(index), with_kwargs=True) for index, layer in enumerate(parts)]
    with hooked(handles):
        for ids, mask in batches:
            current["mask"] = mask.to(model.device)
            model(input_ids=ids.to(model.device), attention_mask=current["mask"], use_cache=False)
            tokens += int(mask.sum())
    return [1 - value / max(1, tokens) for value in sums.tolist()]
