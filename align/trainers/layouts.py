"""Other arrangements of a batch of pairs, in which a model computes less and finds the same.

A collator gives two rows per pair, the prompt in both, padded to one length. `shared_prefixes` makes one row of a pair: the chosen text
whole, and behind it what the rejected text has after their common beginning, in whose eyes the rest of the chosen text is not there
(Wang & Hegde 2024, arXiv 2410.20305):

    prompt x, y_w = a b c, y_l = a d:    x a b c d,    positions 0 1 2 3 2,    d sees x a and itself

`packed` lays all rows end to end without padding, each seeing itself alone. Both want position ids and a mask that the model obeys; which
models do is for `refusal` to say, as far as a configuration shows it.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.trl_compat import attention_of, is_stateful

__all__ = ["LAYOUTS", "Layout", "packed", "refusal", "shared_prefixes"]


class Layout(NamedTuple):
    """A batch of 2B rows, arranged otherwise."""

    inputs: dict[str, Tensor | None]
    """What the model reads in place of `input_ids` and `attention_mask`."""
    source: Tensor
    """`(2B, T)` where each token of the padded batch now is, counted through all rows; 0 for padding."""
    repeated: Tensor | None = None
    """`(2B, T - 1)` true where a rejected text's token is at the same place as the chosen text's, so that it need not be scored again."""

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

    def on(self, device: torch.device) -> "Layout":
        """Where the head is, if a model is spread over devices."""
        repeated = None if self.repeated is None else self.repeated.to(device)
        return self._replace(source=self.source.to(device), repeated=repeated)

    def back(self, values: Tensor) -> Tensor:
        """What was computed at every token of this layout `(rows, width, ...)`, where it predicts in the padded batch, `(2B, T - 1, ...)`."""
        return values.to(self.source.device).flatten(0, 1)[self.source[:, :-1]]

    def once(self, valid: Tensor) -> Tensor:
        """`(2B, T - 1)` of the tokens to be scored those that have to be."""
        return valid if self.repeated is None else valid & ~self._copies(valid)

    def twice(self, scored: Tensor, valid: Tensor) -> Tensor:
        """Scores `(2B, T - 1)` at `once(valid)`, completed at the others."""
        if self.repeated is None:
            return scored
        chosen = scored.chunk(2)[0]
        return torch.where(self._copies(valid), torch.cat([chosen, chosen]), scored)

    def _copies(self, valid: Tensor) -> Tensor:
        assert self.repeated is not None
        chosen = valid.chunk(2)[0]
        return self.repeated & torch.cat([chosen, chosen])


def shared_prefixes(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    """One row per pair, its common beginning once.

    Args:
        input_ids: `(2B, T)`, padded on the right, the chosen texts first.
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
    sees = (key <= query) & ((query < chosen) | (key < common) | (key >= chosen))
    at = _positions(input_ids)[: len(common), 1:]
    repeated = torch.cat([torch.zeros_like(at, dtype=torch.bool), at < common[..., 0]])
    return Layout({"input_ids": ids, "position_ids": positions, "attention_mask": sees[:, None]}, source, repeated)


def _sources(valid: Tensor, chosen_length: Tensor, common: Tensor, width: int) -> Tensor:
    """Where the tokens of a pair go: the chosen text's stay, the rejected text's follow it after the common beginning."""
    at = torch.arange(valid.shape[1], device=valid.device)
    rejected = torch.where(at < common, at, chosen_length + at - common)
    rows = width * torch.arange(len(common), device=valid.device)[:, None]
    return torch.cat([at + rows, rejected + rows]).masked_fill(~valid, 0)


def _positions(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def _moved(values: Tensor, source: Tensor, valid: Tensor, width: int) -> Tensor:
    """Values of the padded batch in rows of the new width, 0 where there is padding."""
    moved = values.new_zeros(len(values) // 2 * width)
    moved[source[valid]] = values[valid]
    return moved.view(-1, width)


def packed(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    """One row of all texts, without padding; where positions start again a text does.

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
"""By the option that asks for it."""
_DENSE_MASKS = ("sdpa", "eager")


def refusal(option: str, kind: Any, config: Any, attention: str) -> str | None:
    """Why a kind of model cannot be given another layout, as a clause; None if nothing that can be seen speaks against it.

    Args:
        option: a key of `LAYOUTS`.
        kind: the model's class, of transformers.
        config: its configuration.
        attention: its `attn_implementation`.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
        >>> refusal("padding_free", MambaForCausalLM, MambaConfig(), "eager")
        'MambaForCausalLM carries a state from token to token'
        >>> refusal("prefix_sharing", LlamaForCausalLM, LlamaConfig(), "sdpa")
    """
    name, config = kind.__name__, config.get_text_config()
    if is_stateful(kind):
        return f"{name} carries a state from token to token"
    if "position_ids" not in inspect.signature(kind.forward).parameters:
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
