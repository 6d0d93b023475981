"""Reward models whose margins are the agreement of annotators ("Beyond the Binary").

`MarginRewardTrainer` is TRL's `RewardTrainer`, which has the loss with a margin. Here the margins are computed from votes or scores, and
checked before a model is loaded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import RewardConfig, RewardTrainer  # type: ignore[attr-defined]

from contralto.align.cards.methods import describe_function
from contralto.align.cards.mixin import CardMixin
from contralto.align.cards.model_card import TrainedCard
from contralto.align.trainers.checks import located
from contralto.align.trainers.config import apply_machine_defaults, require_config, with_own_peft_config
from contralto.align.trainers.settings import RecipeOptions, records_settings

__all__ = ["MarginRewardConfig", "MarginRewardTrainer", "agreement", "margin_loss"]

VOTES = {"chosen": 1.0, "rejected": -1.0, "tie": 0.0}


def margin_loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Return the loss of a reward model with a margin (Touvron et al. 2023, arXiv 2307.09288, equation 2).

        L = -log sigmoid(r(y_w) - r(y_l) - m)

    Padmakumar et al. 2024 (arXiv 2412.03822) set m to the agreement of (synthetic) annotators: where they are divided, the two completions
    may have equal rewards. `RewardTrainer` computes this loss; the function is its documentation and the oracle of tests.

    Args:
        chosen: `(B,)` rewards of the chosen completions.
        rejected: `(B,)` rewards of the rejected completions.
        margin: `(B,)`, below 0 where most annotators prefer the completion that is labelled rejected.

    Returns:
        `(B,)`.

    Examples:
        >>> margin_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1.0]))  # log 2
        tensor([0.6931])
    """
    return -logsigmoid(chosen - rejected - margin)


def agreement(votes: Sequence[Any]) -> float:
    """Return the net vote for the chosen completion, in [-1, 1].

        m = (votes for chosen - votes for rejected) / votes

    The paper makes the margin depend on agreement; this linear map is contralto's.

    Args:
        votes: one vote per annotator: `chosen`, `rejected` or `tie`; or a truth value, true for chosen; or a number in [-1, 1].

    Raises:
        ValueError: there are no votes, or one is something else.

    Examples:
        >>> agreement(["chosen", "chosen", "rejected", "tie"]), agreement([True, True]), agreement([0.5, -1])
        (0.25, 1.0, -0.25)
    """
    if not votes:
        raise ValueError("a margin from votes needs at least one vote, and there is none")
    return sum(map(_vote_value, votes)) / len(votes)


def _vote_value(vote: Any) -> float:
    if isinstance(vote, bool):
        return 1.0 if vote else -1.0
    if isinstance(vote, str) and vote in VOTES:
        return VOTES[vote]
    if isinstance(vote, int | float) and -1 <= vote <= 1:
        return float(vote)
    raise ValueError(f"a vote is chosen, rejected or tie, a truth value, or a number in [-1, 1], not {vote!r}")


@dataclass
class MarginRewardConfig(RecipeOptions, RewardConfig):
    """The options of `MarginRewardTrainer`: those of `trl.RewardConfig`, and the source of margins.

    Args:
        margin_column: the column with the votes of every pair (`agreement`), or with a number such as the `reward_margin` that
            `contralto data` writes.
        margin_scale: the factor of net votes and numbers, in units of reward; the paper's margins lie in [0, 1].

    Raises:
        ValueError: the scale is not a finite number above 0.
    """

    margin_column: str = field(
        default="margin", metadata={"help": "Column of votes or numbers from which margins are computed."}
    )
    margin_scale: float = field(default=1.0, metadata={"help": "Factor by which the votes or numbers are multiplied."})

    @records_settings
    def __post_init__(self) -> None:
        if not 0 < self.margin_scale < math.inf:
            raise ValueError(f"margin_scale must be a finite number above 0, not {self.margin_scale}")
        apply_machine_defaults(self)
        super().__post_init__()


class MarginRewardTrainer(CardMixin, RewardTrainer):  # type: ignore[misc]  # `create_model_card` has the signature of TRL's
    """`RewardTrainer` with margins of votes (Padmakumar et al. 2024, arXiv 2412.03822).

    Args:
        model: see `trl.RewardTrainer`.
        args: a `MarginRewardConfig`.
        kwargs: the other arguments of `trl.RewardTrainer`. A PEFT configuration for language models is used as one for a reward model; the
            object that was passed is not changed.

    Raises:
        ValueError: `args` has another type, the column is missing, or a row holds no margin; the message names the row.
    """

    args: MarginRewardConfig

    def __init__(self, model: Any, args: MarginRewardConfig | None = None, **kwargs: Any) -> None:
        args, model = require_config(args, MarginRewardConfig), located(model)
        if kwargs.get("train_dataset") is None:
            raise ValueError("train_dataset is missing: give the pairs to train on")
        for name in ("train_dataset", "eval_dataset"):
            if kwargs.get(name) is not None:
                kwargs[name] = _with_margins(kwargs[name], name, args)
        kwargs = with_own_peft_config(kwargs)
        if isinstance(kwargs.get("peft_config"), PeftConfig):
            kwargs["peft_config"].task_type = "SEQ_CLS"
        super().__init__(model, args, **kwargs)

    def describe_training(self) -> TrainedCard:
        """Return the loss, with its papers and its formula, for the model card."""
        method = describe_function("margin_loss", margin_loss)
        return TrainedCard(methods=[method], weights=[None], verb="trained as a reward model", tags=["reward-model"])


def _with_margins(dataset: Any, name: str, args: MarginRewardConfig) -> Any:
    """Return the data set with a column `margin` of numbers."""
    if isinstance(dataset, dict):
        return {split: _with_margins(each, split, args) for split, each in dataset.items()}
    column, scale = args.margin_column, args.margin_scale
    first = next(iter(dataset), None)
    if first is None or column not in first:
        held = "no rows" if first is None else f"no column {column}"
        raise ValueError(f"{name} has {held}: give votes or a number per pair, and their column as margin_column")

    def margin(row: Mapping[str, Any], at: int) -> dict[str, float]:
        try:
            return {"margin": scale * _margin(row[column])}
        except ValueError as error:
            raise ValueError(f"{name}, row {at + 1}, column {column}: {error}") from error

    if hasattr(dataset, "select"):  # not a stream, so that errors are raised before training
        margins = [margin(row, at)["margin"] for at, row in enumerate(dataset.select_columns(column))]
        others = dataset.remove_columns("margin") if "margin" in dataset.column_names else dataset
        return others.add_column("margin", margins)
    return dataset.map(margin, with_indices=True)


def _margin(value: Any) -> float:
    if isinstance(value, list):
        return agreement(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ValueError(f"a margin is a finite number or a list of votes, not {value!r}")
