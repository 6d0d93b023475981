"""The rows of a comparison."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ComparisonRow"]


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """A decoder of a comparison: a baseline, a control or a method."""

    name: str
    role: str
    """baseline, control or method."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `ContraltoLM.decoding_by`; a sampled row gets a seed besides."""
    against: tuple[str, ...] = ()
    """The rows that it is tested against."""
    same_as: str | None = None
    """The row that it equals by definition; then it is not run."""
    matched_to: str | None = None
    """The row whose number of yes the bias-matched threshold reaches; then it is not run."""
    modified: bool = False
    """Output layer modification: yes wherever yes and no are close, else the baseline's answer; then it is not run."""
    hint: str | None = None
    """The sentence after every question of the prompt."""
    alone: str | None = None
    """The option that names the other model which answers by itself."""
    note: str = ""

    @property
    def is_run(self) -> bool:
        """Return True if its answers come from a run of its own."""
        return not (self.same_as or self.matched_to or self.modified)

    @property
    def is_sampled(self) -> bool:
        """Return True if its answers differ from seed to seed."""
        return bool(self.options.get("temperature"))
