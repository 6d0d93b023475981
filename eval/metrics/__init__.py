"""Metrics: their declarations and registry, and the functions behind them.

- `base`: `Metric`, the declaration.
- `registry`: `register`, and the counts of logged values for paired comparisons.
- `pope`: yes-or-no questions about objects in an image.
- `chair`: objects of captions that are not in the image; `vocabulary` and `coco` supply the names and the objects.
- `openended`: repetition and diversity of texts; `model_based`: coherence and MAUVE, which need another model.
- `perplexity`: likelihoods of whole texts.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.eval.metrics.base import Metric as Metric
    from contralto.eval.metrics.model_based import coherence as coherence
    from contralto.eval.metrics.model_based import mauve as mauve
    from contralto.eval.metrics.registry import METRICS as METRICS
    from contralto.eval.metrics.registry import MetricCounts as MetricCounts
    from contralto.eval.metrics.registry import measure as measure
    from contralto.eval.metrics.registry import register as register
    from contralto.eval.metrics.registry import register_in_lm_eval as register_in_lm_eval
    from contralto.eval.metrics.registry import unregister as unregister

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "base": ["Metric"],
        "model_based": ["coherence", "mauve"],
        "registry": ["METRICS", "MetricCounts", "measure", "register", "register_in_lm_eval", "unregister"],
    },
)
