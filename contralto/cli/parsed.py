"""Let the parser of a command read its words without running it, for recipes and documents that hold commands."""

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Any

from contralto.cli import COMMANDS, parser_of

__all__ = ["check_command"]

UNREAD = ("serve",)
"""Commands whose flags are those of a library that need not be installed."""


def check_command(words: Sequence[str]) -> None:
    """Parse a command of contralto.

    Args:
        words: the words after `contralto`.

    Raises:
        ValueError: the parser rejects it; the message is its sentence.

    Examples:
        >>> check_command(["generate", "--model", "testbed:expert", "--method", "search", "Ben went"])
        >>> check_command(["hub", "lsit"])
        Traceback (most recent call last):
        ValueError: contralto hub: argument ACTION: invalid choice: 'lsit' (choose from 'list', 'write', 'push') (did you mean 'list'?)
    """
    written = io.StringIO()
    try:
        with redirect_stderr(written):
            _parse(list(words))
    except SystemExit as error:
        if error.code:
            raise ValueError(written.getvalue().strip() or f"contralto {words[0]} cannot read its options") from None


def _parse(words: list[str]) -> None:
    if words[:1] in (["--version"], ["--help"]) or words[-1:] == ["--help"]:
        return
    name, *rest = words
    if name == "align" and rest[:1] == ["report"]:
        from contralto.cli.align_report import make_parser

        make_parser().parse_args(rest[1:])
    elif name == "align":
        from contralto.align import parsing

        *_, of_recipe, of_command = parsing.parse(parsing.resolve_recipe(rest))
        parsing.launch_options(of_recipe, of_command)
    elif name == "eval":
        _parse_evaluation(rest)
    elif name not in UNREAD:
        parser_of(COMMANDS[name]).parse_args(rest)


def _parse_evaluation(words: list[str]) -> None:
    """Let lm-eval read its flags, and the declaration of the method its part of `--model_args`."""
    from lm_eval._cli.harness import HarnessCLI

    from contralto.cli import eval as command

    for flag in ("--data_dir", "--backend"):
        words, _ = command.take(words, flag, "")
    argv, sys.argv = sys.argv, ["contralto eval", *words]
    try:
        args = HarnessCLI().parse_args()
    finally:
        sys.argv = argv
    options = getattr(args, "model_args", None)
    if isinstance(options, dict):
        _check_decoding(options)


def _check_decoding(options: dict[str, Any]) -> None:
    from contralto.decoding.methods import DecodingConfig, option_names

    models = {name: options[name] for name in ("amateur", "expert", "antiexpert") if name in options}
    own = {name: value for name, value in options.items() if name in {"method", *option_names()}}
    if own.get("method") or models:
        DecodingConfig.from_options(**({"method": "cd"} | own | models))
