"""The options of `PreferenceTrainer`: those of TRL's `DPOConfig`, and those of contralto's losses, masks and monitoring."""

# ruff: noqa: TRY004 (a wrong type in somebody's recipe is a ValueError like any other mistake in it)

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from datasets import Dataset, IterableDataset
from transformers import IntervalStrategy
from trl import DPOConfig  # type: ignore[attr-defined]

from contralto.align.losses.activations import KINDS
from contralto.align.losses.loss import Loss
from contralto.align.losses.objective import Objective
from contralto.align.losses.preference import F_DIVERGENCES
from contralto.align.losses.registry import BUILT_IN, LOSSES
from contralto.align.trainers.settings import RecipeOptions, freeze_settings, records_settings
from contralto.align.trainers.sharding import has_head_in_shards
from contralto.common.suggestions import did_you_mean

__all__ = [
    "PreferenceConfig",
    "StagedConfig",
    "apply_machine_defaults",
    "option",
    "require_config",
    "with_adapter_dtype",
    "with_own_peft_config",
]

LOSS_OPTIONS = tuple(dict.fromkeys(name for loss in BUILT_IN for name in loss.settings if name != "beta"))
"""Options that hold settings of losses; `beta` also scales the rewards that are logged, whatever the loss."""
OPTIONS_OF_NEEDS = {
    "reference": (("precompute_ref_log_probs", "sync_ref_model"), "uses no reference"),
    "masks": (
        ("mask", "mask_kinds", "mask_independent", "mask_dropout", "mask_learning_rate", "mask_weight_decay"),
        "uses no token masks",
    ),
}
"""Options that are read only for losses with a need (`Loss.needs`), and the description of a loss without it."""
MASKS = ("ones", "mapo", "learned")
HEAD_METRICS = ("logged", "all", "none")
AUDITS = ("stop", "warn", "off")

Config = TypeVar("Config")


def option(default: Any, text: str, **metadata: Any) -> Any:
    """Return a dataclass field with its line of `--help`.

    Args:
        default: the default.
        text: the help text; a percent sign stands for itself.
        metadata: further metadata of `HfArgumentParser`, such as `choices`.
    """
    return field(default=default, metadata={"help": text.replace("%", "%%"), **metadata})


def loss_option(name: str, text: str) -> Any:
    """Return the field of an option that holds a setting of losses, with the default of their functions.

    Args:
        name: the name of the option.
        text: the help text, to which the losses are added.

    Raises:
        ValueError: no loss has the option, or its default differs between losses.
    """
    losses = [loss for loss in BUILT_IN if name in loss.settings]
    (default,) = {loss.settings[name][1] for loss in losses}
    return option(default, f"{text} Used by {', '.join(loss.name for loss in losses)}.")


def apply_machine_defaults(args: Any) -> None:
    """Replace defaults of TRL 1.16 that do not suit the machine or transformers 5.23, before they are checked.

    Args:
        args: a configuration of TRL; `bf16` becomes False where there is no accelerator, unless it was given. If it was, `use_cpu` becomes
            True there, without which transformers rejects it: see https://github.com/huggingface/trl/issues/3616.
    """
    if args.bf16 and not torch.accelerator.is_available():
        args.use_cpu = True
    if args.use_cpu or not torch.accelerator.is_available():
        args.bf16 = bool(args.bf16)
        args.dataloader_pin_memory = False  # torch warns where there is nothing to pin for
    for name in ("", "_kwargs"):  # TRL's default has the old name, which transformers warns of since 5.20
        if getattr(args, f"activation_checkpointing{name}", "unknown") is None:
            setattr(args, f"activation_checkpointing{name}", getattr(args, f"gradient_checkpointing{name}"))


def require_config(args: Any, kind: type[Config]) -> Config:
    """Return the argument `args` of a trainer, which must be a configuration of its own type.

    Args:
        args: the argument.
        kind: the type of the trainer's configuration.

    Raises:
        ValueError: `args` has another type, or is None.
    """
    if args is None:
        raise ValueError(f"args is missing: give a {kind.__name__}, such as args={kind.__name__}('out')")
    if not isinstance(args, kind):
        raise ValueError(f"args must be a {kind.__name__}, not {type(args).__name__}")
    freeze_settings(args)
    return args


