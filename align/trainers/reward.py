"""A reward model that knows how far annotators agree: the margin of a pair is their net vote ("Beyond the Binary").

`MarginRewardTrainer` is TRL's `RewardTrainer`, which has had the loss with a margin all along; here the margins are made, from votes or from
scores, and checked before a model is loaded.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's data is a ValueError like any other mistake in it)

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import RewardConfig, RewardTrainer  # type: ignore[attr-defined]

from contralto.align.trainers.config import settle, unshared

__all__ = ["MarginRewardConfig", "MarginRewardTrainer", "agreement", "margin_loss"]

VOTES = {"chosen": 1.0, "rejected": -1.0, "tie": 0.0}


def margin_loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """The loss of a reward model with a margin (Touvron et al. 2023, arXiv 2307.09288, equation 2).

        L = -log sigmoid(r(y_w) - r(y_l) - m)

    Padmakumar et al. 2024 (arXiv 2412.03822) take for m how far (synthetic) annotators agree: where they are divided the two texts may
    be rewarded alike. This is what `RewardTrainer` computes; it stands here to be read and tested.

    Args:
        chosen, rejected: `(B,)` rewards.
        margin: `(B,)`, any sign: below 0 where most annotators prefer the text that is labelled rejected.

    Examples:
        >>> margin_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1.0]))  # log 2
        tensor([0.6931])
    """
    return -logsigmoid(chosen - rejected - margin)


def agreement(votes: Sequence[Any]) -> float:
    """The net vote for the chosen text, in [-1, 1].

        m = (votes for chosen - votes for rejected) / votes

    The paper says that agreement sets the margin; this linear map is ours.

    Args:
        votes: of annotators: `chosen`, `rejected` or `tie`; or truth values, true for chosen; or numbers in [-1, 1].

    Raises:
        ValueError: no votes, or something else.

    Examples:
        >>> agreement(["chosen", "chosen", "rejected", "tie"]), agreement([True, True]), agreement([0.5, -1])
        (0.25, 1.0, -0.25)
    """
    if not votes:
        raise ValueError("a margin from votes needs at least one vote, and there is none")
    return sum(map(_counted, votes)) / len(votes)


def _counted(vote: Any) -> float:
    if isinstance(vote, bool):
        return 1.0 if vote else -1.0
    if isinstance(vote, str) and vote in VOTES:
        return VOTES[vote]
    if isinstance(vote, int | float) and -1 <= vote <= 1:
        return float(vote)
    raise ValueError(f"a vote is chosen, rejected or tie, a truth value, or a number in [-1, 1], not {vote!r}")


@dataclass
class MarginRewardConfig(RewardConfig):
    """The options of `MarginRewardTrainer`: those of `trl.RewardConfig`, and where margins come from.

    Args:
        margin_column: the column that holds, for every pair, its votes (`agreement`), or a number, such as the `reward_margin` that
            `contralto data` writes.
        margin_scale: what net votes and numbers are multiplied by, in units of reward; the paper's margins lie in [0, 1].

    Raises:
        ValueError: a scale that is not a finite number above 0.
    """

    margin_column: str = field(
        default="margin", metadata={"help": "Column of votes, or of numbers, that margins are made of."}
    )
    margin_scale: float = field(default=1.0, metadata={"help": "What they are multiplied by."})

    def __post_init__(self) -> None:
        if not 0 < self.margin_scale < math.inf:
            raise ValueError(f"margin_scale must be a finite number above 0, not {self.margin_scale}")
        settle(self)
        super().__post_init__()  # type: ignore[no-untyped-call]


class MarginRewardTrainer(RewardTrainer):
    """`RewardTrainer` with margins of votes (Padmakumar et al. 2024, arXiv 2412.03822).

    Args:
        model: as for `RewardTrainer`.
        args: a `MarginRewardConfig`.
        how: as for `RewardTrainer`. A PEFT configuration for language models is taken as one for a reward model; the object that was
            given stays as it was.

    Raises:
        ValueError: `args` of another kind, no such column, or something in it that is no margin: which row.
    """

    args: MarginRewardConfig

    def __init__(self, model: Any, args: MarginRewardConfig | None = None, **how: Any) -> None:
        if not isinstance(args, MarginRewardConfig):
            raise ValueError(f"args must be a MarginRewardConfig, not {type(args).__name__}")
        if how.get("train_dataset") is None:
            raise ValueError("train_dataset is missing: give the pairs to train on")
        for name in ("train_dataset", "eval_dataset"):
            if how.get(name) is not None:
                how[name] = _with_margins(how[name], name, args)
        how = unshared(how)
        if isinstance(how.get("peft_config"), PeftConfig):
            how["peft_config"].task_type = "SEQ_CLS"
        super().__init__(model, args, **how)


def _with_margins(dataset: Any, name: str, args: MarginRewardConfig) -> Any:
    """The data set with a column `margin` of numbers."""
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

    if hasattr(dataset, "select"):  # not a stream: whatever is wrong is said now
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
