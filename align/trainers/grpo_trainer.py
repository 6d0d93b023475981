"""GRPO by contrast and under constraints: TRL's `GRPOTrainer` with its rewards from a command line."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

from contralto.align.cards.methods import CardMethod, describe_function
from contralto.align.cards.mixin import CardMixin
from contralto.align.cards.model_card import TrainedCard
from contralto.align.trainers.checks import located
from contralto.align.trainers.config import apply_machine_defaults, option, require_config, with_own_peft_config
from contralto.align.trainers.constraints import ConstrainedRewards, ThresholdSearch
from contralto.align.trainers.grpo import SHAPES, ContrastiveReward, check_scale
from contralto.align.trainers.settings import RecipeOptions, records_settings
from contralto.common.suggestions import did_you_mean

__all__ = ["RewardsConfig", "RewardsTrainer", "reward_function"]

OF_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
"""Rewards of `trl.rewards` that `trl grpo` takes by these names."""
FUNCTIONS = f"Rewards: module:function, of a file here or installed, or {', '.join(OF_TRL)}."
"""The help of `reward_funcs`."""
SHAPE_NAMES = list(SHAPES)
OVERLONG = {"max_completion_len": 1280, "soft_punish_cache": 256}
"""As `trl grpo` calls `get_soft_overlong_punishment`."""


@dataclass
class RewardsConfig(RecipeOptions, GRPOConfig):
    """The options of `RewardsTrainer`: those of `trl.GRPOConfig`, among them `loss_type` (dapo, dr_grpo, ...), and those of rewards.

    Args:
        reward_funcs: functions, each as `module:function` or by a name of `trl grpo`.
        reward_model_name_or_path: a reward model, which is a further reward.
        contrast: the shape by which rewards are taken in contrast to baselines, `sigmoid` or `clip`; None takes rewards as they are.
        contrast_temperature: the difference of rewards that counts as 1.
        baselines: the number of texts per prompt that the model writes before training; 0 where the data have a column `baselines`.
        constraints: `NAME=THRESHOLD` for each reward that is held; with `search_objective` `NAME=LOW..HIGH`, the range of first thresholds.
        equality_constraints: hold them from both sides.
        task_reward: the reward that is maximised besides; None is closeness to the reference (`beta`).
        constraint_lr: the learning rate of the multipliers.
        search_objective: the reward by which thresholds are searched for; it is measured and not optimised.
        search_steps: the largest number of logs at a point of the search.

    Raises:
        ValueError: an option has no meaning without another one; a constraint cannot be read.
    """

    reads_prompts: ClassVar[bool] = True
    unit: ClassVar[str] = "completion"
    """What a batch counts."""
    reward_funcs: list[str] | None = field(default=None, metadata={"help": FUNCTIONS})
    reward_model_name_or_path: str | None = option(None, "A reward model, which is a further reward.")
    contrast: str | None = option(
        None, "Take rewards in contrast to baselines, by this shape (default: as they are).", choices=SHAPE_NAMES
    )
    contrast_temperature: float = option(1.0, "With contrast: the difference of rewards that counts as 1.")
    baselines: int = option(
        0, "With contrast: texts per prompt that the model writes before training; 0: the data have a column baselines."
    )
    constraints: list[str] | None = field(
        default=None,
        metadata={"help": "Hold rewards at thresholds: NAME=THRESHOLD, or with search_objective NAME=LOW..HIGH."},
    )
    equality_constraints: bool = option(False, "Hold them from both sides (tanh), not from below (sigmoid).")
    task_reward: str | None = option(None, "The reward maximised besides (default: closeness to the reference, beta).")
    constraint_lr: float = option(0.1, "Learning rate of the multipliers.")
    search_objective: str | None = option(None, "The reward by which thresholds are searched for; it is not optimised.")
    search_steps: int = option(20, "With search_objective: the largest number of logs at a point of the search.")

    @records_settings
    def __post_init__(self) -> None:
        if self.contrast is None and self.baselines:
            raise ValueError("baselines are for contrastive rewards: give contrast (sigmoid or clip) too")
        self.limits()
        apply_machine_defaults(self)
        super().__post_init__()

    def check_constraints(self) -> None:
        """Reject options of constraints where there are none; a recipe may have them, and leave the constraints to the command.

        Raises:
            ValueError: there is such an option.
        """
        for name in ("equality_constraints", "task_reward", "search_objective"):
            if getattr(self, name) and not self.constraints:
                raise ValueError(f"{name} is for constrained rewards: give constraints (NAME=THRESHOLD) too")

    def limits(self) -> dict[str, tuple[float, ...]]:
        """Return the threshold of each constrained reward, or its range.

        Raises:
            ValueError: a constraint has another form.
        """
        found: dict[str, tuple[float, ...]] = {}
        form = (
            "NAME=LOW..HIGH, such as length=0.2..0.8" if self.search_objective else "NAME=THRESHOLD, such as length=0.5"
        )
        for text in self.constraints or ():
            name, _, values = text.partition("=")
            try:
                found[name] = tuple(map(float, values.split("..")))
            except ValueError:
                found[name] = ()
            if len(found[name]) != (2 if self.search_objective else 1):
                raise ValueError(f"a constraint is {form}, not {text!r}")
        return found


def reward_function(name: str) -> Callable[..., Any]:
    """Return a reward function of TRL's form: it takes `prompts`, `completions` and columns as keywords, and returns a list of numbers.

    Args:
        name: `module:function`; a dotted path as `trl grpo` takes it; or a name of `OF_TRL`. The working directory is searched, too.

    Raises:
        ValueError: there is no such function.

    Examples:
        >>> reward_function("think_format_reward").__name__
        'think_format_reward'
    """
    if name in OF_TRL:
        function: Callable[..., Any] = getattr(import_module("trl.rewards"), name)
        return function(**OVERLONG) if name.startswith("get_") else function
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module:
        raise ValueError(
            f"there is no reward {name!r}{did_you_mean(name, OF_TRL)}: give module:function, or one of {', '.join(OF_TRL)}"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the reward {name}: there is no module {error.name}; install it, or call the command beside its file"
        ) from error
    if not callable(found):
        raise ValueError(f"the reward {name}: the module {module} has no function {attribute}")  # noqa: TRY004
    return found  # type: ignore[no-any-return]


class RewardsTrainer(CardMixin, GRPOTrainer):  # type: ignore[misc]  # `create_model_card` has the signature of TRL's
    """`GRPOTrainer` with rewards by contrast (arXiv 2403.07708) and under constraints (arXiv 2310.04373), by the options of its configuration.

    Args:
        model: see `trl.GRPOTrainer`.
        args: a `RewardsConfig`.
        reward_funcs: see `trl.GRPOTrainer`; None takes those that `args` names.
        kwargs: its other arguments.

    Raises:
        ValueError: `args` has another type; there is no reward; two rewards have one name; a constraint names no reward; TRL would divide the scale of rewards
            out again (`scale_rewards` must be none), see `contralto.align.trainers.grpo`.
    """

    args: RewardsConfig

    def __init__(self, model: Any, args: RewardsConfig | None = None, reward_funcs: Any = None, **kwargs: Any) -> None:
        args = require_config(args, RewardsConfig)
        args.check_constraints()
        if args.contrast or args.constraints:
            check_scale(args, "contrast" if args.contrast else "constraints")
        rewards = _rewards(args, reward_funcs)
        limits = args.limits()
        if args.search_objective:
            args.reward_weights = [float(_name(each) != args.search_objective) for each in rewards]
        if args.contrast:
            held = {*limits, args.search_objective}
            wrap = partial(ContrastiveReward, args=args, shape=args.contrast, temperature=args.contrast_temperature)
            rewards = [each if isinstance(each, str) or _name(each) in held else wrap(each) for each in rewards]
        super().__init__(located(model), rewards, args, **with_own_peft_config(kwargs))
        self.held = self._constrain(limits) if limits else None

    def _constrain(self, limits: dict[str, tuple[float, ...]]) -> ConstrainedRewards:
        """Add the callback that holds rewards at thresholds."""
        args = self.args
        task = args.task_reward
        if task is not None and f"contrastive_{task}" in self.reward_func_names:
            task = f"contrastive_{task}"
        options: dict[str, Any] = {"task": task, "lr": args.constraint_lr, "equality": args.equality_constraints}
        if args.search_objective is None:
            held = ConstrainedRewards(self, thresholds={name: value[0] for name, value in limits.items()}, **options)
        else:
            bounds = {name: (low, high) for name, (low, high) in limits.items()}
            held = ThresholdSearch(
                self, bounds=bounds, objective=args.search_objective, steps=args.search_steps, seed=args.seed, **options
            )
        self.add_callback(held)
        return held

    def describe_training(self) -> TrainedCard:
        """Return the rewards and how they are combined, with papers and formulas, for the model card."""
        methods = [describe_function("contrast", ContrastiveReward)] if self.args.contrast else []
        methods += [describe_function("constraints", ConstrainedRewards)] if self.args.constraints else []
        methods = methods or [CardMethod("grpo", "GRPO on rewards, by TRL's trainer", "", [])]
        return TrainedCard(methods=methods, weights=[None] * len(methods), verb="trained by rewards", tags=["grpo"])


def _rewards(args: RewardsConfig, given: Any) -> list[Any]:
    """Return the rewards: those of a script, or those that the configuration names."""
    rewards = list(given) if isinstance(given, list | tuple) else [given] if given is not None else []
    if not rewards:
        rewards = [reward_function(name) for name in args.reward_funcs or ()]
        rewards += [located(args.reward_model_name_or_path)] if args.reward_model_name_or_path else []
    if not rewards:
        raise ValueError("there is no reward: give reward_funcs (module:function) or reward_model_name_or_path")
    names = [_name(each) for each in rewards]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"two rewards are called {twice}: give the functions different names, by which logs and constraints know them"
        )
    return rewards


def _name(reward: Any) -> str:
    """Return the name of a reward as TRL logs it."""
    from trl.trainer.utils import get_callable_name

    return reward.rpartition("/")[2] if isinstance(reward, str) else str(get_callable_name(reward))
