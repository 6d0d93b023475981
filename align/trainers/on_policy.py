"""Completions that the student writes anew during training: on-policy distillation, step by step (GKD, arXiv 2306.13649)."""

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from contralto.align.trainers.specials import end_tokens

__all__ = ["OnPolicySampling", "is_drawn", "sampling_of", "with_own_completions"]

ROWS = ("input_ids", "attention_mask", "completion_mask")
"""The tensors of a batch `(2B, T)`, the chosen completions first."""


class OnPolicySampling(NamedTuple):
    """The options of sampling from the student."""

    max_new_tokens: int
    temperature: float
    max_length: int | None
    """Tokens of prompt and completion together; None does not limit them."""
    pad_token: int
    end_tokens: tuple[int, ...]


def is_drawn(share: float, *key: int) -> bool:
    """Return whether a step is one of those in which the student writes, which its number alone decides.

    Args:
        share: the share of such steps, in [0, 1].
        key: numbers of the run, the process and the step.

    Examples:
        >>> is_drawn(1.0, 0, 3), is_drawn(0.0, 0, 3), sum(is_drawn(0.25, 0, step) for step in range(1000))
        (True, False, 256)
    """
    return random.Random(repr(key)).random() < share


def sampling_of(trainer: Any) -> OnPolicySampling:
    """Return the options of sampling from the student of a trainer.

    Args:
        trainer: a `DistillationPairTrainer`.
    """
    args, processing = trainer.args, trainer.processing_class
    tokenizer = getattr(processing, "tokenizer", processing)
    ends = tuple(sorted(end_tokens(trainer.policy, tokenizer)))
    return OnPolicySampling(
        args.max_new_tokens, args.sampling_temperature, args.max_length, tokenizer.pad_token_id, ends
    )


@torch.no_grad()
def with_own_completions(model: Any, batch: Mapping[str, Any], sampling: OnPolicySampling) -> dict[str, Any]:
    """Return a batch of pairs in which samples of a model take the place of the rejected completions.

    Prompts are those of the rejected completions. Rows are padded on the right, as before.

    Args:
        model: the student, without wrappers. It generates in evaluation mode, and is put back into its mode.
        batch: the batch as the collator returned it, on the device.
        sampling: the options of sampling.

    Returns:
        The batch with other `input_ids`, `attention_mask` and `completion_mask`.
    """
    halves = {name: batch[name].chunk(2) for name in ROWS}
    rows = zip(*(halves[name][1] for name in ROWS), strict=True)
    prompts = [ids[(attended.bool()) & ~scored.bool()] for ids, attended, scored in rows]
    longest = max(map(len, prompts))
    room = sampling.max_new_tokens
    if sampling.max_length is not None:
        room = max(1, min(room, sampling.max_length - longest))
    inputs = {
        "input_ids": pad_sequence(prompts, batch_first=True, padding_value=sampling.pad_token, padding_side="left"),
        "attention_mask": pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"),
    }
    training = model.training
    written = model.eval().generate(
        **inputs,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=room,
        pad_token_id=sampling.pad_token,
        eos_token_id=list(sampling.end_tokens) or None,
    )[:, longest:]
    model.train(training)
    completions = [_until_end(row, sampling.end_tokens) for row in written]
    fresh = {
        "input_ids": [torch.cat(parts) for parts in zip(prompts, completions, strict=True)],
        "attention_mask": [torch.ones(len(p) + len(c)) for p, c in zip(prompts, completions, strict=True)],
        "completion_mask": [
            torch.cat([torch.zeros(len(p)), torch.ones(len(c))]) for p, c in zip(prompts, completions, strict=True)
        ],
    }
    padding = {"input_ids": sampling.pad_token, "attention_mask": 0, "completion_mask": 0}
    replaced = {
        name: pad_sequence(
            [*halves[name][0], *(row.to(batch[name]) for row in fresh[name])],
            batch_first=True,
            padding_value=padding[name],
        )
        for name in ROWS
    }
    return {**batch, **replaced}


def _until_end(tokens: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Return tokens up to and including the first end-of-sequence token."""
    at = torch.isin(tokens, tokens.new_tensor(ends)).nonzero() if ends else tokens.new_zeros((0, 1))
    return tokens[: int(at[0, 0]) + 1] if len(at) else tokens
