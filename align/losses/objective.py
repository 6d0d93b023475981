"""The losses by name, what each needs of policy and reference, and several of them as one objective."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.losses import preference as losses

__all__ = ["LOSSES", "Completions", "Loss", "Losses", "Objective", "Pairs"]


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What policy and reference say of B completions of the same side. Only what the losses need has to be given."""

    logps: Tensor | None = None
    """`(B,)` summed log-probabilities under the policy."""
    ref_logps: Tensor | None = None
    """`(B,)` the same under the reference."""
    lengths: Tensor | None = None
    """`(B,)` tokens."""
    token_logps: Tensor | None = None
    """`(B, T)` under the policy."""
    ref_token_logps: Tensor | None = None
    """`(B, T)` under the reference."""
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
    """`(B,)` log-ratios under the other text's image."""
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5

    @cached_property
    def logratios(self) -> Tensor | None:
        """`(B,)` r."""
        return None if self.logps is None or self.ref_logps is None else self.logps - self.ref_logps

    @cached_property
    def scores(self) -> Tensor | None:
        """`(B,)` s."""
        r = self.logratios
        return None if r is None else losses.f_divergence_scores(r, divergence=self.f_divergence, alpha=self.f_alpha)

    @cached_property
    def token_logratios(self) -> Tensor | None:
        """`(B, T)`."""
        missing = self.token_logps is None or self.ref_token_logps is None
        return None if missing else self.token_logps - self.ref_token_logps  # type: ignore[operator]

    @cached_property
    def kl(self) -> Tensor | None:
        """`(B,)` the forward KL summed over the completion."""
        return None if self.token_kl is None or self.mask is None else (self.token_kl * self.mask).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """B pairs of completions of the same prompts, as the losses take them."""

    chosen: Completions
    rejected: Completions
    margin: Tensor | None = None
    """`(B,)` see `losses.margin` and `losses.odpo`."""
    chosen_advantage: Tensor | None = None
    """`(B,)` how much better the chosen text is than the policy's own, see `losses.apo_auto`."""
    weights: Tensor | None = None
    """`(B,)` every loss of a pair is multiplied by it, as WPO does."""

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
        """Of tensors of 2B rows, the chosen completions first, as TRL's collators stack them.

        Args:
            margin, chosen_advantage, weights: `(B,)`, of the pairs.
            f_divergence, f_alpha: see `losses.f_divergence_scores`.
            completions: the fields of `Completions`, each of 2B rows.

        Examples:
            >>> pairs = Pairs.stacked(logps=torch.tensor([-1.0, -2.0]), ref_logps=torch.tensor([-2.0, -1.0]))
            >>> pairs.chosen.logratios, pairs.rejected.logratios
            (tensor([1.]), tensor([-1.]))
        """
        given = {name: value for name, value in completions.items() if value is not None}
        halves = {id(value): value.chunk(2) for value in given.values()}  # by identity: a common mask stays one tensor
        chosen: dict[str, Any] = {name: halves[id(value)][0] for name, value in given.items()}
        rejected: dict[str, Any] = {name: halves[id(value)][1] for name, value in given.items()}
        return cls(
            chosen=Completions(f_divergence=f_divergence, f_alpha=f_alpha, **chosen),
            rejected=Completions(f_divergence=f_divergence, f_alpha=f_alpha, **rejected),
            margin=margin,
            chosen_advantage=chosen_advantage,
            weights=weights,
        )

    @property
    def advantage(self) -> Tensor | None:
        """`(B,)` the advantage as given, or the proxy that `losses.apo_auto` describes."""
        if self.chosen_advantage is not None:
            return self.chosen_advantage
        sides = [(side.ref_logps, side.lengths) for side in (self.rejected, self.chosen)]
        means = [
            None if sums is None or lengths is None else losses.per_token(sums, lengths) for sums, lengths in sides
        ]
        return None if means[0] is None or means[1] is None else means[0] - means[1]

    def find(self, name: str) -> Tensor | None:
        """What a loss calls `name`: a field of a side after `chosen_` or `rejected_`, or one of the pairs'."""
        side, _, field = name.partition("_")
        found = getattr(getattr(self, side), field) if side in ("chosen", "rejected") else getattr(self, name)
        return None if found is None else torch.as_tensor(found)


_NEEDS: Mapping[str, tuple[str, ...]] = {
    "logps": (),
    "ref_logps": ("reference",),
    "logratios": ("reference",),
    "scores": ("reference",),
    "lengths": ("lengths",),
    "token_logps": ("tokens",),
    "mask": ("tokens",),
    "token_logratios": ("tokens", "reference", "reference_tokens"),
    "kl": ("kl",),
    "token_kl": ("kl",),
    "reward_mask": ("masks",),
    "kl_mask": ("masks",),
    "blind_logratios": ("images",),
    "swapped_logratios": ("images",),
    "margin": ("margin",),
    "advantage": ("reference", "lengths"),
}


