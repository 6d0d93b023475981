"""Read the values of a critic token by token with a cache: those of prompts first, then those of candidates.

A critic is a token classifier with one label. Such models take a cache but do not generate, so that their forward passes are prepared
here and not by the methods of `generate()`.

Read from transformers 5.23.0: token classifiers fill the `past_key_values` that they are given, and do not return it.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from contralto.common.placement import input_device
from contralto.decoding.branches.context import ContextLimit, context_length
from contralto.decoding.branches.padding import KnownTokens
from contralto.decoding.branches.prompts import Prompts, takes_positions
from contralto.decoding.branches.reader import CachedReader

__all__ = ["ValueReader", "is_critic", "takes_cache", "values_of"]

NOT_CAUSAL = ("use_bidirectional_attention", "is_encoder_decoder")
"""Attributes of configurations of models whose earlier states change with later tokens."""


def is_critic(model: Any) -> bool:
    """Return whether a critic is a transformers model, not a function or another module.

    Args:
        model: a critic.
    """
    return isinstance(model, torch.nn.Module) and hasattr(model, "config")


def takes_cache(model: Any) -> bool:
    """Return whether a critic can keep the states of the tokens that it has read.

    Args:
        model: a transformers model.
    """
    if any(getattr(model.config, name, False) for name in NOT_CAUSAL):
        return False
    return "past_key_values" in inspect.signature(model.forward).parameters


def values_of(critic: Any, ids: Tensor, mask: Tensor, *, count: int = 1) -> Tensor:
    """Return a critic's values of the last tokens of whole rows, by one forward pass without a cache.

    Args:
        critic: a module that returns `logits` `(R, T, 1)`.
        ids: `(R, T)` int64.
        mask: `(R, T)`, 0 for padding before the rows.
        count: number of last tokens.

    Returns:
        Logits `(R, count)`, on the device of `ids`.

    Raises:
        TypeError: the critic returns one value per row.
    """
    device = input_device(critic)
    rows, visible = ids.to(device), mask.to(device)
    if is_critic(critic):
        rows = KnownTokens.of(critic).replace(rows, visible)
    inputs = {"input_ids": rows, "attention_mask": visible}
    if takes_positions(critic):
        inputs["position_ids"] = _positions(visible)
    return _checked(critic(**inputs).logits)[:, -count:, 0].to(ids.device)


def _positions(mask: Tensor) -> Tensor:
    """Return the positions `(R, T)` of left-padded rows, from 0 at the first token that is not padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _checked(logits: Tensor) -> Tensor:
    """Return logits `(R, T, 1)`, or raise TypeError for one value per row."""
    if logits.ndim != 3:
        raise TypeError(
            "the critic returns one value per sequence, and finds the end of a sequence by its padding, which a "
            "candidate token may equal: load it with AutoModelForTokenClassification and num_labels=1, or pass a "
            "function"
        )
    return logits


class ValueReader(CachedReader):
    """A critic with a cache, which reads prompts first and then further tokens or candidates for the next one.

    Args:
        model: a decoder-only token classifier with one label.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if (length := context_length(model)) is not None:
            tokens = KnownTokens.of(model)
            self.limit = ContextLimit(type(model).__name__, length, ends=(*tokens.ends, tokens.pad))

    def begin(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read prompts from their beginning.

        Args:
            ids: `(R, T)` int64, tokens that the critic knows.
            mask: `(R, T)`, 0 for padding before the prompts.

        Returns:
            The value of the last token of each row, `(R,)` logits.
        """
        kwargs: dict[str, Any] = {"attention_mask": mask}
        if takes_positions(self.model):
            kwargs["position_ids"] = _positions(mask)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return self.prefill(Prompts(ids, kwargs), cache=cache)[:, -1, 0]

    def _run(self, ids: Tensor, *, new: int | None, keep: int, layer_masks: Any = None, **changed: Any) -> Any:
        """Run the critic on the last `new` columns (None: on whole prompts) and return its outputs."""
        kwargs, width = self.kwargs | changed, ids.shape[1] if new is None else new
        if layer_masks is not None:
            kwargs[self.mask_name] = layer_masks
        if kwargs.get(self.positions_name) is not None:
            kwargs[self.positions_name] = kwargs[self.positions_name][..., -width:]
        outputs = self.model(input_ids=ids[:, -width:], return_dict=True, **kwargs)
        _checked(outputs.logits)
        return outputs

    def _commit(self, outputs: Any, new: int) -> None:
        """Add the column of the next token to mask and positions; the cache has grown in place."""
        self._lengthen(1)
        self.length += new
