"""Flags and checks that `contralto generate` and `contralto explain` share."""

import argparse
from collections.abc import Collection

from contralto.cli.flags import flag
from contralto.cli.methods import add_model_arguments

__all__ = ["add_prompt_arguments", "check_placement", "check_positive"]


def add_prompt_arguments(parser: argparse.ArgumentParser, names: Collection[str] | None = None, *, seeds: str) -> None:
    """Add the flags for models, dtype, device, prompts and chat templates.

    Args:
        parser: the parser of a command.
        names: the methods that the command offers; None is all.
        seeds: what the command draws from `--seed`.
    """
    parser.add_argument("--image", action="append", metavar="PATH", help="an image for every prompt; may be repeated")
    parser.add_argument("--raw", action="store_true", help="feed prompts as they are, even if there is a chat template")
    parser.add_argument("--seed", type=int, default=0, help=f"seed of {seeds} (default 0)")
    models = parser.add_argument_group("models (a folder, a hub id, or testbed:NAME for an embedded model)")
    models.add_argument("--model", required=True, help="the model that generates; also a LoRA adapter, with its base")
    models.add_argument("--adapter", help="a LoRA adapter of --model, a folder or a hub id")
    add_model_arguments(models, names)
    models.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the models")
    models.add_argument("--dtype", default="auto", help="auto (default: as stored), float32, bfloat16 or float16")
    models.add_argument("--device", help="device of models: cpu, cuda, cuda:1, auto (spread); default: a GPU if any")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError unless numbers are at least 1.

    Args:
        args: the parsed flags.
        names: of the numbers.

    Raises:
        ValueError: one is smaller.
    """
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} must be at least 1, not {getattr(args, name)}")


def check_placement(args: argparse.Namespace) -> None:
    """Raise ValueError unless the dtype and the device exist.

    Args:
        args: the parsed flags.

    Raises:
        ValueError: torch has no such dtype, or the machine no such device.
    """
    from contralto.decoding.loading import check_device, check_dtype

    check_dtype(args.dtype)
    check_device(args.device)
