"""Constrained rewards for TRL's `GRPOTrainer`: each reward is held at its threshold, and thresholds are searched for in one run."""

import json
import math
import random
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from contralto.align.trainers.grpo import SHAPES, check_scale
from contralto.common.files import replace_text
from contralto.common.suggestions import did_you_mean

__all__ = ["ConstrainedRewards", "ThresholdSearch", "dual_step", "nelder_mead", "weight_of"]


def dual_step(
    multiplier: float, mean_reward: float, threshold: float, *, lr: float = 0.1, equality: bool = False
) -> float:
    """Return a Lagrange multiplier after a step of gradient descent (Moskovitz et al. 2023, arXiv 2310.04373, and their code).

        lambda <- lambda - lr d/dlambda [w(lambda) (J - theta)],    w = sigmoid, or tanh for an equality

    Args:
        multiplier: the multiplier lambda.
        mean_reward: the mean reward J.
        threshold: the threshold theta.
        lr: the learning rate.
        equality: the reward is held at its threshold from both sides.

    Examples:
        >>> dual_step(0.0, 0.2, 0.6)  # 0.1 * sigmoid'(0) * 0.4: below its threshold a reward gains weight
        0.01
        >>> dual_step(0.0, 1.6, 0.6, equality=True)  # 0.1 * tanh'(0) * 1: above it, it is pushed down
        -0.1
    """
    weight = weight_of(multiplier, equality=equality)
    slope = 1 - weight**2 if equality else weight * (1 - weight)
    return multiplier - lr * slope * (mean_reward - threshold)


def weight_of(multiplier: float, *, equality: bool) -> float:
    """Return the weight of a constrained reward, `sigmoid(lambda)` in (0, 1), or `tanh(lambda)` in (-1, 1) for an equality.

    Args:
        multiplier: the multiplier lambda.
        equality: the reward is held at its threshold from both sides, which takes negative weights.
    """
    return math.tanh(multiplier) if equality else SHAPES["sigmoid"](multiplier)


