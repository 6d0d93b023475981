"""Provide the methods that contrast the attention of one model to its image."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from contralto.decoding import rules
from contralto.decoding.branches.enhanced import TextEnhanced
from contralto.decoding.branches.input import InputBranch
from contralto.decoding.branches.looking import (
    AmplifiedImage,
    LeastAttended,
    ZeroedTokens,
    not_blind,
    prompt_attention,
)
from contralto.decoding.branches.marks import find_image_token
from contralto.decoding.branches.prompts import check_inputs
from contralto.decoding.branches.variants import inner_model
from contralto.decoding.processors.base import ContrastiveLogitsProcessor, try_rule

__all__ = ["AVISCLogitsProcessor", "ONLYLogitsProcessor", "PAILogitsProcessor", "SIDLogitsProcessor"]


class SIDLogitsProcessor(ContrastiveLogitsProcessor):
    """Self-introspective decoding: the image against its least attended tokens (SID, Huo et al. 2024, arXiv 2408.02032).

        contrast = SIDLogitsProcessor(model, inputs)
        model.generate(**inputs, logits_processor=[contrast])

    Scores `(1 + alpha) log p(v | image) - alpha log p(v | least attended tokens)` on the plausible tokens, see
    `rules.visual_contrastive_decoding`; the branch is a `LeastAttended`. Unlike the released code it supports batches.

    Args:
        model: the decoder-only model that generates.
        inputs: the inputs of the prompts, as the model's processor returns them.
        alpha: contrast strength, at least 0 (`cd_alpha`). Default 1.
        beta: plausibility threshold, in [0, 1] (`cd_beta`). Default 0.1.
        start_layer: number of the first layer that hides tokens, from 1 (`fast_v_agg_layer`). Default 2.
        keep: number of image tokens that stay, those of the least attention (`fast_v_attention_rank`). Default 100.

    Raises:
        TypeError: the model cannot generate.
        ValueError: a parameter outside its range; inputs without `input_ids`, or padded on the right; no more image tokens than stay.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        start_layer: int = 2,
        keep: int = 100,
    ) -> None:
        rule = try_rule(partial(rules.visual_contrastive_decoding, alpha=alpha, beta=beta), 2)
        check_inputs("the inputs", inputs)
        least = LeastAttended(model, prompt_length=inputs["input_ids"].shape[1], start_layer=start_layer, keep=keep)
        super().__init__(rule, [InputBranch(least, inputs)], threshold="beta")


