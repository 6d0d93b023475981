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
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.trainers.layout_masks import MASKED, WINDOWED, layer_windows, model_mask
from contralto.align.trl_compat import is_stateful

__all__ = [
    "LAYOUTS",
    "Layout",
    "Sharing",
    "at_places",
    "common_prefix",
    "packed",
    "paired",
    "row_lengths",
    "shared_prefixes",
    "unsupported_reason",
]


class Layout(NamedTuple):
    """A batch of 2B rows in another layout."""

    inputs: dict[str, Tensor]
    """`input_ids` and `position_ids`, `(rows, width)`."""
    source: Tensor
    """`(2B, T)` position of each token of the padded batch in the flattened layout; 0 for padding."""
    ends: Tensor | None = None
    """`(rows, width)` the position in its row before which each token is attended to, see `contralto.align.trainers.layout_masks`. None
    if a sequence attends to itself alone and begins where positions start again at 0."""
    owners: Tensor | None = None
    """`(2B, T - 1)` the row in which each token but the first is computed, so that it need not be scored again. None if all are in their own."""

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
        """Return the layout with `source` and `owners` on a device; models can be spread over several.

        Args:
            device: the device.
        """
        owners = None if self.owners is None else self.owners.to(device)
        return self._replace(source=self.source.to(device), owners=owners)

    def to_padded(self, values: Tensor) -> Tensor:
        """Move values from the tokens of this layout to the predicting positions of the padded batch.

        Args:
            values: `(rows, width, ...)`.

        Returns:
            `(2B, T - 1, ...)`.
        """
        return values.to(self.source.device).flatten(0, 1)[self.source[:, :-1]]

    def without_copies(self, valid: Tensor) -> Tensor:
        """Return the mask of tokens to score, without the tokens that are scored in another row.

        Args:
            valid: `(2B, T - 1)`, true for tokens of completions.

        Returns:
            `(2B, T - 1)`.
        """
        return valid if self.owners is None else valid & ~self._copies(valid, self.owners)

    def with_copies(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Copy the scores of shared tokens to all rows that share them.

        Args:
            scores: `(2B, T - 1)`, computed at `without_copies(valid)`.
            valid: `(2B, T - 1)`, true for tokens of completions.

        Returns:
            `(2B, T - 1)`.
        """
        if self.owners is None:
            return scores
        return torch.where(self._copies(valid, self.owners), scores.gather(0, self.owners), scores)

    def _copies(self, valid: Tensor, owners: Tensor) -> Tensor:
        """Return where a token counts that another row computes and counts too: the prompt of one may be the completion of another."""
        rows = torch.arange(len(valid), device=valid.device)[:, None]
        return valid & (owners != rows) & valid.gather(0, owners)


class Sharing(NamedTuple):
    """The sequences of a batch as paths of a forest, whose common beginnings are computed once."""

    order: list[int]
    """The rows of the padded batch, depth first: what two of them have in common, all between them have too."""
    common: list[int]
    """The tokens that each, in this order, has in common with the one before it and which are computed there; 0 begins a tree."""

    def own_lengths(self, lengths: Sequence[int]) -> list[int]:
        """Return the tokens of each sequence that are not computed in another, in this order.

        Args:
            lengths: of the rows of the padded batch.
        """
        return [lengths[row] - common for row, common in zip(self.order, self.common, strict=True)]


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
    ids, mask = input_ids.cpu(), attention_mask.cpu()
    sharing = paired(ids, mask)
    pairs, own = len(ids) // 2, sharing.own_lengths(row_lengths(mask))
    width = max(map(sum, zip(own[::2], own[1::2], strict=True)))
    places = [start for pair in range(pairs) for start in (width * pair, width * pair + own[2 * pair])]
    return at_places(ids, mask, sharing, places=places, shape=(pairs, width), device=input_ids.device)


def paired(input_ids: Tensor, attention_mask: Tensor) -> Sharing:
    """Return the sharing in which each rejected row follows its chosen row, and shares what it can with it alone.

    Args:
        input_ids: `(2B, T)`, padded on the right, the chosen rows first.
        attention_mask: `(2B, T)`.
    """
    chosen, rejected = torch.arange(len(input_ids)).chunk(2)
    shared = common_prefix(input_ids, attention_mask, chosen, rejected)
    order = torch.stack([chosen, rejected], 1).flatten().tolist()
    return Sharing(order, [tokens for common in shared for tokens in (0, common)])


def common_prefix(input_ids: Tensor, attention_mask: Tensor, first: Tensor, second: Tensor) -> list[int]:
    """Return the number of tokens with which two rows begin, for several pairs of rows.

    Args:
        input_ids: `(n, T)`, padded on the right.
        attention_mask: `(n, T)`.
        first: `(k,)` rows.
        second: `(k,)` the rows to compare with.
    """
    valid = attention_mask.bool()
    same = (input_ids[first] == input_ids[second]) & valid[first] & valid[second]
    lengths: list[int] = same.long().cumprod(-1).sum(-1).tolist()
    return lengths


def row_lengths(attention_mask: Tensor) -> list[int]:
    """Return the number of tokens of each row.

    Args:
        attention_mask: `(n, T)`.
    """
    lengths: list[int] = attention_mask.bool().sum(-1).tolist()
    return lengths


def at_places(
    input_ids: Tensor,
    attention_mask: Tensor,
    sharing: Sharing,
    *,
    places: Sequence[int],
    shape: tuple[int, int],
    device: torch.device,
) -> Layout:
    """Return the layout in which the tokens of each row stand in a given place. It is made on the CPU, in many small steps.

    Args:
        input_ids: `(n, T)`, padded on the right, on the CPU.
        attention_mask: `(n, T)`, on the CPU.
        sharing: the tokens that are computed once.
        places: the position in the flattened layout of the first token that a row does not share, in the order of `sharing`. All of a tree
            are within one row of the layout, one behind the other.
        shape: rows and width of the layout.
        device: of the result.
    """
    ids, valid = input_ids, attention_mask.bool()
    at, lengths, rows = torch.arange(ids.shape[1]), row_lengths(valid), range(len(ids))
    source, owners, ends, common = (torch.zeros_like(ids) for _ in range(4))
    for i in rows:
        row, before, tokens = sharing.order[i], sharing.order[i - 1], sharing.common[i]
        common[row] = tokens
        source[row] = torch.where(at < tokens, source[before], places[i] + at - tokens)
        owners[row] = torch.where(at < tokens, owners[before], row)
    for i in reversed(rows):
        row, tokens = sharing.order[i], sharing.common[i]
        ends[row] = places[i] + lengths[row] - tokens
        if i + 1 < len(rows):  # what the next one shares is attended to until the end of that
            ends[row] = torch.where(at < sharing.common[i + 1], ends[sharing.order[i + 1]], ends[row])
    source = source.masked_fill(~valid, 0)
    alone = torch.arange(1, shape[1] + 1).repeat(shape[0])  # padding attends to itself
    blank, own = torch.zeros_like(alone), valid & (at >= common)
    ends = ends - source // shape[1] * shape[1]
    moved = (
        filled.scatter(0, source[own], values[own]).view(shape).to(device)
        for filled, values in ((blank, ids), (blank, at.expand_as(ids)), (alone, ends))
    )
    ids, positions, ends = moved
    inputs, source = {"input_ids": ids, "position_ids": positions}, source.to(device)
    return Layout(inputs, source, ends, owners[:, 1:].to(device) if any(sharing.common) else None)


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
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    inputs = {"input_ids": input_ids[valid][None], "position_ids": positions[valid][None]}
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
