"""Several preference losses as one objective, and the data that they are computed from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.losses.loss import Loss
from contralto.align.losses.preference import check_setting, f_divergence_scores, per_token
from contralto.align.losses.registry import LOSSES

__all__ = ["Completions", "Losses", "Objective", "Pairs"]


@dataclass(frozen=True, kw_only=True)
class Completions:
    """B completions of one side of the pairs under policy and reference. Inputs that no loss needs may be None."""

    logps: Tensor | None = None
    """`(B,)` summed log-probabilities under the policy."""
    ref_logps: Tensor | None = None
    """`(B,)` summed log-probabilities under the reference."""
    lengths: Tensor | None = None
    """`(B,)` tokens."""
    token_logps: Tensor | None = None
    """`(B, T)` log-probabilities under the policy."""
    ref_token_logps: Tensor | None = None
    """`(B, T)` log-probabilities under the reference."""
    token_kl: Tensor | None = None
    """`(B, T)` forward KL over the vocabulary."""
    mask: Tensor | None = None
    """`(B, T)`, true at the tokens of the completion."""
    reward_mask: Tensor | None = None
    """`(B, T)` SparsePO's m_u."""
    kl_mask: Tensor | None = None
    """`(B, T)` SparsePO's m_d; the same tensor for a common mask."""
    blind_logratios: Tensor | None = None
    """`(B,)` log-ratios without an image."""
    swapped_logratios: Tensor | None = None
    """`(B,)` log-ratios with the image of the other completion."""
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5

    @cached_property
    def logratios(self) -> Tensor | None:
        """Return the log-ratios r, `(B,)`."""
        return None if self.logps is None or self.ref_logps is None else self.logps - self.ref_logps

    @cached_property
    def scores(self) -> Tensor | None:
        """Return the scores s, `(B,)`."""
        r = self.logratios
        return None if r is None else f_divergence_scores(r, divergence=self.f_divergence, alpha=self.f_alpha)

    @cached_property
    def token_logratios(self) -> Tensor | None:
        """Return the log-ratios of the tokens, `(B, T)`."""
        missing = self.token_logps is None or self.ref_token_logps is None
        return None if missing else self.token_logps - self.ref_token_logps  # type: ignore[operator]

    @cached_property
    def kl(self) -> Tensor | None:
        """Return the forward KL summed over the completion, `(B,)`."""
        return None if self.token_kl is None or self.mask is None else (self.token_kl * self.mask).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """B pairs of completions of the same prompts: the inputs of the losses."""

    chosen: Completions
    rejected: Completions
    margin: Tensor | None = None
    """`(B,)`, see `losses.preference.margin` and `odpo`."""
    chosen_advantage: Tensor | None = None
    """`(B,)` advantage of the chosen completion over one of the policy's own, see `losses.preference.apo_auto`."""
    weights: Tensor | None = None
    """`(B,)` factors of every loss, such as those of WPO."""

    @classmethod
    def stacked(
        cls,
        *,
        margin: Tensor | None = None,
        chosen_advantage: Tensor | None = None,
        weights: Tensor | None = None,
        f_divergence: str = "reverse_kl",
        f_alpha: float = 0.5,
        **completions: Tensor | None,
    ) -> "Pairs":
        """Make pairs from tensors of 2B rows, the chosen completions first, as TRL's collators stack them.

        Args:
            margin: `(B,)`, of the pairs.
            chosen_advantage: `(B,)`, of the pairs.
            weights: `(B,)`, of the pairs.
            f_divergence: see `losses.preference.f_divergence_scores`.
            f_alpha: see `losses.preference.f_divergence_scores`.
            completions: the fields of `Completions`, each of 2B rows.

        Examples:
            >>> pairs = Pairs.stacked(logps=torch.tensor([-1.0, -2.0]), ref_logps=torch.tensor([-2.0, -1.0]))
            >>> pairs.chosen.logratios, pairs.rejected.logratios
            (tensor([1.]), tensor([-1.]))
        """
        fields = {name: value for name, value in completions.items() if value is not None}
        halves = {id(value): value.chunk(2) for value in fields.values()}  # by identity: a common mask stays one tensor
        chosen: dict[str, Any] = {name: halves[id(value)][0] for name, value in fields.items()}
        rejected: dict[str, Any] = {name: halves[id(value)][1] for name, value in fields.items()}
        return cls(
            chosen=Completions(f_divergence=f_divergence, f_alpha=f_alpha, **chosen),
            rejected=Completions(f_divergence=f_divergence, f_alpha=f_alpha, **rejected),
            margin=margin,
            chosen_advantage=chosen_advantage,
            weights=weights,
        )

    @property
    def advantage(self) -> Tensor | None:
        """Return the advantage that was given, or else the proxy that `losses.preference.apo_auto` describes, `(B,)`."""
        if self.chosen_advantage is not None:
            return self.chosen_advantage
        sides = [(side.ref_logps, side.lengths) for side in (self.rejected, self.chosen)]
        means = [None if sums is None or lengths is None else per_token(sums, lengths) for sums, lengths in sides]
        return None if means[0] is None or means[1] is None else means[0] - means[1]

    def find(self, name: str) -> Tensor | None:
        """Return an input of a loss, or None if it was not passed.

        Args:
            name: a field of a side after `chosen_` or `rejected_`, or a field of the pairs.
        """
        side, _, field = name.partition("_")
        value = getattr(getattr(self, side), field) if side in ("chosen", "rejected") else getattr(self, name)
        return None if value is None else torch.as_tensor(value)


