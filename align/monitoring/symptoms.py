"""Warnings about a training that goes wrong, derived from its measurements."""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from contralto.align.losses.loss import Loss
from contralto.align.losses.registry import LOSSES
from contralto.align.monitoring.findings import IDLE
from contralto.align.monitoring.record import Point, Record

__all__ = ["symptoms"]

LOST = 0.5
"""Nats per completion, on average, above which a loss of likelihood is reported."""
STANDARD_ERRORS = 2.0
"""A mean change is significant if it is this many standard errors from zero."""
FAR = 0.5
"""Nats per token of divergence from the reference: at this KL about every second token is another one."""
FLAT = 4.0
"""beta |r| above which a sigmoid has lost nine tenths of its slope and more."""
GROWN = 1.5
"""Factor by which generated completions may become longer, or shorter."""


def symptoms(
    record: Record, *, loss_types: Sequence[str] = (), beta: float = 0.1, is_last: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield the symptoms at the last measurement. A mean change counts if it is two standard errors from zero.

    Args:
        record: a record with at least one measurement.
        loss_types: the losses of the training; those that are meant to lower chosen completions may.
        beta: the beta of the training.
        is_last: the training is over.

    Yields:
        Kind and sentence of each symptom.

    Examples:
        >>> pairs = [{"chosen_tokens": 10, "rejected_tokens": 10}] * 3
        >>> record = Record("", "eval_dataset", pairs, [0.0] * 3, [0.0] * 3, [], [Point(8, 1.0, [-2.0, -3.0, -2.5], [-9.0] * 3)])
        >>> [kind for kind, _ in symptoms(record)]
        ['displacement']
    """
    point = record.points[-1]
    losses = [LOSSES.get(name) for name in loss_types]
    evidence = _Evidence(record, point, torch.tensor(point.chosen), torch.tensor(point.rejected), losses, beta, is_last)
    if not (evidence.chosen.isfinite().all() and evidence.rejected.isfinite().all()):
        yield (
            "broken",
            "log-probabilities are not finite any more: lower the learning rate, or use bfloat16 for float16.",
        )
        return
    for kind, describe in SYMPTOMS.items():
        if text := describe(evidence):
            yield kind, text


class _Evidence(NamedTuple):
    """The last measurement, and the facts about the training that the checks need."""

    record: Record
    point: Point
    chosen: Tensor
    """`(n,)` changes of log-probabilities, in nats."""
    rejected: Tensor
    losses: list[Loss]
    beta: float
    is_last: bool

    @property
    def pairs(self) -> str:
        """Return the number of pairs and where they come from, for a sentence."""
        return f"{len(self.chosen)} {'training' if self.record.source == 'train_dataset' else 'held-out'} pairs"


def _displacement(evidence: _Evidence) -> str:
    """Describe a significant loss of likelihood of chosen completions under losses that should not cause it."""
    is_meant = any(loss.lowers_chosen for loss in evidence.losses)
    if not _is_below(evidence.chosen, LOST) or evidence.point.displaced <= 0.5 or is_meant:
        return ""
    return (
        f"chosen texts lose likelihood: {evidence.point.displaced:.0%} of {evidence.pairs}, {evidence.chosen.mean():+.3g} nats on average "
        f"(rejected {evidence.rejected.mean():+.3g}). The margin grows by making both less likely (likelihood displacement). An sft "
        "term, apo_zero, a smaller learning rate, or leaving out the pairs with the highest CHES score hold them up."
    )


def _reversal(evidence: _Evidence) -> str:
    """Describe margins that shrink."""
    if not _is_below(evidence.chosen - evidence.rejected):
        return ""
    return (
        f"rejected texts gain on chosen ones: the margin grew in {evidence.point.won:.0%} of {evidence.pairs}. Check that chosen and "
        "rejected are not exchanged, and that the learning rate is not too high."
    )


def _distance(evidence: _Evidence) -> str:
    """Describe a large divergence from the reference."""
    if evidence.point.kl is None or evidence.point.kl <= FAR:
        return ""
    return (
        f"the policy is {evidence.point.kl:.3g} nats per token from its reference: raise beta, lower the learning rate, or stop "
        "here."
    )


def _saturation(evidence: _Evidence) -> str:
    """Describe saturated sigmoids of single completions; a sigmoid of a difference is expected to saturate."""
    saturating = sorted(loss.name for loss in evidence.losses if loss.saturates)
    flat = ((evidence.beta * torch.cat([evidence.chosen, evidence.rejected])).abs() > FLAT).float().mean()
    if flat <= 0.5 or not saturating:
        return ""
    return (
        f"{flat:.0%} of the texts have beta |log-ratio| above {FLAT:g}, where the sigmoids of {', '.join(saturating)} are "
        "flat, and pull no more: lower beta, or use the length-normalised form (apo_zero_norm, apo_down_norm)."
    )


def _idleness(evidence: _Evidence) -> str:
    """Describe a training that has changed nothing."""
    moved = _mean_change_per_token(evidence.record, evidence.point)
    if not evidence.is_last or moved >= IDLE:
        return ""
    return (
        f"nothing has moved: texts changed by {moved:.1g} nats per token in all. Raise the learning rate; an adapter wants ten to a "
        "hundred times that of full training."
    )


def _length_change(evidence: _Evidence) -> str:
    """Describe a change in the length of generated completions."""
    first, last = evidence.record.points[0].length, evidence.point.length
    if not first or last is None or first / GROWN <= last <= first * GROWN:
        return ""
    return (
        f"texts that the model writes have changed from {first:.0f} to {last:.0f} tokens: compare the lengths of chosen and rejected "
        "texts; sigmoid_norm, ld_alpha or simpo take length out of the loss."
    )


SYMPTOMS: dict[str, Callable[[_Evidence], str]] = {
    "displacement": _displacement,
    "reversed": _reversal,
    "far": _distance,
    "flat": _saturation,
    "idle": _idleness,
    "length": _length_change,
}
"""By kind: the function that returns a sentence, or an empty string. Each kind is reported once in a run."""


def _is_below(changes: Tensor, least: float = 0.0) -> bool:
    """Return whether the mean is significantly below zero, and at most `-least`."""
    if len(changes) < 2:
        return False
    upper = changes.mean() + STANDARD_ERRORS * changes.std() / math.sqrt(len(changes))
    return bool(upper < 0 and changes.mean() <= -least)


def _mean_change_per_token(record: Record, point: Point) -> float:
    """Return the mean absolute change, in nats per token."""
    tokens = [max(1, pair[f"{side}_tokens"]) for side in ("chosen", "rejected") for pair in record.pairs]
    return fmean(abs(change) / n for change, n in zip(point.chosen + point.rejected, tokens, strict=True))
