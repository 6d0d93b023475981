"""The declaration of a preference loss: everything that a trainer and its options have to know about it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from torch import Tensor

__all__ = ["NEEDS", "Loss", "Requirement", "check_loss"]

Requirement = Literal["alone", "positive_margin"]

NEEDS: Mapping[str, tuple[str, ...]] = {
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
"""What has to be computed for each input of a loss. The inputs of a completion are prefixed by `chosen_` or `rejected_`."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A preference loss. Every field is required, so that a declaration cannot leave a fact out.

    Args:
        name: the value of `loss_type` that selects the loss.
        description: what it is, with its source, for tables in the documentation.
        function: computes the loss per pair, `(B,)`. Its positional parameters name its inputs (`NEEDS`); its keyword-only parameters
            are its settings, with their defaults.
        options: the name of the trainer's option by setting, where the two differ.
        requires: conditions that the signature does not show: `alone` if no other loss can be computed on the same batch,
            `positive_margin` if margins must be above 0.
        forbids: options of `PreferenceConfig` that have no meaning with this loss, and the reason, which completes
            "OPTION is set, but NAME ...".
        length_normalised: the loss compares means per token and not sums.
        lowers_chosen: the loss is meant to lower the likelihood of chosen completions, of all or of some.
        saturates: the loss is a sum of sigmoids of single completions, so that its gradient vanishes where `beta |r|` is large.
        from_trl: the loss is also a `loss_type` of `trl.DPOConfig`, whose numbers it reproduces.

    Raises:
        ValueError: the function has an unknown input or a setting without a default, or a field names an unknown setting or requirement.

    Examples:
        >>> def flat(chosen_logps, rejected_logps, *, beta=0.1):
        ...     return beta * (rejected_logps - chosen_logps)
        >>> loss = Loss(
        ...     name="flat",
        ...     description="a linear loss",
        ...     function=flat,
        ...     options={},
        ...     requires=frozenset(),
        ...     forbids={},
        ...     length_normalised=False,
        ...     lowers_chosen=False,
        ...     saturates=False,
        ...     from_trl=False,
        ... )
        >>> loss.inputs, loss.settings
        (('chosen_logps', 'rejected_logps'), {'beta': ('beta', 0.1)})
    """

    name: str
    description: str
    function: Callable[..., Tensor]
    options: Mapping[str, str]
    requires: frozenset[Requirement]
    forbids: Mapping[str, str]
    length_normalised: bool
    lowers_chosen: bool
    saturates: bool
    from_trl: bool

    def __post_init__(self) -> None:
        if unknown := [name for name in self.inputs if _field(name) not in NEEDS]:
            raise ValueError(f"the loss {self.name!r} has an unknown input {unknown[0]}; inputs are {', '.join(NEEDS)}")
        letters: dict[str, Any] = dict(self.settings.values())
        if missing := [letter for letter, default in letters.items() if default is inspect.Parameter.empty]:
            raise ValueError(f"the setting {missing[0]} of the loss {self.name!r} has no default")
        if unknown := [letter for letter in self.options if letter not in letters]:
            raise ValueError(
                f"options of the loss {self.name!r} names {unknown[0]}, which is no setting of its function"
            )
        if strange := self.requires - set(get_args(Requirement)):
            raise ValueError(f"the loss {self.name!r} has an unknown requirement {min(strange)!r}")

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the data that the loss takes, as `Pairs.find` knows them."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)

    @cached_property
    def settings(self) -> dict[str, tuple[str, float]]:
        """Return the letter and the default of every setting, by the name of the option."""
        parameters = inspect.signature(self.function).parameters.values()
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        return {self.options.get(p.name, p.name): (p.name, p.default) for p in keywords}

    @cached_property
    def needs(self) -> frozenset[str]:
        """Return the inputs that have to be computed or passed for the loss.

        Returns:
            Some of `reference` (summed log-probabilities under the reference), `reference_tokens` (those of its tokens), `tokens` (the
            policy's log-probabilities per token, and the mask), `lengths`, `kl` (forward KL over the vocabulary, for which both heads
            must run), `masks`, `margin` (a column of the data), `images` (three views of each completion).
        """
        return frozenset(need for name in self.inputs for need in NEEDS[_field(name)])


def _field(name: str) -> str:
    """Return the name of an input without `chosen_` or `rejected_`."""
    return name if name in NEEDS else name.partition("_")[2]


def check_loss(value: Any) -> None:
    """Raise ValueError unless a value is the declaration of a loss.

    Args:
        value: what another package registers.

    Raises:
        ValueError: the value is not a `Loss`.
    """
    if not isinstance(value, Loss):
        raise ValueError(f"a loss must be a contralto.align.losses.loss.Loss, not a {type(value).__name__}")  # noqa: TRY004
