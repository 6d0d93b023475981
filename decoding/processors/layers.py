"""Provide DoLa, which contrasts the last layer of a model with an earlier one."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from contralto.decoding import rules
from contralto.decoding.branches.layer import LayerBranch
from contralto.decoding.branches.variants import check_loaded
from contralto.decoding.processors.base import ContrastiveLogitsProcessor, Rule

__all__ = ["DoLaLogitsProcessor"]


class DoLaLogitsProcessor(ContrastiveLogitsProcessor):
    """DoLa: contrast the last layer with the earlier layer that differs most from it (Chuang et al. 2024, arXiv 2309.03883).

    Scores `log p_final - log p_layer` on the plausible tokens, with a layer chosen for every row and token. Early layers take
    the path of the last layer to their logits, with final norm, scale and soft cap, see `branches.LayerBranch`. The official
    code leaves the final norm out; then the logits of early layers of a trained model span hundreds to thousands, and
    rounding decides the choice of the layer. As a logits processor it runs the model a second time; `loop()` does not.

    Args:
        model: the decoder-only model that generates.
        layers: "low" or "high", every second layer of the lower or upper half (of 20 layers in models of over 40), or
            numbers of layers, 1 for the first. The embeddings, 0, are a candidate only if they are listed.
        relative_top: plausibility threshold, in [0, 1]. Default 0.1.
        form: the divergence that selects the layer: "kl" (default), the divergence of the official code, see `rules.dola`, or "jsd", that
            of the paper, see `rules.dola_jsd`.
        final_norm: whether early layers pass the final norm. Default yes; no, as in the official code.
        attention_mask: see `ContrastiveDecodingLogitsProcessor`.
        vision_inputs: see `ContrastiveDecodingLogitsProcessor`.

    Raises:
        TypeError: the model cannot generate.
        ValueError: an encoder-decoder, layers that the model does not have, `relative_top` outside [0, 1], an unknown form,
            or a model whose layers do not lead to its logits.
    """

    def __init__(
        self,
        model: Any,
        *,
        layers: Literal["low", "high"] | Sequence[int] = "high",
        relative_top: float = 0.1,
        form: Literal["kl", "jsd"] = "kl",
        final_norm: bool = True,
        attention_mask: Tensor | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        forms: dict[str, Rule] = {"kl": rules.dola, "jsd": rules.dola_jsd}
        if form not in forms:
            raise ValueError(f"form must be 'kl' or 'jsd', not {form!r}")
        rule = partial(forms[form], relative_top=relative_top)
        rule(torch.zeros(1), torch.zeros(1, 1))
        check_loaded(model)
        chosen = _layers(model, layers) if isinstance(layers, str) else layers
        branch = LayerBranch(
            model, chosen, final_norm=final_norm, attention_mask=attention_mask, vision_inputs=vision_inputs
        )
        super().__init__(rule, [branch], threshold="relative_top")


def _layers(model: Any, which: str) -> list[int]:
    """Return the candidate layers of one of DoLa's two ranges; never the embeddings."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    wide, half = depth > 40, depth // 2
    ranges = {"low": range(2, 20 if wide else half, 2), "high": range(depth - 20 if wide else half, depth, 2)}
    if which not in ranges:
        raise ValueError(f"layers must be 'low', 'high' or a list of layer numbers, not {which!r}")
    if depth < 2:
        raise ValueError(
            f"layers={which!r} needs a layer before the last, but {type(model).__name__} has only one layer"
        )
    return list(ranges[which]) or [min(2, half)]
