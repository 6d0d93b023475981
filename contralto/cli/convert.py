"""`contralto convert`: make an ordinary folder of transformers from a GGUF file."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("source", metavar="SOURCE", help="a GGUF file, or a folder that holds one")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights: float32 (default) holds those of the file exactly, the others round them in half the space",
    )


def run(args: argparse.Namespace) -> None:
    """Convert the file, and print what the folder holds.

    Args:
        args: the parsed flags.
    """
    from contralto.common.gguf import convert, find_gguf

    print(f"reading {find_gguf(args.source)}", file=sys.stderr)
    made = convert(args.source, args.output, dtype=args.dtype)
    chat = "a chat template" if made.has_chat_template else "no chat template"
    print(
        f"{args.output}: {made.parameters / 1e6:,.1f}M parameters of {made.file.name} ({made.architecture}, {', '.join(made.kinds)}) in "
        f"{args.dtype}, {made.size / 2**20:,.0f} MiB, {chat}"
    )
