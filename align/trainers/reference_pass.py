"""The forward passes of the reference over a data set, for `precompute_ref_log_probs`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from contralto.align.caches.blocks import ID_COLUMNS, TokenRows
from contralto.align.trainers.base import StagedTrainer

__all__ = ["reference_logps"]


def reference_logps(trainer: StagedTrainer, rows: TokenRows, batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the reference's log-probabilities of rows, computed in batches of similar length by all processes.

    Args:
        trainer: the trainer.
        rows: tokenised rows, or rows with images, whose order stays; the same on all processes.
        batch_size: rows per forward pass and process.

    Returns:
        Log-probabilities `(tokens,)` of each row's chosen and of each row's rejected completion, the same on all processes.
    """
    order = sorted(range(len(rows)), key=lambda i: -sum(len(rows[i].get(name, ())) for name in ID_COLUMNS))
    sides: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
    world_size, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    training = trainer.model.training
    trainer.model.eval()
    for start in range(0, len(rows), batch_size * world_size):
        # every process runs as many forward passes: those of a sharded model wait for each other
        own = order[start + rank * batch_size :][:batch_size] or order[:1]
        logps, mask = _batch_logps(trainer, [rows[i] for i in own])
        for indices, values, valid in _gathered(own, logps, mask, world_size):
            for side, half, where in zip(sides, values.chunk(2), valid.chunk(2), strict=True):
                side.update({i: row[m].cpu() for i, row, m in zip(indices, half, where, strict=True)})
    trainer.model.train(training)
    return [sides[0][i] for i in range(len(rows))], [sides[1][i] for i in range(len(rows))]


def _batch_logps(trainer: StagedTrainer, rows: TokenRows) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and their mask, both `(2B, T - 1)`."""
    inputs = trainer.to_device(trainer.data_collator([dict(row) for row in rows]))
    with trainer.reference_model() as (model, _):
        batch = trainer.arranged(model, inputs)
        logps = trainer.score_tokens(model, batch).logps
    assert logps is not None
    return logps, batch.mask


def _gathered(
    own: Sequence[int], logps: Tensor, mask: Tensor, world_size: int
) -> list[tuple[Sequence[int], Tensor, Tensor]]:
    """Return the rows, log-probabilities and masks of every process."""
    if world_size == 1:
        return [(own, logps, mask)]
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, (list(own), logps.cpu(), mask.cpu()))
    return gathered
