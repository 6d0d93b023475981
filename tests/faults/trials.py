"""Fail every call of a component once, resume its work, and compare the result with that of an undisturbed run."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from injection import Kind, Outcome, tried


class Component(NamedTuple):
    """A part of contralto that leaves files behind."""

    name: str
    run: Callable[[Path, bool], Any]
    """Do the work in a folder; with True after a run that failed."""
    read: Callable[[Path, Any], Any]
    """Return what a reader finds in the folder, and in what `run` returned; equal in every undisturbed run."""
    prepare: Callable[[Path], None] = lambda folder: None
    """Make the inputs in the folder."""


class Trial(NamedTuple):
    """A call that failed, and what became of the run and of the one that resumed it."""

    component: str
    kind: str
    number: int
    call: str
    first: str
    first_error: str
    second: str
    second_error: str

    @property
    def verdict(self) -> str:
        """Return `unharmed`, `recovered`, `refused`, `silent`, `unclear`, or `missed` if no call failed."""
        if {self.first, self.second} & {"wrong", "different", "unread"}:
            return "silent"
        if {self.first, self.second} & {"bug", "hung", "crashed"} or self.second == "killed":
            return "unclear"
        if self.second == "refused":
            return "refused"
        if not self.call and self.first == "done":
            return "missed"
        return "unharmed" if self.first == "done" else "recovered"


def undisturbed(component: Component, folder: Path) -> Any:
    """Return what a reader finds after a run without a fault.

    Raises:
        RuntimeError: the run fails, or two runs differ.
    """
    values = []
    for _ in range(2):
        outcome = _first(component, folder, Kind.FULL, -1)
        if outcome.how != "done":
            raise RuntimeError(f"{component.name} fails without a fault: {outcome.value}")
        values.append(outcome.value)
    if values[0] != values[1]:
        raise RuntimeError(f"two runs of {component.name} differ without a fault: {_difference(*values)}")
    return values[0]


def calls(component: Component, folder: Path, kind: Kind) -> int:
    """Return the number of calls of a run to which a kind of fault applies."""
    return _first(component, folder, kind, -1).calls


def trials(component: Component, folder: Path, kind: Kind, numbers: range, expected: Any) -> Iterator[Trial]:
    """Yield a trial for each number of a call."""
    for number in numbers:
        first = _first(component, folder, kind, number)
        second = tried(
            lambda: component.run(folder, True), lambda result: component.read(folder, result), folder, Kind.FULL, -1
        )
        yield Trial(
            component.name,
            kind.name.lower(),
            number,
            first.struck,
            *_compared(first, expected, "wrong"),
            *_compared(second, expected, "different"),
        )


def _first(component: Component, folder: Path, kind: Kind, number: int) -> Outcome:
    """Run the component in a new folder."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder.parent)
    folder.mkdir(parents=True)
    component.prepare(folder)
    return tried(
        lambda: component.run(folder, False), lambda result: component.read(folder, result), folder, kind, number
    )


def _compared(outcome: Outcome, expected: Any, otherwise: str) -> tuple[str, str]:
    if outcome.how != "done":
        return outcome.how, str(outcome.value)
    return ("done", "") if outcome.value == expected else (otherwise, _difference(outcome.value, expected))


def _difference(value: Any, expected: Any) -> str:
    """Return where two values differ first."""
    if isinstance(value, dict) and isinstance(expected, dict):
        differing = [key for key in {**value, **expected} if value.get(key) != expected.get(key)]
        return f"{differing[0]}: {_difference(value.get(differing[0]), expected.get(differing[0]))}"
    return f"{str(value)[:300]!r} and not {str(expected)[:300]!r}"


def table(trials: list[Trial], calls: dict[str, int]) -> str:
    """Return a table of the verdicts, a line per component."""
    verdicts = ("unharmed", "recovered", "refused", "silent", "unclear")
    lines = [f"| component | calls | faults | {' | '.join(verdicts)} |", "|---" * (len(verdicts) + 3) + "|"]
    for name, number in calls.items():
        counts = Counter(trial.verdict for trial in trials if trial.component == name)
        struck = sum(counts.values()) - counts["missed"]
        lines.append(f"| {name} | {number} | {struck} | {' | '.join(str(counts[each]) for each in verdicts)} |")
    return "\n".join(lines)