class Losses(NamedTuple):
    """The value of an objective on a batch."""

    total: Tensor
    """The scalar to minimise: sum_k w_k mean_i L_ki."""
    terms: dict[str, Tensor]
    """`(B,)` unweighted loss per pair, by name."""


class Objective:
    """Several losses by weight: `total = sum_k w_k mean_i L_ki`.

    Everything is checked at construction; a call only computes.

    Args:
        loss_types: names in `losses.registry.LOSSES`.
        weights: one per name; 1 each by default.
        settings: options of the losses, such as `beta` or `cpo_alpha`, with the losses' own defaults. An option that several losses
            share goes to all of them.

    Attributes:
        losses: the declarations.
        needs: what has to be computed or given for all losses together, see `Loss.needs`.
        requires: the requirements of all losses, see `Loss.requires`.
        length_normalised: one of the losses compares means per token.

    Raises:
        ValueError: a loss is unknown or repeated or cannot be combined, the number of weights differs, or an option is unknown or out of
            range.

    Examples:
        >>> objective = Objective(["sigmoid", "sft"], [1.0, 0.1], beta=0.5)
        >>> sorted(objective.needs)
        ['reference', 'tokens']
        >>> ones = torch.ones(2, 3)
        >>> pairs = Pairs.stacked(
        ...     logps=torch.tensor([-3.0, -3.0]), ref_logps=torch.tensor([-3.0, -3.0]), token_logps=-ones, mask=ones.bool()
        ... )
        >>> objective(pairs).total  # log 2 + 0.1
        tensor(0.7931)
    """

    def __init__(self, loss_types: Sequence[str], weights: Sequence[float] | None = None, **settings: float) -> None:
        self.loss_types = tuple(loss_types)
        self.weights = (1.0,) * len(self.loss_types) if weights is None else tuple(weights)
        self._check_names()
        self.losses = tuple(LOSSES.get(name) for name in self.loss_types)
        self.needs = frozenset[str]().union(*(loss.needs for loss in self.losses))
        self.requires = frozenset[str]().union(*(loss.requires for loss in self.losses))
        self.length_normalised = any(loss.length_normalised for loss in self.losses)
        if "alone" in self.requires and len(self.losses) > 1:
            name = next(loss.name for loss in self.losses if "alone" in loss.requires)
            raise ValueError(f"{name} cannot be combined with other losses: let it stand alone in loss_type")
        known = {option for loss in self.losses for option in loss.settings}
        if unknown := sorted(settings.keys() - known):
            options = ", ".join(sorted(known)) or "no options"
            raise ValueError(f"{', '.join(self.loss_types)} do not read {', '.join(unknown)}; they read {options}")
        self._settings = [_checked_settings(loss, settings) for loss in self.losses]

    def _check_names(self) -> None:
        for name in self.loss_types:
            LOSSES.get(name)
        if not self.loss_types or len(set(self.loss_types)) != len(self.loss_types):
            raise ValueError(f"loss_type must name at least one loss, and each once, not {list(self.loss_types)}")
        if len(self.weights) != len(self.loss_types):
            raise ValueError(f"loss_weights must be one per loss: {len(self.loss_types)}, not {len(self.weights)}")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"loss_weights must be finite numbers, not {list(self.weights)}")

    def __call__(self, pairs: Pairs) -> Losses:
        """Compute the losses of a batch.

        Args:
            pairs: the batch.

        Raises:
            ValueError: the pairs lack an input of a loss.
        """
        terms = {}
        for loss, settings in zip(self.losses, self._settings, strict=True):
            term = loss.function(*_inputs(loss, pairs), **settings)
            terms[loss.name] = term if pairs.weights is None else term * pairs.weights
        total = sum(w * term.mean() for w, term in zip(self.weights, terms.values(), strict=True))
        return Losses(torch.as_tensor(total), terms)


def _checked_settings(loss: Loss, settings: Mapping[str, float]) -> dict[str, float]:
    """Return the settings of one loss by letter.

    Raises:
        ValueError: a setting is out of range.
    """
    values = {letter: settings.get(option, default) for option, (letter, default) in loss.settings.items()}
    for option, (letter, _) in loss.settings.items():
        check_setting(option, letter, values[letter])
    return values


def _inputs(loss: Loss, pairs: Pairs) -> list[Tensor]:
    """Return the inputs of a loss in the order of its parameters.

    Raises:
        ValueError: the pairs lack one.
    """
    values = {name: pairs.find(name) for name in loss.inputs}
    if missing := [name for name, value in values.items() if value is None]:
        raise ValueError(f"the loss {loss.name!r} needs {', '.join(missing)}, which these pairs do not have")
    return [value for value in values.values() if value is not None]
