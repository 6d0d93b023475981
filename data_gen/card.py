"""The card of a data set: the contrast of its pairs, the models, the rows that were lost, and the cost."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import jinja2
import yaml

from contralto import __version__
from contralto.common.files import replace_text
from contralto.common.html import read_template
from contralto.common.plots import PALETTE, TEXT, style_axes
from contralto.common.texts import amount
from contralto.data_gen.checks import annotate, answer_text
from contralto.data_gen.escaping import Markdown, fenced, inline, quoted
from contralto.data_gen.publication import read_publication
from contralto.data_gen.templates import as_text
from contralto.data_gen.votes import summarise_votes

__all__ = ["Contrast", "contrastiveness", "markdown", "write"]

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (math.inf, "n>1M"))
"""The Hub's categories of size."""
EXAMPLE = 1200
"""Characters of an answer that an example shows."""


class Contrast(NamedTuple):
    """The contrast of a strategy's pairs. A value that no pair has is None."""

    strategy: str
    pairs: int
    jaccard: float
    """Mean."""
    levenshtein: float
    """Mean."""
    length_ratio: float | None
    """Median, of the pairs whose rejected answer is not empty."""
    no_op: float
    """Share."""
    finished: float | None
    """Share of the pairs with two complete answers."""
    agreed: int | None
    """Number of pairs whose direction the judge confirms."""
    judged: int
    """Number of judged pairs."""
    margin: float | None
    """Mean reward margin."""
    ln_ches: float | None
    """Mean."""


def contrastiveness(rows: Sequence[Mapping[str, Any]]) -> list[Contrast]:
    """Return the contrast of each strategy's pairs, in the order in which strategies appear.

    Args:
        rows: the pairs. The columns of the check `contrast` are computed if they are missing.

    Examples:
        >>> row = {"strategy": "clair", "chosen": [{"content": "It is 4."}], "rejected": [{"content": "It is 5."}]}
        >>> print(markdown(contrastiveness([row])))
        | strategy | pairs | Jaccard, mean | Levenshtein, mean | length, median | the same |
        |---|---|---|---|---|---|
        | clair | 1 | 0.500 | 1 | 1.00 | 0.0% |
    """
    measured = _measured(rows)
    names = dict.fromkeys(row.get("strategy") or "unknown" for row in measured)
    return [
        _of_strategy(name, [row for row in measured if (row.get("strategy") or "unknown") == name]) for name in names
    ]


