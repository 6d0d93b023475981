"""Read whole sequences with a model: logits, last hidden states, and those of the source."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from contralto.decoding.executors.diverse import ENDED

__all__ = ["Readings", "encode_sources", "read_sequences", "without_last"]


class Readings(NamedTuple):
    """The result of a forward pass over N sequences."""

    logits: Tensor
    """`(N, L, V)`."""
    targets: Tensor
    """`(N, L)`, the token that each position predicts; `ENDED` where that is none of the sequence."""
    states: Tensor
    """`(N, L, H)` last hidden states of the decoder at the same positions."""
    source: Tensor
    """`(N, S, H)` last hidden states of the source: of the encoder, or of a decoder at its prompt."""
    source_mask: Tensor
    """`(N, S)`, true for the tokens of the source."""

    @property
    def log_probs(self) -> Tensor:
        """Return the log-probabilities `(N,)` of the sequences, in float32 at least."""
        kept = self.targets != ENDED
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        tokens = logits.log_softmax(-1).gather(-1, self.targets.masked_fill(~kept, 0)[..., None])[..., 0]
        return tokens.masked_fill(~kept, 0).sum(-1)

    @property
    def lengths(self) -> Tensor:
        """Return the numbers of tokens `(N,)`, end tokens included."""
        return (self.targets != ENDED).sum(-1)


def encode_sources(model: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the last hidden states of an encoder `(B, S, H)`; None for a model without one.

    Args:
        model: a decoder, or an encoder-decoder.
        inputs: `input_ids` and `attention_mask`, `(B, S)`.
    """
    if not model.config.is_encoder_decoder:
        return None
    states: Tensor = model.get_encoder()(**inputs).last_hidden_state
    return states


def read_sequences(
    model: Any,
    inputs: Mapping[str, Tensor],
    sequences: Tensor,
    *,
    encoded: Tensor | None = None,
    forward: Callable[..., Any] | None = None,
) -> Readings:
    """Read sequences that follow prompts or sources.

    A decoder reads each prompt and its sequence in one row, without padding between them.

    Args:
        model: a decoder, or an encoder-decoder.
        inputs: `input_ids` and `attention_mask`, `(N, S)`, of the prompt or source of each sequence.
        sequences: `(N, T)` int64, padded with `ENDED`.
        encoded: `(N, S, H)` from `encode_sources`, for an encoder-decoder; None runs the encoder.
        forward: the model's forward; None is that of `model`.
    """
    call = forward or model
    mask = inputs["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        source: Any = encode_sources(model, inputs) if encoded is None else encoded
        out = call(
            encoder_outputs=BaseModelOutput(source),
            attention_mask=inputs["attention_mask"],
            labels=sequences,
            output_hidden_states=True,
            use_cache=False,
        )
        return Readings(out.logits, sequences, out.decoder_hidden_states[-1], source, mask)
    written = sequences != ENDED
    ids = torch.cat([inputs["input_ids"], sequences.masked_fill(~written, 0)], 1)
    kept = torch.cat([mask, written], 1)
    own = torch.cat([torch.zeros_like(mask), written], 1)
    order = kept.long().argsort(dim=1, descending=True, stable=True)  # padding goes to the end
    ids, kept, own = (each.gather(1, order) for each in (ids, kept, own))
    out = call(input_ids=ids, attention_mask=kept.long(), output_hidden_states=True, use_cache=False)
    states, targets = out.hidden_states[-1], ids[:, 1:].masked_fill(~own[:, 1:], ENDED)
    return Readings(out.logits[:, :-1], targets, states[:, :-1], states, kept & ~own)


def without_last(mask: Tensor) -> Tensor:
    """Remove the last token of each row from a mask, unless it is the only one.

    Args:
        mask: `(N, S)` bool.

    Examples:
        >>> without_last(torch.tensor([[False, True, True], [False, False, True]])).tolist()
        [[False, True, False], [False, False, True]]
    """
    counted = mask.long().cumsum(1)
    total = counted[:, -1:]
    return mask & ((counted < total) | (total == 1))
