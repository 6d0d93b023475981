"""The training loop of the embedded models."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["fit", "save_half"]

T = TypeVar("T")
WARM_UP, CONSTANT, LEAST = 50, 0.3, 0.02
"""Steps of linear warm-up, the share of the steps with the full learning rate, and the factor of the rate at the end."""


def fit(
    model: nn.Module,
    batches: Iterable[T],
    loss: Callable[[T], Tensor],
    *,
    steps: int,
    adamw_lr: float,
    after_step: Callable[[int], None],
) -> None:
    """Train a model on one thread: Muon for the hidden matrices, AdamW for embeddings, norms and biases.

    Args:
        model: the model, in training mode.
        batches: one batch per step.
        loss: returns the loss of a batch, a scalar.
        steps: the number of batches, by which the learning rate decays.
        adamw_lr: the learning rate of AdamW; Muon's is 0.006.
        after_step: called with the number of the step, from 1.
    """
    torch.set_num_threads(1)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.006, weight_decay=0.0),
        torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, steps)) for o in optimizers]
    for step, batch in enumerate(batches, 1):
        torch.autograd.backward(loss(batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        after_step(step)


def _rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear warm-up, constant, then linear decay."""
    return min((step + 1) / WARM_UP, max(LEAST, (1 - step / steps) / (1 - CONSTANT)), 1.0)


def save_half(model: Any, processor: Any, folder: Path) -> None:
    """Save a model in half precision, to be loaded in single precision, with its tokenizer or processor.

    Args:
        model: the model.
        processor: its tokenizer or processor.
        folder: the folder to write.
    """
    state = {name: weight.half() for name, weight in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
