"""Contralto's models in lm-eval.

- `lm`, `vlm`, `vllm`: language models, image-text models, and models in vLLM; importing a module registers its model.
- `base`: the parts that they share: decoder, requests with seeds, cache of answers.
- `decoder`: the method, its sampling, and the kind of likelihood.
- `requests`, `generation_options`, `conversations`, `thinking`: requests and answers.
- `arguments`: checks of model arguments.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.eval.models.decoder import Decoder as Decoder
    from contralto.eval.models.lm import ContraltoLM as ContraltoLM
    from contralto.eval.models.vllm import ContraltoVLLM as ContraltoVLLM
    from contralto.eval.models.vlm import ContraltoVLM as ContraltoVLM

__getattr__, __dir__, __all__ = exports(
    __name__,
    {"decoder": ["Decoder"], "lm": ["ContraltoLM"], "vllm": ["ContraltoVLLM"], "vlm": ["ContraltoVLM"]},
)
