"""Provide the methods that contrast different images of one model."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from contralto.decoding import rules
from contralto.decoding.branches.input import InputBranch
from contralto.decoding.processors.base import ContrastiveLogitsProcessor, contrast_branch, try_rule

__all__ = [
    "InstructionContrastiveDecodingLogitsProcessor",
    "M3IDLogitsProcessor",
    "RitualLogitsProcessor",
    "RitualVCDLogitsProcessor",
    "VisualContrastiveDecodingLogitsProcessor",
]


class VisualContrastiveDecodingLogitsProcessor(ContrastiveLogitsProcessor):
    """Visual contrastive decoding: the image against a distorted one (VCD, Leng et al. 2024, arXiv 2311.16922).

        contrast = VisualContrastiveDecodingLogitsProcessor(model, images.noised(inputs, seed=0))
        model.generate(**inputs, logits_processor=[contrast])

    Scores `(1 + alpha) log p(v | image) - alpha log p(v | distorted)` on the plausible tokens, see
    `rules.visual_contrastive_decoding`. Unlike the official code it also acts in greedy search, not only in sampling.

    Args:
        model: the model that generates.
        contrast_inputs: the inputs of the contrast branch, as the model's processor returns them: `input_ids`,
            `attention_mask`, `pixel_values`, ...; see `images.noised`.
        alpha: contrast strength, at least 0 (`cd_alpha`). Default 1.
        beta: plausibility threshold, in [0, 1] (`cd_beta`). Default 0.1.

    Raises:
        TypeError: the model cannot generate.
        ValueError: a parameter outside its range; contrast inputs without `input_ids`, or padded on the right.
    """

    def __init__(
        self, model: Any, contrast_inputs: Mapping[str, Any], *, alpha: float = 1.0, beta: float = 0.1
    ) -> None:
        rule = try_rule(partial(rules.visual_contrastive_decoding, alpha=alpha, beta=beta), 2)
        super().__init__(rule, [contrast_branch(model, contrast_inputs)], threshold="beta")


class InstructionContrastiveDecodingLogitsProcessor(ContrastiveLogitsProcessor):
    """Instruction contrastive decoding: the instruction against a disturbed one (ICD, Wang et al. 2024, arXiv 2403.18715).

    Scores as `rules.instruction_contrastive_decoding`. `contrast_inputs` hold the prompt with a disturbing prefix, such as
    "You are a confused object detector", and the same image.

    Args:
        model: the model that generates.
        contrast_inputs: the inputs of the contrast branch, as the model's tokenizer or processor returns them.
        alpha: contrast strength, at least 0. Default 1.
        beta: plausibility threshold, in [0, 1]. Default 0.1.

    Raises:
        TypeError: see `VisualContrastiveDecodingLogitsProcessor`.
        ValueError: see `VisualContrastiveDecodingLogitsProcessor`.
    """

    def __init__(
        self, model: Any, contrast_inputs: Mapping[str, Any], *, alpha: float = 1.0, beta: float = 0.1
    ) -> None:
        rule = try_rule(partial(rules.instruction_contrastive_decoding, alpha=alpha, beta=beta), 2)
        super().__init__(rule, [contrast_branch(model, contrast_inputs)], threshold="beta")


class RitualLogitsProcessor(ContrastiveLogitsProcessor):
    """RITUAL: add the view of a randomly transformed image (Woo et al. 2024, arXiv 2405.17821).

    Scores `log p(v | image) + kappa log p(v | transformed)` on the plausible tokens, see `rules.ritual`.

    Args:
        model: the model that generates.
        contrast_inputs: the inputs of the other branch: the processor's output for the transformed image, see
            `images.ritual_transform`.
        kappa: weight of the transformed view, at least 0. Default 3.
        beta: plausibility threshold, in [0, 1]. Default 0.1.
        normalize: divide by `1 + kappa`, so that the scores are no sharper than the model's own. Default no, as published.

    Raises:
        TypeError: see `VisualContrastiveDecodingLogitsProcessor`.
        ValueError: see `VisualContrastiveDecodingLogitsProcessor`.
    """

    def __init__(
        self,
        model: Any,
        contrast_inputs: Mapping[str, Any],
        *,
        kappa: float = 3.0,
        beta: float = 0.1,
        normalize: bool = False,
    ) -> None:
        rule = try_rule(partial(rules.ritual, kappa=kappa, beta=beta, normalize=normalize), 2)
        super().__init__(rule, [contrast_branch(model, contrast_inputs)], threshold="beta")


class RitualVCDLogitsProcessor(ContrastiveLogitsProcessor):
    """RITUAL and VCD together: add the view of a transformed image, subtract that of a distorted one, see `rules.ritual_vcd`.

    Args:
        model: the model that generates.
        transformed_inputs: the inputs of the branch with the transformed image.
        distorted_inputs: the inputs of the branch with the distorted image.
        kappa: weight of the transformed view, at least 0. Default 3.
        alpha: contrast strength against the distorted view, at least 0. Default 1.
        beta: plausibility threshold, in [0, 1]. Default 0.1.

    Raises:
        TypeError: see `VisualContrastiveDecodingLogitsProcessor`.
        ValueError: see `VisualContrastiveDecodingLogitsProcessor`.
    """

    def __init__(
        self,
        model: Any,
        transformed_inputs: Mapping[str, Any],
        distorted_inputs: Mapping[str, Any],
        *,
        kappa: float = 3.0,
        alpha: float = 1.0,
        beta: float = 0.1,
    ) -> None:
        rule = try_rule(partial(rules.ritual_vcd, kappa=kappa, alpha=alpha, beta=beta), 3)
        branches = [contrast_branch(model, transformed_inputs), contrast_branch(model, distorted_inputs)]
        super().__init__(rule, branches, threshold="beta")


class M3IDLogitsProcessor(ContrastiveLogitsProcessor):
    """M3ID: contrast with the model without the image, growing with the length (Favero et al. 2024, arXiv 2403.14003).

    Scores as `rules.m3id`; the step counts the generated tokens, from 0. So the first token has no contrast, and an answer
    of one token, such as yes or no, is the model's own.

    Args:
        model: the decoder-only model that generates.
        contrast_inputs: the prompt without the image, as the tokenizer returns it.
        lam: rate at which the contrast grows, at least 0. Default 0.02.
        beta: plausibility threshold, in [0, 1]. Default 0.1.

    Raises:
        TypeError: see `VisualContrastiveDecodingLogitsProcessor`.
        ValueError: see `VisualContrastiveDecodingLogitsProcessor`.
    """

    def __init__(self, model: Any, contrast_inputs: Mapping[str, Any], *, lam: float = 0.02, beta: float = 0.1) -> None:
        rule = partial(rules.m3id, lam=lam, beta=beta)
        try_rule(partial(rule, step=0), 2)
        self._view = InputBranch(model, contrast_inputs)
        super().__init__(rule, [self._view], threshold="beta")

    def step(self, input_ids: Tensor) -> int:
        """Return the number of tokens that follow the prompts.

        Args:
            input_ids: `(B, T)` int64, the rows.
        """
        return self._view.generated(input_ids)

    def parameters(self, step: int | Tensor) -> dict[str, Any]:
        """Return the step, which sets the contrast strength.

        Args:
            step: number of tokens generated before.
        """
        return {"step": step}
