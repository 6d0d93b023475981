"""Load the models of a decoding configuration."""

from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
)

from contralto.common.hashing import weights_digest
from contralto.common.hub import check_weights, from_pretrained, locate, with_adapter
from contralto.common.options import Option, OptionError
from contralto.decoding.branches import AdaptersOff
from contralto.decoding.methods import DecodingConfig
from contralto.decoding.methods.variants import is_variant, make_variant
from contralto.decoding.vocabulary import check_same_tokenizer

__all__ = ["Models", "check_device", "check_dtype", "load_models", "weights_digests"]


class Models(NamedTuple):
    """The models of a method, and the tokenizer or processor that encodes prompts for them."""

    main: Any
    others: tuple[Any, ...]
    """The models of the other branches: models, or variants of the main model."""
    tokenizer: Any
    processor: Any = None
    """The processor of an image-text model; None if there are no images."""


def check_device(name: str | None) -> None:
    """Raise ValueError for a device that this machine does not have.

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
    """Raise OptionError unless a dtype is known.

    Args:
        name: auto, or a torch dtype such as bfloat16.

    Raises:
        OptionError: torch has no such dtype.
    """
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise OptionError(
            "{option} must be auto or a torch dtype such as bfloat16, not {value}",
            option=Option("dtype"),
            value=repr(name),
        )


def load_models(
    model: str, config: DecodingConfig, *, with_images: bool, dtype: str = "auto", device: str | None = None
) -> Models:
    """Load the main model, those of the other branches, and the tokenizer or processor.

    Args:
        model: a folder, a hub id, or `testbed:NAME`.
        config: the method with its other models.
        with_images: whether prompts have images.
        dtype: auto (as stored), or a torch dtype.
        device: such as cuda:1, or auto to spread the models; None is a GPU if there is one.

    Raises:
        ValueError: the model reads no images, or another model has a different tokenizer.
        MemoryError: local weights are larger than the free memory.
    """
    processor = from_pretrained(AutoProcessor, model) if with_images else None
    if processor is not None and getattr(processor, "image_processor", None) is None:
        raise ValueError(f"{model} reads no images: leave them out, or name an image-text model")
    tokenizer = processor.tokenizer if processor else from_pretrained(AutoTokenizer, model)
    names = [config.models[name] for name in config.declaration.models if name in config.models]
    for name in (name for name in names if not is_variant(name)):
        check_same_tokenizer(model, tokenizer, name, from_pretrained(AutoTokenizer, name))
    tuned = [model, *names][-1] if config.adapters_off else None
    placement = {"dtype": dtype, "device_map": device or ("auto" if torch.accelerator.is_available() else "cpu")}
    main = _load(model, placement, with_images=with_images, has_adapters=model == tuned)
    others = [
        make_variant(name, main)
        if is_variant(name)
        else _load(name, placement, with_images=with_images, has_adapters=name == tuned)
        for name in names
    ]
    if config.adapters_off:
        others.append(AdaptersOff(others[-1] if others else main))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right" if main.config.is_encoder_decoder else "left"
    return Models(main, tuple(others), tokenizer, processor)


def _load(name: str, placement: dict[str, Any], *, with_images: bool, has_adapters: bool) -> Any:
    check_weights(name)
    if has_adapters:
        from peft import AutoPeftModelForCausalLM, PeftConfig

        if not with_images:
            return from_pretrained(AutoPeftModelForCausalLM, name, **placement).eval()
        base = from_pretrained(PeftConfig, name).base_model_name_or_path
        return with_adapter(_load(base, placement, with_images=True, has_adapters=False), name).eval()
    config = from_pretrained(AutoConfig, name)
    if placement["device_map"] == "cpu":
        _check_memory(name)
    if config.is_encoder_decoder:
        return from_pretrained(AutoModelForSeq2SeqLM, name, **placement)
    text_alone = not with_images and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return from_pretrained(AutoModelForCausalLM if text_alone else AutoModelForImageTextToText, name, **placement)


def _check_memory(name: str) -> None:
    """Raise MemoryError if local weights exceed the memory, before the machine starts to swap."""
    needed = sum(file.stat().st_size for file in Path(locate(name)).glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"{name} holds {needed / 2**30:.1f} GiB of weights, and {free / 2**30:.1f} GiB of memory are free: "
            "use a smaller model, adapters_off, or the device auto to spread it"
        )


def weights_digests(model: str, config: DecodingConfig) -> dict[str, str]:
    """Return a hash of every local model by the option that names it; a hub id stands for itself.

    Args:
        model: the main model.
        config: the method with its other models.
    """
    names = {"model": model, **config.models}
    found = {option: weights_digest(name) for option, name in names.items()}
    return {option: value[:16] for option, value in found.items() if value != names[option]}
