"""The declarations of the built-in methods that contrast images."""

from functools import partial
from typing import Any

from contralto.common.ranges import check_share
from contralto.decoding.methods.base import Form, Method, Unsupported
from contralto.decoding.methods.entries import DECODER_ONLY, EVERYWHERE, PROCESSORS, ROWS_COST, RULES, keep_scale
from contralto.decoding.methods.registry import METHODS
from contralto.decoding.methods.views import Extra

METHODS.register(
    Method(
        name="vcd",
        description="visual contrastive decoding: subtract a noised image",
        papers=("2311.16922",),
        processor=f"{PROCESSORS}:VisualContrastiveDecodingLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:VisualContrastiveDecodingLogitsProcessor",
        forms={
            "": Form(
                rule=f"{RULES}:visual_contrastive_decoding",
                internal=(),
                stacked=False,
                mask="beta",
                weight=lambda alpha, **_: 1 + alpha,
                off={"alpha": 0},
            )
        },
        branches=("image", "noised image"),
        models={},
        views=("noised",),
        contrast_prompt_optional=False,
        extra={},
        **EVERYWHERE,
        cost=ROWS_COST,
    )
)
METHODS.register(
    Method(
        name="ritual",
        description="RITUAL: add a randomly transformed image",
        papers=("2405.17821",),
        processor=f"{PROCESSORS}:RitualLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:RitualLogitsProcessor",
        forms={
            "": Form(
                rule=f"{RULES}:ritual",
                internal=(),
                stacked=False,
                mask="beta",
                weight=lambda kappa, normalize, **_: 1.0 if normalize else 1 + kappa,
                off={"kappa": 0},
            )
        },
        branches=("image", "transformed image"),
        models={},
        views=("transformed",),
        contrast_prompt_optional=False,
        extra={},
        **EVERYWHERE,
        cost=ROWS_COST,
    )
)
METHODS.register(
    Method(
        name="ritual-vcd",
        description="RITUAL with VCD: add a transformed image, subtract a noised one",
        papers=("2405.17821",),
        processor=f"{PROCESSORS}:RitualVCDLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:RitualVCDLogitsProcessor",
        forms={
            "": Form(
                rule=f"{RULES}:ritual_vcd",
                internal=(),
                stacked=False,
                mask="beta",
                weight=lambda alpha, kappa, **_: 1 + alpha + kappa,
                off={"kappa": 0, "alpha": 0},
            )
        },
        branches=("image", "transformed image", "noised image"),
        models={},
        views=("transformed", "noised"),
        contrast_prompt_optional=False,
        extra={},
        **EVERYWHERE,
        cost=ROWS_COST,
    )
)
METHODS.register(
    Method(
        name="m3id",
        description="M3ID: subtract the prompt without its image, with a weight that grows with the length",
        papers=("2403.14003",),
        processor=f"{PROCESSORS}:M3IDLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:M3IDLogitsProcessor",
        forms={
            "": Form(
                rule=f"{RULES}:m3id",
                internal=("step",),
                stacked=False,
                mask="beta",
                weight=keep_scale,  # it grows with the text, from 1
                off={"lam": 0},
            )
        },
        branches=("image", "no image"),
        models={},
        views=("blind",),
        contrast_prompt_optional=False,
        extra={},
        **(EVERYWHERE | DECODER_ONLY),
        cost=ROWS_COST,
    )
)
METHODS.register(
    Method(
        name="vdd",
        description="visual debias decoding: subtract the prompt without its image, with the same weight at every token",
        papers=("2403.05262",),
        processor=f"{PROCESSORS}:VisualContrastiveDecodingLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:VisualContrastiveDecodingLogitsProcessor",
        forms={
            "": Form(
                rule=f"{RULES}:visual_contrastive_decoding",
                internal=(),
                stacked=False,
                mask="beta",
                weight=lambda alpha, **_: 1 + alpha,
                off={"alpha": 0},
            )
        },
        branches=("image", "no image"),
        models={},
        views=("blind",),
        contrast_prompt_optional=False,
        extra={},
        **(EVERYWHERE | DECODER_ONLY),
        cost=ROWS_COST,
    )
)


