"""Load the models of a decoding configuration."""

from collections.abc import Mapping
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
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
)

from contralto.common.adapters import split_adapter
from contralto.common.hashing import weights_digest
from contralto.common.hub import adapter_base, check_weights, from_pretrained, has_own, locate, with_adapter
from contralto.common.options import Option, OptionError
from contralto.decoding.aligned import amateur_tokenizer
from contralto.decoding.branches import AdaptersOff
from contralto.decoding.methods import Critic, DecodingConfig
from contralto.decoding.methods.variants import is_variant, make_variant
from contralto.decoding.quantization import MAIN, check_bits, check_quantized, quantization_config

__all__ = ["Models", "check_device", "check_dtype", "load_critic", "load_models", "weights_digests"]


class Models(NamedTuple):
    """The models of a method, and the tokenizer or processor that encodes prompts for them."""

    main: Any
    branch_models: tuple[Any, ...]
    """The models of the other branches: models, or variants of the main model."""
    tokenizer: Any
    processor: Any = None
    """The processor of an image-text model; None if there are no images."""
    amateur_tokenizer: Any = None
    """The tokenizer of the amateur with `vocabulary="aligned"`; None if all models are known to share the first one."""


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
        raise ValueError(f"device {name!r} does not exist on this machine, which has {there}") from error


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
    model: str,
    config: DecodingConfig,
    *,
    with_images: bool,
    dtype: str = "auto",
    device: str | None = None,
    adapter: str | None = None,
    bits: Mapping[str, int] | None = None,
) -> Models:
    """Load the main model, those of the other branches, and the tokenizer or processor.

    Every model may be an adapter of peft, which is put onto its base.

    Args:
        model: a folder, a hub id, or `testbed:NAME`.
        config: the method with its other models.
        with_images: whether prompts have images.
        dtype: auto (as stored), or a torch dtype.
        device: such as cuda:1, or auto to spread the models; None is a GPU if there is one.
        adapter: an adapter of the main model, a folder or a hub id.
        bits: 4 or 8 for models that are quantised as they are loaded, by the option that names the model, see
            `contralto.decoding.quantization.take_bits`.

    Raises:
        ValueError: the model reads no images, another model has a different tokenizer, or an adapter is of another model.
        MemoryError: local weights are larger than the free memory.
        ModuleNotFoundError: `bits` needs bitsandbytes, which is not installed.
    """
    bits = bits or {}
    check_bits(bits, config.models)
    base, adapter = split_adapter(model, adapter)
    processor = _own(AutoProcessor, base, adapter) if with_images else None
    if processor is not None and getattr(processor, "image_processor", None) is None:
        raise ValueError(f"{model} does not accept images: leave them out, or use an image-text model")
    tokenizer = processor.tokenizer if processor else _own(AutoTokenizer, base, adapter)
    names = {name: config.models[name] for name in config.declaration.models if name in config.models}
    other = amateur_tokenizer(config, model, tokenizer, [name for name in names.values() if not is_variant(name)])
    if config.adapters_off:
        _check_has_adapter(model, adapter, names)
    placement = {"dtype": dtype, "device_map": device or ("auto" if torch.accelerator.is_available() else "cpu")}

    def load(option: str, name: str, adapter: str | None = None) -> Any:
        quantised = quantization_config(bits.get(option), dtype)
        load_kwargs = placement if quantised is None else placement | {"quantization_config": quantised}
        if isinstance(config.declaration.models.get(option), Critic):
            return load_critic(name, load_kwargs)
        return _load(name, load_kwargs, with_images=with_images, adapter=adapter)

    main = load(MAIN, base, adapter)
    others = [make_variant(name, main) if is_variant(name) else load(option, name) for option, name in names.items()]
    if config.adapters_off:
        others.append(AdaptersOff(others[-1] if others else main))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right" if main.config.is_encoder_decoder else "left"
    return Models(main, tuple(others), tokenizer, processor, other)


