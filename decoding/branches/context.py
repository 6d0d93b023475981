"""Determine and check the context length of models; beyond it most models return noise without an error."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from contralto.common.options import Option, OptionError
from contralto.decoding.branches.variants import ModelVariant

if TYPE_CHECKING:
    from contralto.decoding.inputs import DecodingBatch

__all__ = ["ContextLimit", "Room", "check_longest", "check_source", "check_tokens", "context_length", "rooms"]

ADVICE = "shorten the prompt, lower max_new_tokens, or use a model with a longer context"


def context_length(model: Any, *, encoder: bool = False) -> int | None:
    """Return the context length of a model: the positions of its configuration, with the scaling of its rotary embeddings.

    Models with ALiBi, recurrent models and those with relative positions alone have no limit, even if they declare a length.

    Args:
        model: a transformers model.
        encoder: whether to return that of the encoder of an encoder-decoder, not of its decoder.

    Returns:
        The number of tokens; None if there is no limit.

    Examples:
        >>> from contralto import testbed
        >>> context_length(testbed.load("amateur"))
        512
    """
    config = model.config.get_text_config(encoder=True) if encoder else model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    recurrent = getattr(config, "num_attention_heads", None) is None
    if not isinstance(length, int) or length < 1 or recurrent or getattr(config, "alibi", False):
        return None
    return max(length, int(_stretched(config, length)))


def _stretched(config: Any, length: int) -> float:
    """Return the length that scaled rotary embeddings reach, the shortest one over all types of layers.

    Configurations that users scale by hand (YaRN, linear, dynamic) often keep the unscaled `max_position_embeddings`.
    """
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = list(rope.values()) if rope and all(isinstance(kind, Mapping) for kind in rope.values()) else [rope]
    return min((kind.get("original_max_position_embeddings") or length) * (kind.get("factor") or 1.0) for kind in kinds)


def check_tokens(name: str, context: int, lengths: Tensor) -> None:
    """Raise an error if a row of a branch is longer than its model's context.

    Args:
        name: of the model.
        context: its context length in tokens.
        lengths: `(B,)` number of tokens in each row.

    Raises:
        ValueError: a row is too long.
    """
    if len(lengths) and int(longest := lengths.max()) > context:
        row = int(lengths.argmax())
        raise ValueError(
            f"row {row} has {int(longest)} tokens, more than the context of {context} tokens of {name}, beyond "
            f"which its logits are noise: {ADVICE}"
        )


class ContextLimit(NamedTuple):
    """The longest rows that a model may read."""

    name: str
    """The class of the model, for errors."""
    tokens: int
    """Number of tokens in the longest row, padding not counted."""
    exempt: int = 0
    """Number of first rows that may be longer: those of a main model, about which `generate()` warns."""
    ends: tuple[int, ...] = ()
    """Token ids that a row which has ended may end with; such rows may be longer."""

    def check(self, lengths: Tensor, last: Tensor | None = None) -> None:
        """Raise an error if a row is too long.

        Args:
            lengths: `(R,)` number of tokens in each row.
            last: `(R,)` the last token of each row; None where no row has ended.

        Raises:
            ValueError: a row is too long.

        Examples:
            >>> ContextLimit("Amateur", 8, ends=(0,)).check(torch.tensor([9, 9]), torch.tensor([0, 0]))
            >>> ContextLimit("Amateur", 8).check(torch.tensor([7, 9]))
            Traceback (most recent call last):
                ...
            ValueError: row 1 has 9 tokens, more than the context of 8 tokens of Amateur, beyond which its logits are noise: shorten the prompt, lower max_new_tokens, or use a model with a longer context
        """
        if last is not None:
            ends = torch.tensor(self.ends, dtype=last.dtype, device=last.device)
            lengths = lengths.masked_fill(torch.isin(last, ends), 0)
        check_tokens(self.name, self.tokens, lengths[self.exempt :])


def check_longest(name: str, model: Any, longest: int) -> None:
    """Raise an error if the context of an amateur is shorter than the longest sequence of vLLM.

    Args:
        name: of the amateur.
        model: the amateur.
        longest: vLLM's `max_model_len`.

    Raises:
        ValueError: the amateur's context is shorter.

    Examples:
        >>> from contralto import testbed
        >>> check_longest("testbed:amateur", testbed.load("amateur"), 513)
        Traceback (most recent call last):
            ...
        ValueError: testbed:amateur has a context of 512 tokens, and sequences may have 513: lower max_model_len to 512, or use an amateur with a longer context
    """
    context = context_length(model)
    if context is not None and context < longest:
        raise ValueError(
            f"{name} has a context of {context:,} tokens, and sequences may have {longest:,}: lower max_model_len "
            f"to {context}, or use an amateur with a longer context"
        )


def check_source(model: Any, mask: Tensor) -> None:
    """Raise an error if a source text is longer than an encoder's context.

    Args:
        model: an encoder-decoder.
        mask: `(B, T)` of the source texts.

    Raises:
        ValueError: a source text is too long.
    """
    context = context_length(model, encoder=True)
    if context is not None and mask.shape[1] > context:
        check_tokens(f"{type(model).__name__}'s encoder", context, mask.sum(-1))


class Room(NamedTuple):
    """The length of a prompt in one branch, and the context length of that branch."""

    tokens: int
    """Number of tokens of the prompt, as that branch reads it."""
    context: float
    """Context length of the branch's model; infinite if there is no limit."""
    name: str
    """The class of the model."""
    text_name: str = "prompt"
    """The word for the prompt in error messages."""
    grows: bool = True
    """Whether new tokens follow the prompt; none follow the source text of an encoder."""

    def left(self) -> float:
        """Return the number of new tokens that fit; negative if the prompt itself is too long."""
        left = self.context - self.tokens
        return left if self.grows or left < 0 else math.inf

    def check(self, count: int) -> None:
        """Raise an error if new tokens do not fit.

        Args:
            count: largest number of new tokens.

        Raises:
            OptionError: the prompt is too long, alone or with the new tokens.

        Examples:
            >>> Room(500, 512, "LlamaForCausalLM").check(20)
            Traceback (most recent call last):
                ...
            contralto.common.options.OptionError: the prompt has 500 tokens and max_new_tokens is 20, more than the context of 512 tokens of LlamaForCausalLM: shorten it, lower max_new_tokens, or use a model with a longer context
        """
        if self.left() >= count:
            return
        new, lower = (" and {option} is {count:,}", ", lower {option},") if self.grows else ("", "")
        raise OptionError(
            "the {text_name} has {tokens:,} tokens"
            + new
            + ", more than the context of {context:,} tokens of {name}: shorten it"
            + lower
            + " or use a model with a longer context",
            **self._asdict(),
            count=count,
            option=Option("max_new_tokens"),
        )


