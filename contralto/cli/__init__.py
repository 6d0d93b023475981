"""The command line: `contralto COMMAND ...`. A command is a module of this package; nothing else in contralto imports it."""

import argparse
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from contralto.cli.parser import Parser
from contralto.common.errors import guarded
from contralto.common.hub import remote_code

__all__ = ["COMMANDS", "Command", "all_commands", "main", "parser_of"]


class Command(NamedTuple):
    """A command, which is the module `contralto.cli.NAME`.

    A module with flags of its own has `add_arguments(parser)` and `run(args)`. One whose flags are read by the parser of another
    library has `run(argv)`.
    """

    name: str
    purpose: str
    """The line in the help."""
    extra: str
    """The extra of contralto that installs what the command needs."""
    has_parser: bool = True
    """Whether the flags are its own."""
    resumes: str = ""
    """What goes on after an interruption; empty if nothing is kept."""


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "generate",
            "decode prompts with any model, by any contrastive method",
            extra="vision",
            resumes="the same command with --resume goes on, if it writes to --output",
        ),
        Command("explain", "show on a page what a contrast did to a text, token by token", extra="vision"),
        Command(
            "eval",
            "evaluate by contrast: lm-eval's own command line, with contralto's models and tasks",
            extra="eval",
            has_parser=False,
            resumes="the same command with --use_cache FILE would go on",
        ),
        Command(
            "compare",
            "run tasks under several decoders on the same documents, with the controls that could explain a gain",
            extra="eval",
            resumes="the same command goes on: finished runs and answers are kept in its output",
        ),
        Command(
            "judge",
            "compare the answers of two systems by judges, in both orders; or judges and reward models on known pairs",
            extra="demo",
            resumes="the same command goes on: every reply is kept in its output",
        ),
        Command(
            "data",
            "make preference pairs by contrast: preview, estimate, run, resume",
            extra="data",
            resumes="the same command goes on: every answer is kept",
        ),
        Command(
            "align",
            "train on pairs by contrast: preferences, distillation, on-policy rounds; every flag of trl dpo",
            extra="align",
            has_parser=False,
            resumes="--resume_from_checkpoint last goes on from the last checkpoint, if there is one",
        ),
        Command(
            "reproduce",
            "run the recipe of a paper, on its own models or on the embedded ones: list, check, estimate, run, resume",
            extra="demo",
            resumes="the same command goes on: commands that ended are not run again",
        ),
        Command("convert", "make a folder that every command reads from a GGUF file", extra="convert"),
        Command(
            "amateur",
            "make a smaller model of a model, to contrast it with: fewer layers, trained on texts that it writes",
            extra="align",
            resumes="the same command goes on: its texts are kept",
        ),
        Command(
            "critic",
            "train a critic on rewards of texts, to guide a model by: a function, a reward model, or a file of texts",
            extra="align",
            resumes="the same command goes on: its texts and scores are kept",
        ),
        Command(
            "serve",
            "vLLM's OpenAI-compatible server, configured for contrastive decoding; every flag of it",
            extra="vllm",
            has_parser=False,
        ),
        Command("hub", "list, write and upload the repositories for generate(custom_generate=...)", extra="vision"),
        Command(
            "demo",
            "see contrastive decoding work on the embedded models: three problems, a table, demo.html",
            extra="demo",
        ),
        Command("completion", "print a script with which a shell completes commands and options", extra="completion"),
    )
}

RENAMED = ".(is_)?gradient_checkpointing(_enable|_disable)?. is deprecated"
"""The messages of transformers about what TRL 1.16 and peft 0.21 call by old names."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `contralto`; by default those of the process.

    Returns:
        The exit status: 0, or see `contralto.common.errors` for how errors end.
    """
    warnings.filterwarnings("ignore", RENAMED, FutureWarning)
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv[0] if argv else ""
    extra, resumes = (COMMANDS[name].extra, COMMANDS[name].resumes) if name in COMMANDS else ("", "")
    return guarded(name, lambda: _run(argv), extra=extra, resumes=resumes, debug="--debug" in argv)


def _run(argv: Sequence[str]) -> None:
    """Parse the arguments and run the command; only its module is imported, since packages may be missing."""
    command = COMMANDS.get(argv[0]) if argv else None
    if command and not command.has_parser:
        with remote_code(trusted=False):  # the parser of the other library may switch it on
            _module(command).run([word for word in argv[1:] if word != "--debug"])
        return
    args = _parser([command] if command else [])[0].parse_args(argv)
    with remote_code(trusted=getattr(args, "trust_remote_code", False)):
        args.run(args)


class _Versions(argparse.Action):
    """Print the versions of contralto, Python and the installed libraries that matter."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        from contralto.common.versions import versions

        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        parser.exit()


def all_commands(
    missing: Callable[[Command, ImportError], object] | None = None,
) -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of all commands, and those of the commands by name; options that other libraries parse are not in it.

    Args:
        missing: receives the commands whose flags need a package that is not installed, with the error; None raises it.

    Raises:
        ImportError: a package is not installed, and `missing` is None.
    """
    chosen = []
    for command in (command for command in COMMANDS.values() if command.has_parser):
        try:
            _module(command).add_arguments(Parser())
            chosen.append(command)
        except ImportError as error:
            if missing is None:
                raise
            missing(command, error)
    return _parser(chosen)


def _parser(chosen: Collection[Command]) -> tuple[Parser, dict[str, Parser]]:
    """Return a parser that lists all commands, with the flags of the chosen ones, and the parsers of the commands by name."""
    parser = Parser(
        prog="contralto",
        description="Align language models by contrast, and decode from them by contrast.",
        epilog="contralto COMMAND --help says more",
    )
    parser.add_argument(
        "--version",
        action=_Versions,
        nargs=0,
        help="show the versions of contralto, Python and the libraries, and exit",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        purpose = command.purpose
        subparser = subparsers.add_parser(command.name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if command in chosen:
            module = _module(command)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser, dict(subparsers.choices)


def parser_of(command: Command) -> Any:
    """Return the parser of a command; for `align` and `eval`, whose parsers are those of other libraries, one without options.

    Args:
        command: one of `COMMANDS`.
    """
    if not command.has_parser:
        module = _module(command)
        return module.make_parser() if hasattr(module, "make_parser") else Parser(prog=f"contralto {command.name}")
    return _parser([command])[1][command.name]


def _module(command: Command) -> Any:
    return import_module(f"contralto.cli.{command.name}")
