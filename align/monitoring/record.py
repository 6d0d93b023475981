"""The measurements of a preference training, kept as a file, and what they say in words."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.monitoring.findings import IDLE, Finding
from contralto.common.files import replace_text

__all__ = ["RECORD", "Point", "Record", "symptoms"]

RECORD = "monitor.json"
LOST = 0.5
"""Nats per text, on average, from which a loss of likelihood is worth a warning."""
ERRORS = 2.0
"""Standard errors from zero from which a mean change is believed."""
FAR = 0.5
"""Nats per token of divergence from the reference: at a KL of that size every second token or so is another one."""
FLAT = 4.0
"""beta |r| from which a sigmoid has lost nine tenths of its slope and more."""
GROWN = 1.5
"""How many times longer, or shorter, generated texts may become."""
ANCHORED = {"apo_zero", "apo_down", "apo_auto"}
LOWERING = {"apo_down", "apo_down_norm", "apo_auto"}
"""Losses that are meant to lower chosen texts."""


@dataclass
class Point:
    """A measurement."""

    step: int
    epoch: float
    chosen: list[float]
    """Of every pair, by how many nats the chosen text has become likelier since the start."""
    rejected: list[float]
    kl: float | None = None
    """KL(reference || policy) in nats per token, over all tokens of all texts."""
    length: float | None = None
    """Tokens of texts that the policy writes for the prompts, greedily; the mean."""

    @property
    def displaced(self) -> float:
        """The share of pairs whose chosen text has become less likely."""
        return sum(change < 0 for change in self.chosen) / len(self.chosen)

    @property
    def won(self) -> float:
        """The share of pairs whose margin has grown."""
        return sum(a > b for a, b in zip(self.chosen, self.rejected, strict=True)) / len(self.chosen)

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        means = {"chosen": _mean(self.chosen), "rejected": _mean(self.rejected)}
        others = {"displaced": self.displaced, "won": self.won, "kl": self.kl, "length": self.length}
        return {f"monitor/{name}": value for name, value in (means | others).items() if value is not None}


@dataclass
class Record:
    """All that a report is made of. It is kept as JSON beside the checkpoints, and written anew at every measurement."""

    key: str
    """A hash of the pairs: a run that resumes goes on with its record if they are the same."""
    source: str
    """Which data set they are of."""
    pairs: list[dict[str, Any]]
    """`name`, `prompt`, `chosen`, `rejected` as texts, `chosen_tokens`, `rejected_tokens`."""
    start_chosen: list[float]
    """Log-probabilities before training."""
    start_rejected: list[float]
    ches: list[float | None]
    """ln-CHES of every pair before training; None if a text has no token."""
    points: list[Point] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    """Of the audit."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """`step`, `kind`, `text`."""
    about: dict[str, Any] = field(default_factory=dict)
    """The model, the data, settings, versions."""
    logs: list[dict[str, Any]] = field(default_factory=list)
    """What the trainer logged."""

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        said = dataclasses.asdict(self) | {"findings": [each._asdict() for each in self.findings]}
        replace_text(folder / RECORD, json.dumps(said, default=str))

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """Read it.

        Raises:
            ValueError: there is none.
        """
        path = folder / RECORD
        if not path.is_file():
            raise ValueError(f"there is no {RECORD} in {folder}: train with monitor_pairs above 0, into this folder")
        said = json.loads(path.read_text(encoding="utf-8"))
        points = [Point(**each) for each in said.pop("points")]
        findings = [Finding(**each | {"rows": tuple(each["rows"])}) for each in said.pop("findings")]
        return cls(**said, points=points, findings=findings)


def symptoms(
    record: Record, *, loss_types: Sequence[str] = (), beta: float = 0.1, is_last: bool = False
) -> Iterator[tuple[str, str]]:
    """What is wrong at the last measurement, as kinds and sentences.

    A mean change counts where it is two standard errors from zero.

    Args:
        record: with at least one measurement.
        loss_types: of the training; those that are meant to lower chosen texts may.
        beta: of the training.
        is_last: whether the training is over.

    Examples:
        >>> pairs = [{"chosen_tokens": 10, "rejected_tokens": 10}] * 3
        >>> record = Record("", "eval_dataset", pairs, [0.0] * 3, [0.0] * 3, [], [Point(8, 1.0, [-2.0, -3.0, -2.5], [-9.0] * 3)])
        >>> [kind for kind, _ in symptoms(record)]
        ['displacement']
    """
    point = record.points[-1]
    look = _Look(
        record, point, torch.tensor(point.chosen), torch.tensor(point.rejected), set(loss_types), beta, is_last
    )
    if not (look.chosen.isfinite().all() and look.rejected.isfinite().all()):
        yield (
            "broken",
            "log-probabilities are not finite any more: lower the learning rate, or use bfloat16 for float16.",
        )
        return
    for kind, say in SYMPTOMS.items():
        if text := say(look):
            yield kind, text


class _Look(NamedTuple):
    """What the symptoms are looked for in."""

    record: Record
    point: Point
    chosen: Tensor
    rejected: Tensor
    losses: set[str]
    beta: float
    is_last: bool

    @property
    def pairs(self) -> str:
        return f"{len(self.chosen)} {'training' if self.record.source == 'train_dataset' else 'held-out'} pairs"


def _displacement(look: _Look) -> str:
    """Chosen texts lose likelihood, by more than chance and noticeably, under a loss that should not do so."""
    if not _is_below(look.chosen, LOST) or look.point.displaced <= 0.5 or LOWERING & look.losses:
        return ""
    return (
        f"chosen texts lose likelihood: {look.point.displaced:.0%} of {look.pairs}, {look.chosen.mean():+.3g} nats on average "
        f"(rejected {look.rejected.mean():+.3g}). The margin grows by making both less likely (likelihood displacement). An sft "
        "term, apo_zero, a smaller learning rate, or leaving out the pairs with the highest CHES score hold them up."
    )


def _reversal(look: _Look) -> str:
    if not _is_below(look.chosen - look.rejected):
        return ""
    return (
        f"rejected texts gain on chosen ones: the margin grew in {look.point.won:.0%} of {look.pairs}. Check that chosen and "
        "rejected are not exchanged, and that the learning rate is not too high."
    )


def _distance(look: _Look) -> str:
    if look.point.kl is None or look.point.kl <= FAR:
        return ""
    return (
        f"the policy is {look.point.kl:.3g} nats per token from its reference: raise beta, lower the learning rate, or stop "
        "here."
    )


def _flatness(look: _Look) -> str:
    """Sigmoids of single texts have no slope left; where a sigmoid is of a difference, that is as it should be."""
    flat = ((look.beta * torch.cat([look.chosen, look.rejected])).abs() > FLAT).float().mean()
    if flat <= 0.5 or not ANCHORED & look.losses:
        return ""
    return (
        f"{flat:.0%} of the texts have beta |log-ratio| above {FLAT:g}, where the sigmoids of {', '.join(sorted(look.losses))} are "
        "flat, and pull no more: lower beta, or use the length-normalised form (apo_zero_norm, apo_down_norm)."
    )


def _idleness(look: _Look) -> str:
    moved = _moved(look.record, look.point)
    if not look.is_last or moved >= IDLE:
        return ""
    return (
        f"nothing has moved: texts changed by {moved:.1g} nats per token in all. Raise the learning rate; an adapter wants ten to a "
        "hundred times that of full training."
    )


def _length_change(look: _Look) -> str:
    first, last = look.record.points[0].length, look.point.length
    if not first or last is None or first / GROWN <= last <= first * GROWN:
        return ""
    return (
        f"texts that the model writes have changed from {first:.0f} to {last:.0f} tokens: compare the lengths of chosen and rejected "
        "texts; sigmoid_norm, ld_alpha or simpo take length out of the loss."
    )


SYMPTOMS: dict[str, Callable[[_Look], str]] = {
    "displacement": _displacement,
    "reversed": _reversal,
    "far": _distance,
    "flat": _flatness,
    "idle": _idleness,
    "length": _length_change,
}
"""By kind: the sentence, empty if there is nothing to be said. Each kind is told once in a run."""


def _is_below(changes: Tensor, least: float = 0.0) -> bool:
    """Whether the mean is below zero by more than chance, and by at least so much."""
    if len(changes) < 2:
        return False
    return bool(changes.mean() + ERRORS * changes.std() / math.sqrt(len(changes)) < 0 and changes.mean() <= -least)


def _moved(record: Record, point: Point) -> float:
    """The mean absolute change, in nats per token."""
    tokens = [max(1, pair[f"{side}_tokens"]) for side in ("chosen", "rejected") for pair in record.pairs]
    return _mean([abs(change) / n for change, n in zip(point.chosen + point.rejected, tokens, strict=True)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