def rooms(batch: "DecodingBatch", *, window: int | None = None) -> list[tuple[Room, ...]]:
    """Return the room of each prompt of a batch in every branch.

    Args:
        batch: a batch as all branches of a method read it.
        window: number of last prompt tokens that the other models see; None for all.

    Returns:
        For each prompt one `Room` per branch.
    """
    columns = _columns(batch.model, batch.inputs)
    for other in batch.branch_models:
        columns += _columns(other, batch.aligned.get("amateur_inputs") or batch.inputs, window)
    for view in batch.views:
        own = _columns(batch.model, view)
        columns += [[room._replace(text_name="prompt of the other branch") for room in column] for column in own]
    return list(zip(*columns, strict=True))


def _columns(model: Any, inputs: Mapping[str, Any], window: int | None = None) -> list[list[Room]]:
    """Return the room of each prompt in one branch; an encoder-decoder has one for source and target."""
    model = model.model if isinstance(model, ModelVariant) else model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])
    lengths, name = mask.sum(-1).tolist(), type(model).__name__
    context = context_length(model) or math.inf
    if not model.config.is_encoder_decoder:
        return [[Room(min(length, window or length), context, name) for length in lengths]]
    source = context_length(model, encoder=True) or math.inf
    return [[Room(length, source, name, grows=False) for length in lengths], [Room(1, context, name)] * len(lengths)]
