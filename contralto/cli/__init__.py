"""The command line: `contralto COMMAND ...`. Nothing imports this module."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from contralto import __version__
from contralto.common.errors import guarded
from contralto.common.hub import remote_code

COMMANDS = {
    "generate": "decode prompts with any model, by any contrastive method",
    "explain": "show on a page what a contrast did to a text, token by token",
    "eval": "evaluate by contrast: lm-eval's own command line, with contralto's models and tasks",
    "compare": "run tasks under several decoders on the same documents, with the controls that a gain needs",
    "data": "make preference pairs by contrast: preview, estimate, run, resume",
    "align": "train on pairs by contrast: preferences, distillation, on-policy rounds; every flag of trl dpo",
    "serve": "vLLM's OpenAI-compatible server, set up for texts by contrast; every flag of it",
    "demo": "see contrastive decoding work on the embedded models: three problems, a table, demo.html",
}
"""Every command is the module contralto.cli.<command>, with `add_arguments(parser)` and `run(args)`."""
PASSED_ON = {"eval": "contralto.cli.eval", "align": "contralto.cli.align", "serve": "contralto.cli.serve"}
"""But these have the flags of lm-eval, of TRL and of vLLM, whose parsers read them: `run(argv)`."""


EXTRAS = {"compare": "eval", "generate": "vision", "explain": "vision"}
"""Extras of commands that are not called like them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its status; see `contralto.common.errors` for how mistakes end."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv[0] if argv else ""
    debug = "--debug" in argv
    return guarded(command, lambda: _run(argv), extra=EXTRAS.get(command, ""), debug=debug)


def _run(argv: Sequence[str]) -> None:
    """Read the arguments, and run the command; imports belong to it, since packages may be missing."""
    if argv and argv[0] in PASSED_ON:
        with remote_code(trusted=False):  # unless a flag that their parsers read says so
            import_module(PASSED_ON[argv[0]]).run([word for word in argv[1:] if word != "--debug"])
        return
    parser = argparse.ArgumentParser(
        prog="contralto",
        description="Align language models by contrast, and decode from them by contrast.",
        epilog="contralto COMMAND --help says more",
    )
    parser.add_argument("--version", action="version", version=f"contralto {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        command = subparsers.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name in argv[:1]:  # only the command that is asked for is imported
            module = import_module(f"contralto.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    with remote_code(trusted=getattr(args, "trust_remote_code", False)):
        args.run(args)
