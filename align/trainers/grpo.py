"""Rewards by contrast with a baseline, for TRL's `GRPOTrainer`, and the options under which the scale of rewards counts.

Shen et al. 2024 (arXiv 2403.07708) subtract the mean reward of completions that the model wrote before training:
r(x, y) - mean_j r(x, y_j). In PPO that changes the reward. In GRPO and RLOO it changes nothing: the baseline is a number per prompt, every
advantage is centred on the mean of the prompt's own completions, and the number cancels exactly. `ContrastiveReward` therefore applies a
sigmoid or clipping to the difference, after which it does not cancel: completions of prompts on which all are far better, or far worse,
than the baseline differ little.

This sets the scale of rewards, as the constraints of `contralto.align.trainers.constraints` do, and TRL's default `scale_rewards="group"`
divides it out again: the advantages of a prompt have unit deviation whatever a constraint or the sigmoid left of them. Both are rejected
unless the trainer keeps the scale of rewards.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's code is a ValueError like any other mistake in it)

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from trl.trainer.utils import get_callable_name

from contralto.common.ranges import check_positive

__all__ = ["SHAPES", "ContrastiveReward", "check_scale"]

SHAPES: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)),
    "clip": lambda x: min(1.0, max(-1.0, x)),
}


class ScaleOption(NamedTuple):
    """An option of a trainer, and the value under which advantages keep the scale of rewards."""

    option: str
    value: Any
    otherwise: str
    """The effect of other values, as a clause."""


SCALE = (
    ScaleOption("scale_rewards", "none", "divides advantages by the deviation of the rewards"),
    ScaleOption("multi_objective_aggregation", "sum_then_normalize", "divides each reward by its own deviation"),
    ScaleOption("normalize_advantages", False, "divides advantages by their deviation"),
    ScaleOption("reward_clip_range", None, "clips the weighted rewards"),
)
"""Options of `GRPOConfig` and `RLOOConfig` (TRL 1.16)."""


def check_scale(args: Any, user: str) -> None:
    """Reject options under which advantages do not keep the scale of rewards.

    Args:
        args: a `trl.GRPOConfig` or `trl.RLOOConfig`.
        user: the class that needs the scale, for the message.

    Raises:
        ValueError: the trainer rescales rewards or advantages.

    Examples:
        >>> from types import SimpleNamespace
        >>> check_scale(SimpleNamespace(scale_rewards="group"), "ContrastiveReward")
        Traceback (most recent call last):
            ...
        ValueError: scale_rewards is 'group', which divides advantages by the deviation of the rewards and so undoes ContrastiveReward: set it to 'none'
    """
    for option, value, otherwise in SCALE:
        given = getattr(args, option, value)
        if given != value:
            raise ValueError(f"{option} is {given!r}, which {otherwise} and so undoes {user}: set it to {value!r}")


class ContrastiveReward:
    """A reward by contrast with completions from before training, which does not cancel (after Shen et al. 2024, arXiv 2403.07708).

        r'(x, y) = f((r(x, y) - 1/k sum_j r(x, y_j)) / temperature),    f a sigmoid, or clipping to [-1, 1]

    The paper's plain difference is rejected, since it cancels in advantages that are centred per prompt. The data need a column with k
    completions of the model before training for every prompt; their rewards are computed once, when the prompt first occurs.

    Args:
        reward: a reward function of `GRPOTrainer`, with `prompts`, `completions` and columns as keywords; not asynchronous. For baselines
            it is called without `completion_ids`.
        args: the `GRPOConfig` or `RLOOConfig` of the trainer that uses this reward, with `scale_rewards="none"`.
        column: the column with the k completions (strings or messages, as the trainer's) of each row.
        shape: the function f: `sigmoid` or `clip`.
        temperature: the difference of rewards that counts as 1.

    Raises:
        ValueError: the shape is unknown, the temperature is not above 0, the data lack the column or a row has no baseline; `args` is
            missing, or the trainer rescales rewards under it.

    Examples:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(scale_rewards="none")  # in a script, the trainer's GRPOConfig
        >>> def words(completions, **_):
        ...     return [float(len(text.split())) for text in completions]
        >>> reward = ContrastiveReward(words, args=args, shape="clip", temperature=4.0)
        >>> reward(prompts=["a", "a"], completions=["one two three", "one"], baselines=[["one two", "one two"]] * 2)
        [0.25, -0.25]
    """

    def __init__(
        self,
        reward: Callable[..., Sequence[float | None]],
        *,
        args: Any = None,
        column: str = "baselines",
        shape: str = "sigmoid",
        temperature: float = 1.0,
    ) -> None:
        if shape not in SHAPES:
            linear = (
                " (a plain difference cancels where advantages are centred per prompt)" if shape == "linear" else ""
            )
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}{linear}")
        check_positive("temperature", temperature)
        if not callable(reward):
            raise ValueError(f"reward must be a function, not a {type(reward).__name__}")
        if args is None:
            raise ValueError("args is missing: give the GRPOConfig of the trainer, with scale_rewards='none'")
        check_scale(args, type(self).__name__)
        self.reward, self.column, self.shape, self.temperature = reward, column, shape, temperature
        self.__name__ = f"contrastive_{get_callable_name(reward)}"  # the name in the trainer's logs
        self._kept: dict[str, float] = {}

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return the rewards, None where the reward function returns None.

        Args:
            prompts: one prompt per completion.
            completions: the completions.
            columns: columns of the data by name, and the other keywords of a reward function.

        Raises:
            ValueError: the data lack the column, or a prompt has no rewarded baseline.
        """
        if self.column not in columns:
            raise ValueError(
                f"the data have no column {self.column}: give texts of the model before training for every prompt"
            )
        rewards = self.reward(prompts=prompts, completions=completions, **columns)
        others = {name: value for name, value in columns.items() if name != "completion_ids"}
        shape = SHAPES[self.shape]
        return [
            None if value is None else shape((value - self._baseline(at, prompts[at], others)) / self.temperature)
            for at, value in enumerate(rewards)
        ]

    def _baseline(self, at: int, prompt: Any, columns: Mapping[str, Any]) -> float:
        """Return the mean reward of a row's baselines."""
        texts = columns[self.column][at]
        if not texts:
            raise ValueError(
                f"a prompt has no text in the column {self.column}, and a baseline needs one at least: {prompt!r:.80}"
            )
        key = repr((prompt, texts))
        if key not in self._kept:
            repeated = {
                name: [value[at]] * len(texts) if isinstance(value, list) else value for name, value in columns.items()
            }
            found = self.reward(prompts=[prompt] * len(texts), completions=texts, **repeated)
            rewards = [value for value in found if value is not None]
            if not rewards:
                raise ValueError(f"the reward function gives no reward to any baseline of a prompt: {prompt!r:.80}")
            self._kept[key] = sum(rewards) / len(rewards)
        return self._kept[key]
