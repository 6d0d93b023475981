"""The processes of a command that `accelerate launch` or `torchrun` has started, each with a device of its own.

Nothing is imported until there are several: a command of one process needs neither torch nor accelerate for it.
"""

import os
from typing import Any, TypeVar

__all__ = ["broadcast", "device_of_process", "gathered", "rank", "world_size"]

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def device_of_process() -> str | None:
    """Return the device of this process, None without a launcher.

    Raises:
        ValueError: accelerate sees another number of processes.
    """
    return None if world_size() == 1 else str(_state().device)


def broadcast(value: T) -> T:
    """Return the value of process 0 in every process.

    Args:
        value: an object that can be pickled; that of other processes does not matter.

    Examples:
        >>> broadcast(3)
        3
    """
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]


def gathered(values: list[T]) -> list[T]:
    """Return the values of all processes in the order of their numbers, in every process.

    Args:
        values: objects that can be pickled.

    Examples:
        >>> gathered([1, 2])
        [1, 2]
    """
    if world_size() == 1:
        return values
    from accelerate.utils import gather_object

    _state()
    return list(gather_object(values))


def _state() -> Any:
    """Return accelerate's state of all processes, which begin to communicate with the first call."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if state.num_processes != world_size():
        raise ValueError(
            f"WORLD_SIZE is {world_size()}, and accelerate sees {state.num_processes} processes: start them by accelerate launch or torchrun"
        )
    return state
