"""The help of `contralto align`: contralto's own options in groups, then those of TRL and transformers.

The parser needs TRL, and importing TRL takes seconds. So the text is kept in a file of the user's cache, whose name is a hash of all that it
depends on: versions, contralto's sources, losses of other packages, the width of the terminal.
"""

import argparse
import copy
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import contralto.align
from contralto.align.parsing import config_class, make_parser, recipes
from contralto.common.files import replace_text
from contralto.common.hashing import json_digest
from contralto.common.versions import versions

__all__ = ["cached_help", "help_text"]

DESCRIPTION = """\
Train a language model on preference pairs, distil a larger model into it, or train a reward model, by TRL's trainers. For example:

  contralto align dpo --model_name_or_path MODEL --dataset_name PAIRS --use_peft --output_dir OUT

MODEL is a hub id or a folder. PAIRS is a hub id, a file or a folder, whose rows have prompt, chosen and rejected. Without --use_peft all
weights are trained. RECIPE, here dpo, sets the options with which a method is usually trained: a YAML file of your own, or one of

{recipes}

Options on the command line win over the recipe. Every option of trl dpo is accepted, and --model, --dataset, --teacher and --output as in the
other commands; options of accelerate launch, such as --num_processes, start several processes. The options below are those of the recipe's
trainer, {defaults}: see also contralto align distill --help and contralto align reward_margin --help. contralto align report DIR ...
writes one page about several trainings."""
LOSSES = ("loss_type", "beta", "loss_weights", "loss_settings")
"""Options about losses, besides their settings."""


def cached_help(trainer: str, recipe: Mapping[str, Any]) -> str:
    """Return the help of a trainer's options, from the user's cache if nothing has changed.

    Args:
        trainer: a key of `TRAINERS`.
        recipe: the options of the recipe, which are shown as defaults.

    Raises:
        ImportError: TRL is not installed.
    """
    path = _cache_folder() / f"align-{trainer}-{json_digest({**_dependencies(), 'recipe': repr(recipe)}, 16)}.txt"
    with suppress(OSError, UnicodeError):
        return path.read_text(encoding="utf-8")
    text = help_text(trainer, recipe)
    with suppress(OSError):  # a read-only home
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    return text


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contralto"


def _dependencies() -> dict[str, Any]:
    """Return all that the text depends on."""
    (folder,) = map(Path, contralto.align.__path__)
    files = [
        path
        for pattern in ("*.py", "recipes/*.yaml", "trainers/*.py", "losses/**/*.py")
        for path in folder.glob(pattern)
    ]
    return {
        "versions": versions(),
        "files": [[str(path), path.stat().st_mtime_ns] for path in sorted([*files, Path(__file__)])],
        "losses": sorted(
            point.value
            for group in ("contralto.losses", "contralto.unpaired_losses")
            for point in entry_points(group=group)
        ),
        "width": shutil.get_terminal_size().columns,
    }


def help_text(trainer: str, recipe: Mapping[str, Any] | None = None) -> str:
    """Return the help of a trainer's options.

    Args:
        trainer: a key of `TRAINERS`.
        recipe: the options of a recipe, which are shown as defaults; None shows those of the trainer.

    Raises:
        ImportError: TRL is not installed.
    """
    parser = make_parser(trainer)
    shown = argparse.ArgumentParser(
        prog=parser.prog,
        usage=parser.usage,
        description=DESCRIPTION.format(
            recipes="\n".join(_columns(recipes())),
            defaults="with the recipe's defaults" if recipe else "with its defaults",
        ),
        formatter_class=_Formatter,
        add_help=False,
    )
    for title, names in _groups(parser, trainer).items():
        group = shown.add_argument_group(title)
        for action in (each for name in names for each in parser._actions if each.dest == name):
            group._add_action(_shown(action, recipe or {}))
    return shown.format_help()


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and keep the lines of the description."""


def _groups(parser: Any, trainer: str) -> dict[str, list[str]]:
    """Return the names of options by the titles of their groups."""
    data, config, model, mixture = parser.dataclass_types
    assert config is config_class(trainer)
    own, settings = _own_fields(config), (*LOSSES, *getattr(sys.modules[config.__module__], "LOSS_OPTIONS", ()))
    first, training = _own_fields(data), f"{trainer} training"
    groups = {
        "trainer, data and rounds (contralto)": first,
        f"losses of {training} (contralto)": [name for name in own if name in settings],
        f"{training} (contralto)": [name for name in own if name not in settings],
        "data (TRL)": _names(data),
        "model (TRL)": _names(model),
        "training (TRL, transformers)": _names(config),
        "mixtures of datasets (TRL)": _names(mixture),
        "others": [action.dest for action in parser._actions],
    }
    seen: set[str] = set()
    for title, names in groups.items():
        groups[title] = [name for name in dict.fromkeys(names) if name not in seen]
        seen |= set(names)
    return {title: names for title, names in groups.items() if names}


def _names(kind: type) -> list[str]:
    return [each.name for each in fields(kind) if each.init]


def _own_fields(kind: type) -> list[str]:
    """Return the fields that contralto's classes declare, not those that they only inherit from TRL."""
    ours = [each for each in kind.__mro__ if each.__module__.startswith("contralto.") and is_dataclass(each)]
    declared = {name for each in ours for name in vars(each).get("__annotations__", {})}
    return [name for name in _names(kind) if name in declared]


def _shown(action: argparse.Action, recipe: Mapping[str, Any]) -> argparse.Action:
    """Return an option in the spelling of TRL, with underscores, with the recipe's default, and without a default that is None."""
    shown = copy.copy(action)
    shown.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
    shown.default = recipe.get(action.dest, action.default)
    if shown.default is None:
        shown.default = argparse.SUPPRESS
    return shown


def _columns(names: Iterable[str], width: int = 100) -> Iterator[str]:
    """Yield lines with several names each."""
    line = ""
    for name in names:
        if len(line) + len(name) + 4 > width:
            yield f"{line},"
            line = ""
        line += ("  " if not line else ", ") + name
    yield line
