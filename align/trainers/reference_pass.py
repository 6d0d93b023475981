"""The forward passes of the reference over a data set, for `precompute_ref_log_probs`."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from contralto.align.caches.blocks import ID_COLUMNS, TokenRows
from contralto.align.trainers.base import StagedTrainer

__all__ = ["ReferencePass", "starting_size"]

logger = logging.getLogger(__name__)

MULTIPLE = 8
"""Size of the first batch that is tried, in batches of training: those keep the activations of all layers for the backward pass."""

Passed = tuple[Sequence[int], Tensor, Tensor]
"""Numbers of rows, their log-probabilities and the mask of these, both `(2B, T - 1)`."""


def starting_size(args: Any, batch_size: int, device: str) -> int:
    """Return the rows per forward pass and process with which the reference begins.

    Args:
        args: the configuration of the training.
        batch_size: its `precompute_ref_batch_size`, which is taken as it is, or the size of a batch in training.
        device: the type of the device. On a CPU larger batches gain little, and the system ends a process that takes all memory.
    """
    if args.precompute_ref_batch_size or device == "cpu":
        return batch_size
    # without padding a batch is one row, for which other kernels than flash attention take quadratic time
    return batch_size if args.padding_free else MULTIPLE * batch_size


class ReferencePass:
    """Computes the reference's log-probabilities of rows, in batches of similar length by all processes.

    A batch that runs out of memory on one process is halved on all, and so are those that follow, also in further calls; what has been
    computed before is kept. A sharded model (FSDP, DeepSpeed) cannot do so: its processes wait for each other within a forward pass.

    Args:
        trainer: the trainer.
        batch_size: rows per forward pass and process to begin with.

    Attributes:
        batch_size: rows per forward pass and process that fit, as far as is known.
    """

    def __init__(self, trainer: StagedTrainer, batch_size: int) -> None:
        self.trainer, self.batch_size = trainer, batch_size
        self._is_sharded = bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)

    def __call__(self, rows: TokenRows) -> tuple[list[Tensor], list[Tensor]]:
        """Return the reference's log-probabilities of rows.

        Args:
            rows: tokenised rows, or rows with images, whose order stays; the same on all processes.

        Returns:
            Log-probabilities `(tokens,)` of each row's chosen and of each row's rejected completion, the same on all processes.

        Raises:
            RuntimeError: a single row does not fit into memory.
        """
        order = sorted(range(len(rows)), key=lambda i: -sum(len(rows[i].get(name, ())) for name in ID_COLUMNS))
        sides: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        training = self.trainer.model.training
        self.trainer.model.eval()
        if self.trainer.arrange is not None:
            self._check_layout(rows, order)
        if self._is_sharded:
            run = functools.partial(self._run, self.batch_size)
        else:
            run = find_executable_batch_size(self._run, self.batch_size, self._halve)
        run(rows, order, sides)
        self.trainer.model.train(training)
        return [sides[0][i] for i in range(len(rows))], [sides[1][i] for i in range(len(rows))]

    def _run(
        self, batch_size: int, rows: TokenRows, order: Sequence[int], sides: tuple[dict[int, Tensor], dict[int, Tensor]]
    ) -> None:
        """Add the log-probabilities of the rows that have none yet to `sides`."""
        while (start := len(sides[0])) < len(order):
            for indices, values, valid in self._passed(rows, self._own(order[start:], batch_size) or order[:1]):
                for side, half, where in zip(sides, values.chunk(2), valid.chunk(2), strict=True):
                    side.update({i: row[m].cpu() for i, row, m in zip(indices, half, where, strict=True)})

    def _own(self, order: Sequence[int], batch_size: int) -> Sequence[int]:
        """Return the rows of this process's next batch, none if there are fewer batches than processes."""
        return order[self.trainer.accelerator.process_index * batch_size :][:batch_size]

    def _halve(self) -> int:
        if self.batch_size == 1:
            raise RuntimeError("the reference's forward pass of one pair runs out of memory: set a smaller max_length")
        self.batch_size //= 2
        logger.info("a forward pass of the reference ran out of memory: going on with %d pairs", self.batch_size)
        return self.batch_size

    def _check_layout(self, rows: TokenRows, order: Sequence[int]) -> None:
        """Check the layout on a batch of training's size: all processes have to get through it."""
        own = self._own(order, self.trainer.args.per_device_train_batch_size) or order[:1]
        with self.trainer.reference_model() as (model, _):
            self.trainer.arranged(model, self._inputs(rows, own))

    def _inputs(self, rows: TokenRows, own: Sequence[int]) -> dict[str, Any]:
        return self.trainer.to_device(self.trainer.data_collator([dict(rows[i]) for i in own]))

    def _passed(self, rows: TokenRows, own: Sequence[int]) -> Sequence[Passed]:
        """Return the results of a forward pass of every process.

        Raises:
            RuntimeError: one of them ran out of memory.
        """
        world_size = self.trainer.accelerator.num_processes
        if world_size == 1:
            return [self._forward(rows, own)]
        passed = None
        try:
            _, logps, mask = self._forward(rows, own)
            passed = (list(own), logps.cpu(), mask.cpu())
        except RuntimeError as error:
            if self._is_sharded or not should_reduce_batch_size(error):
                raise
        gathered: list[Passed | None] = [None] * world_size
        torch.distributed.all_gather_object(gathered, passed)
        results = [each for each in gathered if each is not None]
        if len(results) < world_size:
            raise torch.OutOfMemoryError("the reference's forward pass on one of the processes ran out of memory.")
        return results

    def _forward(self, rows: TokenRows, own: Sequence[int]) -> Passed:
        with self.trainer.reference_model() as (model, _):
            batch = self.trainer.arranged(model, self._inputs(rows, own))
            logps = self.trainer.score_tokens(model, batch).logps
        assert logps is not None
        return own, logps, batch.mask
