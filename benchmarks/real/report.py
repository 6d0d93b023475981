"""Write the sections of lines into the card, and compare another run with it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from contralto.common.files import read_text, replace_text
from real.line import ROLES, Context, Figure, Line, Section

__all__ = ["compare", "section_text", "write"]

HEAD = """# Real models

Every figure of this page is measured on pretrained models and public files by `benchmarks/real_card.py`; nothing here was trained
to show an effect. Settings were written down before the runs and are those of the papers where they name some; nothing is tuned on
test items. Effects that were not found are printed like those that were.

    python benchmarks/real_card.py hellaswag --model MODEL --data DIR         run a line, and write its section
    python benchmarks/real_card.py hellaswag --model MODEL --data DIR --compare   run it anew, and compare with this page

A line that is stopped goes on where it was. Intervals are 95%: Wilson's for shares, percentile bootstrap over items for the rest.
Tests are paired on the same items and two-sided: exact McNemar for shares, sign-flip permutation for means; *detectable* is the
smallest difference that the test would find with a power of 0.8 at the level of 0.05.
"""
NOT_RUN = "Not run yet."


def write(path: Path, lines: Mapping[str, Line], sections: Mapping[str, tuple[Context, Section]]) -> None:
    """Replace the sections of lines in the card; the other sections stay, and lines without one are named as not run.

    Args:
        path: The card; it is made if it is missing.
        lines: All lines, in their order.
        sections: The new sections by the name of their line.
    """
    old = dict(_sections(read_text(path))) if path.exists() else {}
    texts = []
    for name, line in lines.items():
        if name in sections:
            body = section_text(*sections[name])
        else:
            body = old.get(name) or f"## {line.title}\n\n{line.question}\n\n{NOT_RUN} Command: `{_command(line)}`."
        texts.append(f"<!-- line: {name} -->\n{body.strip()}\n<!-- end of line: {name} -->\n")
    replace_text(path, "\n".join([HEAD, *texts]))


def section_text(context: Context, section: Section) -> str:
    """Return the text of a section: heading, question, body, models, versions, command.

    Args:
        context: The context of the line.
        section: Its body.
    """
    line = context.line
    figures = {name: [round(x, 5) for x in figure] for name, figure in section.figures.items()}
    return "\n".join(
        [
            f"## {line.title}",
            "",
            line.question,
            "",
            *section.lines,
            "",
            f"Models: {_models(context)}. {_versions(context)}",
            f"Command: `{_command(line, context)}`.",
            *([f"<!-- figures {json.dumps(figures)} -->"] if figures else []),
        ]
    )


def compare(path: Path, context: Context, section: Section) -> bool:
    """Print every figure of a run beside the interval of the card, and return True if all lie inside.

    Args:
        path: The card.
        context: The context of the line.
        section: The section of the other run.

    Raises:
        ValueError: The card has no figures of the line.
    """
    old = dict(_sections(read_text(path))).get(context.line.name, "") if path.exists() else ""
    kept = re.search(r"<!-- figures (.*?) -->", old)
    if kept is None:
        raise ValueError(f"{path} has no figures of the line {context.line.name!r} to compare with")
    known = {name: Figure(*values) for name, values in json.loads(kept[1]).items()}
    is_inside = True
    for name in known.keys() & section.figures.keys():
        value, old_figure = section.figures[name].value, known[name]
        fits = old_figure.low <= value <= old_figure.high
        is_inside &= fits
        where = f"card {old_figure.value:.4g} [{old_figure.low:.4g}, {old_figure.high:.4g}]"
        print(f"{'ok  ' if fits else 'OUT '} {name:<60} {value:.4g}  {where}")
    return is_inside


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield the names of lines and their sections in a card."""
    pattern = r"<!-- line: ([\w-]+) -->\n(.*?)\n<!-- end of line: \1 -->"
    for found in re.finditer(pattern, text, flags=re.DOTALL):
        if NOT_RUN not in found[2]:
            yield found[1], found[2]


def _models(context: Context) -> str:
    """Describe the models by the names of their folders and their digests, without the paths of a machine."""
    told = []
    for role in ROLES:
        if context.has(role) and (role in context.line.needs or role in context.line.flags):
            told.append(f"{role} {Path(context.path(role)).name} ({context.digest(role)})")
    return ", ".join(told) or "none"


def _versions(context: Context) -> str:
    runs = [run for units in context._units.values() for run in units.runs]
    told = []
    for run in runs:
        rest = dict(run)
        where = f"{rest.pop('machine', '?')}, {rest.pop('date', '?')}"
        text = f"{where}: " + ", ".join(f"{name} {number}" for name, number in rest.items())
        if text not in told:
            told.append(text)
    return "Made on " + "; ".join(told) + "." if told else ""


def _command(line: Line, context: Context | None = None) -> str:
    """Return the command of a line, with placeholders in place of folders."""
    named = [role for role in ROLES if role in line.needs or (context and context.has(role) and role in line.flags)]
    flags = [f"--{role} {role.upper()}" for role in named]
    data = ["--data DATA"] if "data" in line.flags else []
    return " ".join(["python benchmarks/real_card.py", line.name, *flags, *data])
