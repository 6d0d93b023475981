"""The declarations of the built-in methods that contrast models, prompts, layers and hidden states."""

from collections.abc import Sequence
from typing import Any

from contralto.decoding.methods.base import Critic, Form, Method, Unsupported
from contralto.decoding.methods.registry import METHODS
from contralto.decoding.methods.views import Extra

__all__ = [
    "DECODER_ONLY",
    "EVERYWHERE",
    "PROCESSORS",
    "ROWS_COST",
    "RULES",
    "convert_layers",
    "convert_vocabulary",
    "keep_scale",
]


def convert_layers(value: Any) -> str | list[int]:
    """Return the candidate layers of DoLa.

    Args:
        value: "low", "high", numbers, or numbers in a string such as "2,4,6".

    Raises:
        ValueError: anything else.

    Examples:
        >>> convert_layers("2,4")
        [2, 4]
    """
    text = value if isinstance(value, str) else ",".join(map(str, value if isinstance(value, Sequence) else [value]))
    if text in ("low", "high"):
        return text
    try:
        return [int(number) for number in text.strip("[]").split(",")]
    except ValueError:
        raise ValueError(f"layers must be low, high or numbers such as 2,4,6, not {value!r}") from None


def convert_vocabulary(value: Any) -> str:
    """Return how the amateur's vocabulary is brought to the expert's.

    Args:
        value: "aligned".

    Raises:
        ValueError: anything else.
    """
    if value != "aligned":
        raise ValueError(f"vocabulary must be aligned, or left out for models of one tokenizer, not {value!r}")
    return str(value)


RULES = "contralto.decoding.rules"
PROCESSORS = "contralto.decoding.processors"
CONTRASTIVE = f"{PROCESSORS}:ContrastiveDecodingLogitsProcessor"
SPECULATIVE = "contralto.decoding.executors.speculative:SpeculativeContrastiveDecoding"
CRITIC = f"{PROCESSORS}:CriticGuidedLogitsProcessor"
SEARCH = "contralto.decoding.executors.search:ContrastiveSearch"

MODELS_COST = {"loop": "{models} per token", "processor": "{models} per token"}
ROWS_COST = {
    "loop": "{rows} rows per prompt in one forward pass ({branches})",
    "processor": "{rows} forward passes per token ({branches})",
}
EVERYWHERE: dict[str, Any] = {
    "beams": True,
    "sampling": True,
    "row_seeds": True,
    "streaming": True,
    "encoder_decoder": True,
    "vllm": True,
}
"""The capabilities of a method without restrictions."""
DECODER_ONLY: dict[str, Any] = {"encoder_decoder": Unsupported("is for decoder-only models")}
DRAWS = "draws random numbers of its own"
DETERMINISTIC = "is deterministic"
AMATEUR = {
    "amateur": "a weaker model with the same tokenizer, or the model itself, weakened: self:layers=8, self:dropout=0.3, self:int4"
}
WINDOW = Extra(of=CONTRASTIVE, least=1)
VOCABULARY = Extra(of=CONTRASTIVE, convert=convert_vocabulary, is_new=True)


def keep_scale(**parameters: Any) -> float:
    """Return the weight of a formula that does not sharpen."""
    return 1.0


OBRIEN = Form(
    rule=f"{RULES}:contrastive_decoding",
    internal=("min_tokens_to_keep",),
    stacked=False,
    mask="alpha",
    weight=lambda beta, **_: 1 + beta,
    off={"beta": 0},
)
LI = Form(
    rule=f"{RULES}:contrastive_decoding_li",
    internal=("min_tokens_to_keep",),
    stacked=False,
    mask="alpha",
    weight=keep_scale,
    off=None,
)
RELEASED = Form(
    rule=f"{RULES}:contrastive_decoding_released",
    internal=("min_tokens_to_keep",),
    stacked=False,
    mask="alpha",
    weight=keep_scale,
    off=None,
)

