"""Measure the attention of a model to the text and to the image of its prompts while it answers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contralto.common.head import find_layers
from contralto.common.head.hooks import hooked, in_this_thread
from contralto.decoding.branches.attention import AttentionPass, changed_attention
from contralto.decoding.branches.marks import find_image_token
from contralto.decoding.branches.variants import inner_model
from contralto.eval.metrics.dominance import AttentionMass

__all__ = ["measured_attention"]


@contextmanager
def measured_attention(model: Any) -> Iterator[list[AttentionMass]]:
    """Collect the attention of the queries that predict tokens, a document at a time, while the model generates in this thread.

    Weights are computed as by the eager implementation, whatever the model runs.

    Args:
        model: A decoder-only image-text model whose attention is `eager` or `sdpa`.

    Yields:
        A member for every prompt with an image that was read, complete when the context ends.

    Raises:
        ValueError: Attention that takes no float mask, or a model without an image token; when it generates, a batch of several rows.
    """
    meter = _Meter(inner_model(model))
    changes = dict.fromkeys(range(meter.depth), meter.see)
    begin = meter.model.register_forward_pre_hook(in_this_thread(meter.begin), with_kwargs=True)
    found: list[AttentionMass] = []
    with hooked([begin]), changed_attention(meter.model, changes):
        yield found
    found += [mass for mass in meter.masses() if mass.image_tokens]


class _Meter:
    """Sums of attention by document.

    Args:
        model: The transformers model.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.token, self.depth = model, find_image_token(model), find_layers(model).depth
        self._images: list[Tensor] = []  # (T,) of each prompt
        self._sums: list[np.ndarray[Any, Any]] = []  # (3, L) text, image and first token
        self._length = 0

    def begin(self, _module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Begin the sums of a prompt in its first forward pass, and note the length that is read."""
        ids, cache = kwargs.get("input_ids", args[0] if args else None), kwargs.get("past_key_values")
        if ids is None or len(ids) != 1:
            raise ValueError("attention is measured one prompt at a time, by input_ids: set the batch size to 1")
        past = 0 if cache is None else int(cache.get_seq_length())
        self._length = past + ids.shape[1]
        if not past:
            self._images.append((ids[0] == self.token).cpu())
            self._sums.append(np.zeros((3, self.depth)))

    def see(self, own: AttentionPass) -> Tensor:
        """Add the attention of the last query to the tokens of the prompt."""
        weights = own.weights()
        image, sums = self._images[-1], self._sums[-1]
        start = self._length - weights.shape[-1]  # a sliding window holds the last keys alone
        seen = weights[0, :, -1].to(torch.float64).mean(0).cpu()
        attention = torch.zeros(self._length, dtype=torch.float64)
        attention[start:] = seen
        prompt = attention[: len(image)]
        sums[:, own.layer] += [float(prompt[~image].sum()), float(prompt[image].sum()), float(prompt[0])]
        return weights

    def masses(self) -> list[AttentionMass]:
        """Return the attention of each document."""
        counts = [(int((~image).sum()), int(image.sum())) for image in self._images]
        return [
            AttentionMass(text, image, first, *count)
            for (text, image, first), count in zip(self._sums, counts, strict=True)
        ]
