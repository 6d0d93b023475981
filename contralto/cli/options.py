"""Checks of options that several commands share, before anything is loaded."""

import argparse
import math

import torch

from contralto.decoding import methods

__all__ = ["SAMPLED", "check_device", "check_dtype", "check_sampling"]

SAMPLED = {"temperature": 1.0, "top_p": 1.0}
"""Options of sampling alone, with their defaults."""


def check_sampling(args: argparse.Namespace) -> None:
    """Reject options of sampling that would do nothing, and settle the others.

    Args:
        args: of `contralto generate`, with `method` settled.

    Raises:
        ValueError: an option that would do nothing, or is outside its range.
    """
    for name in SAMPLED:
        if getattr(args, name) is not None and not args.sample:
            raise ValueError(f"{methods.flag(name)} is of sampling: add --sample, or leave it out")
    if args.sample and args.beams > 1:
        raise ValueError("--sample draws one text per prompt, and --beams searches: leave one of them out")
    for name, default in SAMPLED.items():
        if args.sample and getattr(args, name) is None:
            setattr(args, name, default)
    if args.sample:
        if not (args.temperature > 0 and math.isfinite(args.temperature)):
            raise ValueError(
                f"--temperature must be a finite number above 0, not {args.temperature}: leave --sample out for the best token"
            )
        if not 0 < args.top_p <= 1:
            raise ValueError(f"--top-p must lie in (0, 1], not {args.top_p}")


def check_device(name: str | None) -> None:
    """Reject a device that this machine does not have.

    Args:
        name: such as cuda:1; None, auto and cpu are always there.

    Raises:
        ValueError: no device of this name.
    """
    if name in (None, "auto", "cpu"):
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        has = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        there = f"cpu and {has.type}:0 to {has.type}:{torch.accelerator.device_count() - 1}" if has else "cpu alone"
        raise ValueError(f"device {name!r} is not on this machine, which has {there}") from error


def check_dtype(name: str) -> None:
    """Raise ValueError unless `name` is auto or a dtype."""
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"--dtype must be auto or a torch dtype such as bfloat16, not {name!r}")
