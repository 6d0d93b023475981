"""A batch of pairs as the stages of a trainer read it, and the names of its columns."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.trainers.layouts import Layout

__all__ = ["IGNORED", "Arrange", "PairBatch"]

IGNORED = -100
"""The label of tokens that are not scored."""
PAIR_COLUMNS = ("margin", "chosen_advantage")
"""Columns with a number per pair that reach the loss."""
REFERENCE_COLUMNS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
"""Columns of a precomputed reference, with a number per scored token."""
STATES = "teacher_states"
"""The column that locates a row's precomputed hidden states of a teacher, and the entry of a batch that holds them."""
TEACHER_PROMPTS = "teacher_prompt_ids"
"""The column of a row's prompt in the tokens of a teacher with another tokenizer, and the entry of a batch that holds them."""
BLIND = "blind"
"""The entry of a batch that holds its completions without an image."""
IMAGE_COLUMNS = ("rejected_images",)
"""Columns of images beside those that TRL reads."""
NOT_FOR_THE_MODEL = {
    "completion_mask",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "ref_token_logps",
    STATES,
    TEACHER_PROMPTS,
    BLIND,
    *PAIR_COLUMNS,
}

Arrange = Callable[[Tensor, Tensor], Layout]
"""A function of `input_ids` and `attention_mask`, see `contralto.align.trainers.layouts`."""


class PairBatch(NamedTuple):
    """A batch of B pairs: 2B padded rows of prompt and completion, the chosen completions first."""

    inputs: dict[str, Any]
    """The arguments of the model's forward."""
    labels: Tensor
    """`(2B, T)`, `IGNORED` outside the completions."""
    mask: Tensor
    """`(2B, T - 1)`, true where the next token belongs to the completion."""
    lengths: Tensor
    """`(2B,)` tokens of the completions."""
    columns: dict[str, Tensor]
    """`(B,)` by name, of `PAIR_COLUMNS`."""
    ref_token_logps: Tensor | None
    """`(2B, T - 1)` log-probabilities of a precomputed reference."""
    teacher_states: Tensor | None = None
    """`(N, H)` precomputed hidden states of a teacher at the scored tokens."""
    teacher_prompts: Tensor | None = None
    """`(B, P)` prompts in the tokens of a teacher with another tokenizer, padded with `IGNORED`."""
    layout: Layout | None = None
    """Inputs of the model in place of the padded rows."""
    blind: "PairBatch | None" = None
    """The same completions without an image, from `TwoImageCollator`."""

    @classmethod
    def of(cls, inputs: Mapping[str, Any], arrange: Arrange | None = None) -> "PairBatch":
        """Make a batch of the tensors that a collator returned.

        Args:
            inputs: the collator's tensors by name.
            arrange: the layout for the model; None keeps the padded rows.
        """
        scored = inputs["completion_mask"].bool()
        mask = scored[:, 1:]
        cached = inputs.get("ref_token_logps")
        return cls(
            inputs={name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL},
            labels=inputs["input_ids"].masked_fill(~scored, IGNORED),
            mask=mask,
            lengths=scored.sum(-1),
            columns={name: inputs[name] for name in PAIR_COLUMNS if name in inputs},
            ref_token_logps=None if cached is None else _unpacked(cached, mask),
            teacher_states=inputs.get(STATES),
            teacher_prompts=inputs.get(TEACHER_PROMPTS),
            layout=None if arrange is None else arrange(inputs["input_ids"], inputs["attention_mask"]),
            blind=cls.of(inputs[BLIND]) if BLIND in inputs else None,
        )

    def side(self, number: int) -> "PairBatch":
        """Return the padded rows of the chosen completions or of the rejected ones, to be scored alone.

        Args:
            number: 0 for chosen, 1 for rejected.
        """
        inputs = {name: value.chunk(2)[number] for name, value in self.inputs.items()}
        labels, mask = self.labels.chunk(2)[number], self.mask.chunk(2)[number]
        return self._replace(inputs=inputs, labels=labels, mask=mask, layout=None)


def _unpacked(packed: Tensor, mask: Tensor) -> Tensor:
    """Place the numbers that each row holds contiguously at the positions of the mask."""
    filled = torch.arange(packed.shape[1], device=packed.device) < mask.sum(-1, keepdim=True)
    return packed.new_zeros(mask.shape).masked_scatter(mask, packed[filled])