class AVISCLogitsProcessor(ContrastiveLogitsProcessor):
    """Attentional vision calibration: the image against its blind tokens alone (AVISC, Woo et al. 2024, arXiv 2405.17820).

    Scores `(1 + alpha) log p(v | image) - alpha log p(v | blind tokens)` on the plausible tokens, see
    `rules.visual_contrastive_decoding`. One more forward pass over the prompts finds the blind tokens, see `not_blind`; the others are
    zeros in the branch, a `ZeroedTokens`. Unlike the released code it supports batches and greedy search.

    Args:
        model: the decoder-only model that generates.
        inputs: the inputs of the prompts, as the model's processor returns them.
        alpha: contrast strength, at least 0 (`cd_alpha`). Default 1, as in the released code; its script for AMBER has 2.5.
        beta: plausibility threshold, in [0, 1] (`cd_beta`). Default 0.1.
        layer_gamma: share of the attention to the image by which layers are chosen, in (0, 1]. Default 0.5.
        lam: standard deviations above the mean from which a token is blind (`lamb`). Default 1.

    Raises:
        TypeError: the model cannot generate.
        ValueError: a parameter outside its range; inputs without `input_ids`, or padded on the right; fewer than 2 image tokens.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        layer_gamma: float = 0.5,
        lam: float = 1.0,
    ) -> None:
        rule = try_rule(partial(rules.visual_contrastive_decoding, alpha=alpha, beta=beta), 2)
        check_inputs("the inputs", inputs)
        image = inputs["input_ids"] == find_image_token(inner_model(model))
        attention = prompt_attention(model, inputs)
        zeroed = not_blind(attention, image.to(attention.device), gamma=layer_gamma, lam=lam)
        super().__init__(rule, [InputBranch(ZeroedTokens(model, zeroed), inputs)], threshold="beta")


class PAILogitsProcessor(ContrastiveLogitsProcessor):
    """Pay attention to image: an image that is attended to more, against no image (PAI, Liu et al. 2024, arXiv 2407.21771).

    Scores as `rules.pay_attention_to_image`; the branch with the image is an `AmplifiedImage`. The released code changes the model itself;
    here the model stays as it is, and its own logits, which the rule does not read, cost one more forward pass.

    Args:
        model: the decoder-only model that generates.
        inputs: the inputs of the prompts, as the model's processor returns them.
        blind_inputs: the prompts without their images.
        alpha: strength of the amplification, at least 0. Default 0.2, as in the released commands.
        gamma: guidance scale, at least 1. Default 1.1, as in the released commands.
        beta: plausibility threshold, in [0, 1]. Default 0.1, as in the released code.
        start_layer: number of the first layer whose attention is amplified, from 0. Default 2, as in the released commands.

    Raises:
        TypeError: the model cannot generate.
        ValueError: a parameter outside its range; inputs without `input_ids`, or padded on the right.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        blind_inputs: Mapping[str, Any],
        *,
        alpha: float = 0.2,
        gamma: float = 1.1,
        beta: float = 0.1,
        start_layer: int = 2,
    ) -> None:
        rule = try_rule(partial(rules.pay_attention_to_image, gamma=gamma, beta=beta), 3)
        check_inputs("the inputs", inputs)
        length = inputs["input_ids"].shape[1]
        amplified = AmplifiedImage(model, prompt_length=length, alpha=alpha, start_layer=start_layer)
        branches = [InputBranch(amplified, inputs), InputBranch(model, blind_inputs)]
        super().__init__(rule, branches, threshold="beta")


class ONLYLogitsProcessor(ContrastiveLogitsProcessor):
    """One-layer intervention: a branch that hears the text more, added or subtracted (ONLY, Wan et al. 2025, arXiv 2507.00898).

    Scores as `rules.one_layer_intervention`; the branch is a `TextEnhanced`. The released code computes it in the pass of the model itself,
    here it has a pass of its own.

    Args:
        model: the decoder-only model that generates, with the layers of Llama.
        inputs: the inputs of the prompts, as the model's processor returns them.
        alpha_pos: weight of the branch where the two agree, at least 0 (`ritual_alpha_pos`). Default 3.
        alpha_neg: contrast strength where they differ, at least 0 (`ritual_alpha_neg`). Default 1.
        gamma: distance from which they differ, at least 0 (`js_gamma`). Default 0.2.
        beta: plausibility threshold, in [0, 1] (`ritual_beta`). Default 0.1.
        layer: number of the layer whose attention is changed, from 0 (`enhance_layer_index`). Default 0.

    Raises:
        TypeError: the model cannot generate.
        ValueError: a parameter outside its range; inputs without `input_ids`, or padded on the right; layers of another structure.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        *,
        alpha_pos: float = 3.0,
        alpha_neg: float = 1.0,
        gamma: float = 0.2,
        beta: float = 0.1,
        layer: int = 0,
    ) -> None:
        rule = try_rule(
            partial(rules.one_layer_intervention, alpha_pos=alpha_pos, alpha_neg=alpha_neg, gamma=gamma, beta=beta), 2
        )
        check_inputs("the inputs", inputs)
        enhanced = TextEnhanced(model, prompt_length=inputs["input_ids"].shape[1], layer=layer)
        super().__init__(rule, [InputBranch(enhanced, inputs)], threshold="beta")
