"""The page of the documentation with the names of options: `python -m contralto.cli.options > docs/options.md`."""

import argparse

from contralto.cli import COMMANDS, parser_of
from contralto.cli.spellings import page

__all__ = ["command_parsers"]


def command_parsers() -> list[argparse.ArgumentParser]:
    """Return the parsers of all commands with options of contralto's own, and of their actions."""
    found = list[argparse.ArgumentParser]()
    for command in COMMANDS.values():
        parser = parser_of(command)
        actions = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        found += [sub for action in actions for sub in action.choices.values()] or [parser]
    return found


if __name__ == "__main__":
    print(page(command_parsers()), end="")
