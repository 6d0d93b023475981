"""The plots of a comparison as inline SVG."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from contralto.common.plots import GREY, PALETTE, TEXT, style_axes, svg_style, to_svg
from contralto.eval.comparison.verdict import relative_cost

__all__ = ["plots"]

SIZE = (5.4, 4.2)
"""The size of each plot, in inches."""
SUFFIXES = (", sampling", ", raw", ", mask")
"""The variants of a method, which have its colour."""


def plots(task: Mapping[str, Any]) -> list[Markup]:
    """Draw all plots of a task: cost, and for some tasks bias to yes and buckets.

    Args:
        task: A summary of the task.

    Returns:
        SVG elements.

    Raises:
        ImportError: matplotlib is not installed.
    """
    draws: list[Callable[[Any, Mapping[str, Any]], None]] = [_cost_plot]
    if task["kind"] == "yes_no":
        draws.append(_yes_plot)
    if task["bucket"]:
        draws.append(_bucket_plot)
    return [_render(draw, task) for draw in draws]


def _render(draw: Callable[[Any, Mapping[str, Any]], None], task: Mapping[str, Any]) -> Markup:
    from matplotlib.figure import Figure

    with svg_style("contralto"):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes, task)
        style_axes(axes, size=11)
        axes.title.set(color=TEXT, size=12, wrap=True)
        axes.xaxis.label.set(color=TEXT, size=11)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside lower left", frameon=False, fontsize=10, labelcolor=TEXT, ncols=2)
        return to_svg(figure)


def _colour(task: Mapping[str, Any], name: str) -> str:
    """Return the colour of a row: methods in colour, their variants in the same one."""
    methods = [row["name"] for row in task["rows"] if row["role"] == "method"]
    bases = list(dict.fromkeys(map(_base_name, methods)))
    return PALETTE[bases.index(_base_name(name)) % len(PALETTE)] if name in methods else GREY


def _base_name(name: str) -> str:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _style(task: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the style of a row's points: filled if deterministic, circles unless it is a control or a variant."""
    controls = [each["name"] for each in task["rows"] if each["role"] == "control"]
    marker = "sD^vP*"[controls.index(row["name"]) % 6] if row["name"] in controls else "o"
    marker = "X" if row["name"].endswith(", raw") else "d" if row["name"].endswith(", mask") else marker
    hollow = {"mfc": "none"} if row["is_sampled"] else {}
    return {"color": _colour(task, row["name"]), "marker": marker, "ls": "none", "ms": 7, "lw": 1.3, **hollow}


def _cost_plot(axes: Any, task: Mapping[str, Any]) -> None:
    """Plot the metric against the cost, mean over models."""
    for row in task["rows"]:
        cells = [cell for cell in row["cells"].values() if cell["cost"]["flops"]]
        if not cells or row["note"].startswith("the same"):
            continue
        ratios = [relative_cost(task, row, model) for model in row["cells"]]
        x = _mean([ratio for ratio in ratios if ratio is not None])
        y, low, high = (_mean([cell["score"][end] for cell in cells]) for end in ("value", "low", "high"))
        error = None if len(cells) > 1 else ([y - low], [high - y])
        axes.errorbar([x], [y], error, label=row["name"], **_style(task, row))
    unit = "document" if task["kind"] == "ranking" else "token"
    mean = ", mean of the models" if len(task["columns"]) > 1 else ""
    axes.set(xlabel=f"FLOPs per {unit}, of the baseline's", title=f"{task['metric']} against cost{mean}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _yes_plot(axes: Any, task: Mapping[str, Any]) -> None:
    """Plot a row's gain over its baseline against its gain of yes answers, a point per model."""
    for row in task["rows"]:
        tests = [(cell["tests"][0]["yes_ratio"], cell["tests"][0]) for cell in row["cells"].values() if cell["tests"]]
        for i, (yes, gain) in enumerate(tests):
            bars = [([d["value"] - d["low"]], [d["high"] - d["value"]]) for d in (yes, gain)]
            label = None if i else row["name"]
            axes.errorbar([yes["value"]], [gain["value"]], bars[1], bars[0], label=label, **_style(task, row))
    axes.axhline(0, color=GREY, lw=0.8)
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set(xlabel="more often yes than the baseline", title=f"{task['metric']} gained, against bias; every model")


def _bucket_plot(axes: Any, task: Mapping[str, Any]) -> None:
    """Plot the gain of unsampled methods in every bucket, a point per model."""
    rows = [row for row in task["rows"] if row["role"] == "method" and not row["is_sampled"]]
    points = [(row, model) for row in rows for model in row["cells"]]
    step = 0.7 / max(1, len(points))
    for i, (row, model) in enumerate(points):
        buckets = [row["cells"][model]["buckets"].get(bucket, {}) for bucket in task["buckets"]]
        gains = [(position, each) for position, each in enumerate(buckets) if "gain" in each]
        x = [position + step * (i - (len(points) - 1) / 2) for position, _ in gains]
        bars = [[e["gain"] - e["low"] for _, e in gains], [e["high"] - e["gain"] for _, e in gains]]
        label = row["name"] if model == next(iter(row["cells"])) else None
        axes.errorbar(x, [e["gain"] for _, e in gains], bars, label=label, **_style(task, row))
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set(xticks=range(len(task["buckets"])), xticklabels=task["buckets"], xlabel=task["bucket"])
    if max(map(len, task["buckets"])) * len(task["buckets"]) > 40:
        axes.tick_params(axis="x", rotation=30)
    axes.set(title=f"{task['metric']} gained, by {task['bucket']}; every model")
