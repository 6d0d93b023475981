"""The tables of a comparison, made of the plain data that `compare` returns."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from contralto.eval.comparison.verdict import LEVEL, relative_cost

__all__ = ["Cell", "Table", "glance", "tables"]


class Cell(NamedTuple):
    """A figure and its qualification, such as an interval."""

    main: str
    small: str = ""
    is_found: bool = False
    """True if a difference is significant, in favour of the method."""


class Table(NamedTuple):
    """A table as both terminal and page show it."""

    title: str
    note: str
    head: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    """Name, role (baseline, control or method), cells."""
    is_detail: bool = False
    """True if the page folds it away, and the terminal leaves it out."""


def glance(comparison: Mapping[str, Any]) -> Table:
    """Return one line per method with its mean gain over the baseline, and the number of models in which it is significant.

    A gain counts as found if all its tests are significant after Holm's adjustment: against the baseline and against every
    control, such as scale-matched sampling or the bias-matched threshold.

    Args:
        comparison: The result of `compare`.
    """
    tasks = comparison["tasks"]
    names = list(dict.fromkeys(row["name"] for task in tasks for row in task["rows"] if row["role"] == "method"))
    rows = [(name, "method", [_gain(task, name) for task in tasks]) for name in names]
    note = (
        "Gain over greedy (sampled rows: over sampling; ranking: over plain likelihood), mean of the models; in brackets in how "
        f"many models it is significant / in how many it beats every control too, p < {LEVEL:g} after Holm's adjustment."
    )
    return Table("At a glance", note, [task["name"] for task in tasks], rows)


def _gain(task: Mapping[str, Any], name: str) -> Cell:
    cells = [cell for row in task["rows"] if row["name"] == name for cell in row["cells"].values() if cell["tests"]]
    if not cells:
        return Cell("")
    sign = _sign(task)
    gains = [cell["tests"][0]["value"] for cell in cells]
    over_baseline = sum(_is_found(cell["tests"][:1], sign) for cell in cells)
    over_all = sum(_is_found(cell["tests"], sign) for cell in cells)
    mean = sum(gains) / len(gains)
    return Cell(f"{mean:+.3f}", f"({over_baseline}/{over_all} of {len(cells)})", over_all == len(cells))


def _sign(task: Mapping[str, Any]) -> int:
    return 1 if task["higher_is_better"] else -1


def _is_found(tests: Iterable[Mapping[str, Any]], sign: int) -> bool:
    return all(sign * test["value"] > 0 and test["holm"] < LEVEL for test in tests)


def tables(task: Mapping[str, Any]) -> list[Table]:
    """Return all tables of a task: scores, tests, answers of yes and no, cost.

    Args:
        task: A summary of the task.
    """
    found = [_score_table(task), _test_table(task)]
    if task["kind"] == "yes_no":
        found += [_yes_no_table(task, model, i > 0) for i, model in enumerate(task["columns"])]
    if task.get("attention"):
        found.append(_attention_table(task["attention"]))
    return found + [_cost_table(task, model, i > 0) for i, model in enumerate(task["columns"])]


def _score_table(task: Mapping[str, Any]) -> Table:
    direction = "" if task["higher_is_better"] else ", lower is better"
    note = f"n = {task['items']} documents, the same for all" + (
        f", clustered by {task['clusters']} values of {task['cluster']}" if task["clusters"] else ""
    )
    rows = [
        (row["name"], row["role"], [_score(row["cells"].get(model)) for model in task["columns"]])
        for row in task["rows"]
    ]
    return Table(f"{task['metric']}{direction}", f"{note}; 95% intervals.", list(task["columns"]), rows)


def _score(cell: Mapping[str, Any] | None) -> Cell:
    if cell is None:
        return Cell("")
    score, seeds = cell["score"], cell["per_seed"]
    small = f"[{score['low']:.3f}, {score['high']:.3f}]"
    if len(seeds) > 1:
        small += f" {len(seeds)} seeds {min(seeds):.3f} to {max(seeds):.3f}"
    return Cell(f"{score['value']:.3f}", small)


def _test_table(task: Mapping[str, Any]) -> Table:
    rows = []
    for row in task["rows"]:
        controls = dict.fromkeys(test["against"] for cell in row["cells"].values() for test in cell["tests"])
        for control in controls:
            cells = [_test(row["cells"].get(model), control, task) for model in task["columns"]]
            rows.append((f"{row['name']} over {control}", row["role"], cells))
    note = (
        "Answers that only the first gets right / only the second, of all seeds; other metrics: the difference with the interval of the "
        f"paired bootstrap. p: of the exact permutation test, which exchanges the two within {_units(task)} (McNemar's exact test where "
        "that is one right or wrong answer). "
    )
    if any(
        test["holm"] != test["p"] for row in task["rows"] for cell in row["cells"].values() for test in cell["tests"]
    ):
        note += "In brackets: p after Holm's adjustment over splits and models of one line. "
    note += "After finds: the smallest difference that this test would find four times in five, at p < 0.05 before any adjustment."
    return Table("Against the controls", note, list(task["columns"]), rows)


def _test(cell: Mapping[str, Any] | None, control: str, task: Mapping[str, Any]) -> Cell:
    test = next((test for test in (cell or {"tests": []})["tests"] if test["against"] == control), None)
    if test is None:
        return Cell("")
    is_found = _is_found([test], _sign(task))
    if "won" in test:
        return Cell(f"+{test['won']} / -{test['lost']}", f"{_p(test)}{_detectable(test)}", is_found)
    difference = _difference(test, is_found)
    return difference._replace(small=f"{difference.small}{_detectable(test)}")


def _units(task: Mapping[str, Any]) -> str:
    return f"all documents of one {task['cluster']}" if task["clusters"] else "a document with all its seeds"


def _detectable(test: Mapping[str, Any]) -> str:
    return ", finds none" if test["detectable"] is None else f", finds ≥ {test['detectable']:.3f}"


def _difference(difference: Mapping[str, Any], is_found: bool = False) -> Cell:
    small = f"[{difference['low']:+.3f}, {difference['high']:+.3f}] {_p(difference)}"
    return Cell(f"{difference['value']:+.3f}", small, is_found)


def _p(test: Mapping[str, Any]) -> str:
    text = f"p {test['p']:.1g}"
    return text if test["holm"] == test["p"] else f"{text} ({test['holm']:.1g})"


def _yes_no_table(task: Mapping[str, Any], model: str, is_detail: bool) -> Table:
    head = ["precision", "recall", "F1", "F1 gained", "yes-ratio", "yes gained", "AUROC", "unparsed"]
    rows = [
        (row["name"], row["role"], _yes_no_cells(row["cells"][model]))
        for row in task["rows"]
        if row["cells"].get(model) is not None
    ]
    note = (
        "Gained: over the baseline, with the interval of the paired bootstrap and the p of the permutation test within "
        f"{_units(task)}. AUROC of log p(yes) - log p(no), which no threshold and no bias to yes can change; its difference by "
        "DeLong's test, clustered."
    )
    return Table(f"Yes and no, {model}", note, head, rows, is_detail)


def _yes_no_cells(cell: Mapping[str, Any]) -> list[Cell]:
    metrics, test = cell["metrics"], next(iter(cell["tests"]), None)
    return [
        *(_share(metrics[name]) for name in ("precision", "recall", "f1")),
        _difference(test["f1"], _is_found([test["f1"]], 1)) if test else Cell(""),
        _share(metrics["yes_ratio"]),
        _difference(test["yes_ratio"]) if test else Cell(""),
        _auroc(cell.get("auroc") or {}),
        _optional(cell["unparsed"], ".3f"),
    ]


def _share(value: Mapping[str, float]) -> Cell:
    return Cell(f"{value['value']:.3f}", f"[{value['low']:.3f}, {value['high']:.3f}]")


def _auroc(auroc: Mapping[str, Any]) -> Cell:
    if not auroc:
        return Cell("")
    difference = auroc.get("difference")
    small = f"{difference['value']:+.3f}, {_p(difference)}" if difference else ""
    return Cell(f"{auroc['value']:.3f}", small, difference is not None and _is_found([difference], 1))


def _attention_table(attention: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of attention to text and image, a line per model and stage."""
    head = ["MDI", "without the first token", "AEI of the text", "AEI of the image", "documents"]
    rows, reasons = [], []
    for model, found in attention.items():
        if "reason" in found:
            reasons.append(f" {model}: not measured, {found['reason']}.")
            continue
        for stage in ("early", "middle", "late", "all"):
            figures = found[stage]
            values = [figures[name] for name in ("mdi", "mdi_without_first", "aei_text", "aei_image")]
            cells = [Cell(f"{value:.2f}") for value in values]
            rows.append((f"{model}, {stage} layers", "", [*cells, Cell(str(found["documents"]))]))
    note = (
        "Attention of the queries that predict a greedy answer, to the text and to the image of the prompt, per token (arXiv 2508.10552): "
        "MDI, the text's by the image's, and AEI, the share of attention by the share of tokens; 1 is balance. Early and late: the first and the "
        "last two layers. The first token, on which many models rest their attention, is a part of the text."
    )
    return Table("Attention to text and image", note + "".join(reasons), head, rows)


