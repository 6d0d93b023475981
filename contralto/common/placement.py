"""Find the device of a model's inputs: its own, or the one that accelerate runs its offloaded weights on."""

from typing import Any

import torch

__all__ = ["input_device"]


def input_device(model: Any) -> torch.device:
    """Return the device on which a model takes its inputs.

    A model that accelerate offloads to the CPU's memory or to disk keeps no weights between forward passes: its parameters,
    and so `model.device`, are on `meta`. Its hooks know the device on which every module runs.

    Args:
        model: a `torch.nn.Module`, such as a transformers model, with or without hooks of accelerate.

    Returns:
        The device of the first parameter; of an offloaded one the execution device of accelerate's hooks.

    Examples:
        >>> from accelerate import cpu_offload
        >>> from contralto import testbed
        >>> model = cpu_offload(testbed.load("amateur"), execution_device="cpu")
        >>> model.device, input_device(model)
        (device(type='meta'), device(type='cpu'))
    """
    first: torch.device = next(model.parameters()).device
    if first.type != "meta":
        return first
    hooks = (hook for module in model.modules() for hook in _hooks(module))
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None and str(device) != "meta"), None)
    return first if found is None else torch.device(found)


def _hooks(module: Any) -> tuple[Any, ...]:
    """Return the hooks that accelerate attached to a module, those of a `SequentialHook` one by one."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))
