"""Provide the methods that contrast different prompts of one model."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from contralto.decoding import rules
from contralto.decoding.branches.base import Branch, unwrap
from contralto.decoding.branches.model import ModelBranch
from contralto.decoding.processors.base import ContrastiveLogitsProcessor, Rule, contrast_branch, try_rule

__all__ = [
    "ClassifierFreeGuidanceLogitsProcessor",
    "ContextAwareDecodingLogitsProcessor",
    "ContrastiveInputDecodingLogitsProcessor",
]


class ContrastiveInputDecodingLogitsProcessor(ContrastiveLogitsProcessor):
    """Contrastive input decoding: prefer tokens that a prompt makes likelier than a contrasting prompt (CID, Yona et al. 2023).

    arXiv 2305.07378. `form="probability"`: `log p(v | x) + lam (p(v | x) - p(v | x'))`, see
    `rules.contrastive_input_decoding`. `form="log_ratio"`: `(1 + lam) log p(v | x) - lam log p(v | x')` on the plausible
    tokens, see `rules.contrastive_input_decoding_log_ratio`.

    Args:
        model: the model that generates.
        contrast_inputs: the contrasting prompts, as the tokenizer returns them, or their `input_ids` `(prompts, T')`
            alone. One prompt may serve all rows.
        lam: contrast strength, at least 0. Default 10 for `form="probability"`, not a value of the paper: a difference
            of 0.1 in probability counts as one nat; 1 for `form="log_ratio"`.
        form: the formula.
        alpha: plausibility threshold of `form="log_ratio"`, in [0, 1]. Default 0.1.

    Raises:
        TypeError: the model cannot generate.
        ValueError: a parameter outside its range or of the other form; prompts padded on the right.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> prompt, other = (tokenizer(t, return_tensors="pt") for t in ("Ben went to the barn.", "Ben went to the river."))
        >>> contrast = ContrastiveInputDecodingLogitsProcessor(model, other, lam=30)
        >>> output = model.generate(**prompt, logits_processor=[contrast], max_new_tokens=6)
    """

    def __init__(
        self,
        model: Any,
        contrast_inputs: Mapping[str, Any] | Tensor,
        *,
        lam: float | None = None,
        form: Literal["probability", "log_ratio"] = "probability",
        alpha: float | None = None,
    ) -> None:
        if form not in ("probability", "log_ratio"):
            raise ValueError(f"form must be 'probability' or 'log_ratio', not {form!r}")
        if form == "probability" and alpha is not None:
            raise ValueError("form='probability' has no plausibility threshold: leave alpha out")
        inputs = {"input_ids": contrast_inputs} if isinstance(contrast_inputs, Tensor) else contrast_inputs
        parameters: dict[str, Any] = {n: v for n, v in {"lam": lam, "alpha": alpha}.items() if v is not None}
        if form == "probability":
            rule: Rule = partial(rules.contrastive_input_decoding, **parameters)
        else:
            rule = partial(rules.contrastive_input_decoding_log_ratio, **parameters)
        threshold = "alpha" if form == "log_ratio" else None
        super().__init__(try_rule(rule, 2), [contrast_branch(model, inputs)], threshold=threshold)


class ContextAwareDecodingLogitsProcessor(ContrastiveLogitsProcessor):
    """Context-aware decoding: contrast the prompt with and without its context (CAD, Shi et al. 2023).

    arXiv 2305.14739. Scores `(1 + alpha) log p(v | context, question) - alpha log p(v | question)`, see
    `rules.context_aware_decoding`.

    Args:
        model: the model that generates, from prompts with context.
        contrast_inputs: the prompts without it, as the tokenizer returns them.
        alpha: contrast strength, at least 0. Default 0.5.

    Raises:
        TypeError: the model cannot generate.
        ValueError: `alpha` negative; prompts padded on the right.
    """

    def __init__(self, model: Any, contrast_inputs: Mapping[str, Any], *, alpha: float = 0.5) -> None:
        rule = try_rule(partial(rules.context_aware_decoding, alpha=alpha), 2)
        super().__init__(rule, [contrast_branch(model, contrast_inputs)])


class ClassifierFreeGuidanceLogitsProcessor(ContrastiveLogitsProcessor):
    """Classifier-free guidance of a language model (CFG, Sanchez et al. 2023, arXiv 2306.17806).

    Scores `log p(v | negative) + gamma (log p(v | prompt) - log p(v | negative))`, see `rules.classifier_free_guidance`.
    Unlike `generate(guidance_scale=...)` it supports beams and returned sequences, padded negative prompts of models with
    absolute positions, and prompts with images.

    Args:
        model: the model that generates.
        negative_inputs: negative prompts, as the tokenizer or processor returns them; one may serve all rows. None stands for the
            prompt's last token, as in transformers.
        guidance_scale: `gamma`, at least 0. Default 1.5.
        attention_mask: `(prompts, T)` of the main prompts, needed only without `negative_inputs`, and only where leading pad
            tokens do not show the padding.

    Raises:
        TypeError: the model cannot generate.
        ValueError: `guidance_scale` negative; prompts padded on the right; an encoder-decoder without `negative_inputs`.
    """

    def __init__(
        self,
        model: Any,
        negative_inputs: Mapping[str, Any] | None = None,
        *,
        guidance_scale: float = 1.5,
        attention_mask: Tensor | None = None,
    ) -> None:
        if negative_inputs is not None and attention_mask is not None:
            raise ValueError(
                "attention_mask and negative_inputs are mutually exclusive, because negative_inputs contain their "
                "own mask"
            )
        rule = try_rule(partial(rules.classifier_free_guidance, guidance_scale=guidance_scale), 2)
        branch: Branch
        if negative_inputs is None and unwrap(model).model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder: pass negative_inputs=, a source text to avoid"
            )
        if negative_inputs is None:
            branch = ModelBranch(model, window=1, attention_mask=attention_mask)
        else:
            branch = contrast_branch(model, negative_inputs)
        super().__init__(rule, [branch])
