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

GREY, ORANGE = "#7a8899", "#c2571a"  # readable on light and on dark paper
SIZE = (6, 3.9)  # inches, of each plot
STYLES: dict[str, dict[str, str]] = {
    demo.GREEDY: {"color": GREY},
    demo.CONTRASTIVE: {"color": ORANGE},
    demo.SHARPENED: {"color": GREY, "mfc": "none"},
    demo.CONTRASTIVE_SAMPLING: {"color": ORANGE, "mfc": "none"},
}
"""The systems in the plots: contrast in orange, its baseline in grey, sampling hollow."""


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
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    titles = [pair.title for pair in demo.PAIRS]
    for at, name in enumerate(STYLES):
        cells = [proportion(results.hits[title][name]) for title in titles]
        _points(axes, [x + 0.15 * (at - 1.5) for x in range(len(titles))], cells, name)
    axes.set(xticks=range(len(titles)), xticklabels=titles, ylim=(0, 1.03), title="accuracy, by model")
    return _finish(figure)


def _length_plot(results: demo.Results) -> Markup:
    """Accuracy by the number of steps, with the shortcut (three seeds together) and without it."""
    figure = Figure(figsize=SIZE, layout="constrained")
    with_shortcut = [pair.title for pair in demo.PAIRS[:-1]]
    worlds = (("with the shortcut", with_shortcut), ("control", [demo.PAIRS[-1].title]))
    for axes, (world, titles) in zip(figure.subplots(1, 2, sharey=True), worlds, strict=True):
        for at, name in enumerate((demo.GREEDY, demo.CONTRASTIVE)):
            cells = [_of_length(results, titles, name, steps) for steps in demo.LENGTHS]
            _points(axes, [steps + 0.2 * (at - 0.5) for steps in demo.LENGTHS], cells, name)
        axes.set(xticks=list(demo.LENGTHS), xlabel="steps", ylim=(-0.03, 1.03), title=world)
    return _finish(figure)


def _of_length(results: demo.Results, titles: Sequence[str], name: str, steps: int) -> Proportion:
    chosen = [len(problem.steps) == steps for problem in results.problems]
    hits = [hit for title in titles for hit, keep in zip(results.hits[title][name], chosen, strict=True) if keep]
    return proportion(hits)


def _points(axes: Any, x: Sequence[float], cells: Sequence[Proportion], name: str) -> None:
    low, high = [c.value - c.low for c in cells], [c.high - c.value for c in cells]
    axes.errorbar(x, [c.value for c in cells], (low, high), fmt="o", ms=6, lw=1.5, label=name, **STYLES[name])


def _finish(figure: Figure) -> Markup:
    """The figure as inline SVG in greys that suit light and dark paper, its text as text."""
    for axes in figure.axes:
        axes.grid(axis="y", color=GREY, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(GREY)
        axes.tick_params(colors=GREY, labelsize=12)
        axes.title.set(color=GREY, size=13)
        axes.xaxis.label.set(color=GREY, size=12)
    figure.axes[0].legend(frameon=False, fontsize=11, loc="lower left", labelcolor=GREY)
    image = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Markup(image.getvalue()[image.getvalue().index("<svg") :])
