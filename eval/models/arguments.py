"""Checks of model arguments that lm-eval's models would accept and ignore."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from contralto.common.placement import input_device
from contralto.common.suggestions import closest
from contralto.decoding.loading import check_dtype

__all__ = ["check_arguments", "check_ranking", "parameters_of"]

LOADING = (
    "autogptq",
    "delta",
    "dtype",
    "gguf_file",
    "gptqmodel",
    "max_cpu_memory",
    "max_memory_per_gpu",
    "offload_folder",
    "parallelize",
    "peft",
    "subfolder",
    "tp_plan",
)
"""Arguments of loading, which lm-eval ignores if the model is loaded already."""
MISSPELT = 0.75
"""The similarity to an option from which on an unknown argument is taken for a misspelt option."""
SPREADING = ("max_cpu_memory", "max_memory_per_gpu", "offload_folder")
"""Arguments that lm-eval ignores without `parallelize=True`."""


def parameters_of(kinds: Iterable[type]) -> set[str]:
    """Return the names of all constructor parameters of some classes.

    Args:
        kinds: The classes, such as the bases of a model of lm-eval.
    """
    parameters = (parameter for kind in kinds for parameter in inspect.signature(kind).parameters.values())
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}


def check_arguments(
    pretrained: Any,
    arguments: Mapping[str, Any],
    *,
    known: set[str],
    options: Iterable[str],
    ignored: Mapping[str, str],
) -> None:
    """Reject model arguments that would have no effect, before anything is loaded.

    Args:
        pretrained: The name of a model, or a model.
        arguments: The arguments for lm-eval's model by name; None counts as left out.
        known: The names of all parameters of lm-eval's model; other arguments reach the constructor of transformers' model.
        options: The names of the options of decoding, for the hint at a misspelt one.
        ignored: Arguments that this kind of model ignores, each with the reason.

    Raises:
        ValueError: An option is misspelt, an argument has no effect, torch has no such dtype, or a loaded model is on another device.
    """
    for name, value in arguments.items():
        meant = None if name in known else closest(name, options, similar=MISSPELT)
        if meant is not None:  # other arguments may be those of the model's processor
            raise ValueError(f"there is no model argument {name!r} (did you mean {meant!r}?)")
        if value is not None and name in ignored:
            raise ValueError(f"{name} has no effect here: {ignored[name]}")
        if value is not None and name in SPREADING and not arguments.get("parallelize"):
            raise ValueError(f"{name} says how a model is spread, and has no effect without parallelize=True")
    if isinstance(arguments.get("dtype"), str):
        check_dtype(arguments["dtype"])
    if not isinstance(pretrained, str):
        _check_loaded(pretrained, arguments, known)


def _check_loaded(model: Any, arguments: Mapping[str, Any], known: set[str]) -> None:
    named = [name for name, value in arguments.items() if value is not None and (name in LOADING or name not in known)]
    if named:
        raise ValueError(
            f"pretrained is a loaded model, on which {named[0]} has no effect: load it that way, or give its name"
        )
    device = arguments.get("device")
    if device is not None and torch.device(device).type != input_device(model).type:
        raise ValueError(f"device is {device}, and the model that was given is on {input_device(model)}: move it first")


def check_ranking(enable_thinking: bool | None) -> None:
    """Raise an error if likelihoods of a thinking model are requested, as lm-eval does.

    Args:
        enable_thinking: The model argument.

    Raises:
        ValueError: It is true.
    """
    if enable_thinking:
        raise ValueError(
            "enable_thinking=True is for tasks whose answers are written, and this one asks for likelihoods: leave it out"
        )
