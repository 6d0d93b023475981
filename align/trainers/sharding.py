"""Sharded training, as the options of a trainer or `accelerate launch` ask for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import parse_flag_from_env

__all__ = ["fsdp_version", "has_head_in_shards", "loading_whole", "uses_deepspeed"]


def fsdp_version(args: Any) -> int | None:
    """Return the version of FSDP that shards the model, None without FSDP.

    Args:
        args: a configuration of transformers. Where it says nothing, the variables that `accelerate launch` sets count, as they do for
            the trainer.
    """
    if args.fsdp:
        config: dict[str, Any] = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
        return int(config.get("version", config.get("fsdp_version", 2)))
    return int(os.environ.get("FSDP_VERSION", "1")) if parse_flag_from_env("ACCELERATE_USE_FSDP") else None


def uses_deepspeed(args: Any) -> bool:
    """Return whether DeepSpeed trains the model.

    Args:
        args: see `fsdp_version`.
    """
    return bool(args.deepspeed) or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def has_head_in_shards(args: Any) -> bool:
    """Return whether the language-model head is sharded over processes: ZeRO 3, FSDP 1.

    Args:
        args: a configuration of transformers after its `__post_init__`.
    """
    plugin = args.deepspeed_plugin
    return (plugin is not None and plugin.zero_stage == 3) or fsdp_version(args) == 1


@contextmanager
def loading_whole(args: Any) -> Iterator[None]:
    """Load models with whole weights within the block, also where ZeRO 3 shards those of every model that is loaded.

    Args:
        args: a configuration of transformers.
    """
    plugin = args.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)  # type: ignore[no-untyped-call]
        else:
            plugin.set_deepspeed_weakref()