class Loss(NamedTuple):
    """A loss by name: its function, and what a trainer has to bring for it."""

    function: Callable[..., Tensor]
    options: Mapping[str, str] = {}
    """What a setting is called among a trainer's options, where that is not the paper's letter."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arguments that hold data, as `Pairs.find` knows them."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)

    @property
    def settings(self) -> dict[str, tuple[str, float]]:
        """By option: the letter and the default."""
        parameters = inspect.signature(self.function).parameters.values()
        found = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        return {self.options.get(p.name, p.name): (p.name, p.default) for p in found}

    @property
    def needs(self) -> frozenset[str]:
        """What has to be computed or given, of: `reference` (sums of its log-probabilities), `reference_tokens` (those of
        its tokens), `tokens` (the policy's, and where they are), `lengths`, `kl` (forward KL over the vocabulary, for which
        both models' heads must run), `masks`, `margin` (a column of the data), `images` (three views of each text)."""
        fields = [n if n in _NEEDS else n.partition("_")[2] for n in self.inputs]
        return frozenset(need for field in fields for need in _NEEDS[field])

    @property
    def takes_f_divergence(self) -> bool:
        """Whether an f-divergence other than the reverse KL has a meaning here, as TRL sees it."""
        return self.function is losses.sft or any(n.endswith("_scores") for n in self.inputs)


_CPO = {"alpha": "cpo_alpha"}
_SIMPO = {"gamma": "simpo_gamma"}
_ARPO = {"eta": "arpo_eta", "scale": "arpo_scale"}

LOSSES: Mapping[str, Loss] = {
    "sigmoid": Loss(losses.sigmoid),
    "hinge": Loss(losses.hinge),
    "ipo": Loss(losses.ipo),
    "exo_pair": Loss(losses.exo_pair, {"epsilon": "label_smoothing"}),
    "nca_pair": Loss(losses.nca_pair),
    "robust": Loss(losses.robust),
    "bco_pair": Loss(losses.bco_pair),
    "sppo_hard": Loss(losses.sppo_hard),
    "aot": Loss(losses.aot),
    "aot_unpaired": Loss(losses.aot_unpaired),
    "apo_zero": Loss(losses.apo_zero),
    "apo_down": Loss(losses.apo_down),
    "discopop": Loss(losses.discopop, {"tau": "discopop_tau"}),
    "sft": Loss(losses.sft),
    "sigmoid_norm": Loss(losses.sigmoid_norm),
    "apo_auto": Loss(losses.apo_auto),
    "apo_zero_norm": Loss(losses.apo_zero_norm),
    "apo_down_norm": Loss(losses.apo_down_norm),
    "margin": Loss(losses.margin),
    "odpo": Loss(losses.odpo, {"alpha": "odpo_alpha"}),
    "cpo": Loss(losses.cpo, _CPO),
    "simpo": Loss(losses.simpo, _SIMPO),
    "cpo_simpo": Loss(losses.cpo_simpo, _CPO | _SIMPO),
    "arpo": Loss(losses.arpo, _CPO | _ARPO),
    "tdpo1": Loss(losses.tdpo1),
    "tdpo2": Loss(losses.tdpo2, {"alpha": "tdpo_alpha"}),
    "sparsepo": Loss(losses.sparsepo),
    "svco": Loss(losses.svco),
}
"""Every loss by the name that a trainer's `loss_type` gives it; the first fifteen are TRL's."""


class Losses(NamedTuple):
    """The value of an objective on a batch."""

    total: Tensor
    """The number to minimise: sum_k w_k mean_i L_ki."""
    terms: dict[str, Tensor]
    """`(B,)` by name, unweighted."""


class Objective:
    """Several losses by weight: `total = sum_k w_k mean_i L_ki`.

    Everything is checked at construction; a call computes.

    Args:
        loss_types: names of `LOSSES`.
        weights: one per name; 1 each if not given.
        settings: options of the losses, such as `beta` or `cpo_alpha`; those that are not given keep their defaults. An option
            that several losses share goes to all of them.

    Attributes:
        needs: what has to be computed or given for all of them together, see `Loss.needs`.

    Raises:
        ValueError: an unknown or repeated loss, another number of weights, an unknown option or one out of range.

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
        chosen = [LOSSES[name] for name in self.loss_types]
        self.needs = frozenset[str]().union(*(loss.needs for loss in chosen))
        known = {option for loss in chosen for option in loss.settings}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(f"{', '.join(self.loss_types)} do not read {', '.join(unknown)}; they read {_list(known)}")
        self._settings = [self._own(loss, settings) for loss in chosen]

    def _check_names(self) -> None:
        if unknown := [name for name in self.loss_types if name not in LOSSES]:
            raise ValueError(f"there is no loss {unknown[0]!r}; loss_type must be one of {', '.join(LOSSES)}")
        if not self.loss_types or len(set(self.loss_types)) != len(self.loss_types):
            raise ValueError(f"loss_type must name at least one loss, and each once, not {list(self.loss_types)}")
        if len(self.weights) != len(self.loss_types):
            raise ValueError(f"loss_weights must be one per loss: {len(self.loss_types)}, not {len(self.weights)}")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"loss_weights must be finite numbers, not {list(self.weights)}")

    @staticmethod
    def _own(loss: Loss, settings: Mapping[str, float]) -> dict[str, float]:
        """The settings of one loss by letter, checked."""
        own = {letter: settings.get(option, default) for option, (letter, default) in loss.settings.items()}
        for option, (letter, _) in loss.settings.items():
            losses.check_setting(option, letter, own[letter])
        return own

    def __call__(self, pairs: Pairs) -> Losses:
        """The losses of a batch.

        Raises:
            ValueError: the pairs lack something that a loss needs.
        """
        terms = {}
        for name, own in zip(self.loss_types, self._settings, strict=True):
            loss = LOSSES[name].function(*self._inputs(name, pairs), **own)
            terms[name] = loss if pairs.weights is None else loss * pairs.weights
        total = sum(w * term.mean() for w, term in zip(self.weights, terms.values(), strict=True))
        return Losses(torch.as_tensor(total), terms)

    @staticmethod
    def _inputs(name: str, pairs: Pairs) -> list[Tensor]:
        found = {each: pairs.find(each) for each in LOSSES[name].inputs}
        if missing := [each for each, value in found.items() if value is None]:
            raise ValueError(f"the loss {name!r} needs {', '.join(missing)}, which these pairs do not have")
        return [value for value in found.values() if value is not None]


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "no options"
