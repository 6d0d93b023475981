"""Read the beginnings that the prompts of a run share once, such as few-shot examples, also where `generate()` reads the prompts."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from contralto.decoding.branches import CachedReader
from contralto.decoding.branches.prefixes import PrefixCaches, reused_prefixes
from contralto.decoding.branches.prompts import prepare_images
from contralto.decoding.branches.variants import inner_model

__all__ = ["check_prefix_cache", "read_prompts", "shared_prefixes"]


def check_prefix_cache(value: Any) -> bool:
    """Return the model argument `prefix_cache`, or raise TypeError.

    Args:
        value: The argument.

    Raises:
        TypeError: It is neither true nor false.

    Examples:
        >>> check_prefix_cache("yes")
        Traceback (most recent call last):
            ...
        TypeError: prefix_cache must be true or false, not 'yes'
    """
    if not isinstance(value, bool):
        raise TypeError(f"prefix_cache must be true or false, not {value!r}")
    return value


def shared_prefixes(enabled: bool) -> AbstractContextManager[Any]:
    """Return a context in which shared beginnings of prompts are read once.

    Args:
        enabled: Otherwise the context has no effect.
    """
    return reused_prefixes() if enabled else nullcontext()


def read_prompts(model: Any, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Read the prompts of a call of `generate()` but for their last tokens, where that can reuse a beginning.

    Args:
        model: The main model.
        inputs: Its inputs.
        options: The other arguments of `generate()`.

    Returns:
        `past_key_values` for the call; nothing outside of `shared_prefixes`, for a decoding loop, which reads the prompts itself, for beams,
        images, and models that cannot reuse a beginning.
    """
    caches, transformer, ids = PrefixCaches.current(), inner_model(model), inputs["input_ids"]
    is_text = set(inputs) == {"input_ids", "attention_mask"} and ids.shape[1] > 1
    plain = is_text and "custom_generate" not in options and options.get("num_beams", 1) == 1
    if caches is None or not plain or not caches.supports(transformer):
        return {}
    reader, rows = CachedReader(transformer), {"attention_mask": inputs["attention_mask"][:, :-1]}
    reader.prefill(prepare_images(transformer, ids[:, :-1], rows, len(ids)))
    return {"past_key_values": reader.cache}
