"""A method as a model card describes it."""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from contralto.align.cards.papers import Paper, papers_in
from contralto.align.losses import cross_tokenizer, divergences, preference
from contralto.align.losses.curriculum import Curriculum
from contralto.align.losses.registry import LOSSES

__all__ = [
    "CardMethod",
    "describe_function",
    "distillation_methods",
    "formula_of",
    "preference_methods",
    "preference_notation",
]


class CardMethod(NamedTuple):
    """A method of training, or a part of it."""

    name: str
    """Such as the `loss_type`."""
    description: str
    """What it is, with its source."""
    formula: str
    """Lines of the formula; empty if there is none."""
    papers: list[Paper]


def describe_function(name: str, function: Callable[..., Any], description: str = "") -> CardMethod:
    """Return the method that a function computes.

    Args:
        name: the name of the method.
        function: its docstring has the formula as an indented block, and cites the paper.
        description: what it is; by default the first paragraph of the docstring.
    """
    text = inspect.getdoc(function) or ""
    first = " ".join(text.split("\n\n")[0].split()).removeprefix("Compute ").removeprefix("Return ").rstrip(".")
    head = text.split("\nArgs:")[0]
    return CardMethod(name, description or first, formula_of(function), papers_in(f"{description} {head}"))


def formula_of(function: Any) -> str:
    """Return the formula in the docstring of a function, class or module: its first indented block before the arguments.

    Args:
        function: any object with a docstring.

    Examples:
        >>> from contralto.align.losses.preference import apo_zero
        >>> print(formula_of(apo_zero))
        L = 1 - sigmoid(beta r_w) + sigmoid(beta r_l)
    """
    lines = (inspect.getdoc(function) or "").split("\nArgs:")[0].split("\n")
    block: list[str] = []
    for line in lines:
        if line.startswith("    "):
            block.append(line)
        elif block:
            break
    return textwrap.dedent("\n".join(block)).strip()


DIVERGENCES: dict[str, Callable[..., Any]] = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jsd": divergences.jensen_shannon,
    "tvd": divergences.total_variation,
    "skew_kl": divergences.skew_kl,
    "skew_reverse_kl": divergences.skew_reverse_kl,
    "uld": cross_tokenizer.universal_logit_distance,
    "gold": cross_tokenizer.gold,
}
CURRICULUM = "DistiLLM-2 with its curriculum (Ko et al. 2025, arXiv 2503.07067)"
LIKELIHOOD = "likelihood of the teacher's completions: sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947)"


def preference_methods(names: Iterable[str]) -> list[CardMethod]:
    """Return the methods of preference losses.

    Args:
        names: keys of `LOSSES`.
    """
    return [describe_function(name, LOSSES.get(name).function, LOSSES.get(name).description) for name in names]


def preference_notation() -> str:
    """Return what the letters in the formulas of preference losses mean."""
    return formula_of(preference)


def distillation_methods(loss: str, sides: Mapping[str, str], *, follows_curriculum: bool) -> list[CardMethod]:
    """Return the methods of a distillation loss: its curriculum, and the divergence on each side.

    Args:
        loss: a key of `DISTILLATION_LOSSES`.
        sides: the divergence by side, `chosen` (the teacher's completions) and `rejected` (the student's).
        follows_curriculum: the weights of the sides change in training.
    """
    methods = [describe_function(loss, Curriculum, CURRICULUM)] if follows_curriculum else []
    for side, name in sides.items():
        label = f"{name} on the {'teacher' if side == 'chosen' else 'student'}'s completions"
        if name in DIVERGENCES:
            methods.append(describe_function(label, DIVERGENCES[name]))
        else:
            methods.append(CardMethod(label, LIKELIHOOD, "", papers_in(LIKELIHOOD)))
    return methods