def _cost_table(task: Mapping[str, Any], model: str, is_detail: bool) -> Table:
    unit = "document" if task["kind"] == "ranking" else "token"
    head = [f"forwards per {unit}", f"FLOPs per {unit}"]
    head += ["ruled out"] if unit == "document" else ["ms per token", "tokens per document", "unparsed"]
    rows = [
        (row["name"], row["role"], _cost_cells(task, row, model))
        for row in task["rows"]
        if row["cells"].get(model) is not None and row["cells"][model]["cost"]["flops"] is not None
    ]
    note = "Forward passes (rows through any model) and operations, counted on the first documents"
    if unit == "document":
        note += "; ruled out: the share of tokens that the mask makes impossible."
    else:
        note += " without their prompts; milliseconds over all documents and prompts, at the batch size of the run."
    return Table(f"Cost, {model}", note, head, rows, is_detail)


def _cost_cells(task: Mapping[str, Any], row: Mapping[str, Any], model: str) -> list[Cell]:
    cell = row["cells"][model]
    cost = cell["cost"]
    counted = [
        Cell(f"{cost['forwards']:.2f}"),
        Cell(f"{cost['flops']:.3g}", f"x {relative_cost(task, row, model):.2f}"),
    ]
    if task["kind"] == "ranking":
        return [*counted, _optional(cell["ruled_out"], ".3f")]
    values = (cost["ms"], ".3g"), (cost["tokens"], ".1f"), (cell["unparsed"], ".3f")
    return counted + [_optional(value, form) for value, form in values]


def _optional(value: float | None, form: str) -> Cell:
    return Cell("" if value is None else format(value, form))
