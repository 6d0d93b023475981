"""Which adapter each branch of a method has, where methods are named as everywhere else in contralto."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contralto.common.hub import locate
from contralto.decoding import methods
from contralto.decoding.vllm.settings import METHODS

__all__ = ["adapters_of", "lora_options", "loras"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has kernels for."""


def adapters_of(chosen: Any, adapter: str | None) -> list[str | None]:
    """The adapter of every branch, None for the model itself.

    Args:
        chosen: of `methods.choice`.
        adapter: of the main branch.

    Raises:
        ValueError: a method that is no matter of prompts and adapters, or another model that is no adapter.

    Examples:
        >>> adapters_of(methods.choice(method="cad", contrast_prompt="x"), None)
        [None, None]
        >>> adapters_of(methods.choice(method="dola"), None)
        Traceback (most recent call last):
            ...
        ValueError: method='dola' does not run in vLLM: use cad, cd, cfg, cid, icd, proxy or none, or leave the vllm backend out
    """
    method = methods.METHODS[chosen.method]
    if chosen.method == "none":
        return [_adapter(adapter)]
    if chosen.method not in METHODS or set(method.views) - {"prompt"}:
        known = [name for name in METHODS if not set(methods.METHODS[name].views) - {"prompt"}]
        raise ValueError(
            f"method={chosen.method!r} does not run in vLLM: use {', '.join(known)} or none, or leave the vllm backend out"
        )
    if chosen.amateur_window:
        raise ValueError("amateur_window needs the model contralto: leave the vllm backend out")
    if not method.models:
        return [_adapter(adapter)] * len(method.branches)
    others = [_adapter(getattr(chosen, name)) for name in method.models if getattr(chosen, name)]
    off: list[str | None] = [None] * bool(chosen.adapters_off)
    if chosen.adapters_off and chosen.method == "cd" and adapter is None:
        raise ValueError("adapters_off contrasts an adapter with the model without it: give adapter")
    return [_adapter(adapter), *others, *off]


def _adapter(name: str | None) -> str | None:
    """An adapter's folder."""
    if name is None:
        return None
    folder = locate(name)
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"in vLLM the branches share one model, and {name} is no folder with a LoRA adapter of it")
    return folder


def lora_options(adapters: Sequence[str | None]) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for adapters in these folders; none without any."""
    folders = _folders(adapters)
    if not folders:
        return {}
    ranks = [json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["r"] for folder in folders]
    rank = next(size for size in RANKS if size >= max(ranks))
    return {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": rank}


def loras(adapters: Sequence[str | None]) -> list[Any]:
    """vLLM's requests for them, None for the model itself."""
    folders = _folders(adapters)
    if not folders:
        return [None] * len(adapters)
    from vllm.lora.request import LoRARequest

    return [LoRARequest(name, folders.index(name) + 1, name) if name else None for name in adapters]


def _folders(adapters: Sequence[str | None]) -> list[str]:
    return [folder for folder in dict.fromkeys(adapters) if folder]
