"""Evaluation of contrastive decoding with lm-eval.

- `models`: contralto's models in lm-eval.
- `tasks`, `data`: tasks, and documents from local files.
- `metrics`: metrics and their registry.
- `comparison`: several decoders on the same documents, with controls and tests.
- `stats`: exact and clustered statistics of paired comparisons.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.eval.comparison.compare import compare as compare
    from contralto.eval.comparison.planning import Subject as Subject
    from contralto.eval.comparison.tasks import Conditions as Conditions
    from contralto.eval.metrics.base import Metric as Metric
    from contralto.eval.models.lm import ContraltoLM as ContraltoLM
    from contralto.eval.models.vllm import ContraltoVLLM as ContraltoVLLM
    from contralto.eval.models.vlm import ContraltoVLM as ContraltoVLM

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "comparison.compare": ["compare"],
        "comparison.planning": ["Subject"],
        "comparison.tasks": ["Conditions"],
        "metrics.base": ["Metric"],
        "models.lm": ["ContraltoLM"],
        "models.vllm": ["ContraltoVLLM"],
        "models.vlm": ["ContraltoVLM"],
    },
)
