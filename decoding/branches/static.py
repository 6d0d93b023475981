"""Static caches, with which every step has the same shapes, and compiled forward passes over them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import StaticCache

from contralto.decoding.branches.reader import CachedReader

__all__ = ["StaticSteps", "compiled_call"]


class StaticSteps(NamedTuple):
    """Steps of one shape, as `cache_implementation="static"` asks for."""

    width: int
    """Number of positions of a cache."""
    config: Any
    """The prepared generation configuration."""

    def cache(self, model: Any) -> Any:
        """Return an empty static cache.

        Args:
            model: a decoder-only model.
        """
        return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=self.width)

    def compiled(self, reader: CachedReader) -> Callable[..., Any] | None:
        """Return the compiled forward of a reader's model where `generate()` would compile it; None elsewhere.

        Args:
            reader: it has read its prompts.
        """
        return compiled_call(reader, self.config)


def compiled_call(reader: CachedReader, config: Any) -> Callable[..., Any] | None:
    """Return the compiled forward of a reader's model where `generate()` would compile it; None elsewhere.

    Args:
        reader: it has read its prompts.
        config: the prepared generation configuration.
    """
    model = reader.model
    if not model._valid_auto_compile_criteria(reader.kwargs, config):
        return None
    compiled: Callable[..., Any] = model.get_compiled_call(config.compile_config)
    return compiled
