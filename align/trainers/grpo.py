"""Two extensions of TRL's `GRPOTrainer`: rewards held at thresholds by multipliers, and rewards by contrast with a baseline.

On baselines: Shen et al. 2024 (arXiv 2403.07708) subtract the mean reward of completions that the model wrote before training:
r(x, y) - mean_j r(x, y_j). In PPO that changes the reward. In GRPO and RLOO it changes nothing: the baseline is a number per prompt, every
advantage is centred on the mean of the prompt's own completions, and the number cancels exactly. `ContrastiveReward` therefore applies a
sigmoid or clipping to the difference, after which it does not cancel: completions of prompts on which all are far better, or far worse,
than the baseline differ little.

Both extensions set the scale of rewards, and TRL's default `scale_rewards="group"` divides it out again: the advantages of a prompt have
unit deviation whatever a constraint or the sigmoid left of them. They are rejected unless the trainer keeps the scale of rewards.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's code is a ValueError like any other mistake in it)

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import get_callable_name

from contralto.common.ranges import check_positive
from contralto.common.suggestions import did_you_mean

__all__ = ["ConstrainedRewards", "ContrastiveReward", "check_scale", "dual_step"]

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


def dual_step(multiplier: float, mean_reward: float, threshold: float, *, lr: float = 0.1) -> float:
    """Return a Lagrange multiplier after a step of gradient descent (Moskovitz et al. 2023, arXiv 2310.04373, and their code).

        lambda <- lambda - lr d/dlambda [sigmoid(lambda) (J - theta)]

    Args:
        multiplier: the multiplier lambda.
        mean_reward: the mean reward J.
        threshold: the threshold theta.
        lr: the learning rate.

    Examples:
        >>> dual_step(0.0, 0.2, 0.6)  # 0.1 * sigmoid'(0) * 0.4: below its threshold a reward gains weight
        0.01
    """
    weight = SHAPES["sigmoid"](multiplier)
    return multiplier - lr * weight * (1 - weight) * (mean_reward - threshold)


class ConstrainedRewards(TrainerCallback):
    """Weights the rewards of a `GRPOTrainer` so that each stays at its threshold (Moskovitz et al. 2023, arXiv 2310.04373).

        A = (N - sum_i sigmoid(lambda_i)) A_0 + sum_i sigmoid(lambda_i) A_i

    A reward model is a good proxy up to a point; beyond it a higher reward means a worse completion. The thresholds are these points. A
    multiplier falls while its mean reward is above the threshold and rises below it. `A_0` remains to be maximised: a reward, or, as in the
    paper, closeness to the reference, GRPO's own KL term, whose `beta` is then weighted.

    The means are those that `GRPOTrainer` logs, over all processes since the last log, so multipliers move at every log: set
    `logging_steps` to 1 to follow the paper. The current weights are logged as `constraints/NAME`. A resumed run replays its logs, and so
    has the multipliers it had.

    Args:
        trainer: a `GRPOTrainer` (or `RLOOTrainer`) with `scale_rewards="none"`; add this callback with `trainer.add_callback`.
        thresholds: the threshold theta by the name of the reward function.
        task: the name of the reward function that is A_0; None takes the KL term.
        lr: the learning rate of the multipliers.

    Raises:
        ValueError: the trainer has no such reward, or none is left to be A_0; it rescales rewards, has weights of its own for these
            rewards, or logs nothing.
    """

    def __init__(
        self, trainer: Any, *, thresholds: Mapping[str, float], task: str | None = None, lr: float = 0.1
    ) -> None:
        names = list(trainer.reward_func_names)
        if strange := [name for name in (*thresholds, *([task] if task else [])) if name not in names]:
            raise ValueError(
                f"there is no reward {strange[0]!r}{did_you_mean(strange[0], names)}; the trainer has {', '.join(names)}"
            )
        if not thresholds or task in thresholds:
            raise ValueError("thresholds must name one reward or more, and not the task, which has none")
        if task is None and not trainer.beta:
            raise ValueError(
                "beta is 0, so there is no KL term to be maximised besides: set beta, or name a reward as task"
            )
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be a finite number above 0, not {lr}")
        _check_trainer(trainer, [*thresholds, *([task] if task else [])])
        self.trainer, self.thresholds, self.task, self.lr = trainer, dict(thresholds), task, lr
        self.beta = trainer.beta
        self.multipliers = dict.fromkeys(thresholds, 0.0)
        self._set_weights()

    @property
    def weights(self) -> dict[str, float]:
        """Return sigmoid(lambda) by the name of the reward."""
        return {name: SHAPES["sigmoid"](value) for name, value in self.multipliers.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Replay the steps that the log of a resumed run records.

        Args:
            args: see `transformers.TrainerCallback`.
            state: see `transformers.TrainerCallback`.
            control: see `transformers.TrainerCallback`.
            kwargs: see `transformers.TrainerCallback`.
        """
        self.multipliers = dict.fromkeys(self.thresholds, 0.0)
        for line in state.log_history:
            self._step(line)
        self._set_weights()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a step with all multipliers.

        Args:
            args: see `transformers.TrainerCallback`.
            state: see `transformers.TrainerCallback`.
            control: see `transformers.TrainerCallback`.
            kwargs: see `transformers.TrainerCallback`.
        """
        if self._step(kwargs["logs"]):
            state.log_history[-1] |= {f"constraints/{name}": weight for name, weight in self.weights.items()}
            self._set_weights()

    def _step(self, logs: Mapping[str, Any]) -> bool:
        """Update the multipliers if the log has the mean rewards of a training step, and return whether it has."""
        means = {name: logs[key] for name in self.thresholds if (key := f"rewards/{name}/mean") in logs}
        if len(means) < len(self.thresholds):
            return False
        for name, mean in means.items():
            self.multipliers[name] = dual_step(self.multipliers[name], mean, self.thresholds[name], lr=self.lr)
        return True

    def _set_weights(self) -> None:
        """Set the weights in the trainer."""
        rest = len(self.thresholds) - sum(self.weights.values())
        names, weights = self.trainer.reward_func_names, self.trainer.reward_weights
        by_name = self.weights | ({} if self.task is None else {self.task: rest})
        self.trainer.reward_weights = torch.tensor(
            [by_name.get(name, weights[at].item()) for at, name in enumerate(names)], dtype=weights.dtype
        )
        if self.task is None:
            self.trainer.beta = self.beta * rest


def _check_trainer(trainer: Any, weighted: Sequence[str]) -> None:
    """Reject a trainer that does not apply the weights of these rewards, or does not log their means."""
    check_scale(trainer.args, "ConstrainedRewards")
    if trainer.args.logging_strategy == "no":
        raise ValueError("logging_strategy is 'no', and the multipliers move by the logged means: set it to 'steps'")
    for name, weight in zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True):
        if name in weighted and weight != 1:
            raise ValueError(
                f"reward_weights gives {name} the weight {weight:g}, and ConstrainedRewards sets it: leave it at 1, and scale the "
                "reward itself"
            )


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
