"""Score by the formula of a method without its other branches: its mask alone, or sharpening alone.

Either needs a forward pass of the main model and nothing else. They explain gains in likelihoods that come without any contrast:

    mask:     log p(v) if v is plausible, else -inf
    uniform:  the formula with 1 / V in place of every other distribution, such as (1 + beta) log p(v) + beta log V

With a gate, either acts where the contrast does, see `contralto.decoding.rules.gated`.

The raw scores of a uniform contrast add a constant for each token, so that long continuations score higher.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contralto.decoding.methods.base import GATE
from contralto.decoding.processors.base import ContrastiveLogitsProcessor
from contralto.decoding.rules import gated

if TYPE_CHECKING:
    from contralto.decoding.methods.base import Form
    from contralto.decoding.methods.config import DecodingConfig

__all__ = ["CONTROLS", "control_processor", "has_effect"]

CONTROLS = ("mask", "uniform")


class _Control(ContrastiveLogitsProcessor):
    """A formula that computes its other branches from the main one."""

    def parameters(self, step: int | Tensor) -> dict[str, Any]:
        """Return the step, on which some formulas depend.

        Args:
            step: number of tokens generated before.
        """
        return {"step": step}


def control_processor(config: "DecodingConfig", control: str) -> ContrastiveLogitsProcessor:
    """Return a logits processor whose scores are those of a control of a method.

    Args:
        config: the method with its parameters.
        control: `mask` or `uniform`.

    Raises:
        ValueError: there is no such control, or the formula has no mask that could act alone.

    Examples:
        >>> from contralto.decoding.methods import DecodingConfig
        >>> config = DecodingConfig(method="cd", models={"amateur": "any"}, parameters={"beta": 1, "alpha": 0.5})
        >>> scores = torch.tensor([[0.6, 0.3, 0.1]]).log()
        >>> control_processor(config, "mask").combine(scores, [], 0).exp()
        tensor([[0.6000, 0.3000, 0.0000]])
        >>> control_processor(config, "uniform").combine(scores, [], 0).softmax(-1)  # p^2 on the plausible tokens
        tensor([[0.8000, 0.2000, 0.0000]])
    """
    form = config.declaration.forms.get(config.form or "")
    if control not in CONTROLS or form is None:
        raise ValueError(f"control must be {' or '.join(CONTROLS)}, of a method with a contrast, not {control!r}")
    if control == "mask" and (form.mask is None or form.off is None):
        raise ValueError(f"method={config.method!r} has no control 'mask': its formula has no mask that acts alone")
    gate = config.parameters.get(GATE)
    rule = _rule(config, control)
    if gate is None:
        return _Control(rule, [], threshold=form.mask)

    def gated_rule(main: Tensor, *, step: int | Tensor, **changed: Any) -> Tensor:
        return gated(rule(main, step=step, **changed), main, gate=gate, step=step)

    return _Control(gated_rule, [], threshold=form.mask)


def _rule(config: "DecodingConfig", control: str) -> Callable[..., Tensor]:
    """Return the formula of a control as a function of the main logits."""
    form = config.declaration.forms[config.form or ""]
    fixed = {**config.rule_parameters, **(form.off or {} if control == "mask" else {})}

    def rule(main: Tensor, *, step: int | Tensor, **changed: Any) -> Tensor:
        scores: Tensor = form.scores(_branches(form, main, control), step=step, **{**fixed, **changed})
        return scores

    return rule


def _branches(form: "Form", main: Tensor, control: str) -> list[Tensor]:
    """Return the logits of all branches: those that a mask alone does not read, or uniform ones."""
    other = main if control == "mask" else torch.zeros_like(main)
    return [main, *[other] * (len(form.branch_names) - 1)]


def has_effect(config: "DecodingConfig", *, renormalized: bool) -> bool:
    """Return True if the formula with uniform branches scores continuations differently from the model alone, without its mask.

    Args:
        config: the method with its parameters.
        renormalized: whether log-probabilities are compared, to which a constant makes no difference, or raw scores.

    Examples:
        >>> from contralto.decoding.methods import DecodingConfig
        >>> added = DecodingConfig(method="ritual")  # adds (kappa log 1 / V) to every token
        >>> has_effect(added, renormalized=True), has_effect(added, renormalized=False)
        (False, True)
    """
    processor = control_processor(replace(config, parameters={**config.parameters, GATE: None}), "uniform")
    main = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    open_mask: dict[str, Any] = {} if processor.threshold is None else {processor.threshold: 0.0}
    scores = processor.combine(main, [], 1, **open_mask)
    return not torch.allclose(scores.log_softmax(-1) if renormalized else scores, main)
