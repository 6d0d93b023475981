"""The declarations of the built-in methods that contrast images."""

from contralto.decoding.methods.base import Form, Method
from contralto.decoding.methods.entries import DECODER_ONLY, EVERYWHERE, PROCESSORS, ROWS_COST, RULES, keep_scale
from contralto.decoding.methods.registry import METHODS

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
