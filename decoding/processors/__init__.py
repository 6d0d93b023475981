"""Logits processors: contrastive decoding in an unmodified `generate()`. Each joins a rule and its branches.

`base` holds `ContrastiveLogitsProcessor`, from which the methods derive: those that contrast `models`, `prompts`, `images`, the
`attention` to an image, and `layers`. `gated` skips the contrast of any of them where the main model is sure. `guidance` reranks
candidate tokens, and so does contrastive `search`.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.decoding.processors.attention import AVISCLogitsProcessor as AVISCLogitsProcessor
    from contralto.decoding.processors.attention import ONLYLogitsProcessor as ONLYLogitsProcessor
    from contralto.decoding.processors.attention import PAILogitsProcessor as PAILogitsProcessor
    from contralto.decoding.processors.attention import SIDLogitsProcessor as SIDLogitsProcessor
    from contralto.decoding.processors.base import ContrastiveLogitsProcessor as ContrastiveLogitsProcessor
    from contralto.decoding.processors.gated import GatedLogitsProcessor as GatedLogitsProcessor
    from contralto.decoding.processors.guidance import CriticGuidedLogitsProcessor as CriticGuidedLogitsProcessor
    from contralto.decoding.processors.images import (
        InstructionContrastiveDecodingLogitsProcessor as InstructionContrastiveDecodingLogitsProcessor,
    )
    from contralto.decoding.processors.images import M3IDLogitsProcessor as M3IDLogitsProcessor
    from contralto.decoding.processors.images import RitualLogitsProcessor as RitualLogitsProcessor
    from contralto.decoding.processors.images import RitualVCDLogitsProcessor as RitualVCDLogitsProcessor
    from contralto.decoding.processors.images import (
        VisualContrastiveDecodingLogitsProcessor as VisualContrastiveDecodingLogitsProcessor,
    )
    from contralto.decoding.processors.layers import DoLaLogitsProcessor as DoLaLogitsProcessor
    from contralto.decoding.processors.models import (
        ContrastiveDecodingLogitsProcessor as ContrastiveDecodingLogitsProcessor,
    )
    from contralto.decoding.processors.models import ProxyTuningLogitsProcessor as ProxyTuningLogitsProcessor
    from contralto.decoding.processors.prompts import (
        ClassifierFreeGuidanceLogitsProcessor as ClassifierFreeGuidanceLogitsProcessor,
    )
    from contralto.decoding.processors.prompts import (
        ContextAwareDecodingLogitsProcessor as ContextAwareDecodingLogitsProcessor,
    )
    from contralto.decoding.processors.prompts import (
        ContrastiveInputDecodingLogitsProcessor as ContrastiveInputDecodingLogitsProcessor,
    )
    from contralto.decoding.processors.search import (
        ContrastiveSearchLogitsProcessor as ContrastiveSearchLogitsProcessor,
    )

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "attention": [
            "AVISCLogitsProcessor",
            "ONLYLogitsProcessor",
            "PAILogitsProcessor",
            "SIDLogitsProcessor",
        ],
        "base": ["ContrastiveLogitsProcessor"],
        "gated": ["GatedLogitsProcessor"],
        "guidance": ["CriticGuidedLogitsProcessor"],
        "images": [
            "InstructionContrastiveDecodingLogitsProcessor",
            "M3IDLogitsProcessor",
            "RitualLogitsProcessor",
            "RitualVCDLogitsProcessor",
            "VisualContrastiveDecodingLogitsProcessor",
        ],
        "layers": ["DoLaLogitsProcessor"],
        "models": ["ContrastiveDecodingLogitsProcessor", "ProxyTuningLogitsProcessor"],
        "prompts": [
            "ClassifierFreeGuidanceLogitsProcessor",
            "ContextAwareDecodingLogitsProcessor",
            "ContrastiveInputDecodingLogitsProcessor",
        ],
        "search": ["ContrastiveSearchLogitsProcessor"],
    },
)
