"""A comparison shown: tables for the terminal, and one page without scripts that needs no network, with plots.

Everything here is made of the plain data that `compare` returns and `contralto compare` keeps as JSON.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from contralto.common.html import render_page
from contralto.common.plots import GREY, PALETTE, style_axes, svg_style, to_svg

__all__ = ["Cell", "Table", "glance", "page", "show", "tables"]

LEVEL = 0.05
"""Of significance, after Holm's adjustment."""
WIDE = 5
"""Tables of more columns have no room for intervals in a terminal."""
SIZE = (6, 4.2)  # inches, of each plot


class Cell(NamedTuple):
    """A figure and what qualifies it."""

    main: str
    small: str = ""
    is_found: bool = False
    """Whether a difference is significant, in favour of the method."""


class Table(NamedTuple):
    """A table as both terminal and page show it."""

    title: str
    note: str
    head: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    """Name, role (baseline, control or method), cells."""
    is_detail: bool = False
    """Whether the page folds it away, and the terminal leaves it out."""


# ------------------------------------------------------------------------------------------------------------------ tables


def glance(comparison: Mapping[str, Any]) -> Table:
    """Every method on every task in one line: the mean gain over its baseline, and in how many models it is more than chance.

    A gain counts as found if all its tests are significant after Holm's adjustment: against the baseline and against every
    control, such as scale-matched sampling or the bias-matched threshold.
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
    sign = 1 if task["higher_is_better"] else -1
    gains = [cell["tests"][0]["value"] for cell in cells]
    over_baseline = sum(_is_found(cell["tests"][:1], sign) for cell in cells)
    over_all = sum(_is_found(cell["tests"], sign) for cell in cells)
    mean = sum(gains) / len(gains)
    return Cell(f"{mean:+.3f}", f"({over_baseline}/{over_all} of {len(cells)})", over_all == len(cells))


def _is_found(tests: Iterable[Mapping[str, Any]], sign: int) -> bool:
    return all(sign * test["value"] > 0 and test["holm"] < LEVEL for test in tests)


def tables(task: Mapping[str, Any]) -> list[Table]:
    """All tables of a task: scores, tests, answers of yes and no, cost."""
    found = [_score_table(task), _test_table(task)]
    if task["kind"] == "yes_no":
        found += [_yes_no_table(task, model, at > 0) for at, model in enumerate(task["columns"])]
    return found + [_cost_table(task, model, at > 0) for at, model in enumerate(task["columns"])]


def _score_table(task: Mapping[str, Any]) -> Table:
    which = "" if task["higher_is_better"] else ", lower is better"
    note = f"n = {task['items']} documents, the same for all" + (
        f", clustered by {task['clusters']} values of {task['cluster']}" if task["clusters"] else ""
    )
    rows = [
        (row["name"], row["role"], [_score(row["cells"].get(model)) for model in task["columns"]])
        for row in task["rows"]
    ]
    return Table(f"{task['metric']}{which}", f"{note}; 95% intervals.", list(task["columns"]), rows)


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
        pairs = dict.fromkeys(test["against"] for cell in row["cells"].values() for test in cell["tests"])
        for against in pairs:
            cells = [_test(row["cells"].get(model), against, task) for model in task["columns"]]
            rows.append((f"{row['name']} over {against}", row["role"], cells))
    note = (
        "Answers that only the first gets right / only the second, of all seeds; other metrics: the difference with the interval of the "
        f"paired bootstrap. p: of the exact permutation test, which exchanges the two within {_units(task)} (McNemar's exact test where "
        "that is one right or wrong answer). In brackets: p after Holm's adjustment over splits and models of one line. After finds: the "
        "smallest difference that this test would find four times in five, at p < 0.05 before the adjustment."
    )
    return Table("Against the controls", note, list(task["columns"]), rows)


def _test(cell: Mapping[str, Any] | None, against: str, task: Mapping[str, Any]) -> Cell:
    test = next((test for test in (cell or {"tests": []})["tests"] if test["against"] == against), None)
    if test is None:
        return Cell("")
    sign = 1 if task["higher_is_better"] else -1
    if "won" in test:
        return Cell(f"+{test['won']} / -{test['lost']}", f"{_p(test)}{_least(test)}", _is_found([test], sign))
    change = _change(test, _is_found([test], sign))
    return change._replace(small=f"{change.small}{_least(test)}")


def _units(task: Mapping[str, Any]) -> str:
    return f"all documents of one {task['cluster']}" if task["clusters"] else "a document with all its seeds"


def _least(test: Mapping[str, Any]) -> str:
    """Return the smallest difference that a test would find."""
    return ", finds none" if test["detectable"] is None else f", finds ≥ {test['detectable']:.3f}"


def _change(difference: Mapping[str, Any], is_found: bool = False) -> Cell:
    small = f"[{difference['low']:+.3f}, {difference['high']:+.3f}] {_p(difference)}"
    return Cell(f"{difference['value']:+.3f}", small, is_found)


def _p(test: Mapping[str, Any]) -> str:
    said = f"p {test['p']:.1g}"
    return said if test["holm"] == test["p"] else f"{said} ({test['holm']:.1g})"


def _yes_no_table(task: Mapping[str, Any], model: str, is_detail: bool) -> Table:
    head = ["precision", "recall", "F1", "F1 gained", "yes-ratio", "yes gained", "AUROC", "unparsed"]
    rows = []
    for row in task["rows"]:
        if (cell := row["cells"].get(model)) is None:
            continue
        metrics, test = cell["metrics"], next(iter(cell["tests"]), None)
        found = [_share(metrics[name]) for name in ("precision", "recall", "f1")]
        found.append(_change(test["f1"], _is_found([test["f1"]], 1)) if test else Cell(""))
        found.append(_share(metrics["yes_ratio"]))
        found.append(_change(test["yes_ratio"]) if test else Cell(""))
        found.append(_auroc(cell.get("auroc") or {}))
        found.append(Cell("" if cell["unparsed"] is None else f"{cell['unparsed']:.3f}"))
        rows.append((row["name"], row["role"], found))
    note = (
        f"Gained: over the baseline, with the interval of the paired bootstrap and the p of the permutation test within {_units(task)}. AUROC of log p(yes) - log p(no), which no threshold and no "
        "bias to yes can change; its difference by DeLong's test, clustered."
    )
    return Table(f"Yes and no, {model}", note, head, rows, is_detail)


def _share(value: Mapping[str, float]) -> Cell:
    return Cell(f"{value['value']:.3f}", f"[{value['low']:.3f}, {value['high']:.3f}]")


def _auroc(found: Mapping[str, Any]) -> Cell:
    if not found:
        return Cell("")
    difference = found.get("difference")
    small = f"{difference['value']:+.3f}, {_p(difference)}" if difference else ""
    return Cell(f"{found['value']:.3f}", small, difference is not None and _is_found([difference], 1))


def _cost_table(task: Mapping[str, Any], model: str, is_detail: bool) -> Table:
    unit = "document" if task["kind"] == "ranking" else "token"
    head = [f"forwards per {unit}", f"FLOPs per {unit}"]
    head += ["ruled out"] if unit == "document" else ["ms per token", "tokens per document", "unparsed"]
    rows = []
    for row in task["rows"]:
        if (cell := row["cells"].get(model)) is None or cell["cost"]["flops"] is None:
            continue
        cost = cell["cost"]
        shown = [Cell(f"{cost['forwards']:.2f}"), Cell(f"{cost['flops']:.3g}", f"x {_relative(task, row, model):.2f}")]
        if unit == "document":
            shown += [_or_nothing(cell["ruled_out"], ".3f")]
        else:
            values = (cost["ms"], ".3g"), (cost["tokens"], ".1f"), (cell["unparsed"], ".3f")
            shown += [_or_nothing(value, form) for value, form in values]
        rows.append((row["name"], row["role"], shown))
    note = "Forward passes (rows through any model) and operations, counted on the first documents"
    if unit == "document":
        note += "; ruled out: the share of tokens that the mask makes impossible."
    else:
        note += " without their prompts; milliseconds over all documents and prompts, at the batch size of the run."
    return Table(f"Cost, {model}", note, head, rows, is_detail)


def _or_nothing(value: float | None, form: str) -> Cell:
    return Cell("" if value is None else format(value, form))


# ---------------------------------------------------------------------------------------------------------------- terminal


def show(comparison: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the comparison."""
    out = console or Console()
    for task in comparison["tasks"]:
        out.print(f"\n[bold]{escape(task['name'])}[/bold]", highlight=False)
        for table in tables(task):
            if not table.is_detail:
                out.print(_rich(table))
    out.print(_rich(glance(comparison)))


