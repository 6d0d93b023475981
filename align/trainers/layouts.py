"""Layouts of a batch of pairs in which a model computes fewer tokens (prefix sharing, Wang & Hegde 2024, arXiv 2410.20305).

The numbers stay the same. A collator returns two rows per pair, the prompt in both, padded to one length. `shared_prefixes` makes one
row of a pair: the chosen row, and behind it the tokens of the rejected row after their common prefix, which do not attend to the rest
of the chosen row:

    prompt x, y_w = a b c, y_l = a d:    x a b c d,    positions 0 1 2 3 2,    d attends to x a and itself

`packed` concatenates all rows without padding, each attending to itself alone. Both need a model that obeys position ids and masks;
`unsupported_reason` rejects those that do not, as far as a configuration shows it.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.trl_compat import attention_of, is_stateful

__all__ = ["LAYOUTS", "Layout", "packed", "shared_prefixes", "unsupported_reason"]


class Layout(NamedTuple):
    """A batch of 2B rows in another layout."""

    inputs: dict[str, Tensor | None]
    """Arguments of the model in place of `input_ids` and `attention_mask`."""
    source: Tensor
    """`(2B, T)` position of each token of the padded batch in the flattened layout; 0 for padding."""
    repeated: Tensor | None = None
    """`(2B, T - 1)` true where a rejected row shares its token with the chosen row, so that it need not be scored again."""

    def inputs_for(self, model: Any) -> dict[str, Tensor | None]:
        """Return the inputs with the mask that a model's attention takes: eager attention adds it, others select by it.

        Args:
            model: a model of transformers, not wrapped.
        """
        mask = self.inputs["attention_mask"]
        if mask is None or attention_of(model.config) != "eager":
            return self.inputs
        closed = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
        return self.inputs | {"attention_mask": closed.masked_fill(~mask, torch.finfo(model.dtype).min)}

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
        >>> layout.inputs["attention_mask"][0, 0, -1].long()
        tensor([1, 1, 0, 0, 1])
        >>> layout.source
        tensor([[0, 1, 2, 3],
                [0, 1, 4, 0]])
    """
    valid = attention_mask.bool()
    chosen_length, rejected_length = valid.sum(-1, keepdim=True).chunk(2)
    same = (input_ids.chunk(2)[0] == input_ids.chunk(2)[1]) & valid.chunk(2)[0] & valid.chunk(2)[1]
    common = same.long().cumprod(-1).sum(-1, keepdim=True)
    width = int((chosen_length + rejected_length - common).max())
    source = _sources(valid, chosen_length, common, width)
    ids, positions = (_moved(values, source, valid, width) for values in (input_ids, _positions(input_ids)))
    query, key = torch.arange(width, device=input_ids.device)[:, None], torch.arange(width, device=input_ids.device)
    chosen, common = chosen_length[..., None], common[..., None]
    attends = (key <= query) & ((query < chosen) | (key < common) | (key >= chosen))  # (B, width, width)
    at = _positions(input_ids)[: len(common), 1:]
    repeated = torch.cat([torch.zeros_like(at, dtype=torch.bool), at < common[..., 0]])
    return Layout({"input_ids": ids, "position_ids": positions, "attention_mask": attends[:, None]}, source, repeated)


def _sources(valid: Tensor, chosen_length: Tensor, common: Tensor, width: int) -> Tensor:
    """Return `Layout.source`: tokens of the chosen row stay, those of the rejected row follow after the common prefix."""
    at = torch.arange(valid.shape[1], device=valid.device)
    rejected = torch.where(at < common, at, chosen_length + at - common)
    rows = width * torch.arange(len(common), device=valid.device)[:, None]
    return torch.cat([at + rows, rejected + rows]).masked_fill(~valid, 0)


def _positions(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def _moved(values: Tensor, source: Tensor, valid: Tensor, width: int) -> Tensor:
    """Return values of the padded batch `(2B, T)` in rows of the new width `(B, width)`, 0 at padding."""
    moved = values.new_zeros(len(values) // 2 * width)
    moved[source[valid]] = values[valid]
    return moved.view(-1, width)


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
    return Layout({**inputs, "attention_mask": None}, source)


LAYOUTS = {"prefix_sharing": shared_prefixes, "padding_free": packed}
"""The functions by the option of `PreferenceConfig` that selects them."""
_DENSE_MASKS = ("sdpa", "eager")


def unsupported_reason(option: str, model_class: Any, config: Any, attention: str) -> str | None:
    """Return the reason why a model does not support a layout; None if its configuration shows none.

    Args:
        option: a key of `LAYOUTS`.
        model_class: the model's class, of transformers.
        config: its configuration.
        attention: its `attn_implementation`.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
        >>> unsupported_reason("padding_free", MambaForCausalLM, MambaConfig(), "eager")
        'MambaForCausalLM carries a state from token to token'
        >>> unsupported_reason("prefix_sharing", LlamaForCausalLM, LlamaConfig(), "sdpa")
    """
    name, config = model_class.__name__, config.get_text_config()
    if is_stateful(model_class):
        return f"{name} carries a state from token to token"
    if "position_ids" not in inspect.signature(model_class.forward).parameters:
        return f"{name} takes no position_ids"
    if option == "padding_free":
        return None
    layers = getattr(config, "layer_types", None)
    windows = set(layers or ()) - {"full_attention"}
    if windows or (layers is None and getattr(config, "sliding_window", None) is not None):
        return f"{name} has layers of {min(windows, default='sliding_attention')}, which go by the distance of two tokens in a row"
    if attention not in _DENSE_MASKS:
        return (
            f"attn_implementation {attention} takes no mask of pairs of tokens, which {' and '.join(_DENSE_MASKS)} do"
        )
    return None
