"""Map the branches of a method to LoRA adapters of the model that vLLM runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contralto.common.hub import locate
from contralto.decoding.methods import METHODS, DecodingConfig
from contralto.decoding.methods.variants import is_variant
from contralto.decoding.vllm.settings import supported

__all__ = ["adapters_of", "lora_options", "loras"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has kernels for."""


def adapters_of(config: DecodingConfig, adapter: str | None) -> list[str | None]:
    """Return the adapter of every branch, None for the model itself.

    Args:
        config: the method with its other models.
        adapter: of the main branch.

    Raises:
        ValueError: vLLM does not run the method, or another model is no adapter.

    Examples:
        >>> adapters_of(DecodingConfig(method="cad", contrast_prompt="x"), None)
        [None, None]
        >>> adapters_of(DecodingConfig(method="dola"), None)
        Traceback (most recent call last):
            ...
        ValueError: method='dola' is not supported with vLLM, because it needs the hidden states of earlier layers, which vLLM does not return: use cad, cd, cfg, cid, icd, proxy or no method, or another backend
    """
    method = config.declaration
    if not method.contrasts:
        return [_adapter(adapter)]
    if not method.vllm or method.reads_images:
        known = [name for name in supported() if not METHODS[name].reads_images]
        why = "contrasts images, which this backend does not send to vLLM" if method.vllm else method.vllm.reason
        raise ValueError(
            f"method={config.method!r} is not supported with vLLM, because it {why}: use {', '.join(known)} or no "
            "method, or another backend"
        )
    if config.parameters.get("amateur_window"):
        raise ValueError("amateur_window is not supported with vLLM: use the transformers backend")
    if config.parameters.get("vocabulary"):
        raise ValueError("vocabulary='aligned' is not supported with vLLM: use the transformers backend")
    if not method.models:
        return [_adapter(adapter)] * len(method.branches)
    others = [_adapter(config.models[name]) for name in method.models if name in config.models]
    off: list[str | None] = [None] * config.adapters_off
    if config.adapters_off and len(method.models) == 1 and adapter is None:
        raise ValueError("adapters_off contrasts an adapter with the model without it: set adapter")
    return [_adapter(adapter), *others, *off]


def _adapter(name: str | None) -> str | None:
    """Return the folder of an adapter."""
    if name is None:
        return None
    if is_variant(name):
        raise ValueError(f"vLLM runs a model as a whole, and {name} is a part of it: leave the vllm backend out")
    folder = locate(name)
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"in vLLM all branches share one model, and {name} is not a folder with a LoRA adapter of it")
    return folder


def lora_options(adapters: Sequence[str | None]) -> dict[str, Any]:
    """Return the keyword arguments of `vllm.LLM` for adapters.

    Args:
        adapters: the folder of each branch, None for the model itself.

    Returns:
        Keyword arguments; none without adapters.
    """
    folders = _folders(adapters)
    if not folders:
        return {}
    ranks = [json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["r"] for folder in folders]
    rank = next(size for size in RANKS if size >= max(ranks))
    return {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": rank}


def loras(adapters: Sequence[str | None]) -> list[Any]:
    """Return vLLM's request for the adapter of each branch.

    Args:
        adapters: the folder of each branch, None for the model itself.

    Returns:
        A `LoRARequest` per branch, None for the model itself.
    """
    folders = _folders(adapters)
    if not folders:
        return [None] * len(adapters)
    from vllm.lora.request import LoRARequest

    return [LoRARequest(name, folders.index(name) + 1, name) if name else None for name in adapters]


def _folders(adapters: Sequence[str | None]) -> list[str]:
    return [folder for folder in dict.fromkeys(adapters) if folder]
