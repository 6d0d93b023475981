"""Collators that wrap those of TRL, which drop unknown columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from contralto.align.caches.teacher import read_states
from contralto.align.trainers.batches import BLIND, IGNORED, PAIR_COLUMNS, REFERENCE_COLUMNS, STATES, TEACHER_PROMPTS

__all__ = ["ColumnCollator", "TeacherPromptsCollator", "TeacherStatesCollator", "TwoImageCollator"]


class ColumnCollator:
    """A collator that also passes on `PAIR_COLUMNS` and `REFERENCE_COLUMNS`.

    Args:
        collator: the collator that makes the rest of the batch.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        columns = {name: [example[name] for example in examples] for name in PAIR_COLUMNS if name in examples[0]}
        cached = [example[name] for name in REFERENCE_COLUMNS if name in examples[0] for example in examples]
        own = (*PAIR_COLUMNS, *REFERENCE_COLUMNS)
        batch: dict[str, Any] = self.collator(_without(examples, own))
        batch |= {name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}
        if cached:
            rows = [torch.as_tensor(row, dtype=torch.float32) for row in cached]
            batch["ref_token_logps"] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return batch


class TeacherStatesCollator:
    """A collator that reads the teacher's states `(N, H)` of its rows from disk: those of all chosen completions, then of all rejected ones.

    Args:
        collator: the collator that makes the rest of the batch.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        places = [example[STATES] for example in examples if STATES in example]
        batch: dict[str, Any] = self.collator(_without(examples, (STATES,)))
        if places:
            sides = zip(*(read_states(place) for place in places), strict=True)
            batch[STATES] = torch.cat([states for side in sides for states in side])
        return batch


class TeacherPromptsCollator:
    """A collator that also pads the prompts in the tokens of a teacher with another tokenizer, `(B, P)`, with `IGNORED`.

    Args:
        collator: the collator that makes the rest of the batch.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(_without(examples, (TEACHER_PROMPTS,)))
        prompts = [torch.tensor(example[TEACHER_PROMPTS], dtype=torch.long) for example in examples]
        padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=IGNORED)
        return batch | {TEACHER_PROMPTS: padded}


class TwoImageCollator:
    """A collator for pairs of two images: each completion is read under its image, under the other one, and without one.

    The batch has 4B rows: the chosen completions under `images`, then under `rejected_images`, then the rejected completions in the same
    order. Its entry `BLIND` is a batch of 2B rows whose prompts have no image.

    Args:
        collator: TRL's, of one image (or one list of images) per pair.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        others = [example | {"images": example["rejected_images"]} for example in examples]
        blind = [example | {"images": [], "prompt": _without_images(example["prompt"])} for example in examples]
        batch = dict(self.collator([*(dict(example) for example in examples), *others]))
        return batch | {BLIND: dict(self.collator(blind))}


def _without(examples: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return examples without some of their columns."""
    return [{name: value for name, value in example.items() if name not in columns} for example in examples]


def _without_images(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a prompt without its images."""
    contents = [message["content"] for message in messages]
    kept = [c if isinstance(c, str) else [part for part in c if part["type"] != "image"] for c in contents]
    return [{**message, "content": content} for message, content in zip(messages, kept, strict=True)]
