"""Decode the questions of the line of knowledge conflicts with a gate around context-aware decoding."""

from typing import Any, NamedTuple

from contralto.eval import stats
from real.line import Context, Figure, Line, Section
from real.lines.conflicts import compare, items, known_items, outcomes, replies, shown_items
from real.tables import p_text, table

ALPHA = 1.0


class Setting(NamedTuple):
    """How a question is decoded."""

    label: str
    alpha: float = ALPHA
    gate: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of decoding besides alpha."""
        return {} if self.gate is None else {"gate": self.gate}


WHOLE = Setting("no gate")
SETTINGS = [
    Setting("greedy, no contrast", 0.0),
    *(Setting(f"gate {gate:g}", gate=gate) for gate in (0.3, 0.5, 0.7, 0.9)),
]
"""What is compared with `WHOLE`."""
COUNTED = {"conflict": "context", "unrelated": "memory"}
"""What is counted after each kind of context."""


def run(context: Context) -> None:
    """Find the facts that the model knows, then decode their questions after both contexts in every setting.

    Args:
        context: The context of the line.
    """
    every, units = items(context), context.units()
    keys = [_key(context, item) for item in every]
    units.fill(
        keys, lambda batch: replies(context, [every[i] for i in batch], "none", 0.0), title="known", batch_size=8
    )
    known = known_items(context, every, units.of(keys) or ())
    for shown in COUNTED:
        asked = shown_items(known, shown)
        for setting in (WHOLE, *SETTINGS):
            units.fill(
                [_key(context, item, shown, setting) for item in asked],
                lambda batch, asked=asked, shown=shown, setting=setting: replies(  # type: ignore[misc]
                    context, [asked[i] for i in batch], shown, setting.alpha, **setting.options
                ),
                title=f"{shown}, {setting.label}",
                batch_size=1,  # a gate closes where all rows of a batch are sure
            )


def _key(context: Context, item: dict[str, str], shown: str = "none", setting: Setting | None = None) -> dict[str, Any]:
    other = {"other": item["other"]} if shown == "conflict" else {}
    how = {} if setting is None else {"alpha": setting.alpha, "gate": setting.gate}
    return context.key("model", kind=item["kind"], subject=item["subject"], shown=shown, **other, **how)


def render(context: Context) -> Section | None:
    """Return the section.

    Args:
        context: The context of the line.
    """
    every, units = items(context), context.units()
    bare = units.of([_key(context, item) for item in every])
    if bare is None:
        return None
    known = known_items(context, every, bare)
    rows: list[list[str]] = []
    figures: dict[str, Figure] = {}
    p_values: dict[int, float] = {}
    for shown, counted in COUNTED.items():
        asked = shown_items(known, shown)
        clusters = [f"{item['kind']} {item['subject']}" for item in asked]
        hits: dict[Setting, list[bool]] = {}
        for setting in (WHOLE, *SETTINGS):
            texts = units.of([_key(context, item, shown, setting) for item in asked])
            if texts is None:
                return None
            own = hits[setting] = outcomes(texts, asked, shown)[counted]
            share = stats.proportion(own, clusters=clusters)
            figures[f"{shown}, {setting.label}"] = Figure(*share[:3])
            cells = ["", ""]
            if setting != WHOLE:
                p_values[len(rows)], cells = compare(hits[WHOLE], own, clusters)
            rows.append([f"{shown} ({len(texts)})", setting.label, str(share), *cells])
    adjusted = dict(zip(p_values, stats.holm(list(p_values.values())).tolist(), strict=True))
    rows = [[*row, p_text(adjusted[i]) if i in adjusted else ""] for i, row in enumerate(rows)]
    head = ["context (n)", "decoding", "right", "less no gate", "test against no gate", "Holm's p"]
    return Section([*INTRO, "", *table(head, rows)], figures)


INTRO = [
    f"The prompts of [Knowledge conflicts](#knowledge-conflicts), context-aware decoding at alpha {ALPHA:g}, one text at a time. A gate leaves the",
    "contrast out where the model's likeliest token has at least this probability. *Right*: after a context that says otherwise, the",
    "continuation begins with the context's answer; after one about something else, with what the model knows. Tests as there, against",
    "the contrast without a gate.",
]
LINE = Line(
    name="gates",
    title="A gate around context-aware decoding",
    question="Does a gate keep what the contrast gains, and does it lose less where there is nothing to contrast?",
    order=32,
    needs=("model",),
    full={"subjects": 100, "items": 400},
    small={"subjects": 2, "items": 6},
    revision=1,
    run=run,
    render=render,
)