METHODS.register(
    Method(
        name="none",
        description="no contrast",
        papers=(),
        processor=Unsupported("has no contrast"),
        loop=None,
        likelihoods="contralto.decoding.methods.build:plain_scores",
        forms={},
        branches=(),
        models={},
        views=(),
        contrast_prompt_optional=False,
        extra={},
        **EVERYWHERE,
        cost={},
    )
)
METHODS.register(
    Method(
        name="cd",
        description="contrastive decoding: subtract a weaker model",
        papers=("2309.09117", "2210.15097"),
        processor=CONTRASTIVE,
        loop=None,
        likelihoods=CONTRASTIVE,
        forms={"obrien": OBRIEN, "li": LI, "released": RELEASED},
        branches=("expert", "amateur"),
        models=AMATEUR,
        views=(),
        contrast_prompt_optional=False,
        extra={"amateur_window": WINDOW, "vocabulary": VOCABULARY},
        **EVERYWHERE,
        cost=MODELS_COST,
    )
)
METHODS.register(
    Method(
        name="scd",
        description="speculative contrastive decoding: the same as cd, but the amateur also drafts tokens",
        papers=("2311.08981",),
        processor=Unsupported("has only a loop: use cd, which has the same results, as a processor"),
        loop=SPECULATIVE,
        likelihoods=CONTRASTIVE,
        forms={"obrien": OBRIEN, "li": LI},
        branches=("expert", "amateur"),
        models=AMATEUR,
        views=(),
        contrast_prompt_optional=False,
        extra={
            "amateur_window": WINDOW,
            "draft_length": Extra(of=SPECULATIVE, least=1),
            "prompt_lookup_num_tokens": Extra(of=SPECULATIVE, least=1, is_new=True),
        },
        beams=Unsupported("has no beams"),
        sampling=True,
        row_seeds=Unsupported(DRAWS),
        streaming=True,
        encoder_decoder=True,
        vllm=Unsupported("drafts several tokens per forward pass, and vLLM's requests advance one at a time: use cd"),
        cost={"loop": "{models}; the expert verifies several draft tokens per forward pass"},
    )
)
METHODS.register(
    Method(
        name="search",
        description="contrastive search: penalise similarity to the context among the k most likely tokens",
        papers=("2202.06417", "2210.14140"),
        processor="contralto.decoding.processors.search:ContrastiveSearchLogitsProcessor",
        loop=SEARCH,
        likelihoods=Unsupported("has no likelihoods: its scores are not log-probabilities"),
        forms={
            "": Form(
                rule=SEARCH,
                internal=("k", "path", "streamer"),
                stacked=False,
                mask=None,
                weight=keep_scale,
                off=None,
            )
        },
        branches=(),
        models={},
        views=(),
        contrast_prompt_optional=False,
        extra={"k": Extra(of=SEARCH, least=1)},
        beams=Unsupported("has no beams"),
        sampling=Unsupported(DETERMINISTIC),
        row_seeds=Unsupported(DETERMINISTIC),
        streaming=True,
        encoder_decoder=True,
        vllm=Unsupported("needs the hidden states of its candidates, which vLLM does not return"),
        cost={
            "loop": "1 forward pass per token for all {k} candidates",
            "processor": "2 forward passes per token, one of them for all {k} candidates",
        },
    )
)
METHODS.register(
    Method(
        name="critic",
        description="critic-guided decoding: weight the k most likely tokens by the values of a trained critic",
        papers=("2212.10938",),
        processor=CRITIC,
        loop=None,
        likelihoods=Unsupported("has no likelihoods: it scores only the candidates that its critic reads"),
        forms={
            "": Form(
                rule=f"{RULES}.candidates:check_candidates",
                internal=(),
                stacked=False,
                mask=None,
                weight=keep_scale,
                off=None,
            )
        },
        branches=(),
        models={"critic": Critic("a token classifier with one label, the value of a text so far: contralto critic")},
        views=(),
        contrast_prompt_optional=False,
        extra={},
        beams=Unsupported("has no beams: their sums would count the value of a text at each of its tokens"),
        sampling=True,
        row_seeds=True,
        streaming=True,
        encoder_decoder=Unsupported("is for decoder-only models: the critic reads the prompt"),
        vllm=Unsupported("reads its candidates by a second model with a cache of its own, which vLLM does not run"),
        cost={
            "loop": "{models} per token, of which the critic reads all {k} candidates in one forward pass",
            "processor": "{models} per token, of which the critic reads all {k} candidates in one forward pass",
        },
    )
)
METHODS.register(
    Method(
        name="icd",
        description="instruction contrastive decoding: subtract a disturbed instruction",
        papers=("2403.18715",),
        processor=f"{PROCESSORS}:InstructionContrastiveDecodingLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:InstructionContrastiveDecodingLogitsProcessor",
        forms={
            "": Form(
                rule=f"{RULES}:instruction_contrastive_decoding",
                internal=(),
                stacked=False,
                mask="beta",
                weight=lambda alpha, **_: 1 + alpha,
                off={"alpha": 0},
            )
        },
        branches=("instruction", "disturbed instruction"),
        models={},
        views=("prompt",),
        contrast_prompt_optional=False,
        extra={},
        **EVERYWHERE,
        cost=ROWS_COST,
    )
)
METHODS.register(
    Method(
        name="cid",
        description="contrastive input decoding: prefer tokens that are more likely than after another prompt",
        papers=("2305.07378",),
        processor=f"{PROCESSORS}:ContrastiveInputDecodingLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:ContrastiveInputDecodingLogitsProcessor",
        forms={
            "probability": Form(
                rule=f"{RULES}:contrastive_input_decoding",
                internal=(),
                stacked=False,
                mask=None,
                weight=keep_scale,
                off=None,
            ),
            "log_ratio": Form(
                rule=f"{RULES}:contrastive_input_decoding_log_ratio",
                internal=(),
                stacked=False,
                mask="alpha",
                weight=lambda lam, **_: 1 + lam,
                off={"lam": 0},
            ),
        },
        branches=("prompt", "contrast prompt"),
        models={},
        views=("prompt",),
        contrast_prompt_optional=False,
        extra={},
        **EVERYWHERE,
        cost=ROWS_COST,
    )
)
METHODS.register(
    Method(
        name="cad",
        description="context-aware decoding: subtract the prompt without its context",
        papers=("2305.14739",),
        processor=f"{PROCESSORS}:ContextAwareDecodingLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:ContextAwareDecodingLogitsProcessor",
        forms={
            "": Form(
                rule=f"{RULES}:context_aware_decoding",
                internal=(),
                stacked=False,
                mask=None,
                weight=lambda alpha, **_: 1 + alpha,
                off=None,
            )
        },
        branches=("with context", "without context"),
        models={},
        views=("prompt",),
        contrast_prompt_optional=False,
        extra={},
        **EVERYWHERE,
        cost=ROWS_COST,
    )
)
METHODS.register(
    Method(
        name="cfg",
        description="classifier-free guidance: subtract a negative prompt, or the prompt's last token",
        papers=("2306.17806",),
        processor=f"{PROCESSORS}:ClassifierFreeGuidanceLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:ClassifierFreeGuidanceLogitsProcessor",
        forms={
            "": Form(
                rule=f"{RULES}:classifier_free_guidance",
                internal=(),
                stacked=False,
                mask=None,
                weight=lambda guidance_scale, **_: max(1.0, guidance_scale),
                off=None,
            )
        },
        branches=("prompt", "negative prompt"),
        models={},
        views=("prompt",),
        contrast_prompt_optional=True,
        extra={},
        **EVERYWHERE,
        cost=ROWS_COST,
    )
)
METHODS.register(
    Method(
        name="dola",
        description="DoLa: subtract an earlier layer of the same model",
        papers=("2309.03883",),
        processor=f"{PROCESSORS}:DoLaLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:DoLaLogitsProcessor",
        forms={
            form: Form(
                rule=f"{RULES}:{rule}",
                internal=(),
                stacked=True,
                mask="relative_top",
                weight=keep_scale,
                off=None,
            )
            for form, rule in (("kl", "dola"), ("jsd", "dola_jsd"))
        },
        branches=("last layer", "earlier layer"),
        models={},
        views=(),
        contrast_prompt_optional=False,
        extra={
            "layers": Extra(of=f"{PROCESSORS}:DoLaLogitsProcessor", convert=convert_layers),
            "final_norm": Extra(of=f"{PROCESSORS}:DoLaLogitsProcessor"),
        },
        **(
            EVERYWHERE
            | DECODER_ONLY
            | {"vllm": Unsupported("needs the hidden states of earlier layers, which vLLM does not return")}
        ),
        cost={
            "loop": "1 forward pass per token; its head runs again for every earlier layer",
            "processor": "2 forward passes per token; the head runs again for every earlier layer",
        },
    )
)
METHODS.register(
    Method(
        name="proxy",
        description="proxy tuning: add a small tuned model, subtract its untuned version",
        papers=("2401.08565", "2105.03023"),
        processor=f"{PROCESSORS}:ProxyTuningLogitsProcessor",
        loop=None,
        likelihoods=f"{PROCESSORS}:ProxyTuningLogitsProcessor",
        forms={
            "": Form(
                rule=f"{RULES}:proxy_tuning",
                internal=(),
                stacked=False,
                mask=None,
                weight=lambda alpha, **_: 1 + alpha,
                off=None,
            )
        },
        branches=("base", "expert", "anti-expert"),
        models={"expert": "a small tuned model", "antiexpert": "the small model before tuning"},
        views=(),
        contrast_prompt_optional=False,
        extra={},
        **EVERYWHERE,
        cost=MODELS_COST,
    )
)
