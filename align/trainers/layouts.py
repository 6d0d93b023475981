"""Layouts of a batch of pairs in which a model computes fewer tokens (prefix sharing, Wang & Hegde 2024, arXiv 2410.20305).

The numbers stay the same. A collator returns two rows per pair, the prompt in both, padded to one length. `shared_prefixes` makes one
row of a pair: the chosen row, and behind it the tokens of the rejected row after their common prefix, which do not attend to the rest
of the chosen row:

    prompt x, y_w = a b c, y_l = a d:    x a b c d,    positions 0 1 2 3 2,    d attends to x a and itself

`packed` concatenates all rows without padding, each attending to itself alone. `contralto.align.trainers.packing` puts several pairs, or
several sequences, into each of a few rows. All need a model that obeys position ids and masks; `unsupported_reason` rejects those that
do not, as far as a configuration shows it.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.trainers.layout_masks import MASKED, WINDOWED, layer_windows, model_mask
from contralto.align.trl_compat import is_stateful

__all__ = ["LAYOUTS", "Layout", "at_places", "common_prefix", "packed", "shared_prefixes", "unsupported_reason"]


class Layout(NamedTuple):
    """A batch of 2B rows in another layout."""

    inputs: dict[str, Tensor]
    """`input_ids` and `position_ids`, `(rows, width)`."""
    source: Tensor
    """`(2B, T)` position of each token of the padded batch in the flattened layout; 0 for padding."""
    ends: Tensor | None = None
    """`(rows, width)` the position in its row before which each token is attended to, see `contralto.align.trainers.layout_masks`. None
    if a sequence attends to itself alone and begins where positions start again at 0."""
    repeated: Tensor | None = None
    """`(2B, T - 1)` true where a rejected row shares its token with the chosen row, so that it need not be scored again."""

    @property
    def holds_single_sequences(self) -> bool:
        """Return whether each row holds one sequence alone."""
        return len(self.inputs["input_ids"]) == len(self.source)

    def inputs_for(self, model: Any) -> dict[str, Any]:
        """Return the arguments of a model in place of `input_ids` and `attention_mask`, with the mask in the form of its attention.

        Args:
            model: a model of transformers, not wrapped.
        """
        if self.ends is None:
            return self.inputs | {"attention_mask": None}
        return self.inputs | {"attention_mask": model_mask(model, self.ends, self.inputs["position_ids"])}

    def to(self, device: torch.device) -> "Layout":
        """Return the layout with `source` and `repeated` on a device; models can be spread over several.

        Args:
            device: the device.
        """
        repeated = None if self.repeated is None else self.repeated.to(device)
        return self._replace(source=self.source.to(device), repeated=repeated)

    def to_padded(self, values: Tensor) -> Tensor:
        """Move values from the tokens of this layout to the predicting positions of the padded batch.

        Args:
            values: `(rows, width, ...)`.

        Returns:
            `(2B, T - 1, ...)`.
        """
        return values.to(self.source.device).flatten(0, 1)[self.source[:, :-1]]

    def without_copies(self, valid: Tensor) -> Tensor:
        """Return the mask of tokens to score, without the tokens that a rejected row shares with its chosen row.

        Args:
            valid: `(2B, T - 1)`, true for tokens of completions.

        Returns:
            `(2B, T - 1)`.
        """
        return valid if self.repeated is None else valid & ~self._copies(valid)

    def with_copies(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Copy the scores of shared tokens to the rejected rows.

        Args:
            scores: `(2B, T - 1)`, computed at `without_copies(valid)`.
            valid: `(2B, T - 1)`, true for tokens of completions.

        Returns:
            `(2B, T - 1)`.
        """
        if self.repeated is None:
            return scores
        chosen = scores.chunk(2)[0]
        return torch.where(self._copies(valid), torch.cat([chosen, chosen]), scores)

    def _copies(self, valid: Tensor) -> Tensor:
        assert self.repeated is not None
        chosen = valid.chunk(2)[0]
        return self.repeated & torch.cat([chosen, chosen])


