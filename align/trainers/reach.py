"""Measure, before the first step, how far a training can change the log-probabilities of an adapted model.

An optimizer of the Adam family moves every weight by about the learning rate in a step, whatever the size of the gradient. So no weight
moves further than the sum of the learning rates of all steps, and a step of that size along the signs of the gradient changes
log-probabilities the most. If even that changes nothing, the training cannot: the usual cause is the learning rate of full fine-tuning with
an adapter, whose product of two small matrices starts at zero.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from contralto.align.trainers.batches import PairBatch

__all__ = ["reach", "total_rate"]

BY_SIZE = ("sgd",)
"""Parts of the names of optimizers whose steps grow with the gradient."""


def total_rate(trainer: Any) -> float:
    """Return the sum of the learning rates of all steps, by the trainer's schedule.

    Args:
        trainer: a trainer; if it has no scheduler yet, every step counts with the full learning rate.
    """
    steps, rate = trainer.state.max_steps, trainer.args.learning_rate
    schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    lambdas = getattr(schedule, "lr_lambdas", None)
    return float(rate * (sum(map(lambdas[0], range(steps))) if lambdas else steps))


def reach(trainer: Any) -> Iterator[tuple[float, float]]:
    """Yield the largest possible change of a pair's log-probabilities, in nats per token, and `total_rate`.

    Yields nothing where it cannot be known: before a training begins, without an adapter, with sharded weights, and with optimizers whose
    steps grow with the gradient. The weights are restored afterwards.

    Args:
        trainer: a `PreferenceTrainer` whose training begins.
    """
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    sharded = trainer.args.deepspeed_plugin is not None or any(isinstance(weight, DTensor) for weight in weights)
    by_size = any(part in str(trainer.args.optim) for part in BY_SIZE)
    if (
        not weights
        or trainer.state.max_steps < 1
        or sharded
        or by_size
        or not is_peft_model(trainer.unwrap(trainer.model))
    ):
        return
    total = total_rate(trainer)
    batch = PairBatch.of(trainer.to_device(trainer.data_collator([dict(next(iter(trainer.train_dataset)))])))
    signs = _signs(trainer, batch, weights)
    before = [weight.detach().clone() for weight in weights]
    try:
        start = _logps(trainer, batch)
        with torch.no_grad():
            for weight, sign in zip(weights, signs, strict=True):
                weight += total * sign
        moved = (_logps(trainer, batch) - start).abs().mean()
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
    yield float(moved), total


def _signs(trainer: Any, batch: PairBatch, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the direction that increases a pair's margin fastest under a bound on the change of each weight."""
    training = trainer.model.training
    trainer.model.train()  # so that checkpoints save the memory that they save in training
    try:
        with torch.enable_grad(), trainer.accelerator.autocast():
            logps = trainer.score_tokens(trainer.model, batch).logps.float()
            chosen, rejected = logps.sum(-1).chunk(2)
            found = torch.autograd.grad((chosen - rejected).sum(), list(weights), allow_unused=True)
    finally:
        trainer.model.train(training)
    return [torch.zeros_like(w) if g is None else g.sign().to(w.dtype) for w, g in zip(weights, found, strict=True)]


def _logps(trainer: Any, batch: PairBatch) -> Tensor:
    with torch.no_grad(), trainer.accelerator.autocast():
        logps: Tensor = trainer.score_tokens(trainer.model, batch).logps[batch.mask].float()
    return logps