def _rich(table: Table) -> Group:
    drawn = RichTable(
        title=escape(table.title), title_justify="left", box=None, header_style="dim", padding=(0, 2, 0, 0)
    )
    drawn.add_column("", overflow="fold")
    for name in table.head:
        drawn.add_column(escape(name), justify="right")
    for name, role, cells in table.rows:
        style = "bold" if role == "method" else ""
        drawn.add_row(Text(name, style=style), *(_rich_cell(cell, short=len(cells) > WIDE) for cell in cells))
    return Group("", drawn, Text(table.note, style="dim"))


def _rich_cell(cell: Cell, *, short: bool) -> Text:
    text = Text(cell.main, style="bold green" if cell.is_found else "")
    return text if short or not cell.small else text.append(f" {cell.small}", style="dim")


# -------------------------------------------------------------------------------------------------------------------- page


def page(
    comparison: Mapping[str, Any],
    *,
    title: str = "Decoders compared",
    lead: str = "",
    before: str = "",
    reading: Sequence[str] = (),
    made_by: str = "contralto compare",
) -> str:
    """The comparison as one self-contained page, for light and dark paper.

    Args:
        comparison: of `compare`.
        title: of the page.
        lead: what it is about, one paragraph.
        before: HTML (Markup) that stands before the figures.
        reading: further paragraphs on how to read them.
        made_by: the command.

    Raises:
        ImportError: without matplotlib.
    """
    return render_page(
        "contralto.eval.comparison",
        "report.html.j2",
        title=title,
        lead=lead,
        before=before,
        reading=reading,
        made_by=made_by,
        comparison=comparison,
        glance=glance(comparison),
        tables=tables,
        plots=_plots,
        verdict=_verdict,
    )


