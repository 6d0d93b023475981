"""Fail every call of a component once, resume its work, and compare the result with that of an undisturbed run."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from components import Component
from injection import Kind, Outcome, tried


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

    The first run is in this process, so that the children of later ones find everything imported.

    Raises:
        RuntimeError: the run fails, or two runs differ.
    """
    _begin(component, folder)
    component.read(folder, component.run(folder, False))
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
    _begin(component, folder)
    return tried(
        lambda: component.run(folder, False), lambda result: component.read(folder, result), folder, kind, number
    )


def _begin(component: Component, folder: Path) -> None:
    """Make a new folder with the inputs, which are made once."""
    inputs = folder.parents[1] / "inputs" / component.name
    if not inputs.exists():
        (inputs / folder.name).mkdir(parents=True)
        component.prepare(inputs / folder.name)
    with suppress(FileNotFoundError):
        shutil.rmtree(folder.parent)
    shutil.copytree(inputs, folder.parent)


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


class Result(NamedTuple):
    """The trials of a component."""

    component: str
    calls: int
    """Of an undisturbed run."""
    every: int
    """1 if each call failed in some trial, n if each n-th did."""
    trials: list[Trial]

    @property
    def verdicts(self) -> Counter[str]:
        """Return the number of trials by verdict."""
        return Counter(trial.verdict for trial in self.trials)


VERDICTS = ("unharmed", "recovered", "refused", "silent", "unclear")


def table(results: Sequence[Result]) -> str:
    """Return a table with a line per component."""
    lines = [f"| component | calls | failed | faults | {' | '.join(VERDICTS)} |", "|---" * (len(VERDICTS) + 4) + "|"]
    for each in results:
        counts, share = each.verdicts, "each" if each.every == 1 else f"one in {each.every}"
        faults = sum(counts[name] for name in VERDICTS)
        numbers = " | ".join(str(counts[name]) for name in VERDICTS)
        lines.append(f"| {each.component} | {each.calls} | {share} | {faults} | {numbers} |")
    return "\n".join(lines)


def page(results: Sequence[Result]) -> str:
    """Return the page of the results, with the sentences of the second runs that refused to resume."""
    errors = sorted({trial.second_error for each in results for trial in each.trials if trial.verdict == "refused"})
    refusals = [f"- {error}" for error in errors] or ["None: every second run ended with the undisturbed result."]
    return "\n".join(
        [
            "# Every fault once",
            "",
            "`make faults`; [what is injected](../../docs/reliability.md)",
            "",
            table(results),
            "",
            "## Refusals of a second run",
            "",
            *refusals,
            "",
        ]
    )


def read(path: Path) -> Result:
    """Read a result that was kept as JSON."""
    name, calls, every, trials = json.loads(path.read_text(encoding="utf-8"))
    return Result(name, calls, every, [Trial(*each) for each in trials])
