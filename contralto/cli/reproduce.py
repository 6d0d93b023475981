"""`contralto reproduce`: run the recipe of a paper, on the models it names or on embedded stand-ins, or show what it would take."""

import argparse
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from contralto.common.errors import require

if TYPE_CHECKING:
    from contralto.recipes.estimates import Need
    from contralto.recipes.papers import PaperRecipe
    from contralto.recipes.steps import RecipeStep

__all__ = ["add_arguments", "run"]

PRICE = 3.0
"""Dollars per hour of a GPU with 80 GB."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags.

    Args:
        parser: the parser of the command.
    """
    parser.add_argument("paper", nargs="?", metavar="NAME", help="a paper: its name in --list, or its number on arXiv")
    parser.add_argument("--list", action="store_true", help="list all papers, with what their recipes take")
    parser.add_argument(
        "--dry-run", action="store_true", help="check every command and name, estimate hours and cost, run nothing"
    )
    parser.add_argument(
        "--small", action="store_true", help="run the same methods on the embedded models, in a few minutes on a CPU"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder of the run (default: reproduce/NAME)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=PLACE",
        help="where a file, folder or model is that you bring, such as DIR=/data/coco; can be given several times",
    )
    parser.add_argument(
        "--price", type=float, default=PRICE, help=f"dollars per hour of a GPU with 80 GB (default {PRICE:g})"
    )


def run(args: argparse.Namespace) -> None:
    """List, check or run.

    Args:
        args: the parsed flags.

    Raises:
        ValueError: no such paper, something is missing that the user has to bring, or a command of the recipe fails.
        ImportError: a package of the extra `demo` is not installed.
    """
    require("datasets", "lm_eval", "peft", "trl", "yaml")
    from contralto.recipes import papers, running

    if args.list or args.paper is None:
        _list()
        return
    recipe = papers.find(args.paper)
    places = _places(args.set)
    commands = running.prepare(recipe, is_small=args.small, places=places)
    if not commands.steps:
        kind, other = ("--small", "a full run") if args.small else ("a full run", "--small")
        raise ValueError(f"the recipe of {recipe.name} has no commands for {kind}: there is only {other}")
    _show(recipe, commands.steps, price=None if args.small else args.price)
    if args.dry_run:
        _check(recipe, commands.steps, places, is_small=args.small)
        return
    if missing := running.missing(recipe, commands):
        raise ValueError(
            f"{recipe.name} needs {', '.join(missing)}, which you bring: say where with --set {missing[0]}=PLACE. {_line(recipe.models)}"
        )
    folder = args.output or Path("reproduce") / (f"{recipe.key}-small" if args.small else recipe.key)
    running.run(commands, folder)
    _figures(recipe, folder)


def _places(pairs: list[str]) -> dict[str, str]:
    """Return the places that the user gives, as absolute paths where they exist."""
    places = {}
    for pair in pairs:
        name, sign, place = pair.partition("=")
        if not (name and sign and place):
            raise ValueError(f"--set takes NAME=PLACE, such as DIR=/data/coco, not {pair!r}")
        places[name] = str(Path(place).resolve()) if Path(place).exists() else place
    return places


def _line(text: str) -> str:
    return " ".join(text.split())


def _list() -> None:
    from contralto.recipes.estimates import estimate, total
    from contralto.recipes.papers import PARTS, paper_recipes
    from contralto.recipes.steps import steps_of

    recipes = paper_recipes().values()
    width = max(len(recipe.key) for recipe in recipes)
    for part, title in PARTS.items():
        print(f"\n{title}")
        for recipe in recipes:
            if recipe.part == part:
                needs = estimate(recipe, steps_of(recipe.hub, recipe.hub_files)) if recipe.hub else []
                print(f"  {recipe.key:{width}}  {recipe.arxiv}  {_taken(total(needs)) if needs else 'only --small'}")


def _taken(need: "Need") -> str:
    if need.memory == 0:
        return "no GPU"
    gpus = f"{need.gpus} GPU{'s' * (need.gpus > 1)} of 80 GB"
    return f"{gpus}, {_hours(need.hours)}" if need.hours else f"{gpus}, time depends on your data"


def _hours(hours: float) -> str:
    """Say GPU hours with one digit."""
    if math.isnan(hours):
        return "time depends on your data"
    return "minutes" if hours < 0.2 else f"about {float(f'{hours:.1g}'):g} GPU hours"


def _show(recipe: "PaperRecipe", steps: "list[RecipeStep]", *, price: float | None) -> None:
    """Print the claim, the commands with what each takes, and the figures to compare with."""
    from contralto.recipes.estimates import estimate, total

    print(f"{recipe.name} (arXiv {recipe.arxiv}): {_line(recipe.claim)}\n")
    if price is None:
        print("On the embedded models: this shows that the method runs, not what it gains.\n")
    else:
        print(f"{_line(recipe.models)}\n")
    needs = estimate(recipe, steps)
    for step, need in zip(steps, needs, strict=True):
        print(shlex.join(step.words))
        if price is not None:
            print(f"    {_taken(need)}")
    if price is not None:
        whole = total(needs)
        money = (
            f", about {float(f'{whole.hours * price:.1g}'):g} dollars at {price:g} per GPU hour" if whole.hours else ""
        )
        print(f"\nIn all: {_taken(whole)}{money}; within a factor of about three.")
        if whole.unknown:
            print(f"Not in the estimate, since their sizes are not known: {', '.join(whole.unknown)}.")
    print()


def _check(recipe: "PaperRecipe", steps: "list[RecipeStep]", places: Mapping[str, str], *, is_small: bool) -> None:
    """Let every parser read its command, and look for the models and data on the hub."""
    from contralto.cli.parsed import check_command
    from contralto.recipes import running
    from contralto.recipes.steps import brought

    with running.files_of(recipe, is_small=is_small, places=places):
        for step in steps:
            if step.words[0] == "contralto":
                check_command(step.words[1:])
    print(f"{len(steps)} command{'s' * (len(steps) > 1)} read by their parsers.")
    for name, state in running.on_hub(steps).items():
        print(f"{name}: {state}")
    if needed := [name for name in brought(recipe, steps) if name not in places]:
        print(f"You bring, with --set NAME=PLACE: {', '.join(needed)}.")


def _figures(recipe: "PaperRecipe", folder: Path) -> None:
    print(f"\nThe results are in {folder}.")
    for figure, place in recipe.published:
        print(f"To compare with ({place}): {_line(figure)}")
