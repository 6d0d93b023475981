"""Checks of arguments that trainers on pairs have in common. They need no loaded model."""

# ruff: noqa: TRY004 (a wrong type in somebody's recipe is a ValueError like any other mistake in it)

import os
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from contralto.common.hub import locate

__all__ = ["check_adapter", "check_model", "has_images", "located"]


def located(model: Any) -> Any:
    """Return the argument `model` of a trainer as TRL reads it: folders as strings, `testbed:NAME` as a folder.

    Args:
        model: a name, a path, or a loaded model, which is returned as it is.

    Raises:
        ValueError: the name is one of a source that has no such model, or of a GGUF file.

    Examples:
        >>> located("testbed:expert").endswith("expert-0"), located("org/model")
        (True, 'org/model')
    """
    return locate(os.fspath(model)) if isinstance(model, str | os.PathLike) else model


def check_model(model: Any) -> None:
    """Reject a value that is neither a model nor the name of one.

    Args:
        model: the argument `model` of a trainer.

    Raises:
        ValueError: the model has another type.
    """
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise ValueError(f"model must be a name, a folder or a loaded model, not a {type(model).__name__}")


def check_adapter(model: Any, adapter: Any, *, compares_tokens: bool) -> None:
    """Reject a configuration of an adapter that cannot be trained.

    Args:
        model: the argument `model` of a trainer.
        adapter: its argument `peft_config`, or None.
        compares_tokens: the loss compares two models token by token, which learned prompts would shift.

    Raises:
        ValueError: the adapter has another type, is a second one, or shifts tokens.
    """
    if adapter is None:
        return
    if not isinstance(adapter, PeftConfig):
        raise ValueError(f"peft_config must be a configuration of peft, not a {type(adapter).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already, and peft_config asks for another: leave peft_config out")
    if compares_tokens and adapter.is_prompt_learning:
        raise ValueError("learned prompts change which tokens stand where, and a divergence compares them: use LoRA")


def has_images(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a column of images that TRL reads.

    Args:
        row: a row of a data set.
    """
    return bool({"image", "images"} & set(row))
