"""Branches: the distributions that a method contrasts with that of the main model.

`base` defines what executors require of a branch. `ModelBranch` follows the rows with another model, `InputBranch` with other
prompts or images, `LayerBranch` with earlier layers of the same model; `variants` are weaker forms of a model for `ModelBranch`, among them those of `steering`, `looking` and `enhanced`, whose `attention` or states are changed. `reader` runs a model with a cache, whose beginning may be that of earlier prompts (`prefixes`); `prompts`,
`padding` and `context` prepare and check what it reads, `cache` changes its cache.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.decoding.branches.base import Branch as Branch
    from contralto.decoding.branches.enhanced import TextEnhanced as TextEnhanced
    from contralto.decoding.branches.input import InputBranch as InputBranch
    from contralto.decoding.branches.layer import LayerBranch as LayerBranch
    from contralto.decoding.branches.looking import AmplifiedImage as AmplifiedImage
    from contralto.decoding.branches.looking import LeastAttended as LeastAttended
    from contralto.decoding.branches.looking import ZeroedTokens as ZeroedTokens
    from contralto.decoding.branches.model import ModelBranch as ModelBranch
    from contralto.decoding.branches.prefixes import PrefixCaches as PrefixCaches
    from contralto.decoding.branches.prefixes import reused_prefixes as reused_prefixes
    from contralto.decoding.branches.reader import CachedReader as CachedReader
    from contralto.decoding.branches.steering import HiddenImage as HiddenImage
    from contralto.decoding.branches.steering import Steered as Steered
    from contralto.decoding.branches.steering import mean_difference as mean_difference
    from contralto.decoding.branches.variants import AdaptersOff as AdaptersOff
    from contralto.decoding.branches.variants import Dropout as Dropout
    from contralto.decoding.branches.variants import EarlyExit as EarlyExit
    from contralto.decoding.branches.variants import ModelVariant as ModelVariant
    from contralto.decoding.branches.variants import quantized_copy as quantized_copy

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "base": ["Branch"],
        "enhanced": ["TextEnhanced"],
        "input": ["InputBranch"],
        "layer": ["LayerBranch"],
        "looking": ["AmplifiedImage", "LeastAttended", "ZeroedTokens"],
        "model": ["ModelBranch"],
        "prefixes": ["PrefixCaches", "reused_prefixes"],
        "reader": ["CachedReader"],
        "steering": ["HiddenImage", "Steered", "mean_difference"],
        "variants": ["AdaptersOff", "Dropout", "EarlyExit", "ModelVariant", "quantized_copy"],
    },
)