SID, AVISC, PAI, ONLY = (f"{PROCESSORS}:{name}LogitsProcessor" for name in ("SID", "AVISC", "PAI", "ONLY"))
INSIDE: dict[str, Any] = DECODER_ONLY | {
    "vllm": Unsupported("changes the attention inside the model, which vLLM does not allow")
}
"""The restrictions of methods whose branches are the model with another attention."""
PASSES_COST = {
    "loop": "{rows} forward passes per token ({branches})",
    "processor": "{rows} forward passes per token ({branches})",
}


METHODS.register(
    Method(
        name="sid",
        description="self-introspective decoding: subtract the image tokens of the least attention",
        papers=("2408.02032",),
        processor=SID,
        loop=None,
        likelihoods=SID,
        forms={
            "": Form(
                rule=f"{RULES}:visual_contrastive_decoding",
                internal=(),
                stacked=False,
                mask="beta",
                weight=lambda alpha, **_: 1 + alpha,
                off={"alpha": 0},
            )
        },
        branches=("image", "least attended image tokens"),
        models={},
        views=("shown",),
        contrast_prompt_optional=False,
        extra={"start_layer": Extra(of=SID, least=1), "keep": Extra(of=SID, least=1)},
        **(EVERYWHERE | INSIDE),
        cost=PASSES_COST,
    )
)
METHODS.register(
    Method(
        name="avisc",
        description="attentional vision calibration: subtract the blind tokens of the image, attended to whatever is asked",
        papers=("2405.17820",),
        processor=AVISC,
        loop=None,
        likelihoods=AVISC,
        forms={
            "": Form(
                rule=f"{RULES}:visual_contrastive_decoding",
                internal=(),
                stacked=False,
                mask="beta",
                weight=lambda alpha, **_: 1 + alpha,
                off={"alpha": 0},
            )
        },
        branches=("image", "blind image tokens"),
        models={},
        views=("shown",),
        contrast_prompt_optional=False,
        extra={"layer_gamma": Extra(of=AVISC, convert=partial(check_share, "layer_gamma")), "lam": Extra(of=AVISC)},
        **(EVERYWHERE | INSIDE),
        cost=PASSES_COST,
    )
)
METHODS.register(
    Method(
        name="pai",
        description="pay attention to image: an image attended to more, against no image",
        papers=("2407.21771",),
        processor=PAI,
        loop=None,
        likelihoods=PAI,
        forms={
            "": Form(
                rule=f"{RULES}:pay_attention_to_image",
                internal=(),
                stacked=False,
                mask="beta",
                weight=lambda gamma, **_: gamma,
                off=None,
            )
        },
        branches=("image", "amplified image", "no image"),
        models={},
        views=("shown", "blind"),
        contrast_prompt_optional=False,
        extra={"alpha": Extra(of=PAI, least=0), "start_layer": Extra(of=PAI, least=0)},
        **(EVERYWHERE | INSIDE),
        cost={
            "loop": "{rows} rows per prompt in 2 forward passes per token ({branches})",
            "processor": "{rows} forward passes per token ({branches})",
        },
    )
)
METHODS.register(
    Method(
        name="only",
        description="ONLY: add or subtract the model with one layer's attention to the text enhanced",
        papers=("2507.00898",),
        processor=ONLY,
        loop=None,
        likelihoods=ONLY,
        forms={
            "": Form(
                rule=f"{RULES}:one_layer_intervention",
                internal=(),
                stacked=False,
                mask="beta",
                weight=lambda alpha_pos, alpha_neg, **_: 1 + max(alpha_pos, alpha_neg),
                off={"alpha_pos": 0, "alpha_neg": 0},
            )
        },
        branches=("image", "text-enhanced"),
        models={},
        views=("shown",),
        contrast_prompt_optional=False,
        extra={"layer": Extra(of=ONLY, least=0)},
        **(EVERYWHERE | INSIDE),
        cost=PASSES_COST,
    )
)
