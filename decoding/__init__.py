"""Decoding by contrast.

`rules` holds the mathematics: pure functions of logits, which import nothing but torch. `branches` says where a contrast
distribution comes from. `processors` joins the two for an unmodified `generate()`, `loop` for a faster one, `score` for the
likelihood of given texts; `order` states the order of a step, `validity` which logits are errors. `sampling` gives every row
a random stream of its own, `stopping` ends texts at given strings, `streaming` shows those of a batch. `methods` knows all methods by name. `search` is
contrastive search, `speculative` speculative contrastive decoding, `images` makes the contrast images, `trace` shows what a
contrast did.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.decoding.branches import AdaptersOff as AdaptersOff
    from contralto.decoding.branches import Dropout as Dropout
    from contralto.decoding.branches import EarlyExit as EarlyExit
    from contralto.decoding.branches import HiddenImage as HiddenImage
    from contralto.decoding.branches import Steered as Steered
    from contralto.decoding.branches import quantized_copy as quantized_copy
    from contralto.decoding.executors.diverse import DiverseBeamsLogitsProcessor as DiverseBeamsLogitsProcessor
    from contralto.decoding.executors.diverse import diverse_beams as diverse_beams
    from contralto.decoding.executors.reranking import SequenceProjection as SequenceProjection
    from contralto.decoding.executors.reranking import SimilarityReranker as SimilarityReranker
    from contralto.decoding.executors.score import score as score
    from contralto.decoding.executors.search import ContrastiveSearch as ContrastiveSearch
    from contralto.decoding.executors.speculative import (
        SpeculativeContrastiveDecoding as SpeculativeContrastiveDecoding,
    )
    from contralto.decoding.methods import DecodingConfig as DecodingConfig
    from contralto.decoding.methods import Method as Method
    from contralto.decoding.methods import SamplingConfig as SamplingConfig
    from contralto.decoding.methods import register as register
    from contralto.decoding.processors import AVISCLogitsProcessor as AVISCLogitsProcessor
    from contralto.decoding.processors import (
        ClassifierFreeGuidanceLogitsProcessor as ClassifierFreeGuidanceLogitsProcessor,
    )
    from contralto.decoding.processors import (
        ContextAwareDecodingLogitsProcessor as ContextAwareDecodingLogitsProcessor,
    )
    from contralto.decoding.processors import (
        ContrastiveDecodingLogitsProcessor as ContrastiveDecodingLogitsProcessor,
    )
    from contralto.decoding.processors import (
        ContrastiveInputDecodingLogitsProcessor as ContrastiveInputDecodingLogitsProcessor,
    )
    from contralto.decoding.processors import ContrastiveLogitsProcessor as ContrastiveLogitsProcessor
    from contralto.decoding.processors import ContrastiveSearchLogitsProcessor as ContrastiveSearchLogitsProcessor
    from contralto.decoding.processors import CriticGuidedLogitsProcessor as CriticGuidedLogitsProcessor
    from contralto.decoding.processors import DoLaLogitsProcessor as DoLaLogitsProcessor
    from contralto.decoding.processors import GatedLogitsProcessor as GatedLogitsProcessor
    from contralto.decoding.processors import (
        InstructionContrastiveDecodingLogitsProcessor as InstructionContrastiveDecodingLogitsProcessor,
    )
    from contralto.decoding.processors import M3IDLogitsProcessor as M3IDLogitsProcessor
    from contralto.decoding.processors import ONLYLogitsProcessor as ONLYLogitsProcessor
    from contralto.decoding.processors import PAILogitsProcessor as PAILogitsProcessor
    from contralto.decoding.processors import ProxyTuningLogitsProcessor as ProxyTuningLogitsProcessor
    from contralto.decoding.processors import RitualLogitsProcessor as RitualLogitsProcessor
    from contralto.decoding.processors import RitualVCDLogitsProcessor as RitualVCDLogitsProcessor
    from contralto.decoding.processors import SIDLogitsProcessor as SIDLogitsProcessor
    from contralto.decoding.processors import (
        VisualContrastiveDecodingLogitsProcessor as VisualContrastiveDecodingLogitsProcessor,
    )
    from contralto.decoding.sampling import SeededSampling as SeededSampling
    from contralto.decoding.streaming import BatchTextStreamer as BatchTextStreamer

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "branches": ["AdaptersOff", "Dropout", "EarlyExit", "HiddenImage", "Steered", "quantized_copy"],
        "processors": [
            "AVISCLogitsProcessor",
            "ClassifierFreeGuidanceLogitsProcessor",
            "ContextAwareDecodingLogitsProcessor",
            "ContrastiveDecodingLogitsProcessor",
            "ContrastiveInputDecodingLogitsProcessor",
            "ContrastiveLogitsProcessor",
            "ContrastiveSearchLogitsProcessor",
            "CriticGuidedLogitsProcessor",
            "DoLaLogitsProcessor",
            "GatedLogitsProcessor",
            "InstructionContrastiveDecodingLogitsProcessor",
            "M3IDLogitsProcessor",
            "ONLYLogitsProcessor",
            "PAILogitsProcessor",
            "ProxyTuningLogitsProcessor",
            "RitualLogitsProcessor",
            "RitualVCDLogitsProcessor",
            "SIDLogitsProcessor",
            "VisualContrastiveDecodingLogitsProcessor",
        ],
        "methods": ["DecodingConfig", "Method", "SamplingConfig", "register"],
        "sampling": ["SeededSampling"],
        "streaming": ["BatchTextStreamer"],
        "executors.diverse": ["DiverseBeamsLogitsProcessor", "diverse_beams"],
        "executors.reranking": ["SequenceProjection", "SimilarityReranker"],
        "executors.score": ["score"],
        "executors.search": ["ContrastiveSearch"],
        "executors.speculative": ["SpeculativeContrastiveDecoding"],
    },
)
