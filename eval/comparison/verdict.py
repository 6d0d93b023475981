"""The result of a comparison in one sentence: which decoder wins, by how much, at what cost, and how sure that is.

A method wins with a model on a task if it is better than its baseline, than each of its controls, and than its rival: the best of
the other rows that contrast nothing. Each is a paired exact test. The p of a win is the largest of these tests, after two
adjustments: Holm's over the tasks and models of one line (`significance.adjust`), and Bonferroni's over the methods, because the
sentence is about the best of them:

    p(win) = min(1, methods max_t holm(t)) < 0.05        methods: the number of method rows, over kinds of tasks

Without a win the sentence gives the smallest difference that the test against the baseline finds four times in five at this level.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from contralto.eval.comparison.significance import smallest_difference

__all__ = ["LEVEL", "conclude", "relative_cost"]

LEVEL = 0.05
"""The level of significance, after the adjustments."""
NAMED = 4
"""The largest number of tasks that one sentence names one by one."""


class _MethodLine(NamedTuple):
    """A method row of a task, against everything that could explain its gain."""

    row: Mapping[str, Any]
    sign: int
    """1 if higher values of the metric are better, else -1."""
    methods: int
    """The number of methods that the best one is chosen from."""

    @property
    def cells(self) -> dict[str, Mapping[str, Any]]:
        """Return the cells with tests, by model."""
        return {model: cell for model, cell in self.row["cells"].items() if cell["tests"]}

    @property
    def baseline(self) -> str:
        """Return the name of the baseline."""
        return str(next(iter(self.cells.values()))["tests"][0]["against"])

    @property
    def gains(self) -> list[float]:
        """Return the differences from the baseline, by model."""
        return [cell["tests"][0]["value"] for cell in self.cells.values()]

    def p(self, tests: Iterable[Mapping[str, Any]]) -> float:
        """Return the largest adjusted p of some tests; 1 where the method is not better."""
        return max(min(1.0, self.methods * t["holm"]) if self.sign * t["value"] > 0 else 1.0 for t in tests)

    @property
    def won(self) -> list[str]:
        """Return the models with which the method wins."""
        return [model for model, cell in self.cells.items() if self.p(_tests(cell)) < LEVEL]

    @property
    def gained(self) -> list[str]:
        """Return the models with which the method is better than its baseline."""
        return [model for model, cell in self.cells.items() if self.p(cell["tests"][:1]) < LEVEL]

    @property
    def rank(self) -> tuple[int, int, float]:
        """Return the key by which the best method of a task is chosen."""
        return len(self.won), len(self.gained), self.sign * fmean(self.gains)


def _tests(cell: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*cell["tests"], *([cell["rival"]] if cell.get("rival") else [])]


def conclude(comparison: dict[str, Any]) -> None:
    """Add the verdicts: one of each task with a method, and one of the comparison.

    Args:
        comparison: The result of `compare`, with Holm's p; changed in place. A task's `verdict` is None without a method,
            or has `kind` (`win`, `explained` by a control, or `none`), `sentence`, `row` (the best method), `baseline`, `against` (the
            row that decides: the control that explains the gain, or the baseline), `scores` of baseline and method, `gain` (mean of the
            models) and `gains`, `models` (won, tested), `methods` (the number compared), `p`, `cost` (times the baseline's operations; None if they were not counted),
            `detectable` (against the row that decides, with the model where it is largest; None if none can be found), and `controls`,
            each with `name`, `score`, `difference`, `p`, `beaten` of `models`. The comparison's `verdict` has `sentence`.
    """
    methods = {(t["kind"], row["name"]) for t in comparison["tasks"] for row in t["rows"] if _is_tested(row)}
    sizes = _family_sizes(comparison["tasks"])
    for task in comparison["tasks"]:
        sign = 1 if task["higher_is_better"] else -1
        lines = [_MethodLine(row, sign, len(methods)) for row in task["rows"] if _is_tested(row)]
        task["verdict"] = _verdict(task, max(lines, key=lambda line: line.rank), sizes) if lines else None
    comparison["verdict"] = {"sentence": _overall([task for task in comparison["tasks"] if task["verdict"]])}


def _is_tested(row: Mapping[str, Any]) -> bool:
    return row["role"] == "method" and any(cell["tests"] for cell in row["cells"].values())


def _family_sizes(tasks: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], int]:
    """Return the number of tests against the baseline that Holm's method adjusts together, by kind of task and row."""
    sizes: dict[tuple[str, str], int] = {}
    for task in tasks:
        for row in task["rows"]:
            key = (task["kind"], row["name"])
            sizes[key] = sizes.get(key, 0) + sum(bool(cell["tests"]) for cell in row["cells"].values())
    return sizes


def relative_cost(task: Mapping[str, Any], row: Mapping[str, Any], model: str) -> float | None:
    """Return the operations of a row divided by those of the first row; None if they were not counted.

    Args:
        task: A summary of the task.
        row: One of its rows.
        model: The name of the model.
    """
    own, first = (each["cells"][model]["cost"]["flops"] for each in (row, task["rows"][0]))
    return float(own / first) if own and first else None


def _verdict(task: Mapping[str, Any], line: _MethodLine, sizes: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Return the verdict about the best method of a task."""
    cells, won, name = line.cells, line.won, line.row["name"]
    controls = _controls(task, line)
    kind = "win" if won else "explained" if line.gained else "none"
    open_one = max(controls[1:], key=lambda each: (each["p"], -each["difference"]), default=None)
    against = open_one["name"] if kind == "explained" and open_one else line.baseline
    costs = [relative_cost(task, line.row, model) for model in cells]
    level = LEVEL / line.methods / sizes[task["kind"], name]
    tests = [test for cell in cells.values() for test in _tests(cell) if test["against"] == against]
    smallest = [smallest_difference(test["power"], level=level) for test in tests]
    decisive = [test for model in won for test in _tests(cells[model])] or tests
    verdict = {
        "kind": kind,
        "row": name,
        "baseline": line.baseline,
        "against": against,
        "scores": [_score(task, line.baseline, list(cells)), _score(task, name, list(cells))],
        "gain": fmean(line.gains),
        "gains": line.gains,
        "models": [len(won), len(cells)],
        "methods": line.methods,
        "p": line.p(decisive),
        "cost": None if None in costs else fmean(cost for cost in costs if cost is not None),
        "detectable": None if None in smallest else max(each for each in smallest if each is not None),
        "controls": controls,
    }
    return verdict | {"sentence": _sentence(task, line, verdict)}


def _score(task: Mapping[str, Any], name: str, models: Sequence[str]) -> float:
    """Return the mean score of a row over some models."""
    cells = next(row["cells"] for row in task["rows"] if row["name"] == name)
    return fmean(cells[model]["score"]["value"] for model in models if model in cells)


def _controls(task: Mapping[str, Any], line: _MethodLine) -> list[dict[str, Any]]:
    """Return what could explain the gain, the baseline first: see `conclude`. p is over the models with which the method wins, if any."""
    tests: dict[str, dict[str, Mapping[str, Any]]] = {}
    for model, cell in line.cells.items():
        for test in _tests(cell):
            tests.setdefault(test["against"], {})[model] = test
    return [
        {
            "name": name,
            "score": _score(task, name, list(of)),
            "difference": fmean(test["value"] for test in of.values()),
            "p": line.p([test for model, test in of.items() if model in line.won] or of.values()),
            "beaten": sum(line.p([test]) < LEVEL for test in of.values()),
            "models": len(of),
        }
        for name, of in tests.items()
    ]


# ----------------------------------------------------------------------------------------------------------------- words


def _sentence(task: Mapping[str, Any], line: _MethodLine, verdict: Mapping[str, Any]) -> str:
    """Return the verdict in words."""
    name, (won, tested) = verdict["row"], verdict["models"]
    change = f"{_change(task, verdict)}{_per_model(line)}"
    if verdict["kind"] == "win":
        where = "" if won == tested else f" with {won} of {tested} models"
        p = f"p {verdict['p']:.1g} after adjustment for all comparisons"
        return f"{name} wins on {task['name']}{where}: it {change}, {_cost(task, verdict)}, and no control explains that ({p})."
    missed = _missed(verdict)
    if verdict["kind"] == "explained":
        control = next(each for each in verdict["controls"] if each["name"] == verdict["against"])
        beaten = (
            ""
            if control["models"] == 1
            else f", and {name} beats it with {control['beaten']} of {control['models']} models"
        )
        return (
            f"Nothing wins on {task['name']}: {name} {change}, but {control['name']}, which contrasts nothing, explains that with "
            f"{control['score']:.3f} (p {control['p']:.1g}{beaten}); {missed}."
        )
    if line.sign * verdict["gain"] <= 0:
        return f"Nothing wins on {task['name']}: the best method, {name}, is no better than {verdict['baseline']} and {change}; {missed}."
    return f"Nothing wins on {task['name']}: the best method, {name}, {change}, which chance explains (p {verdict['p']:.1g}); {missed}."


def _change(task: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    """Return the change of the metric, such as `raises acc from 0.400 (greedy) to 0.500`."""
    before, after = verdict["scores"]
    if f"{before:.3f}" == f"{after:.3f}":
        return f"leaves {task['metric']} at {before:.3f} ({verdict['baseline']})"
    verb = "raises" if after > before else "lowers"
    return f"{verb} {task['metric']} from {before:.3f} ({verdict['baseline']}) to {after:.3f}"


def _per_model(line: _MethodLine) -> str:
    """Return the interval of the difference with one model, or the range of the differences with several."""
    if len(line.gains) > 1:
        return f" in the mean of {len(line.gains)} models (by {min(line.gains):+.3f} to {max(line.gains):+.3f})"
    test = next(iter(line.cells.values()))["tests"][0]
    return f" (by {test['value']:+.3f}, 95% interval {test['low']:+.3f} to {test['high']:+.3f})"


def _cost(task: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    unit = "document" if task["kind"] == "ranking" else "token"
    return (
        "at a cost that was not counted"
        if verdict["cost"] is None
        else f"at {verdict['cost']:.2f} times the FLOPs per {unit}"
    )


def _missed(verdict: Mapping[str, Any]) -> str:
    smallest = verdict["detectable"]
    if smallest is None:
        return "the documents are too few to find any difference"
    return f"a difference below {smallest:.3f} may have been missed"


def _overall(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Return the verdict of a comparison in words."""
    if not tasks:
        return "Nothing was compared: no task has a method and its baseline."
    if len(tasks) == 1:
        return str(tasks[0]["verdict"]["sentence"])
    wins = [task for task in tasks if task["verdict"]["kind"] == "win"]
    if not wins:
        return f"Nothing wins on any of the {len(tasks)} tasks: {_no_win(tasks)}."
    parts = [_wins(name, wins) for name in dict.fromkeys(task["verdict"]["row"] for task in wins)]
    others = [task["name"] for task in tasks if task not in wins]
    return "; ".join(parts + ([f"nothing wins on {_listed(others)}"] if others else [])) + "."


def _wins(name: str, wins: Sequence[Mapping[str, Any]]) -> str:
    """Return the tasks on which a method wins in words."""
    own = [task for task in wins if task["verdict"]["row"] == name]
    if len(own) > NAMED:
        gains = [task["verdict"]["gain"] for task in own]
        p = max(task["verdict"]["p"] for task in own)
        return f"{name} wins on {len(own)} tasks (by {min(gains):+.3f} to {max(gains):+.3f}, p at most {p:.1g})"
    return f"{name} wins on {_listed([_win(task) for task in own])}"


def _win(task: Mapping[str, Any]) -> str:
    verdict = task["verdict"]
    won, tested = verdict["models"]
    where = f", {won} of {tested} models" if tested > 1 else ""
    return (
        f"{task['name']} ({task['metric']} {verdict['gain']:+.3f} over {verdict['baseline']}, {_cost(task, verdict)}, "
        f"p {verdict['p']:.1g}{where})"
    )


def _no_win(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Return the largest change that is no win, and the differences that may have been missed."""
    explained = [task for task in tasks if task["verdict"]["kind"] == "explained"]
    reason = (
        "chance explains" if not explained else f"controls explain on {_listed([task['name'] for task in explained])}"
    )
    found = [task["verdict"]["detectable"] for task in tasks]
    known = [each for each in found if each is not None]
    if not known:
        return f"what the methods gain {reason}; the documents are too few to find any difference"
    span = f"{known[0]:.3f}" if len(known) == 1 else f"{min(known):.3f} to {max(known):.3f} (by task)"
    chance = "" if not explained or len(explained) == len(tasks) else ", and chance on the others"
    return f"what the methods gain {reason}{chance}; differences below {span} may have been missed"


def _listed(names: Sequence[str]) -> str:
    if len(names) > NAMED:
        return f"{len(names)} tasks"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
