"""The options that load a model or the other models of a method in 4 or 8 bits, by bitsandbytes."""

from collections.abc import Mapping
from typing import Any

from contralto.common.errors import require
from contralto.common.options import Option, OptionError
from contralto.common.quiet import report_missing_kernel
from contralto.decoding.methods import model_options
from contralto.decoding.methods.variants import is_variant

__all__ = ["BITS", "MAIN", "check_bits", "check_quantized", "quantization_config", "quantization_options", "take_bits"]

BITS = {"load_in_4bit": 4, "load_in_8bit": 8}
"""The options of the main model, spelled as in transformers and TRL; `amateur_load_in_4bit` is that of the amateur."""
MAIN = "model"


def quantization_options() -> dict[str, tuple[str, int]]:
    """Return every option with the model that it loads, by the option that names it, and the number of bits.

    Examples:
        >>> quantization_options()["load_in_4bit"], quantization_options()["amateur_load_in_8bit"]
        (('model', 4), ('amateur', 8))
    """
    others = {f"{model}_{name}": (model, bits) for model in model_options() for name, bits in BITS.items()}
    return {name: (MAIN, bits) for name, bits in BITS.items()} | others


def take_bits(options: dict[str, Any]) -> dict[str, int]:
    """Remove the options of quantisation from others, and return the number of bits of each model.

    Args:
        options: options by name; changed in place.

    Returns:
        4 or 8 by the option that names the model; models that are loaded as they are, are left out.

    Raises:
        OptionError: a model is to be loaded in 4 and in 8 bits.
        TypeError: a value is neither true nor false.

    Examples:
        >>> take_bits({"load_in_4bit": True, "amateur_load_in_8bit": True})
        {'model': 4, 'amateur': 8}
    """
    chosen: dict[str, int] = {}
    for name, (model, bits) in quantization_options().items():
        value = options.pop(name, None)
        if value not in (None, True, False):
            raise TypeError(f"{name} must be true or false, not {value!r}")
        if value and model in chosen:
            prefix = "" if model == MAIN else f"{model}_"
            one, other = (Option(f"{prefix}{each}") for each in BITS)
            raise OptionError("give either {one} or {other}, not both", one=one, other=other)
        if value:
            chosen[model] = bits
    return chosen


def check_bits(bits: Mapping[str, int], models: Mapping[str, Any]) -> None:
    """Raise an error for bits of a model that is not used, and if bitsandbytes is missing, before anything is loaded.

    Args:
        bits: see `take_bits`.
        models: the other models of the method, by name.

    Raises:
        OptionError: no such model is given, or it is a variant of the main model.
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    for model, number in bits.items():
        if model != MAIN and (model not in models or is_variant(models[model])):
            problem = "is the model itself: quantise that" if model in models else "is not given"
            raise OptionError(
                f"{{option}} quantises {{model}}, which {problem}",
                option=Option(f"{model}_load_in_{number}bit"),
                model=Option(model, models.get(model)),
            )
    if bits:
        require("bitsandbytes")


def check_quantized(model: Any, name: str) -> None:
    """Raise ValueError for a model in 4 bits that bitsandbytes cannot run on a CPU, before its first forward pass fails.

    Args:
        model: the loaded model.
        name: the name that the user gave.

    Raises:
        ValueError: on a CPU, a matrix has a number of inputs that is no multiple of the block size of its scales.
    """
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is None or weight is None or weight.device.type != "cpu" or module.in_features % state.blocksize == 0:
            continue
        raise ValueError(
            f"{name} cannot be loaded in 4 bits on a CPU: {path} has {module.in_features} inputs, and bitsandbytes needs a multiple of "
            f"{state.blocksize} there: load it in 8 bits"
        )


def quantization_config(bits: int | None, dtype: Any = "auto") -> Any:
    """Return the configuration with which transformers quantises a model as it loads it.

    4 bits are NF4 (Dettmers et al. 2023, arXiv 2305.14314) with products in `dtype`; 8 bits are LLM.int8 (arXiv 2208.07339).

    Args:
        bits: 4, 8, or None for the weights as they are.
        dtype: of the products of 4-bit weights, a torch dtype or its name; "auto" is bfloat16.

    Returns:
        A `transformers.BitsAndBytesConfig`; None for None.

    Examples:
        >>> quantization_config(None) is None, quantization_config(4, "float32").bnb_4bit_quant_type
        (True, 'nf4')
    """
    if bits is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if bits == 4:
        report_missing_kernel()
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    compute = (
        getattr(torch, "bfloat16" if dtype in (None, "auto") else dtype)
        if not isinstance(dtype, torch.dtype)
        else dtype
    )
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)  # type: ignore[no-untyped-call]
