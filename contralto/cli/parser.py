"""The parser of contralto's own options."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from contralto.cli.spellings import aliases_of, options_of, spelled
from contralto.common.suggestions import closest, did_you_mean

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """A parser that accepts the spellings of `contralto.cli.spellings`, and suggests a name where one is unknown.

    Options cannot be abbreviated: `--seed` would stand for the number of seeds, `--seeds`, and be accepted.

    Args:
        arguments: those of `argparse.ArgumentParser`.

    Examples:
        >>> parser = Parser("contralto generate")
        >>> _ = parser.add_argument("--max-new-tokens", type=int)
        >>> parser.parse_args(["--max_new_tokens", "9"])
        Namespace(max_new_tokens=9)
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments.

        Args:
            args: the arguments; by default those of the process.
            namespace: the object to write to.

        Returns:
            The parsed arguments, and words that are left over, none of which is an option.
        """
        try:
            words = spelled(sys.argv[1:] if args is None else list(args), self)
        except ValueError as error:
            self.error(str(error))
        parsed, left = super().parse_known_args(words, namespace)
        if unknown := next((word.partition("=")[0] for word in left if word.startswith("--") and len(word) > 2), None):
            names = [*options_of(self), *(f"--{alias.name}" for alias in aliases_of(self))]
            self.error(f"there is no option {unknown}{_suggested(unknown, names)}; {self.prog} --help lists them")
        return parsed, left

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Suggest a choice where the value is none."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, action.choices or ())
            raise

    def error(self, message: str) -> NoReturn:
        """Print a sentence, without the list of all options that argparse prints, and exit with status 2.

        Args:
            message: the sentence.
        """
        self.exit(2, f"{self.prog}: {message}\n")


def _suggested(option: str, names: Sequence[str]) -> str:
    found = closest(option, names)
    return "" if found is None else f" (did you mean {found}?)"
