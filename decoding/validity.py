"""Check that logits can be contrasted: NaN, `+inf` or a row without a possible token is an error.

Such logits come from a half-precision overflow or from broken weights. The rules would exclude the tokens that these affect and fall
back on the main branch, and the completion would look like one that was decoded by contrast.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["branch_names", "check_logits", "check_shape"]


def check_logits(logits: Sequence[Tensor], names: Callable[[], Sequence[str]], place: Callable[..., str]) -> None:
    """Raise an error that names the branch and the row if some logits cannot be contrasted.

    One maximum per row suffices: it is NaN, `+inf` or `-inf` exactly where the row holds NaN, holds `+inf`, or is all `-inf`. The sum
    of the maxima is finite only if each is, so that there is one synchronization with the device for all branches.

    Args:
        logits: `(..., V)` of each branch.
        names: returns the names of the logits for the error message; called only then.
        place: returns the place of a row from its indices for the error message; called only then.

    Raises:
        ValueError: NaN or `+inf` in some logits, or a row of `-inf` alone.

    Examples:
        >>> broken = torch.tensor([[0.0, 1.0], [torch.inf, 0.0]])
        >>> check_logits([torch.zeros(2, 2), broken], lambda: ["logits of the expert", "logits of the amateur"], lambda row: f"in row {row}")
        Traceback (most recent call last):
            ...
        ValueError: the logits of the amateur contain +inf in row 1: an overflow of half precision, or damaged weights; load the model in float32 or bfloat16, or check the weights
    """
    if math.isfinite(torch.cat([each.amax(-1).flatten() for each in logits]).sum().item()):
        return
    for name, each in zip(names(), logits, strict=True):
        if len(broken := (~each.amax(-1).isfinite()).nonzero()):
            index = broken[0].tolist()
            raise ValueError(_describe(name, each[tuple(index)], place(*index)))


def check_shape(scores: Any, logits: Tensor) -> None:
    """Raise an error unless the scores of a rule have the shape of its logits; others would be broadcast or cut later.

    Args:
        scores: of the rule.
        logits: `(..., V)` of the main branch.

    Raises:
        TypeError: the rule returned no tensor.
        ValueError: another shape.

    Examples:
        >>> check_shape(torch.zeros(5), torch.zeros(2, 5))
        Traceback (most recent call last):
            ...
        ValueError: the rule returned scores of shape (5,) for logits of shape (2, 5): it must return one score per row and token
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"the rule must return a tensor of scores, not {type(scores).__name__}")
    if scores.shape != logits.shape:
        raise ValueError(
            f"the rule returned scores of shape {tuple(scores.shape)} for logits of shape {tuple(logits.shape)}: it must "
            "return one score per row and token"
        )


def _describe(name: str, row: Tensor, where: str) -> str:
    """Return the error message for the first row that cannot be contrasted."""
    if row.isnan().any() or row.isposinf().any():
        kind = "NaN" if row.isnan().any() else "+inf"
        return (
            f"the {name} contain {kind} {where}: an overflow of half precision, or damaged weights; load the "
            "model in float32 or bfloat16, or check the weights"
        )
    return (
        f"the {name} are all -inf {where}, so no token is possible: damaged weights, or processors that "
        "exclude every token"
    )


def branch_names(rule: Callable[..., Tensor], branches: Sequence[Any]) -> list[str]:
    """Return names for the logits that a rule takes, the main branch's first: its parameters, and the classes of the models.

    Args:
        rule: takes the logits of the main branch and of each other branch.
        branches: the other branches.

    Examples:
        >>> from contralto.decoding import rules
        >>> branch_names(rules.contrastive_decoding, [None])
        ['logits of the expert', 'logits of the amateur']
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = [p.name.replace("_", " ") for p in inspect.signature(rule).parameters.values() if p.kind in kinds]
    rest = ["main branch", *(f"branch {i + 1}" for i in range(len(branches)))]
    names = [*own, *rest[len(own) :]][: len(rest)]
    models = [None, *(getattr(branch, "model", None) for branch in branches)]
    return [
        f"logits of the {name}" + ("" if model is None else f" ({type(model).__name__})")
        for name, model in zip(names, models, strict=True)
    ]
