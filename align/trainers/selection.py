"""Select the completions of a batch that have a weight in a step; models run on these only."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from contralto.align.trainers.batches import IGNORED, PairBatch

__all__ = ["CompletionBatch", "select_sides"]


class CompletionBatch(NamedTuple):
    """R completions of a batch of pairs."""

    batch: PairBatch
    rows: dict[str, slice]
    """The rows of the `chosen` completions, and of the `rejected` ones, in `batch`."""
    pairs: int
    """The number of pairs in the whole batch."""
    states: Tensor | None = None
    """Precomputed hidden states of the teacher at their tokens, `(N, H)`."""

    def token_counts(self) -> list[int]:
        """Return the number of tokens of each side, with one wait for the device."""
        counts: list[int] = torch.stack([self.batch.mask[rows].sum() for rows in self.rows.values()]).tolist()
        return counts


def select_sides(batch: PairBatch, sides: Sequence[str], cached: Sequence[str]) -> CompletionBatch:
    """Return the completions of some sides.

    Args:
        batch: the pairs.
        sides: `chosen`, `rejected` or both.
        cached: the sides whose states of the teacher the batch holds, if it holds any.
    """
    pairs = len(batch.labels) // 2
    halves = {"chosen": slice(0, pairs), "rejected": slice(pairs, 2 * pairs)}
    if len(sides) == 2:
        return CompletionBatch(batch, halves, pairs, batch.teacher_states)
    (side,) = sides
    rows, states = halves[side], _states_of_side(batch, side, cached)
    if batch.inputs.keys() <= {"input_ids", "attention_mask"}:
        inputs = {name: value[rows] for name, value in batch.inputs.items()}
        kept = batch._replace(
            inputs=inputs, labels=batch.labels[rows], mask=batch.mask[rows], lengths=batch.lengths[rows]
        )
        return CompletionBatch(kept, {side: slice(0, pairs)}, pairs, states)
    # images do not lie row by row, so that all rows stay, and only the labels of one side
    own = torch.zeros_like(batch.lengths, dtype=torch.bool)
    own[rows] = True
    labels, mask = batch.labels.masked_fill(~own[:, None], IGNORED), batch.mask & own[:, None]
    return CompletionBatch(batch._replace(labels=labels, mask=mask), {side: rows}, pairs, states)


def _states_of_side(batch: PairBatch, side: str, cached: Sequence[str]) -> Tensor | None:
    """Return the precomputed states of one side of a batch, which stores those of chosen completions first."""
    states = batch.teacher_states
    if states is None or len(cached) == 1:
        return states
    first = int(batch.mask[: len(batch.mask) // 2].sum())
    return states[:first] if side == "chosen" else states[first:]
