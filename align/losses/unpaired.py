"""Losses of single completions with a label, and several of them as one objective: KTO, APO-zero, NPO, gradient difference, QCRD.

A row is a prompt, a completion and a label: true for a completion that is desirable (KTO) or to be retained (unlearning), false for one
that is undesirable or to be forgotten. Notation, in nats, for a completion `y` of a prompt x:

    r(y) = log pi(y | x) - log pi_ref(y | x)    the log-ratio, summed over the tokens of y
    z                                           KTO's reference point: the mean log-ratio of completions of other prompts, at least 0
    |y|                                         the number of tokens of y
    s(y)                                        the quality of y, in [0, 1], a column of the data

A loss reads all rows of a batch, or those of one label, and returns one number for each row that it reads; its value is their mean, and 0
for a batch without such rows. The positional parameters of its function name its inputs (`INPUTS`), the keyword-only ones are its settings.

A loss of another package is an `UnpairedLoss` that calls `UNPAIRED.register`, or that an entry point of the group
`contralto.unpaired_losses` names.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from contralto.align.losses.objective import Losses
from contralto.align.losses.preference import check_setting, check_settings
from contralto.common.registry import Registry

__all__ = [
    "BOTH",
    "BUILT_IN",
    "UNPAIRED",
    "LabelledRows",
    "UnpairedLoss",
    "UnpairedObjective",
    "apo_zero_unpaired",
    "gradient_ascent",
    "kto",
    "npo",
    "qcrd",
    "retain",
]

BOTH = frozenset({True, False})


def kto(
    logratios: Tensor,
    label: Tensor,
    reference_point: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute the loss of Kahneman-Tversky optimization, KTO (Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8).

        L = w_D (1 - sigmoid(beta (r - z)))    if y is desirable
        L = w_U (1 - sigmoid(beta (z - r)))    else

    The paper writes lambda_D and lambda_U, and advises weights by which desirable rows count as much as undesirable ones or a little more.
    There is no gradient through z.

    Args:
        logratios: `(n,)` log-ratios.
        label: `(n,)`, true for desirable completions.
        reference_point: z, a scalar of at least 0.
        beta: above 0.
        desirable_weight: w_D, at least 0.
        undesirable_weight: w_U, at least 0.

    Returns:
        `(n,)` loss per row.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> zeros = torch.zeros(2)
        >>> kto(zeros, torch.tensor([True, False]), torch.tensor(0.0), undesirable_weight=2.0)
        tensor([0.5000, 1.0000])
    """
    check_settings(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    away = logratios - reference_point.detach()
    return torch.where(label, desirable_weight * (-beta * away).sigmoid(), undesirable_weight * (beta * away).sigmoid())


def apo_zero_unpaired(
    logratios: Tensor,
    label: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute APO-zero of single completions (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7), as TRL does: KTO with z = 0.

        L = w_D (1 - sigmoid(beta r))    if y is desirable
        L = w_U sigmoid(beta r)          else

    Args:
        logratios: `(n,)` log-ratios.
        label: `(n,)`, true for desirable completions.
        beta: above 0.
        desirable_weight: w_D, at least 0.
        undesirable_weight: w_U, at least 0.

    Returns:
        `(n,)` loss per row.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> apo_zero_unpaired(torch.zeros(2), torch.tensor([True, False]))
        tensor([0.5000, 0.5000])
    """
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto(logratios, label, logratios.new_zeros(()), beta=beta, **weights)


def npo(logratios: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute the loss of negative preference optimization, NPO, on completions to forget (Zhang et al. 2024, arXiv 2404.05868, equation 3).

        L = -(2 / beta) log sigmoid(-beta r)

    It is DPO without a chosen completion. Its gradient, 2 sigmoid(beta r) times that of log pi, fades as the completion becomes less likely
    than under the reference; where beta is near 0 it does not, and is that of gradient ascent.

    Args:
        logratios: `(n,)` log-ratios of the completions to forget.
        beta: above 0.

    Returns:
        `(n,)` loss per row.

    Raises:
        ValueError: `beta` is not above 0.

    Examples:
        >>> npo(torch.tensor([0.0, -100.0]))  # 20 log 2; nothing is left to forget
        tensor([1.3863e+01, 9.0798e-04])
    """
    check_settings(beta=beta)
    return 2 / beta * softplus(beta * logratios)


def gradient_ascent(logps: Tensor, lengths: Tensor) -> Tensor:
    """Compute the log-likelihood of completions to forget, per token of the batch, which training lowers.

        L = sum_i log pi(y_i) / sum_i |y_i|

    It has no lower bound, and training on it alone destroys a model. With `retain` it is gradient difference (Liu et al. 2022, arXiv
    2203.12817; Maini et al. 2024, arXiv 2401.06121).

    Args:
        logps: `(n,)` summed log-probabilities of the completions to forget.
        lengths: `(n,)` their tokens.

    Returns:
        `(n,)` the loss, once per row.

    Examples:
        >>> gradient_ascent(torch.tensor([-1.0, -8.0]), torch.tensor([1, 2]))
        tensor([-3., -3.])
    """
    return (logps.sum() / lengths.sum().clamp(min=1)).expand(len(logps))


def retain(logps: Tensor, lengths: Tensor) -> Tensor:
    """Compute the negative log-likelihood of completions to retain, per token of the batch.

        L = -sum_i log pi(y_i) / sum_i |y_i|

    Args:
        logps: `(n,)` summed log-probabilities of the completions to retain.
        lengths: `(n,)` their tokens.

    Returns:
        `(n,)` the loss, once per row.

    Examples:
        >>> retain(torch.tensor([-1.0, -8.0]), torch.tensor([1, 2]))
        tensor([3., 3.])
    """
    return -gradient_ascent(logps, lengths)


def qcrd(
    logps: Tensor,
    lengths: Tensor,
    label: Tensor,
    quality: Tensor,
    *,
    qcrd_beta: float = 0.2,
    qcrd_delta: float = 3.0,
) -> Tensor:
    """Compute the loss of quality-guided contrastive rationale distillation, QCRD (Wang et al. 2024, arXiv 2405.13014).

        L = s CE(y)                                  if y is a positive rationale, or an answer
        L = beta (1 - s) max(0, delta - CE(y))       else,    CE(y) = -log pi(y | x) / |y|

    A negative rationale is pushed away only while the model finds it likelier than delta nats per token: worse ones teach nothing. The
    quality s of a discriminator weakens both terms where it disagrees with the label. The paper has the term min(CE - delta, 0) of a
    negative rationale, subtracted, and of several positive ones takes the likeliest; here each counts.

    Args:
        logps: `(n,)` summed log-probabilities of the completions.
        lengths: `(n,)` their tokens.
        label: `(n,)`, true for completions to learn.
        quality: `(n,)` s, in [0, 1].
        qcrd_beta: the weight of negative rationales, at least 0.
        qcrd_delta: the paper's delta, at least 0.

    Returns:
        `(n,)` loss per row.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> logps, lengths = torch.tensor([-4.0, -4.0, -8.0]), torch.tensor([2, 2, 2])
        >>> qcrd(logps, lengths, torch.tensor([True, False, False]), torch.tensor([0.5, 0.25, 0.25]))  # 0.5 * 2; 0.2 * 0.75 * (3 - 2); 0
        tensor([1.0000, 0.1500, 0.0000])
    """
    check_settings(qcrd_beta=qcrd_beta, qcrd_delta=qcrd_delta)
    entropy = -logps / lengths.clamp(min=1)
    return torch.where(label, quality * entropy, qcrd_beta * (1 - quality) * relu(qcrd_delta - entropy))


# ------------------------------------------------------------------------------------------------------- declarations

INPUTS: Mapping[str, tuple[str, ...]] = {
    "logps": (),
    "lengths": (),
    "label": (),
    "quality": ("quality",),
    "logratios": ("reference",),
    "reference_point": ("reference", "kl"),
}
"""What has to be computed for each input of a loss."""


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """A batch of n completions with labels. Inputs that no loss needs may be None."""

    logps: Tensor
    """`(n,)` summed log-probabilities under the policy."""
    lengths: Tensor
    """`(n,)` tokens."""
    label: Tensor
    """`(n,)` bool."""
    ref_logps: Tensor | None = None
    """`(n,)` summed log-probabilities under the reference."""
    reference_point: Tensor | None = None
    """KTO's z, a scalar."""
    quality: Tensor | None = None
    """`(n,)` in [0, 1]."""

    @property
    def logratios(self) -> Tensor | None:
        """Return the log-ratios, `(n,)`."""
        return None if self.ref_logps is None else self.logps - self.ref_logps


@dataclass(frozen=True, kw_only=True)
class UnpairedLoss:
    """A loss of single completions. Every field is required, so that a declaration cannot leave a fact out.

    Args:
        name: the value of `loss_type` that selects the loss.
        description: what it is, with its source, for tables in the documentation.
        function: computes the loss per row. Its positional parameters name its inputs (`INPUTS`); its keyword-only parameters are its
            settings, with their defaults, by the names of the trainer's options.
        labels: the labels of the rows that it reads; the function gets these rows alone.

    Raises:
        ValueError: the function has an unknown input or a setting without a default, or there are no labels.

    Examples:
        >>> loss = UnpairedLoss(name="npo", description="NPO", function=npo, labels=frozenset({False}))
        >>> loss.needs, loss.settings
        (frozenset({'reference'}), {'beta': 0.1})
    """

    name: str
    description: str
    function: Callable[..., Tensor]
    labels: frozenset[bool]

    def __post_init__(self) -> None:
        if unknown := [name for name in self.inputs if name not in INPUTS]:
            raise ValueError(
                f"the loss {self.name!r} has an unknown input {unknown[0]}; inputs are {', '.join(INPUTS)}"
            )
        if missing := [name for name, default in self.settings.items() if default is inspect.Parameter.empty]:
            raise ValueError(f"the setting {missing[0]} of the loss {self.name!r} has no default")
        if not self.labels or not self.labels <= BOTH:
            raise ValueError(f"labels of the loss {self.name!r} must be true, false or both, not {set(self.labels)}")

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the data that the loss takes."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return the defaults of the settings by name."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @cached_property
    def needs(self) -> frozenset[str]:
        """Return what has to be computed or passed: some of `reference` (its log-probabilities), `kl` (completions of other prompts) and
        `quality` (a column of the data)."""
        return frozenset(need for name in self.inputs for need in INPUTS[name])


def check_unpaired(value: Any) -> None:
    """Raise ValueError unless a value is the declaration of a loss of single completions.

    Args:
        value: what another package registers.

    Raises:
        ValueError: the value is not an `UnpairedLoss`.
    """
    if not isinstance(value, UnpairedLoss):
        raise ValueError(f"an unpaired loss must be an UnpairedLoss, not a {type(value).__name__}")  # noqa: TRY004


BUILT_IN = (
    UnpairedLoss(
        name="kto",
        description="KTO (Ethayarajh et al. 2024, arXiv 2402.01306)",
        function=kto,
        labels=BOTH,
    ),
    UnpairedLoss(
        name="apo_zero_unpaired",
        description="APO-zero of single completions (D'Oosterlinck et al. 2024, arXiv 2408.06266)",
        function=apo_zero_unpaired,
        labels=BOTH,
    ),
    UnpairedLoss(
        name="npo",
        description="NPO, to forget (Zhang et al. 2024, arXiv 2404.05868)",
        function=npo,
        labels=frozenset({False}),
    ),
    UnpairedLoss(
        name="gradient_ascent",
        description="likelihood of completions to forget, lowered; with `retain` gradient difference (Maini et al. 2024, arXiv 2401.06121)",
        function=gradient_ascent,
        labels=frozenset({False}),
    ),
    UnpairedLoss(
        name="retain",
        description="likelihood of completions to retain",
        function=retain,
        labels=frozenset({True}),
    ),
    UnpairedLoss(
        name="qcrd",
        description="QCRD, rationales by their quality (Wang et al. 2024, arXiv 2405.13014)",
        function=qcrd,
        labels=BOTH,
    ),
)
"""The unpaired losses of contralto."""

UNPAIRED: Registry[UnpairedLoss] = Registry("unpaired loss", group="contralto.unpaired_losses", check=check_unpaired)
"""All unpaired losses by name."""
for _loss in BUILT_IN:
    UNPAIRED.register(_loss)


class _Term(NamedTuple):
    loss: UnpairedLoss
    weight: float
    settings: dict[str, float]


class UnpairedObjective:
    """Several losses of single completions by weight: `total = sum_k w_k mean_i L_ki`, each mean over the rows that the loss reads.

    Args:
        loss_types: names in `UNPAIRED`.
        weights: one per name; 1 each by default.
        settings: settings of the losses; one that several losses share goes to all of them.

    Attributes:
        losses: the declarations.
        needs: what has to be computed for all losses together, see `UnpairedLoss.needs`.
        labels: the labels of the rows that are read.
        forgets: some losses read rows of one label alone, so that batches should have rows of every label that is read.

    Raises:
        ValueError: a loss is unknown or repeated, the number of weights differs, or a setting is unknown or out of range.

    Examples:
        >>> objective = UnpairedObjective(["npo", "retain"], beta=0.5)
        >>> rows = LabelledRows(
        ...     logps=torch.tensor([-3.0, -4.0]),
        ...     lengths=torch.tensor([2, 2]),
        ...     label=torch.tensor([False, True]),
        ...     ref_logps=torch.tensor([-3.0, -3.0]),
        ... )
        >>> objective(rows).total  # 4 log 2 + 2
        tensor(4.7726)
    """

    def __init__(self, loss_types: Sequence[str], weights: Sequence[float] | None = None, **settings: float) -> None:
        self.loss_types = tuple(loss_types)
        losses = [UNPAIRED.get(name) for name in self.loss_types]
        if not losses or len(set(self.loss_types)) != len(losses):
            raise ValueError(f"loss_type must name at least one loss, and each once, not {list(self.loss_types)}")
        self.weights = (1.0,) * len(losses) if weights is None else tuple(weights)
        if len(self.weights) != len(losses):
            raise ValueError(f"loss_weights must be one per loss: {len(losses)}, not {len(self.weights)}")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"loss_weights must be finite numbers, not {list(self.weights)}")
        if unknown := sorted(settings.keys() - {name for loss in losses for name in loss.settings}):
            raise ValueError(f"{', '.join(self.loss_types)} do not read {', '.join(unknown)}")
        self._terms = [
            _Term(loss, weight, {name: settings.get(name, default) for name, default in loss.settings.items()})
            for loss, weight in zip(losses, self.weights, strict=True)
        ]
        for term in self._terms:
            for name, value in term.settings.items():
                check_setting(name, name, value)
        self.losses = tuple(losses)
        self.needs = frozenset[str]().union(*(loss.needs for loss in losses))
        self.labels = frozenset[bool]().union(*(loss.labels for loss in losses))
        self.forgets = any(loss.labels != BOTH for loss in losses)

    def __call__(self, rows: LabelledRows) -> Losses:
        """Compute the losses of a batch.

        Args:
            rows: the batch.

        Returns:
            The total, and by name the loss of each row that a loss reads, none for a batch without such rows.

        Raises:
            ValueError: the rows lack an input of a loss.
        """
        total, terms = 0 * rows.logps.sum(), {}
        for loss, weight, settings in self._terms:
            read = torch.stack([rows.label == label for label in loss.labels]).any(0)
            terms[loss.name] = loss.function(*_inputs(loss, rows, read), **settings)
            if len(terms[loss.name]):
                total = total + weight * terms[loss.name].mean()
        return Losses(total, terms)


def _inputs(loss: UnpairedLoss, rows: LabelledRows, read: Tensor) -> list[Tensor]:
    """Return the inputs of a loss in the order of its parameters, of the rows that it reads."""
    values = [getattr(rows, name) for name in loss.inputs]
    if missing := [name for name, value in zip(loss.inputs, values, strict=True) if value is None]:
        raise ValueError(f"the loss {loss.name!r} needs {', '.join(missing)}, which these rows do not have")
    return [value[read] if value.ndim else value for value in values]
