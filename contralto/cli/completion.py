"""`contralto completion`: print a script with which a shell completes commands, options and their choices.

    eval "$(contralto completion bash)"                         in ~/.bashrc, or once for the running shell
    contralto completion zsh > ~/.zfunc/_contralto              zsh, with ~/.zfunc in fpath

The script holds all names, so that completing starts no process. Options of TRL and lm-eval are in it where they are installed.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contralto.cli.spellings import options_of
from contralto.common.errors import sentence

__all__ = ["SHELLS", "add_arguments", "complete_parser", "run"]

SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.epilog = 'bash: eval "$(contralto completion bash)" in ~/.bashrc'


def run(args: argparse.Namespace) -> None:
    """Print the script.

    Args:
        args: the parsed flags.

    Raises:
        ModuleNotFoundError: shtab is not installed.
    """
    import shtab

    print(shtab.complete(complete_parser(), shell=args.shell))


def complete_parser() -> argparse.ArgumentParser:
    """Return a parser with the options of all commands, also those that other libraries parse."""
    import shtab

    from contralto.cli import COMMANDS, all_commands

    parser, commands = all_commands(missing=_note)
    for name, command in COMMANDS.items():
        if not command.has_parser:
            try:
                for action in OTHERS[name]():
                    if not set(action.option_strings) & options_of(commands[name]).keys():
                        commands[name]._add_action(action)
            except ImportError as error:
                _note(command, error)
    for each in commands.values():
        for action in _actions(each):
            if action.type is Path or action.metavar in ("DIR", "FILE", "PATH"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def _note(command: Any, error: ImportError) -> None:
    """Print that the options of a command are left out, since they need a package that is not installed."""
    print(
        f"contralto completion: without the options of {command.name}: {sentence(error, command.extra)}",
        file=sys.stderr,
    )


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the options of a command, and those of its actions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)
        else:
            yield action


def _align_actions() -> Iterator[argparse.Action]:
    """Yield the recipes as a first argument, and the options of every trainer with underscores, as TRL spells them."""
    from contralto.align.parsing import make_parser, recipes
    from contralto.align.trainers import TRAINERS

    parser = argparse.ArgumentParser(add_help=False)
    yield parser.add_argument("recipe", nargs="?", choices=[*recipes(), "report"])
    parsers = [make_parser(trainer) for trainer in TRAINERS]
    seen = set[str]()
    for action in (action for parser in parsers for action in parser._actions):
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        if action.option_strings and not seen & {*action.option_strings}:
            seen |= {*action.option_strings}
            yield action


def _eval_actions() -> Iterator[argparse.Action]:
    """Yield the flags of lm-eval and contralto's own."""
    from contralto.cli.eval_help import FLAGS

    parser = argparse.ArgumentParser(add_help=False)
    for flag in FLAGS:
        yield parser.add_argument(flag.split()[0])
    from lm_eval._cli.harness import HarnessCLI

    yield from HarnessCLI()._subparsers.choices["run"]._actions


def _serve_actions() -> Iterator[argparse.Action]:
    """Yield contralto's flags of the server."""
    from contralto.cli.serve import make_parser

    yield from (action for action in make_parser()._actions if action.help != argparse.SUPPRESS)


OTHERS = {"align": _align_actions, "eval": _eval_actions, "serve": _serve_actions}
"""Functions that yield the options of commands whose parsers are those of other libraries."""
