"""The measurements of a preference training, kept in a file beside the checkpoints."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from contralto.align.monitoring.findings import Finding
from contralto.common.files import replace_text

__all__ = ["RECORD", "Point", "Record"]

RECORD = "monitor.json"


@dataclass
class Point:
    """A measurement."""

    step: int
    epoch: float
    chosen: list[float]
    """The change of the log-probability of the chosen completion since the start, per pair, in nats."""
    rejected: list[float]
    """The same for the rejected completion."""
    kl: float | None = None
    """KL(reference || policy) in nats per token, over all tokens of all completions."""
    length: float | None = None
    """Mean number of tokens that the policy generates for the prompts, greedily."""

    @property
    def displaced(self) -> float:
        """Return the share of pairs whose chosen completion has become less likely."""
        return sum(change < 0 for change in self.chosen) / len(self.chosen)

    @property
    def won(self) -> float:
        """Return the share of pairs whose margin has grown."""
        return sum(a > b for a, b in zip(self.chosen, self.rejected, strict=True)) / len(self.chosen)

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log."""
        means = {"chosen": fmean(self.chosen), "rejected": fmean(self.rejected)}
        others = {"displaced": self.displaced, "won": self.won, "kl": self.kl, "length": self.length}
        return {f"monitor/{name}": value for name, value in (means | others).items() if value is not None}


@dataclass
class Record:
    """The data of a report, kept as JSON beside the checkpoints and rewritten at every measurement."""

    key: str
    """A hash of the pairs: a resumed run continues its record if they are the same."""
    source: str
    """The name of the dataset of the pairs."""
    pairs: list[dict[str, Any]]
    """`name`, `prompt`, `chosen`, `rejected` as strings, `chosen_tokens`, `rejected_tokens`."""
    start_chosen: list[float]
    """Log-probabilities of the chosen completions before training."""
    start_rejected: list[float]
    """Log-probabilities of the rejected completions before training."""
    ches: list[float | None]
    """ln-CHES of every pair before training; None if a completion has no token."""
    points: list[Point] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    """Findings of the audit."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """`step`, `kind`, `text`."""
    about: dict[str, Any] = field(default_factory=dict)
    """The model, the data, settings, versions."""
    logs: list[dict[str, Any]] = field(default_factory=list)
    """The log history of the trainer."""

    def save(self, folder: Path) -> None:
        """Write the record atomically.

        Args:
            folder: the output folder of the run.
        """
        values = dataclasses.asdict(self) | {"findings": [each._asdict() for each in self.findings]}
        replace_text(folder / RECORD, json.dumps(values, default=str))

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """Read the record of a run.

        Args:
            folder: the output folder of the run.

        Raises:
            ValueError: the folder has no record.
        """
        path = folder / RECORD
        if not path.is_file():
            raise ValueError(f"there is no {RECORD} in {folder}: train with monitor_pairs above 0, into this folder")
        values = json.loads(path.read_text(encoding="utf-8"))
        points = [Point(**each) for each in values.pop("points")]
        findings = [Finding(**each | {"rows": tuple(each["rows"])}) for each in values.pop("findings")]
        return cls(**values, points=points, findings=findings)