def _measured(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return rows if all("jaccard" in row for row in rows) else annotate(rows, {"contrast": {}})


def _of_strategy(name: str, rows: Sequence[Mapping[str, Any]]) -> Contrast:
    lengths = _known(rows, "length_ratio")
    directions = _known(rows, "direction")
    return Contrast(
        strategy=name,
        pairs=len(rows),
        jaccard=fmean(row["jaccard"] for row in rows),
        levenshtein=fmean(row["levenshtein"] for row in rows),
        length_ratio=median(lengths) if lengths else None,
        no_op=fmean(row["no_op"] for row in rows),
        finished=_mean(rows, "finished"),
        agreed=directions.count("chosen") if directions else None,
        judged=len(directions),
        margin=_mean(rows, "reward_margin"),
        ln_ches=_mean(rows, "ln_ches"),
    )


def _known(rows: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    return [row[column] for row in rows if row.get(column) is not None]


def _mean(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    values = _known(rows, column)
    return fmean(values) if values else None


def markdown(contrasts: Sequence[Contrast]) -> str:
    """Return contrasts as a table in Markdown, without empty columns.

    Args:
        contrasts: as `contrastiveness` returns them.
    """
    columns: dict[str, list[str | None]] = {
        "strategy": [inline(c.strategy) for c in contrasts],
        "pairs": [str(c.pairs) for c in contrasts],
        "Jaccard, mean": [f"{c.jaccard:.3f}" for c in contrasts],
        "Levenshtein, mean": [f"{c.levenshtein:.0f}" for c in contrasts],
        "length, median": [None if c.length_ratio is None else f"{c.length_ratio:.2f}" for c in contrasts],
        "the same": [f"{c.no_op:.1%}" for c in contrasts],
        "whole": [None if c.finished is None else f"{c.finished:.1%}" for c in contrasts],
        "direction": [None if c.agreed is None else f"{c.agreed} of {c.judged}" for c in contrasts],
        "margin, mean": [None if c.margin is None else f"{c.margin:.3g}" for c in contrasts],
        "ln-CHES, mean": [None if c.ln_ches is None else f"{c.ln_ches:.3g}" for c in contrasts],
    }
    shown = {name: [value or "" for value in values] for name, values in columns.items() if any(values)}
    lines = [f"| {' | '.join(line)} |" for line in [list(shown), *map(list, zip(*shown.values(), strict=True))]]
    return "\n".join([lines[0], "|" + "---|" * len(shown), *lines[1:]])


# ---------------------------------------------------------------------------------------------------------------- a page


def write(folder: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Path:
    """Write README.md and its plot into the folder of a data set.

    Single completions have no contrast and no plot: the card counts them by strategy and label.

    Args:
        folder: of the data set, whose pairs lie in `data/*.parquet`.
        rows: the pairs, with the columns of the checks; or single completions.
        summary: `recipe` (the mapping that was read), `models` (the identities of engines, by role), `counts` (`rows`, `pairs`,
            and by reason `rejected`, `failed`, `dropped`), `costs` (of each role `role`, `requests`, `prompt_tokens`,
            `completion_tokens`, `money`, `currency`), `templates` (requests by name@version), and optionally `scorers` (digests of
            source or weights, by name) and `name`, if it is not that of the folder.

    Returns:
        The path of the card.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a card needs at least one pair")
    is_paired = "completion" not in rows[0]
    measured = _measured(rows) if is_paired else rows
    contrasts = contrastiveness(measured) if is_paired else []
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True, finalize=inline
    )
    environment.filters |= {"in_yaml": _in_yaml, "quoted": partial(quoted, limit=EXAMPLE), "fenced": fenced}
    template = environment.from_string(read_template("contralto.data_gen", "card.md.j2"))
    page = template.render(
        about=read_publication(summary["recipe"]),
        title=summary.get("name") or Path(folder).resolve().name,
        version=__version__,
        size=next(name for limit, name in SIZES if len(rows) < limit),
        counts=summary["counts"],
        has_images=any(row.get("images") for row in rows),
        is_paired=is_paired,
        table=Markdown(markdown(contrasts) if is_paired else label_table(rows)),
        tokens=_tokens(summary["recipe"]),
        votes=summarise_votes(measured),
        judged=any(contrast.judged for contrast in contrasts),
        has_ches=any(contrast.ln_ches is not None for contrast in contrasts),
        plot=_plot(Path(folder), measured, [contrast.strategy for contrast in contrasts]) if is_paired else "",
        roles=[_role(cost, summary["models"][cost["role"]]) for cost in summary["costs"]],
        templates=summary["templates"],
        scorers=summary.get("scorers", {}),
        has_margin=any(contrast.margin is not None for contrast in contrasts),
        examples=[_example(measured, contrast.strategy) for contrast in contrasts] or _single_examples(rows),
        recipe=yaml.safe_dump(summary["recipe"], sort_keys=False, allow_unicode=True),
    )
    path = Path(folder) / "README.md"
    replace_text(path, page)
    return path


def _in_yaml(text: str) -> Markdown:
    return Markdown(json.dumps(text))  # JSON is YAML


def _tokens(recipe: Mapping[str, Any]) -> str:
    settings = ((recipe.get("checks") or {}).get("contrast")) or {}
    return f"tokens ({settings['tokenizer']})" if settings.get("tokenizer") else "words, split at white space,"


def _role(cost: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    money = f"{amount(cost['money'])} {cost['currency']}" if cost["money"] else "-"
    name = f"{model.get('model', '-')}{' @ ' if 'source' in model else ''}{model.get('source', '')}"
    return {**cost, "cost": money, "model": name, "engine": model.get("engine", "-")}


def _example(rows: Sequence[Mapping[str, Any]], strategy: str) -> dict[str, str]:
    """Return the strategy's pair of median Levenshtein distance."""
    pairs = sorted(
        (row for row in rows if (row.get("strategy") or "unknown") == strategy), key=lambda row: row["levenshtein"]
    )
    row = pairs[len(pairs) // 2]
    answers = {name: answer_text(row, name) for name in ("chosen", "rejected")}
    return {"strategy": strategy, "prompt": as_text(row["prompt"]), **answers}


def label_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the numbers of single completions by strategy and label as a table in Markdown.

    Args:
        rows: the completions.

    Examples:
        >>> print(label_table([{"strategy": "c_rag", "label": True}, {"strategy": "c_rag", "label": False}, {"strategy": "c_rag", "label": True}]))
        | strategy | completions | to learn | to avoid |
        |---|---|---|---|
        | c_rag | 3 | 2 | 1 |
    """
    labels: dict[str, list[bool]] = {}
    for row in rows:
        labels.setdefault(row["strategy"], []).append(row["label"])
    lines = [f"| {inline(name)} | {len(own)} | {sum(own)} | {len(own) - sum(own)} |" for name, own in labels.items()]
    return "\n".join(["| strategy | completions | to learn | to avoid |", "|---|---|---|---|", *lines])


def _single_examples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the first completion of each strategy."""
    first = {row["strategy"]: row for row in reversed(rows)}
    return [
        {"strategy": name, "prompt": as_text(row["prompt"]), "completion": answer_text(row, "completion")}
        for name, row in reversed(first.items())
    ]


PANELS = (
    ("jaccard", "Jaccard similarity"),
    ("levenshtein", "Levenshtein distance, characters"),
    ("length_ratio", "length of chosen / rejected"),
    ("reward_margin", "reward margin"),
    ("ln_ches", "ln-CHES"),
)


def _plot(folder: Path, rows: Sequence[Mapping[str, Any]], strategies: Sequence[str]) -> str:
    """Plot the cumulative distribution of each measure on white paper, a line per strategy; return the path that the card names."""
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False}):  # names may hold dollar signs
        figure = _figure(rows, strategies)
        path = folder / "plots" / "contrast.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})
    return "plots/contrast.png"


def _figure(rows: Sequence[Mapping[str, Any]], strategies: Sequence[str]) -> Any:
    from matplotlib.figure import Figure

    panels = [(column, title) for column, title in PANELS if _known(rows, column)]
    across = 2 if len(panels) == 4 else 3
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4 * across, 2.9 * down + 0.5), layout="constrained")
    drawn = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, (column, title) in zip(drawn, panels, strict=False):
        _panel(axes, rows, column, strategies)
        axes.set_title(title, color=TEXT, size=12)
    for axes in drawn[len(panels) :]:
        axes.remove()
    figure.supylabel("share of the pairs at or below", color=TEXT, size=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 * across // 2, frameon=False, labelcolor=TEXT)
    return figure


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], column: str, strategies: Sequence[str]) -> None:
    """Draw the share of a strategy's pairs at or below each value, without the outermost hundredth at either end."""
    values = sorted(_known(rows, column))
    low, high = values[len(values) // 100], values[-1 - len(values) // 100]
    margin = 0.03 * (high - low) or 0.5
    for at, name in enumerate(strategies):
        found = _known([row for row in rows if (row.get("strategy") or "unknown") == name], column)
        colour, line = PALETTE[at % len(PALETTE)], "-" if at < len(PALETTE) else "--"
        if found:
            axes.ecdf(found, label=name, color=colour, ls=line, lw=1.6)
    axes.set(xlim=(low - margin, high + margin), ylim=(0, 1.02))
    style_axes(axes)
