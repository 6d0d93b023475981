"""Engines by name."""

from collections.abc import Callable
from typing import Any

from contralto.common.registry import Registry
from contralto.data_gen.engines.function import FunctionEngine
from contralto.data_gen.engines.openai import OpenAIEngine
from contralto.data_gen.engines.transformers import TransformersEngine
from contralto.data_gen.engines.vllm import VLLMEngine

__all__ = ["ENGINES"]


def _check_engine(kind: Any) -> None:
    if not callable(kind) or (isinstance(kind, type) and not hasattr(kind, "answer")):
        raise ValueError(f"an engine must be a class with a method answer, not {kind!r}")


ENGINES: Registry[Callable[..., Any]] = Registry("engine", group="contralto.engines", check=_check_engine)
"""The engines by name: their classes. Packages add theirs by entry points of the group `contralto.engines`."""
for _name, _engine in {
    "transformers": TransformersEngine,
    "openai": OpenAIEngine,
    "vllm": VLLMEngine,
    "function": FunctionEngine,
}.items():
    ENGINES.register(_engine, name=_name)
