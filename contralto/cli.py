"""The command line: `contralto COMMAND ...`. Nothing imports this module."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from contralto import __version__
from contralto.names import remote_code

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
"""Every command is the module contralto.<command>, with `add_arguments(parser)` and `run(args)`."""
PASSED_ON = {"eval": "contralto.evaluate", "align": "contralto.train", "serve": "contralto.serve"}
"""But these have the flags of lm-eval, of TRL and of vLLM, whose parsers read them: `run(argv)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Mistakes in the arguments end with one sentence and status 2, not with a traceback."""
    argv = sys.argv[1:] if argv is None else argv
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
        if name in argv[:1] and name not in PASSED_ON:  # only the command that is asked for is imported
            module = import_module(f"contralto.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = _pass_on(*argv) if argv and argv[0] in PASSED_ON else parser.parse_args(argv)
    try:
        with remote_code(trusted=getattr(args, "trust_remote_code", False)):
            args.run(args)
    except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
        if args.debug:
            raise
        print(f"contralto {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _pass_on(command: str, *argv: str) -> argparse.Namespace:
    """A command whose flags another parser reads."""
    rest = [word for word in argv if word != "--debug"]
    return argparse.Namespace(
        command=command, debug="--debug" in argv, run=lambda args: import_module(PASSED_ON[command]).run(rest)
    )
