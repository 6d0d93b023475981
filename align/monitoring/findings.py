"""The findings of an audit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

__all__ = ["IDLE", "Finding", "Level", "RowTally", "row_name"]

Level = Literal["error", "warning", "note"]
LISTED_ROWS = 8
"""Rows that a finding lists."""
IDLE = 1e-3
"""Nats per token; a training that changes completions by less has changed nothing."""


class Finding(NamedTuple):
    """A result of an audit."""

    level: Level
    text: str
    """The observation, one sentence."""
    advice: str
    """The remedy, one sentence."""
    rows: tuple[str, ...] = ()
    """The first affected rows: their `id`, or their number from 1."""
    seen: int = 0
    """The number of affected rows."""

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.text} {self.advice}"
        rest = f" and {self.seen - len(self.rows)} more" if self.seen > len(self.rows) else ""
        return f"{self.text} {self.advice} Rows: {', '.join(self.rows)}{rest}."


@dataclass
class RowTally:
    """The rows with a fault: their number, and the first names."""

    names: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, name: str) -> None:
        """Count a row.

        Args:
            name: the name of the row.
        """
        self.count += 1
        if len(self.names) < LISTED_ROWS:
            self.names.append(name)

    def finding(self, level: Level, text: str, advice: str) -> Finding:
        """Return the finding about these rows.

        Args:
            level: how serious it is.
            text: the observation.
            advice: the remedy.
        """
        return Finding(level, text, advice, tuple(self.names), self.count)


def row_name(row: Mapping[str, Any], number: int) -> str:
    """Return the `id` of a row, or its number.

    Args:
        row: a row of a dataset.
        number: the number of the row, from 1.

    Examples:
        >>> row_name({"id": "a7"}, 3), row_name({}, 3)
        ('a7', '3')
    """
    return str(row.get("id") or number)
