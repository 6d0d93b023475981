"""Measure what contralto does on real models and public files, line by line, and write docs/real_models.md.

    python benchmarks/real_card.py                                     list the lines
    python benchmarks/real_card.py hellaswag --model DIR --data DIR    run a line, and write its section of the card
    python benchmarks/real_card.py --all --model DIR --data DIR        run every line for which the models are given
    python benchmarks/real_card.py --report --model DIR                write the sections of the results that are there
    python benchmarks/real_card.py hellaswag ... --small               a trial of seconds; the card stays as it is
    python benchmarks/real_card.py hellaswag ... --compare             run it, and compare with the intervals of the card

Pages of papers quote the card: `python docs/generators/papers.py` brings them up to date.

Results are kept in `--folder` as they are made: a line that is stopped goes on where it was, and a finished one is not run again.
A line is a module in `benchmarks/real/lines/`, see `benchmarks/real/line.py`.
"""

import argparse
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from real.line import ROLES, Context, Line, Section, lines
from real.report import compare, section_text, write

from contralto.common.files import locked_folder

ROOT = Path(__file__).parents[1]
CARD = ROOT / "docs" / "real_models.md"


def main() -> None:
    """Run the lines that are named, and write the card."""
    torch.set_num_threads(1)  # figures do not depend on the number of cores, and two lines can run side by side
    known = lines()
    args = _parser().parse_args()
    if unknown := [name for name in args.lines if name not in known]:
        raise SystemExit(f"there is no line {unknown[0]!r}; there are {', '.join(known)}")
    models = {role: getattr(args, role) for role in ROLES if getattr(args, role)}
    contexts = {
        line.name: Context(line, models, args.data, args.folder / ("small" if args.small else "full"), args.small)
        for line in known.values()
    }
    chosen = args.lines or ([*known] if args.all or args.report else [])
    if not chosen:
        print("\n".join(f"{line.name:<14} {line.title}" for line in known.values()))
        return
    if args.all:
        chosen = [name for name in chosen if all(contexts[name].has(role) for role in known[name].needs)]
    card = args.card or (args.folder / "small" / CARD.name if args.small else CARD)
    if not args.report:
        _check_models(contexts[name] for name in chosen)
        for name in chosen:
            _run(contexts[name], card, known, is_compared=args.compare)
        return
    made = {name: section for name in chosen if (section := _section(contexts[name])) is not None}
    write(card, known, {name: (contexts[name], section) for name, section in made.items()})
    print(f"{card}: {', '.join(made) or 'no line has results'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", metavar="LINE", help="names of lines; without any they are listed")
    for role, text in ROLES.items():
        parser.add_argument(f"--{role}", metavar="MODEL", help=f"{text}: a folder, a hub id or testbed:NAME")
    parser.add_argument("--data", type=Path, metavar="DIR", help="public files: hellaswag/, wikitext/, ...")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "real_card", help="the folder of results")
    parser.add_argument(
        "--card", type=Path, help=f"the card; default: docs/{CARD.name}, with --small one beside the results"
    )
    parser.add_argument("--all", action="store_true", help="run every line for which the models are given")
    parser.add_argument("--small", action="store_true", help="a trial with a few items, kept apart from the results")
    parser.add_argument("--report", action="store_true", help="run nothing, write the sections of what is there")
    parser.add_argument(
        "--compare", action="store_true", help="compare with the card's intervals, and leave it as it is"
    )
    return parser


def _check_models(contexts: Iterable[Context]) -> None:
    """Exit with one sentence if a line lacks a model, before any line runs."""
    try:
        for context in contexts:
            for role in context.line.needs:
                context.path(role)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def _run(context: Context, card: Path, known: Mapping[str, Line], *, is_compared: bool) -> None:
    """Run a line, and write its section or compare it with the card."""
    line = context.line
    with ExitStack() as stack:
        try:
            busy = f"another process ({{pid}}) runs the line {line.name!r} in {context.scratch}: wait for it"
            stack.enter_context(locked_folder(context.scratch, busy))
        except OSError as error:
            raise SystemExit(str(error)) from error
        line.run(context)
    section = _section(context)
    if section is None:
        raise SystemExit(f"the line {line.name!r} ran, but has no results to print")
    print(section_text(context, section))
    if is_compared:
        raise SystemExit(0 if compare(card, context, section) else 1)
    write(card, known, {line.name: (context, section)})


def _section(context: Context) -> Section | None:
    """Return the section of a line, None if there are no results of the models that are given."""
    if any(not context.has(role) for role in context.line.needs):
        return None
    return context.line.render(context)


if __name__ == "__main__":
    main()