def _verdict(said: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """What an answer got: right or wrong, or the score."""
    score = said["score"]
    return {0.0: "wrong", 1.0: "right"}.get(score, f"{score:.2f}") if task["higher_is_better"] else f"{score:.2f}"


def _plots(task: Mapping[str, Any]) -> list[Markup]:
    made: list[Callable[[Any, Mapping[str, Any]], None]] = [_cost_plot]
    if task["kind"] == "yes_no":
        made.append(_yes_plot)
    if task["bucket"]:
        made.append(_bucket_plot)
    return [_drawn(draw, task) for draw in made]


def _colour(task: Mapping[str, Any], name: str) -> str:
    """Methods in colour, their sampled rows in the same."""
    owner = name.removesuffix(", sampling").removesuffix(", raw").removesuffix(", mask")
    own = [row["name"] for row in task["rows"] if row["role"] == "method"]
    base = list(
        dict.fromkeys(each.removesuffix(", sampling").removesuffix(", raw").removesuffix(", mask") for each in own)
    )
    return PALETTE[base.index(owner) % len(PALETTE)] if name in own else GREY


def _looks(task: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Filled: deterministic; hollow: sampled. Circles: baselines and methods; other shapes: controls."""
    controls = [each["name"] for each in task["rows"] if each["role"] == "control"]
    marker = "sD^vP*"[controls.index(row["name"]) % 6] if row["name"] in controls else "o"
    marker = "X" if row["name"].endswith(", raw") else "d" if row["name"].endswith(", mask") else marker
    hollow = {"mfc": "none"} if row["is_sampled"] else {}
    return {"color": _colour(task, row["name"]), "marker": marker, "ls": "none", "ms": 7, "lw": 1.3, **hollow}


def _cost_plot(axes: Any, task: Mapping[str, Any]) -> None:
    """The metric against the cost, mean over models."""
    for row in task["rows"]:
        cells = [cell for cell in row["cells"].values() if cell["cost"]["flops"]]
        if not cells or row["note"].startswith("the same"):
            continue
        x, y = (
            _mean([_relative(task, row, model) for model in row["cells"]]),
            _mean([c["score"]["value"] for c in cells]),
        )
        low, high = (_mean([cell["score"][end] for cell in cells]) for end in ("low", "high"))
        error = None if len(cells) > 1 else ([y - low], [high - y])
        axes.errorbar([x], [y], error, label=row["name"], **_looks(task, row))
    unit = "document" if task["kind"] == "ranking" else "token"
    mean = ", mean of the models" if len(task["columns"]) > 1 else ""
    axes.set(xlabel=f"FLOPs per {unit}, of the baseline's", title=f"{task['metric']} against cost{mean}")


def _relative(task: Mapping[str, Any], row: Mapping[str, Any], model: str) -> float:
    """What a row costs, of what the baseline costs."""
    return float(row["cells"][model]["cost"]["flops"] / task["rows"][0]["cells"][model]["cost"]["flops"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _yes_plot(axes: Any, task: Mapping[str, Any]) -> None:
    """What a row gains over its baseline, against how much more often it says yes."""
    for row in task["rows"]:
        tests = [(cell["tests"][0]["yes_ratio"], cell["tests"][0]) for cell in row["cells"].values() if cell["tests"]]
        for at, (yes, gain) in enumerate(tests):
            bars = [([d["value"] - d["low"]], [d["high"] - d["value"]]) for d in (yes, gain)]
            axes.errorbar(
                [yes["value"]],
                [gain["value"]],
                bars[1],
                bars[0],
                label=None if at else row["name"],
                **_looks(task, row),
            )
    axes.axhline(0, color=GREY, lw=0.8)
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set(xlabel="more often yes than the baseline", title=f"{task['metric']} gained, against bias; every model")


def _bucket_plot(axes: Any, task: Mapping[str, Any]) -> None:
    """The gain of unsampled methods in every bucket, a point per model."""
    rows = [row for row in task["rows"] if row["role"] == "method" and not row["is_sampled"]]
    points = [(row, model) for row in rows for model in row["cells"]]
    step = 0.7 / max(1, len(points))
    for at, (row, model) in enumerate(points):
        found = [row["cells"][model]["buckets"].get(bucket, {}) for bucket in task["buckets"]]
        kept = [(i, each) for i, each in enumerate(found) if "gain" in each]
        bars = [[e["gain"] - e["low"] for _, e in kept], [e["high"] - e["gain"] for _, e in kept]]
        x = [i + step * (at - (len(points) - 1) / 2) for i, _ in kept]
        is_first = model == next(iter(row["cells"]))
        axes.errorbar(
            x, [e["gain"] for _, e in kept], bars, label=row["name"] if is_first else None, **_looks(task, row)
        )
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set(xticks=range(len(task["buckets"])), xticklabels=task["buckets"], xlabel=task["bucket"])
    if max(map(len, task["buckets"])) * len(task["buckets"]) > 40:
        axes.tick_params(axis="x", rotation=30)
    axes.set(title=f"{task['metric']} gained, by {task['bucket']}; every model")


def _drawn(draw: Callable[[Any, Mapping[str, Any]], None], task: Mapping[str, Any]) -> Markup:
    """A plot as inline SVG in colours that suit light and dark paper, its text as text."""
    from matplotlib.figure import Figure

    with svg_style("contralto"):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes, task)
        style_axes(axes, size=11)
        axes.title.set(color=GREY, size=12)
        axes.xaxis.label.set(color=GREY, size=11)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside lower left", frameon=False, fontsize=10, labelcolor=GREY, ncols=2)
        return to_svg(figure)
