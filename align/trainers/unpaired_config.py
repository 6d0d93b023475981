"""The options of `UnpairedTrainer`: those of TRL's `KTOConfig`, several losses, and checks."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import KTOConfig  # type: ignore[attr-defined]

from contralto.align.losses.unpaired import BUILT_IN, UNPAIRED, UnpairedObjective
from contralto.align.trainers.config import apply_machine_defaults, option
from contralto.align.trainers.settings import RecipeOptions, records_settings

__all__ = ["UnpairedConfig"]

OF_REFERENCE = ("precompute_ref_log_probs", "sync_ref_model")
"""Options that act on the reference alone."""


@dataclass
class UnpairedConfig(RecipeOptions, KTOConfig):
    """The options of `UnpairedTrainer`: those of `trl.KTOConfig` (1.16), with a list of losses.

    `bf16` defaults to False where there is no accelerator.

    Args:
        loss_type: names of losses in `contralto.align.losses.unpaired.UNPAIRED`, which are added up by `loss_weights`.
        loss_weights: one per loss; 1 each by default.
        qcrd_beta: the weight of negative rationales in `qcrd`.
        qcrd_delta: nats per token below which `qcrd` pushes negative rationales away.
        train_sampling_strategy: None takes the order that the losses need: sequential for `kto`, which pairs each row with its neighbour
            (the data are shuffled once), random otherwise. Losses to forget and to retain get batches of half each, in random order.

    Raises:
        ValueError: an option is invalid, has no effect, or contradicts another.

    Examples:
        >>> UnpairedConfig("out", loss_type=["npo", "retain"], per_device_train_batch_size=3, report_to="none")
        Traceback (most recent call last):
            ...
        ValueError: per_device_train_batch_size must be even, not 3: npo, retain read one row to retain for each one to forget
    """

    reads_labels: ClassVar[bool] = True
    """Rows are completions with labels, not pairs."""
    unit: ClassVar[str] = "row"

    loss_type: list[str] = field(  # type: ignore[assignment]
        default_factory=lambda: ["kto"],
        metadata={
            "help": f"One or several losses: {', '.join(UNPAIRED.names())}. Several losses are summed with loss_weights."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the losses (default: 1 each)."}
    )
    qcrd_beta: float = option(0.2, "Weight of negative rationales in qcrd.")
    qcrd_delta: float = option(3.0, "Nats per token below which qcrd pushes negative rationales away.")
    train_sampling_strategy: str | None = option(  # type: ignore[assignment]
        None, "Order of the training data (default: as the losses need it).", choices=["random", "sequential"]
    )

    @records_settings
    def __post_init__(self) -> None:
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        plain = UnpairedObjective(self.loss_type, self.loss_weights)
        read = {name for loss in plain.losses for name in loss.settings}
        self._check_ignored(read, plain)
        settings = {name: getattr(self, name) for name in sorted(read) if hasattr(self, name)}
        self.objective = UnpairedObjective(self.loss_type, self.loss_weights, **settings)
        self._check_order()
        apply_machine_defaults(self)
        super().__post_init__()

    @property
    def halves(self) -> bool:
        """Return whether batches consist of half rows to forget and half rows to retain."""
        return self.objective.forgets and len(self.objective.labels) > 1

    def _check_ignored(self, read: set[str], objective: UnpairedObjective) -> None:
        """Reject options that the chosen losses ignore."""
        names = ", ".join(self.loss_type)
        for name in sorted({name for loss in BUILT_IN for name in loss.settings} - read):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} is set, but {names} does not use it: leave {name} out")
        if "reference" not in objective.needs:
            for name in OF_REFERENCE:
                if getattr(self, name):
                    raise ValueError(f"{name} is set, but {names} uses no reference: leave {name} out")

    def _check_order(self) -> None:
        """Set the order of the training data, or reject one that the losses cannot have."""
        names, reads_kl = ", ".join(self.loss_type), "kl" in self.objective.needs
        if reads_kl and self.train_sampling_strategy not in (None, "sequential"):
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}, but {names} pairs each row with its neighbour: leave it out"
            )
        if reads_kl and self.per_device_train_batch_size < 2:
            raise ValueError(
                f"per_device_train_batch_size must be at least 2, not {self.per_device_train_batch_size}: {names} compares a row with the "
                "completion of another one"
            )
        if self.halves and self.train_sampling_strategy is not None:
            raise ValueError(
                f"train_sampling_strategy is set, but {names} draws as many rows to retain as to forget: leave it out"
            )
        if self.halves and self.per_device_train_batch_size % 2:
            raise ValueError(
                f"per_device_train_batch_size must be even, not {self.per_device_train_batch_size}: {names} read one row to retain for "
                "each one to forget"
            )
        self.train_sampling_strategy = self.train_sampling_strategy or ("sequential" if reads_kl else "random")