def with_own_peft_config(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a trainer with a copy of the PEFT configuration.

    `get_peft_model` writes into the configuration: the modules of its model, for one, which another model need not have. peft advises
    against using one twice: https://github.com/huggingface/peft/pull/3770.

    Args:
        kwargs: keyword arguments, perhaps with `peft_config`.
    """
    return {name: copy.deepcopy(value) if name == "peft_config" else value for name, value in kwargs.items()}


def with_adapter_dtype(args: Any, model: Any, adapter: Any) -> Any:
    """Return options that load a model in bfloat16 if only an adapter is trained on an accelerator.

    Args:
        args: a configuration of TRL, which stays as it was; a dtype in its `model_init_kwargs` wins.
        model: the argument `model` of a trainer; one that is loaded keeps its dtype.
        adapter: its argument `peft_config`, or None.
    """
    if not isinstance(model, str) or adapter is None or not torch.accelerator.is_available():
        return args
    args = copy.copy(args)
    args.model_init_kwargs = {"dtype": "bfloat16"} | dict(args.model_init_kwargs or {})
    return args


@dataclass
class StagedConfig(RecipeOptions, DPOConfig):
    """`trl.DPOConfig` (1.16), whose `bf16` defaults to False where there is no accelerator, since few CPUs are fast at it.

    Args:
        audit: the audit before the first step: `stop` ends the run at an error, `warn` only logs it, `off`.
    """

    columns: ClassVar[str] = "prompt, chosen and rejected"
    """The columns of a dataset, in words."""

    audit: str = option(
        "stop",
        "Audit of data, and of reference and adapter of preference losses, before the first step: errors stop the run (stop) or are "
        "logged (warn); off disables it.",
        choices=list(AUDITS),
    )

    @records_settings
    def __post_init__(self) -> None:
        if self.audit not in AUDITS:
            raise ValueError(
                f"audit must be one of {', '.join(AUDITS)}, not {self.audit!r}{did_you_mean(self.audit, AUDITS)}"
            )
        apply_machine_defaults(self)
        super().__post_init__()

    @property
    def head_in_shards(self) -> bool:
        """Return whether the language-model head is sharded over processes: ZeRO 3, FSDP 1."""
        return has_head_in_shards(self)

    def checked_pairs(
        self, train: Any, evaluation: Any
    ) -> Iterator[tuple[str, Dataset | IterableDataset, dict[str, Any]]]:
        """Check the datasets of pairs, and yield each with its name and its first row.

        Args:
            train: the training set.
            evaluation: the evaluation set, several by name, or None.

        Yields:
            Name, dataset and first row.

        Raises:
            ValueError: a dataset is missing, is no dataset, has no rows, or lacks a column; or a stream has no `max_steps`.
        """
        if train is None:
            raise ValueError("train_dataset is missing: give the pairs to train on")
        if isinstance(train, IterableDataset) and self.max_steps <= 0:
            raise ValueError("a streamed train_dataset has no length: set max_steps")
        if self.eval_strategy != "no" and evaluation is None:
            raise ValueError(
                f"eval_strategy is {IntervalStrategy(self.eval_strategy).value}, and there is no eval_dataset: give one"
            )
        splits = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
        for name, dataset in {"train_dataset": train, **splits}.items():
            if dataset is None:
                continue
            if not isinstance(dataset, Dataset | IterableDataset):
                raise ValueError(
                    f"{name} must be a datasets.Dataset or IterableDataset, not a {type(dataset).__name__}"
                    + ": make one by Dataset.from_list" * isinstance(dataset, list)
                )
            first = next(iter(dataset), None)
            if first is None:
                raise ValueError(f"{name} has no rows")
            if missing := [column for column in ("chosen", "rejected") if column not in first]:
                raise ValueError(f"{name} has no column {missing[0]}; a row has {self.columns}")
            yield name, dataset, first


@dataclass
class PreferenceConfig(StagedConfig):
    """The options of `PreferenceTrainer`.

    All of `trl.DPOConfig` (1.16) and of `transformers.TrainingArguments`. What differs: `loss_type` also takes contralto's
    losses, see `contralto.align.losses.registry.LOSSES`; `beta` defaults to that of the loss; `bf16` defaults to False where there is no
    accelerator, since few CPUs are fast at it. Invalid values, and options that the chosen losses ignore, are rejected before a model is
    loaded.

    `padding_free`, which TRL ignores, puts all sequences of a batch into one row without padding. It is for flash attention: other
    kernels take time quadratic in the length of the row. `packing` makes several rows, of pairs with `prefix_sharing`, of sequences
    without it; a batch keeps its `per_device_train_batch_size` pairs, so that loss and gradients stay what they are.

    Args:
        loss_type: names of losses, which are added up by `loss_weights`.
        beta: strength of the pull towards the reference; None takes the default of the loss, such as 0.1 for `sigmoid` and 2.0 for
            `simpo`.
        loss_settings: settings of losses from other packages that are no options here.
        cpo_alpha: the weight of the likelihood of chosen completions in `cpo`, `cpo_simpo` and `arpo`.
        simpo_gamma: the reward margin of `simpo`, `cpo_simpo` and `alphapo`.
        alphapo_alpha: the shape of the reward in `alphapo`.
        dpop_lambda: the weight of the penalty in `dpop` on chosen completions that lose likelihood.
        cal_alpha: the weight of the calibration in `cal_dpo`.
        mdpo_delta: the reward that the chosen completion should reach in `mdpo`.
        odpo_alpha: the weight of the offset in `odpo`.
        arpo_eta: the growth of the penalty of `arpo`.
        arpo_scale: the start of the penalty of `arpo`.
        tdpo_alpha: the weight of the divergence in `tdpo2`.
        lambda_u: the weight of the L1 norm of the learned mask on log-ratios, in `sparsepo`.
        lambda_d: the weight of the L1 norm of the learned mask on the divergence, in `sparsepo`.
        mask: the token masks of `sparsepo`: `ones`, `mapo` (from the reference's activations) or `learned`.
        mask_kinds: the activations that `mapo` reads, of `attention`, `mlp`, `residual` and `logits`.
        mask_independent: learn two masks, for log-ratios and divergence.
        mask_dropout: the dropout of the learned mask.
        mask_learning_rate: the learning rate of the learned mask; None takes `learning_rate`.
        mask_weight_decay: the weight decay of the learned mask.
        head_metrics: the steps in which entropy, mean logits and token accuracy are computed, which cost a few passes over the logits:
            `logged` for steps that are logged, with the values of that step alone; `all` for every step, as in TRL; `none`.
        reference_cache: the folder of precomputed references; None takes one beside the caches of `datasets`.
        freeze_vision_encoder: train only the language model of a vision-language model, and the projector.
        prefix_sharing: compute the common prefix of the two sequences of a pair once. It gives the same loss, gradients and metrics, see
            `contralto.align.trainers.layouts`.
        packing: pack the sequences of a batch into rows with little padding; with `prefix_sharing` pairs, each with its common prefix
            once. See `contralto.align.trainers.packing`.
        pack_length: the tokens of a row with `packing`, at least `max_length`; None takes the longest pair, or sequence, of each batch.
        audit: the audit of data, reference and adapter before the first step: `stop` ends the run at an error, `warn` only logs it, `off`.
        monitor_pairs: the number of pairs, held-out ones if there are any, whose log-probabilities and divergence from the reference are
            measured before training, in up to 29 logged steps and in the last one; 0 measures none.
        monitor_generate: the number of their prompts for which the policy generates greedily, to measure the length.
        report: write `training_report.html` and `.png` into `output_dir` at the end; None leaves it to the caller: `contralto align` does,
            a script does not.

    Raises:
        ValueError: an option is invalid, has no effect, or contradicts another.

    Examples:
        >>> PreferenceConfig("out", loss_type=["simpo"], report_to="none").beta
        2.0
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": f"One or several losses: {', '.join(LOSSES.names())}. Several losses are summed with loss_weights."
        },
    )
    beta: float | None = option(  # type: ignore[assignment]
        None, "Strength of the regularization towards the reference (default: that of the loss, mostly 0.1)."
    )
    loss_settings: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Settings of losses from other packages, such as {"gamma": 0.5}.'}
    )
    cpo_alpha: float = loss_option("cpo_alpha", "Weight of the negative log-likelihood of chosen completions.")
    simpo_gamma: float = loss_option("simpo_gamma", "Reward margin.")
    alphapo_alpha: float = loss_option("alphapo_alpha", "Shape of the reward; 0 is SimPO.")
    dpop_lambda: float = loss_option("dpop_lambda", "Weight of the penalty on chosen completions that lose likelihood.")
    cal_alpha: float = loss_option("cal_alpha", "Weight of the calibration.")
    mdpo_delta: float = loss_option("mdpo_delta", "Reward that the chosen completion should reach.")
    odpo_alpha: float = loss_option("odpo_alpha", "Weight of the offset.")
    arpo_eta: float = loss_option("arpo_eta", "Growth of the penalty with the gap between the two completions.")
    arpo_scale: float = loss_option("arpo_scale", "Start of the penalty.")
    tdpo_alpha: float = loss_option("tdpo_alpha", "Weight of the divergence.")
    lambda_u: float = loss_option("lambda_u", "Weight of the L1 norm of the learned mask on log-ratios.")
    lambda_d: float = loss_option("lambda_d", "Weight of the L1 norm of the learned mask on the divergence.")
    mask: str = option("ones", "Token masks of sparsepo.", choices=list(MASKS))
    mask_kinds: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": f"Activations that mapo uses: {', '.join(KINDS)}."}
    )
    mask_independent: bool = option(False, "Learn two masks, for log-ratios and divergence, instead of a shared one.")
    mask_dropout: float = option(0.0, "Dropout of the learned mask.")
    mask_learning_rate: float | None = option(None, "Learning rate of the learned mask (default: learning_rate).")
    mask_weight_decay: float = option(0.01, "Weight decay of the learned mask.")
    head_metrics: str = option(
        "logged",
        "Steps in which entropy, mean logits and token accuracy are computed: logged steps, all (as in TRL) or none.",
        choices=list(HEAD_METRICS),
    )
    reference_cache: str | None = option(
        None, "Folder of precomputed references (default: next to the caches of datasets)."
    )
    freeze_vision_encoder: bool = option(False, "Train the language model and the projector, not the vision encoder.")
    prefix_sharing: bool = option(False, "Compute the common prefix of the two sequences of a pair once.")
    packing: bool = option(
        False, "Pack sequences, with prefix_sharing pairs, into rows with little padding; a batch keeps its pairs."
    )
    pack_length: int | None = option(
        None, "Tokens of a row with packing, at least max_length (default: the longest pair or sequence of each batch)."
    )
    monitor_pairs: int = option(
        32, "Number of pairs that are measured before training and in up to 29 logged steps; 0 disables the monitor."
    )
    monitor_generate: int = option(
        0, "Number of prompts of these pairs for which the policy generates greedily to measure the length."
    )
    report: bool | None = option(
        None,
        "Write training_report.html and .png into output_dir at the end (default: yes for contralto align, no for a script).",
    )

    _VALID_DICT_FIELDS = [*StagedConfig._VALID_DICT_FIELDS, "loss_settings"]  # noqa: RUF012

    @records_settings
    def __post_init__(self) -> None:
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        losses = Objective(self.loss_type, self.loss_weights).losses
        if self.beta is None:
            self.beta = _common_beta(losses)
        self.objective = Objective(self.loss_type, self.loss_weights, **self._settings(losses))
        self._check_ignored()
        self._check_forbidden()
        self._check_divergence()
        self._check_reference()
        self._check_layouts()
        self._check_masks()
        self._check_numbers()
        self._check_monitoring()
        super().__post_init__()

    def _settings(self, losses: Sequence[Loss]) -> dict[str, float]:
        """Return the settings of the losses by option: from fields of that name, and from `loss_settings`."""
        fields = {each.name for each in dataclasses.fields(self)}
        others = json.loads(self.loss_settings) if isinstance(self.loss_settings, str) else self.loss_settings or {}
        if doubled := sorted(fields & others.keys()):
            raise ValueError(f"loss_settings holds {doubled[0]}, which is an option of its own: set {doubled[0]}")
        return {name: getattr(self, name) for loss in losses for name in loss.settings if name in fields} | others

    def _is_set(self, name: str) -> bool:
        """Return whether an option has another value than its default, None or False."""
        default = next(
            each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            for each in dataclasses.fields(self)
            if each.name == name
        )
        return getattr(self, name) not in (default, None, False)

    def _check_ignored(self) -> None:
        """Reject options that the chosen losses ignore."""
        names, needs = ", ".join(self.loss_type), self.objective.needs
        read = {option for loss in self.objective.losses for option in loss.settings}
        for option in LOSS_OPTIONS:
            if option not in read and self._is_set(option):
                users = ", ".join(loss.name for loss in BUILT_IN if option in loss.settings)
                raise ValueError(f"{option} is set, but {names} does not use it; it is an option of {users}")
        for need, (options, reason) in OPTIONS_OF_NEEDS.items():
            unread = () if need in needs or (need == "reference" and "kl" in needs) else options
            if ignored := [option for option in unread if self._is_set(option)]:
                raise ValueError(f"{ignored[0]} is set, but {names} {reason}: leave {ignored[0]} out")

    def _check_forbidden(self) -> None:
        """Reject options that have no meaning with one of the losses."""
        for loss in self.objective.losses:
            for option, reason in loss.forbids.items():
                if self._is_set(option):
                    raise ValueError(f"{option} is set, but {loss.name} {reason}: leave {option} out")

    def _check_divergence(self) -> None:
        if self.f_divergence_type not in F_DIVERGENCES:
            raise ValueError(
                f"f_divergence_type must be one of {', '.join(F_DIVERGENCES)}, not {self.f_divergence_type!r}"
                f"{did_you_mean(self.f_divergence_type, F_DIVERGENCES)}"
            )
        if self._is_set("f_alpha_divergence_coef") and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"f_alpha_divergence_coef is set, but f_divergence_type {self.f_divergence_type!r} does not use it: leave it out"
            )

    def _check_reference(self) -> None:
        if self.precompute_ref_log_probs and self.sync_ref_model:
            raise ValueError(
                "sync_ref_model moves the reference and precompute_ref_log_probs freezes it: set one of them"
            )
        if self.reference_cache is not None and not self.precompute_ref_log_probs:
            raise ValueError("reference_cache is set, but is only used with precompute_ref_log_probs: set both")

    def _check_layouts(self) -> None:
        if self.padding_free and (other := next((o for o in ("prefix_sharing", "packing") if getattr(self, o)), None)):
            raise ValueError(f"{other} and padding_free are two layouts of a batch: set one of them")
        if self.pack_length is None:
            return
        if not self.packing:
            raise ValueError("pack_length is set, but is only used with packing: set both")
        if self.max_length is None or self.pack_length < self.max_length:
            raise ValueError(
                f"pack_length is {self.pack_length} and max_length {self.max_length}, so that a sequence may not fit into a row: set a "
                "max_length of at most pack_length"
            )

    def _check_masks(self) -> None:
        for option, allowed in (("mask", MASKS), ("head_metrics", HEAD_METRICS)):
            if getattr(self, option) not in allowed:
                value = getattr(self, option)
                raise ValueError(
                    f"{option} must be one of {', '.join(allowed)}, not {value!r}{did_you_mean(value, allowed)}"
                )
        if not self.mask_kinds or not set(self.mask_kinds) <= set(KINDS):
            raise ValueError(f"mask_kinds must name some of {', '.join(KINDS)}, not {self.mask_kinds}")
        if set(self.mask_kinds) != set(KINDS) and self.mask != "mapo":
            raise ValueError(f"mask_kinds is read with mask mapo alone, not with mask {self.mask}")
        if self.mask != "ones" and (self.torch_compile or self.torch_compile_backend or self.torch_compile_mode):
            raise ValueError(
                f"torch_compile is set, and the mask {self.mask} is read by hooks that a compiled layer does not call: leave "
                "torch_compile out"
            )
        if self.mask != "learned":
            learned = ("lambda_u", "lambda_d", "mask_independent", "mask_dropout", "mask_learning_rate")
            if given := [name for name in learned if getattr(self, name)]:
                raise ValueError(f"{given[0]} acts on learned masks alone: set mask to learned, or leave it out")
        if not 0 <= self.mask_dropout < 1:
            raise ValueError(f"mask_dropout must lie in [0, 1), not {self.mask_dropout}")
        for option in ("mask_learning_rate", "mask_weight_decay"):
            value = getattr(self, option)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{option} must be a finite number of at least 0, not {value}")

    def _check_numbers(self) -> None:
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must lie in [0, 1] (the weight of the longer tail), not {self.ld_alpha}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 tokens (one to read, one to predict), not {self.max_length}"
            )
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode must be keep_start or keep_end, not {self.truncation_mode!r}")

    def _check_monitoring(self) -> None:
        if self.report and not self.monitor_pairs:
            raise ValueError(
                "report is made of what was measured, and monitor_pairs is 0: set it to 32, or report to False"
            )
        if self.monitor_pairs < 0:
            raise ValueError(f"monitor_pairs must be at least 0 (0 measures none), not {self.monitor_pairs}")
        if not 0 <= self.monitor_generate <= self.monitor_pairs:
            raise ValueError(
                f"monitor_generate must lie in 0 to monitor_pairs ({self.monitor_pairs}), whose prompts it takes, not "
                f"{self.monitor_generate}"
            )


def _common_beta(losses: Sequence[Loss]) -> float:
    """Return the default of beta that all losses share.

    Raises:
        ValueError: the defaults differ.
    """
    defaults = {loss.settings["beta"][1] for loss in losses if "beta" in loss.settings}
    if len(defaults) > 1:
        names = ", ".join(loss.name for loss in losses)
        raise ValueError(f"the defaults of beta differ between {names} ({sorted(defaults)}): set beta")
    return defaults.pop() if defaults else 0.1