def shared_prefixes(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    """Return one row per pair, with the common prefix once.

    Args:
        input_ids: `(2B, T)`, padded on the right, the chosen rows first.
        attention_mask: `(2B, T)`.

    Examples:
        >>> ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
        >>> layout = shared_prefixes(ids, (ids > 0).long())
        >>> layout.inputs["input_ids"], layout.inputs["position_ids"]
        (tensor([[5, 6, 7, 8, 9]]), tensor([[0, 1, 2, 3, 2]]))
        >>> layout.ends
        tensor([[5, 5, 4, 4, 5]])
        >>> layout.source
        tensor([[0, 1, 2, 3],
                [0, 1, 4, 0]])
    """
    valid, common = attention_mask.bool(), common_prefix(input_ids, attention_mask)
    chosen_length, rejected_length = valid.sum(-1, keepdim=True).chunk(2)
    width = int((chosen_length + rejected_length - common).max())
    chosen = width * torch.arange(len(common), device=valid.device)[:, None]
    places = torch.cat([chosen, chosen + chosen_length])
    return at_places(input_ids, valid, common=common, places=places, shape=(len(common), width))


def common_prefix(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return `(B, 1)` the number of tokens with which both rows of a pair begin.

    Args:
        input_ids: `(2B, T)`, padded on the right, the chosen rows first.
        attention_mask: `(2B, T)`.
    """
    (chosen, rejected), valid = input_ids.chunk(2), attention_mask.bool().chunk(2)
    same = (chosen == rejected) & valid[0] & valid[1]
    return same.long().cumprod(-1).sum(-1, keepdim=True)


def at_places(input_ids: Tensor, valid: Tensor, *, common: Tensor, places: Tensor, shape: tuple[int, int]) -> Layout:
    """Return the layout in which the tokens of each row stand in a given place.

    Args:
        input_ids: `(2B, T)`, padded on the right, the chosen rows first.
        valid: `(2B, T)`, false for padding.
        common: `(B, 1)` tokens that a rejected row shares with its chosen row, and which are computed there; 0 shares none.
        places: `(2B, 1)` the position in the flattened layout of a chosen row's first token, and of the first token that a rejected row
            does not share. All are within one row of the layout, and those of a pair that shares tokens are one behind the other.
        shape: rows and width of the layout.
    """
    chosen, rejected = places.chunk(2)
    at, (chosen_length, rejected_length) = _positions(input_ids)[: len(common)], valid.sum(-1, keepdim=True).chunk(2)
    shared = at < common
    repeated = torch.cat([torch.zeros_like(shared), shared])
    source = torch.cat([chosen + at, torch.where(shared, chosen + at, rejected + at - common)]).masked_fill(~valid, 0)
    chosen_end, rejected_end = chosen + chosen_length, rejected + rejected_length - common
    ends = torch.cat([torch.where(shared, rejected_end, chosen_end), rejected_end.expand_as(at)])
    alone = torch.arange(1, shape[1] + 1, device=valid.device).repeat(shape[0])  # padding attends to itself
    blank, own = torch.zeros_like(alone), valid & ~repeated
    moved = (
        filled.scatter(0, source[own], values[own]).view(shape)
        for filled, values in (
            (blank, input_ids),
            (blank, _positions(input_ids)),
            (alone, ends - source // shape[1] * shape[1]),
        )
    )
    ids, positions, ends = moved
    inputs = {"input_ids": ids, "position_ids": positions}
    return Layout(inputs, source, ends, repeated[:, 1:] if bool(shared.any()) else None)


def _positions(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def packed(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    """Return one row of all tokens without padding; a sequence begins where positions start again at 0.

    Args:
        input_ids: `(2B, T)`, padded on the right.
        attention_mask: `(2B, T)`.

    Examples:
        >>> ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
        >>> layout = packed(ids, (ids > 0).long())
        >>> layout.inputs["input_ids"], layout.inputs["position_ids"]
        (tensor([[5, 6, 7, 8, 5, 6, 9]]), tensor([[0, 1, 2, 3, 0, 1, 2]]))
        >>> layout.source
        tensor([[0, 1, 2, 3],
                [4, 5, 6, 0]])
    """
    valid = attention_mask.bool()
    source = (valid.flatten().cumsum(0) - 1).view_as(input_ids).masked_fill(~valid, 0)
    inputs = {"input_ids": input_ids[valid][None], "position_ids": _positions(input_ids)[valid][None]}
    return Layout(inputs, source)


LAYOUTS = {"prefix_sharing": shared_prefixes, "padding_free": packed}
"""The functions by the option of `PreferenceConfig` that selects them."""


def unsupported_reason(model_class: Any, config: Any, attention: str, *, masked: bool) -> str | None:
    """Return the reason why a model does not support a layout; None if its configuration shows none.

    Args:
        model_class: the model's class, of transformers.
        config: its configuration.
        attention: its `attn_implementation`.
        masked: whether the layout needs a mask of pairs of tokens, as all but `packed` do.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
        >>> unsupported_reason(MambaForCausalLM, MambaConfig(), "eager", masked=False)
        'MambaForCausalLM carries a state from token to token'
        >>> unsupported_reason(LlamaForCausalLM, LlamaConfig(), "sdpa", masked=True)
    """
    name, config = model_class.__name__, config.get_text_config()
    if is_stateful(model_class):
        return f"{name} carries a state from token to token"
    if "position_ids" not in inspect.signature(model_class.forward).parameters:
        return f"{name} takes no position_ids"
    if not masked:
        return None
    if others := sorted(set(layer_windows(config)) - set(WINDOWED)):
        return f"{name} has layers of {others[0]}, for which no mask is made; it is made for {' and '.join(WINDOWED)}"
    if attention not in MASKED:
        return f"attn_implementation {attention} takes no mask of pairs of tokens, which {', '.join(MASKED)} do"
    return None