def _own(auto: Any, base: str, adapter: str | None) -> Any:
    """Return the tokenizer or the processor of an adapter, which is that of the base unless the adapter has its own."""
    return from_pretrained(auto, base if adapter is None or not has_own(auto, adapter) else adapter)


def _check_has_adapter(model: str, adapter: str | None, names: Mapping[str, str]) -> None:
    """Raise OptionError unless the last other model, or else the main model, has an adapter to switch off."""
    last = list(names.values())[-1] if names else model
    if (names or adapter is None) and adapter_base(last) is None:
        raise OptionError(
            "{off} contrasts a model with itself without its adapter, and "
            + f"{last} has none: give a folder with an adapter in its place"
            + ("" if names else ", or {adapter}"),
            off=Option("adapters_off"),
            adapter=Option("adapter"),
        )


def _load(name: str, load_kwargs: dict[str, Any], *, with_images: bool, adapter: str | None = None) -> Any:
    """Load a model by name, with an adapter or as the adapter that it is."""
    check_weights(name)
    base = adapter_base(name)
    if base is not None:
        name, adapter = base, name
        check_weights(name)
    model = _load_whole(name, load_kwargs, with_images=with_images)
    check_quantized(model, name)
    return model if adapter is None else with_adapter(model, adapter).eval()


def load_critic(name: str, load_kwargs: Mapping[str, Any]) -> Any:
    """Load a token classifier with one label, the critic of critic-guided decoding.

    Args:
        name: a folder or a hub id.
        load_kwargs: keyword arguments of `from_pretrained`.

    Raises:
        ValueError: the model is an adapter, has another number of labels, or has no weights for its head.
    """
    if adapter_base(name) is not None:
        raise ValueError(f"{name} is an adapter, and a critic must be a whole model: merge it into its base first")
    check_weights(name)
    labels = from_pretrained(AutoConfig, name).num_labels
    if labels != 1:
        raise ValueError(
            f"{name} is no critic: it has {labels} labels, and a critic has one, the value of a text so far; train one with contralto critic"
        )
    critic, loaded = from_pretrained(
        AutoModelForTokenClassification, name, output_loading_info=True, num_labels=1, **load_kwargs
    )
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{name} is no critic: it has no weights for {', '.join(missing)}; train one with contralto critic"
        )
    check_quantized(critic, name)
    return critic.eval()


def _load_whole(name: str, load_kwargs: dict[str, Any], *, with_images: bool) -> Any:
    config = from_pretrained(AutoConfig, name)
    if load_kwargs["device_map"] == "cpu" and "quantization_config" not in load_kwargs:
        _check_memory(name)
    if config.is_encoder_decoder:
        return from_pretrained(AutoModelForSeq2SeqLM, name, **load_kwargs)
    text_alone = not with_images and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return from_pretrained(AutoModelForCausalLM if text_alone else AutoModelForImageTextToText, name, **load_kwargs)


def _check_memory(name: str) -> None:
    """Raise MemoryError if local weights exceed the memory, before the machine starts to swap."""
    needed = sum(file.stat().st_size for file in Path(locate(name)).glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"{name} has {needed / 2**30:.1f} GiB of weights, and only {free / 2**30:.1f} GiB of memory are "
            "free: use a smaller model, adapters_off, or device auto to spread it"
        )


def weights_digests(model: str, config: DecodingConfig, adapter: str | None = None) -> dict[str, str]:
    """Return a hash of every local model by the option that names it; a hub id stands for itself.

    Args:
        model: the main model.
        config: the method with its other models.
        adapter: an adapter of the main model.

    Returns:
        16 hexadecimal digits by option. The base of an adapter has an entry of its own, such as `amateur_base`.
    """
    names = {"model": model, **config.models} | ({} if adapter is None else {"adapter": adapter})
    for option, name in list(names.items()):
        if option != "adapter" and not is_variant(name) and (base := adapter_base(name)) is not None:
            names[f"{option}_base"] = base
    found = {option: weights_digest(name) for option, name in names.items()}
    return {option: value[:16] for option, value in found.items() if value != names[option]}
