"""Engines answer requests: local models, endpoints of the OpenAI protocol, vLLM, Python functions.

`base` is the protocol, `registry` holds the engines by name; packages add theirs by entry points of the group
`contralto.engines`, and a recipe may name any other one as `module:class`.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.data_gen.engines.base import Engine as Engine
    from contralto.data_gen.engines.base import Outcome as Outcome
    from contralto.data_gen.engines.function import FunctionEngine as FunctionEngine
    from contralto.data_gen.engines.openai import OpenAIEngine as OpenAIEngine
    from contralto.data_gen.engines.registry import ENGINES as ENGINES
    from contralto.data_gen.engines.transformers import TransformersEngine as TransformersEngine
    from contralto.data_gen.engines.vllm import VLLMEngine as VLLMEngine

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "base": ["Engine", "Outcome"],
        "function": ["FunctionEngine"],
        "openai": ["OpenAIEngine"],
        "registry": ["ENGINES"],
        "transformers": ["TransformersEngine"],
        "vllm": ["VLLMEngine"],
    },
)
