"""The page of `contralto demo`: one self-contained HTML file, its plots inside."""

import io
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from contralto import __version__, demo
from contralto.eval.stats import Proportion, proportion

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("contralto demo draws its plots with matplotlib: pip install 'contralto[demo]'") from error

COLORS = {demo.GREEDY: "#7a8899", demo.SAMPLING_MASKED: "#3f8fbf", demo.CONTRASTIVE: "#c2571a"}
"""The systems in the plots; readable on light and on dark paper."""


def render(results: demo.Results, tokenizer: Any) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files("contralto").joinpath("demo.html.j2").read_text())
    return template.render(
        version=__version__,
        torch_version=torch.__version__,
        results=results,
        beta=demo.BETA,
        alpha=demo.ALPHA,
        titles=[pair.title for pair in demo.PAIRS],
        rows=demo.accuracy_rows(results),
        tests=demo.comparison_rows(results),
        right=demo.is_right,
        word=lambda token: demo.word(token, tokenizer),
        space=lambda token: demo.space(token, tokenizer),
        plots=[_accuracy_plot(results), _length_plot(results)],
        reading=demo.READING,
    )


def _accuracy_plot(results: demo.Results) -> Markup:
    """Accuracy with intervals, by pair and system."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    titles = [pair.title for pair in demo.PAIRS]
    for at, (name, color) in enumerate(COLORS.items()):
        cells = [proportion(results.hits[title][name]) for title in titles]
        _points(axes, [x + 0.2 * (at - 1) for x in range(len(titles))], cells, name, color)
    axes.set(xticks=range(len(titles)), xticklabels=titles, ylim=(0, 1), title="accuracy, by model")
    return _finish(figure)


def _length_plot(results: demo.Results) -> Markup:
    """Accuracy by the number of steps, with the shortcut (three seeds together) and without it."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    with_shortcut = [pair.title for pair in demo.PAIRS[:-1]]
    worlds = (("with the shortcut", with_shortcut), ("control", [demo.PAIRS[-1].title]))
    for axes, (world, titles) in zip(figure.subplots(1, 2, sharey=True), worlds, strict=True):
        for at, (name, color) in enumerate((n, c) for n, c in COLORS.items() if n != demo.SAMPLING_MASKED):
            cells = [_of_length(results, titles, name, steps) for steps in demo.LENGTHS]
            _points(axes, [steps + 0.16 * (at - 0.5) for steps in demo.LENGTHS], cells, name, color)
        axes.set(xticks=list(demo.LENGTHS), xlabel="steps", ylim=(-0.03, 1.03), title=world)
    return _finish(figure)


def _of_length(results: demo.Results, titles: Sequence[str], name: str, steps: int) -> Proportion:
    chosen = [len(problem.steps) == steps for problem in results.problems]
    hits = [hit for title in titles for hit, keep in zip(results.hits[title][name], chosen, strict=True) if keep]
    return proportion(hits)


def _points(axes: Any, x: Sequence[float], cells: Sequence[Proportion], name: str, color: str) -> None:
    low, high = [c.value - c.low for c in cells], [c.high - c.value for c in cells]
    axes.errorbar(x, [c.value for c in cells], (low, high), fmt="o", ms=5, lw=1.5, color=color, label=name)


def _finish(figure: Figure) -> Markup:
    """The figure as inline SVG in greys that suit light and dark paper, its text as text."""
    for axes in figure.axes:
        axes.grid(axis="y", color="#8a94a3", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors="#7a8899")
        for text in (axes.title, axes.xaxis.label):
            text.set_color("#7a8899")
        for spine in axes.spines.values():
            spine.set_color("#7a8899")
    legend = figure.axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    for text in legend.get_texts():
        text.set_color("#7a8899")
    image = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Markup(image.getvalue()[image.getvalue().index("<svg") :])