class ConstrainedRewards(TrainerCallback):
    """Weights the rewards of a `GRPOTrainer` so that each stays at its threshold (Moskovitz et al. 2023, arXiv 2310.04373).

        A = (N - sum_i w(lambda_i)) A_0 + sum_i w(lambda_i) A_i,    w = sigmoid, or tanh with `equality`

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
        equality: hold rewards at their thresholds from both sides, as the released code of the paper does: a reward far above its threshold
            gets a negative weight, where an inequality stops at 0. Default False, as in the paper's equation.

    Raises:
        ValueError: the trainer has no such reward, or none is left to be A_0; it rescales rewards, has weights of its own for these
            rewards, or logs nothing.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        thresholds: Mapping[str, float],
        task: str | None = None,
        lr: float = 0.1,
        equality: bool = False,
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
        self.equality = equality
        self.beta = trainer.beta
        self.multipliers = dict.fromkeys(thresholds, 0.0)
        self._set_weights()

    @property
    def weights(self) -> dict[str, float]:
        """Return w(lambda) by the name of the reward."""
        return {name: weight_of(value, equality=self.equality) for name, value in self.multipliers.items()}

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
        self._restart()
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
            state.log_history[-1] |= self._logged()
            self._set_weights()

    def _restart(self) -> None:
        """Return to the state before the first log."""
        self.multipliers = dict.fromkeys(self.thresholds, 0.0)

    def _step(self, logs: Mapping[str, Any]) -> bool:
        """Update the multipliers if the log has the mean rewards of a training step, and return whether it has."""
        means = {name: logs[key] for name in self.thresholds if (key := f"rewards/{name}/mean") in logs}
        if len(means) < len(self.thresholds):
            return False
        for name, mean in means.items():
            self.multipliers[name] = dual_step(
                self.multipliers[name], mean, self.thresholds[name], lr=self.lr, equality=self.equality
            )
        return True

    def _logged(self) -> dict[str, float]:
        """Return what a log records of the constraints."""
        return {f"constraints/{name}": weight for name, weight in self.weights.items()}

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


# ---------------------------------------------------------------------------------------------------------------- the search

Point = list[float]


def nelder_mead(simplex: Sequence[Sequence[float]], *, tolerance: float = 0.01) -> Generator[Point, float, None]:
    """Yield points whose values are sent back, and minimise by reflection, expansion, contraction and shrinking (Nelder & Mead 1965).

    Coefficients are the usual ones, and those of the code of Moskovitz et al. 2023 (arXiv 2310.04373): 1, 2, 1/2, 1/2. The points can be
    evaluated by somebody else, one after the other, which is what a training run does; `scipy.optimize` calls a function instead.

    Args:
        simplex: n + 1 points of n numbers to begin with.
        tolerance: the search ends when the standard deviation of the values at the simplex is below this.

    Examples:
        >>> search = nelder_mead([[0.0], [1.0]])
        >>> point, tried = next(search), []
        >>> for _ in range(20):
        ...     tried.append(point)
        ...     try:
        ...         point = search.send((point[0] - 3) ** 2)
        ...     except StopIteration:
        ...         break
        >>> round(min(tried, key=lambda point: (point[0] - 3) ** 2)[0], 1)
        3.0
    """
    corners = []
    for point in simplex:
        corners.append(((yield list(point)), list(point)))
    while True:
        corners.sort(key=lambda corner: corner[0])
        if _deviation([value for value, _ in corners]) < tolerance:
            return
        (best, nearest), (worst, farthest) = corners[0], corners[-1]
        centre = [
            sum(column) / (len(corners) - 1) for column in zip(*(point for _, point in corners[:-1]), strict=True)
        ]
        reflected = _towards(centre, farthest, -1.0)
        value = yield reflected
        if value < best:
            expanded = _towards(centre, farthest, -2.0)
            further = yield expanded
            corners[-1] = (further, expanded) if further < value else (value, reflected)
        elif value < corners[-2][0]:
            corners[-1] = (value, reflected)
        else:
            contracted = _towards(centre, farthest, 0.5)
            value = yield contracted
            if value < worst:
                corners[-1] = (value, contracted)
                continue
            for place in range(1, len(corners)):
                shrunk = _towards(nearest, corners[place][1], 0.5)
                corners[place] = ((yield shrunk), shrunk)


def _towards(start: Point, end: Point, share: float) -> Point:
    return [a + share * (b - a) for a, b in zip(start, end, strict=True)]


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


class ThresholdSearch(ConstrainedRewards):
    """Constrained rewards whose thresholds are searched for within one run (Moskovitz et al. 2023, arXiv 2310.04373, section 5).

    Thresholds are the points up to which rewards are good proxies of what is wanted, the objective: a reward that is too expensive, or too
    good, to be optimised itself, with weight 0 in the trainer. A point of the search is a threshold per reward. The training goes on towards
    it until all rewards were within 5% of it for `averaged` logs in a row, or for `steps` logs; then its value is the mean of the objective over
    the last `averaged` logs, and `nelder_mead` names the next point. After the search has ended the best thresholds stay. `thresholds.json` in the output folder has the
    points and their values.

    The released code measures the objective on the test set, once, as soon as the thresholds are met. Here it is measured on the training
    prompts, so that test data stay unseen, and over several logs, since a reward that is still on its way has the objective of another point.

    Args:
        trainer: see `ConstrainedRewards`.
        bounds: the range of each reward's first thresholds, which are drawn in it; later ones may leave it.
        objective: the name of the reward that is to be as high as possible, with weight 0 in `reward_weights`.
        steps: the largest number of logs at a point.
        averaged: the number of logs for which thresholds have to be met, and over which the objective is averaged.
        seed: of the first thresholds.
        options: the other arguments of `ConstrainedRewards`: `task`, `lr`, `equality`.

    Raises:
        ValueError: as `ConstrainedRewards`; the objective is no reward of weight 0; a range is empty; `steps` or `averaged` is below 1.
    """

    REACHED = 0.05

    def __init__(
        self,
        trainer: Any,
        *,
        bounds: Mapping[str, tuple[float, float]],
        objective: str,
        steps: int = 20,
        averaged: int = 5,
        seed: int = 0,
        **options: Any,
    ) -> None:
        for name, (low, high) in bounds.items():
            if not low < high:
                raise ValueError(f"the range of {name} is empty: {low:g} is not below {high:g}")
        if steps < 1 or averaged < 1:
            raise ValueError(f"steps and averaged must be at least 1, not {steps} and {averaged}")
        draws = random.Random(seed)
        self._corners = [[draws.uniform(*limits) for limits in bounds.values()] for _ in range(len(bounds) + 1)]
        self.objective, self.steps, self.averaged = objective, steps, averaged
        super().__init__(trainer, thresholds=dict(zip(bounds, self._corners[0], strict=True)), **options)
        names = list(trainer.reward_func_names)
        if objective not in names or trainer.reward_weights[names.index(objective)] != 0:
            raise ValueError(
                f"the objective {objective!r} must be a reward whose weight in reward_weights is 0: it is measured, and not optimised"
                f"{did_you_mean(objective, names)}"
            )
        self._restart()

    def _restart(self) -> None:
        super()._restart()
        self.tried: list[tuple[dict[str, float], float]] = []
        """Points, and the means of the objective there."""
        self._seen: list[float] = []
        self._reached = 0
        self._search: Generator[Point, float, None] | None = nelder_mead(self._corners)
        self._move(next(self._search))

    def _move(self, point: Sequence[float]) -> None:
        self.thresholds = dict(zip(self.thresholds, point, strict=True))

    @property
    def best(self) -> dict[str, float]:
        """Return the thresholds with the highest objective so far; those of the moment before any was measured."""
        return max(self.tried, key=lambda each: each[1])[0] if self.tried else self.thresholds

    def _step(self, logs: Mapping[str, Any]) -> bool:
        """Update the multipliers, and move to the next thresholds where these are reached or were tried for long enough."""
        if not super()._step(logs):
            return False
        if self._search is None or (value := logs.get(f"rewards/{self.objective}/mean")) is None:
            return True
        self._seen.append(float(value))
        self._reached = self._reached + 1 if self._is_reached(logs) else 0
        if len(self._seen) < self.steps and self._reached < self.averaged:
            return True
        last = self._seen[-self.averaged :]
        self.tried.append((self.thresholds, sum(last) / len(last)))
        self._seen, self._reached = [], 0
        try:
            self._move(self._search.send(-self.tried[-1][1]))
        except StopIteration:
            self._search = None
            self.thresholds = self.best
        return True

    def _is_reached(self, logs: Mapping[str, Any]) -> bool:
        return all(
            abs(logs[f"rewards/{name}/mean"] - threshold) <= self.REACHED * abs(threshold)
            for name, threshold in self.thresholds.items()
        )

    def _logged(self) -> dict[str, float]:
        return super()._logged() | {f"thresholds/{name}": value for name, value in self.thresholds.items()}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the thresholds that were tried, with their values.

        Args:
            args: see `transformers.TrainerCallback`.
            state: see `transformers.TrainerCallback`.
            control: see `transformers.TrainerCallback`.
            kwargs: see `transformers.TrainerCallback`.
        """
        if state.is_world_process_zero and self.tried:
            tried = [{"thresholds": point, self.objective: value} for point, value in self.tried]
            text = json.dumps({"best": self.best, "has_ended": self._search is None, "tried": tried}, indent=1)
            replace_text(Path(str(args.output_dir)) / "thresholds.json", text)
