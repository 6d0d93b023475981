"""The options of `DistillationPairTrainer`, and its losses, by `loss_type`:

| loss_type | D_t on the teacher's completion | D_s on the student's | weights |
|---|---|---|---|
| `distillm2` | skew KL | skew reverse KL | of the curriculum: DistiLLM-2, Ko et al. 2025, arXiv 2503.07067 |
| `skew_kl` | skew KL | the same | 1 - lmbda, lmbda: DistiLLM's loss, Ko et al. 2024, arXiv 2402.03898 |
| `skew_reverse_kl` | skew reverse KL | the same | 1 - lmbda, lmbda: DistiLLM's other loss |
| `jsd` | generalised Jensen-Shannon | the same | 1 - lmbda, lmbda: GKD, Agarwal et al. 2024, arXiv 2306.13649 |
| `forward_kl` | forward KL | the same | 1, 0: knowledge distillation, Hinton et al. 2015, arXiv 1503.02531 |
| `reverse_kl` | reverse KL | the same | 0, 1: MiniLLM's divergence, Gu et al. 2024, arXiv 2306.08543, here per token |
| `tvd` | total variation | the same | 1 - lmbda, lmbda: Wen et al. 2023, arXiv 2307.15190 |
| `uld` | ULD, of any vocabularies | the same | 1 - lmbda, lmbda: Boizard et al. 2024, arXiv 2402.12030; and -log q |
| `gold` | GOLD, of any vocabularies | the same | 1 - lmbda, lmbda: Patiño et al. 2025 |
| `sft` | -log q | none | 1, 0: sequence-level distillation, Kim & Rush 2016, arXiv 1606.07947; no teacher is loaded |

D_t and D_s are the divergences on the completions of the teacher and of the student, which `contralto.align.trainers.distillation` adds up.
"""

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, cast

from trl import DPOConfig  # type: ignore[attr-defined]

from contralto.align.losses.curriculum import PAPER, RELEASED, RELEASED_GRADUAL, Curriculum
from contralto.align.trainers.config import StagedConfig, option
from contralto.align.trainers.settings import records_settings
from contralto.align.trainers.text_spans import MERGES, PAIRINGS, Pairing
from contralto.common.ranges import check_positive
from contralto.common.suggestions import did_you_mean

__all__ = ["DISTILLATION_LOSSES", "LOSS_OPTIONS", "DistillationConfig", "DivergencePair"]


class TextOptions(NamedTuple):
    """The default options of a loss that compares models with different vocabularies."""

    pairing: Pairing
    """See `contralto.align.trainers.text_spans.PAIRINGS`."""
    crossentropy: float
    """The weight of -log q on the teacher's completions."""
    distillation: float
    """The weight of the divergence."""


class DivergencePair(NamedTuple):
    """The declaration of a distillation loss: its divergences, and the options that it reads. Every field is required."""

    chosen: str
    """The divergence on the teacher's completion."""
    rejected: str
    """The divergence on the student's completion."""
    lmbda: float
    """The default weight of the student's completion."""
    settings: tuple[str, ...]
    """The options that the loss reads, of `LOSS_OPTIONS`."""
    text: TextOptions | None
    """For losses that compare models by text, whatever their tokenizers; None for those that need one vocabulary."""

    @property
    def uses_teacher(self) -> bool:
        """Return whether a teacher is loaded."""
        return "teacher_model_name_or_path" in self.settings

    @property
    def follows_curriculum(self) -> bool:
        """Return whether weights and skew change in training."""
        return "curriculum" in self.settings

    @property
    def is_skewed(self) -> bool:
        """Return whether the divergences have a skew."""
        return "alpha_0" in self.settings


SCHEDULE = (
    *("alpha_0", "alpha_low", "alpha_high", "beta_0", "beta_max", "beta_ramp"),
    *("adaptive_alpha", "gradual_beta", "loss_factor"),
)
"""Options that override a part of `curriculum`."""
CURRICULA = {"paper": PAPER, "released": RELEASED, "released_gradual": RELEASED_GRADUAL}
TEACHER = (
    *("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs"),
    *("teacher_load_in_4bit", "teacher_load_in_8bit", "precompute_teacher", "teacher_cache", "teacher_dtype"),
)
ON_POLICY = ("on_policy", "max_new_tokens", "sampling_temperature")
"""Options of completions that the student writes during training."""
OF_CACHE = ("precompute_teacher", "teacher_cache")
"""Options of a teacher whose states are kept for tokens of the student."""
SKEW, SHARED = ("alpha_0",), ("temperature", *ON_POLICY, *TEACHER)
BY_TEXT = (
    *(name for name in SHARED if name not in OF_CACHE),
    *("lmbda", "merge", "crossentropy_weight", "distillation_weight"),
)
DISTILLATION_LOSSES = {
    "distillm2": DivergencePair(
        "skew_kl", "skew_reverse_kl", 0.5, (*SHARED, *SCHEDULE, "curriculum", "srkl", "first_epoch", "all_epochs"), None
    ),
    "skew_kl": DivergencePair("skew_kl", "skew_kl", 0.5, (*SHARED, *SKEW, "lmbda"), None),
    "skew_reverse_kl": DivergencePair(
        "skew_reverse_kl", "skew_reverse_kl", 0.5, (*SHARED, *SKEW, "srkl", "lmbda"), None
    ),
    "jsd": DivergencePair("jsd", "jsd", 0.5, (*SHARED, "beta", "lmbda"), None),
    "forward_kl": DivergencePair("forward_kl", "forward_kl", 0.0, (*SHARED, "lmbda"), None),
    "reverse_kl": DivergencePair("reverse_kl", "reverse_kl", 1.0, (*SHARED, "lmbda"), None),
    "tvd": DivergencePair("tvd", "tvd", 0.5, (*SHARED, "lmbda"), None),
    "uld": DivergencePair("uld", "uld", 0.0, (*BY_TEXT, "pairing"), TextOptions("positions", 1.0, 1.5)),
    "gold": DivergencePair(
        "gold", "gold", 0.5, (*BY_TEXT, "beta", "matched_weight", "unmatched_weight"), TextOptions("text", 0.0, 1.0)
    ),
    "sft": DivergencePair("nll", "nll", 0.0, (), None),
}
"""The losses by name; see the table above."""
LOSS_OPTIONS = tuple(dict.fromkeys(name for kind in DISTILLATION_LOSSES.values() for name in kind.settings))
"""All options that some loss reads."""
FROM_DPO = (
    *("model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "dataset_num_proc"),
    *("max_length", "truncation_mode", "pad_to_multiple_of", "pad_token", "activation_offloading"),
    *("precompute_ref_log_probs", "precompute_ref_batch_size"),
)
"""Options of `trl.DPOConfig` (1.16) that are read here. Its others, and those that a new version adds, are rejected."""


@dataclass
class DistillationConfig(StagedConfig):
    """The options of `DistillationPairTrainer`.

    Those of `trl.DPOConfig` (1.16) and `transformers.TrainingArguments`, without those of preference losses. Invalid values, and options
    that the loss ignores, are rejected before a model is loaded.

    Args:
        loss_type: one of `DISTILLATION_LOSSES`.
        lmbda: the weight of the student's completions, in [0, 1] (GKD's lambda); None takes the default of the loss.
        beta: the teacher's share of the mixture in `jsd` and `gold`, in [0, 1].
        temperature: both models' logits are divided by it in the divergence.
        on_policy: the share of steps in which the student writes the rejected completions anew, in [0, 1]. At 1 rows need no `rejected`,
            and evaluations are of new completions, too.
        max_new_tokens: the longest of them.
        sampling_temperature: the temperature at which they are sampled.
        pairing: the tokens that `uld` compares: `positions` for the first with the first and so on, as published, or `text` for spans that
            stand for the same text, as in `gold`.
        merge: the distribution of a span of several tokens: that at its first token times the probabilities of the later ones (`observed`),
            or that at its last token times those of the earlier ones (`bayesian`).
        crossentropy_weight: the weight of -log q on the teacher's completions in `uld` and `gold`; None takes the default of the loss.
        distillation_weight: the weight of the divergence in `uld` and `gold`; None takes the default of the loss.
        matched_weight: the weight of tokens of both vocabularies in `gold`; None takes their share of the teacher's.
        unmatched_weight: the weight of the other tokens; None takes the rest.
        curriculum: the schedules of `distillm2`: `paper`; `released` for what the released code computes (SKL + SRKL, alpha 0.1, the skew
            reverse KL's mixture held fixed); or `released_gradual`, the same with the weights going from (1, 1) to (0.5, 1.5)
            over the first half of the steps.
        alpha_0: the alpha of `skew_kl` and `skew_reverse_kl`, and that of the curriculum if it does not adapt. For this and
            the next options see `contralto.align.losses.curriculum.Curriculum`; None takes the value of `curriculum`.
        alpha_low: the least alpha.
        alpha_high: the greatest alpha.
        beta_0: the least beta.
        beta_max: the greatest beta. At 1, as in the paper, the teacher's completions lose their weight early.
        beta_ramp: share of the steps over which beta grows linearly.
        adaptive_alpha: alpha adapts to each completion, from the second epoch on.
        gradual_beta: beta grows.
        loss_factor: the factor of the loss.
        srkl: the gradient of the skew reverse KL, `full` or `detached`, see `contralto.align.losses.divergences.skew_reverse_kl`.
        first_epoch: the curriculum's epoch that this run begins with, where runs are rounds of one training.
        all_epochs: the curriculum's number of epochs E; None takes that of this run.
        teacher_model_name_or_path: a folder, a hub id, or `testbed:NAME`; a folder with an adapter is loaded with its base.
        teacher_model_revision: the revision of a hub id.
        teacher_model_init_kwargs: keyword arguments of `from_pretrained`. Without a dtype, the teacher has that of its weights on an
            accelerator, and float32 on a CPU.
        teacher_dtype: the dtype of the teacher's weights; bfloat16 halves its memory on a CPU.
        teacher_load_in_4bit: quantise the teacher by bitsandbytes (NF4).
        teacher_load_in_8bit: quantise the teacher by bitsandbytes (LLM.int8).
        precompute_teacher: compute the teacher's last hidden states once, keep them on disk, and train without the teacher.
        audit: the audit of the data before the first step: `stop` ends the run at an error, `warn` only logs it, `off`.
        teacher_cache: the folder for them; None takes one beside the caches of `datasets`.
        report: write `training_report.html` and `.png` into `output_dir` at the end; None leaves it to the caller: `contralto align` does,
            a script does not.

    Raises:
        ValueError: an option is invalid, has no effect, or contradicts another.

    Examples:
        >>> DistillationConfig("out", loss_type="jsd", lmbda=1.0, report_to="none").weights
        (0.0, 1.0)
        >>> DistillationConfig("out", loss_type="sft", beta=0.1, report_to="none")
        Traceback (most recent call last):
            ...
        ValueError: beta is set, but sft does not use it; it is an option of jsd, gold
    """

    default_loss: ClassVar[str] = "distillm2"
    columns: ClassVar[str] = "prompt, chosen (the teacher's text) and rejected (the student's)"

    learning_rate: float = option(5e-5, "The initial learning rate for AdamW.")
    loss_type: list[str] = field(
        default_factory=lambda: [DistillationConfig.default_loss],
        metadata={"help": f"The loss, one of: {', '.join(DISTILLATION_LOSSES)}."},
    )
    lmbda: float | None = option(None, "Weight of the student's completions (default: that of the loss).")
    beta: float = option(0.5, "The teacher's share of the mixture in jsd and gold.")
    temperature: float = option(1.0, "Temperature by which both models' logits are divided in the divergence.")
    on_policy: float = option(0.0, "Share of steps in which the student writes its completions anew.")
    max_new_tokens: int = option(128, "With on_policy: the longest new completion, in tokens.")
    sampling_temperature: float = option(1.0, "With on_policy: the temperature of sampling.")
    pairing: str | None = option(
        None, "Tokens that uld compares: by position (default) or by text.", choices=list(PAIRINGS)
    )
    merge: str = option("observed", "Distribution of a span of several tokens in uld and gold.", choices=list(MERGES))
    crossentropy_weight: float | None = option(
        None, "Weight of the likelihood of the teacher's completions in uld and gold (default: 1 in uld, 0 in gold)."
    )
    distillation_weight: float | None = option(
        None, "Weight of the divergence in uld and gold (default: 1.5 in uld, 1 in gold)."
    )
    matched_weight: float | None = option(
        None, "Weight of tokens of both vocabularies in gold (default: their share of the teacher's)."
    )
    unmatched_weight: float | None = option(None, "Weight of the other tokens in gold (default: the rest).")
    curriculum: str = option("paper", "The schedules of alpha and beta in distillm2.", choices=list(CURRICULA))
    alpha_0: float | None = option(None, "The skew alpha without adaptive_alpha.")
    alpha_low: float | None = option(None, "Lower bound of alpha.")
    alpha_high: float | None = option(None, "Upper bound of alpha.")
    beta_0: float | None = option(None, "Smallest weight of the student's completions in the curriculum.")
    beta_max: float | None = option(None, "Largest weight of the student's completions in the curriculum.")
    beta_ramp: float | None = option(
        None, "Share of the steps over which that weight grows linearly (default of paper: e / E + tau / T)."
    )
    adaptive_alpha: bool | None = option(None, "Adapt alpha to each completion, from the second epoch on.")
    gradual_beta: bool | None = option(None, "Increase the weight of the student's completions during training.")
    loss_factor: float | None = option(None, "Factor of the loss of distillm2: 0.5 in the paper.")
    srkl: str | None = option(None, "Gradient of the skew reverse KL.", choices=["full", "detached"])
    first_epoch: int = option(1, "Epoch of the curriculum at which this run starts.")
    all_epochs: int | None = option(None, "Number of epochs of the curriculum (default: that of this run).")
    teacher_model_name_or_path: str | None = option(None, "The teacher: a folder, a hub id, or testbed:NAME.")
    teacher_model_revision: str | None = option(None, "The teacher's revision.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of the teacher's from_pretrained."}
    )
    teacher_dtype: str | None = option(
        None,
        "The dtype of the teacher's weights (default: as stored on an accelerator, float32 on a CPU).",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    teacher_load_in_4bit: bool = option(False, "Load the teacher in 4 bits (NF4, bitsandbytes).")
    teacher_load_in_8bit: bool = option(False, "Load the teacher in 8 bits (LLM.int8, bitsandbytes).")
    precompute_teacher: bool = option(False, "Keep the teacher's hidden states on disk, and train without the teacher.")
    teacher_cache: str | None = option(
        None, "Folder of precomputed teachers (default: next to the caches of datasets)."
    )

    report: bool | None = option(
        None,
        "Write training_report.html and .png into output_dir at the end (default: yes for contralto align, no for a script).",
    )

    _VALID_DICT_FIELDS = [*StagedConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012

    @records_settings
    def __post_init__(self) -> None:
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if len(names) != 1 or names[0] not in DISTILLATION_LOSSES:
            raise ValueError(
                f"loss_type must be one of {', '.join(DISTILLATION_LOSSES)}, not {', '.join(map(str, names)) or 'none'}"
                + did_you_mean(names[0] if names else "", DISTILLATION_LOSSES)
            )
        self.loss_type, self.kind = names, DISTILLATION_LOSSES[names[0]]
        self._check_read(names[0])
        self._check_teacher()
        self._check_numbers()
        self._check_text()
        self._check_curriculum()
        self._check_on_policy()
        self.precompute_ref_log_probs = self.precompute_teacher  # so DPOTrainer asks for the columns of all data sets
        super().__post_init__()
        alone = self.per_device_train_batch_size * self.world_size == 1
        if alone and self.kind.follows_curriculum and self.schedule.adaptive_alpha:
            raise ValueError(
                "adaptive_alpha compares completions of a batch, and per_device_train_batch_size is 1: raise it or set "
                "adaptive_alpha to False"
            )

    @property
    def weights(self) -> tuple[float, float]:
        """Return the weights of the teacher's and the student's completion; with a curriculum those at beta_0."""
        if self.kind.follows_curriculum:
            return self.schedule.factor * (1 - self.schedule.beta_0), self.schedule.factor * self.schedule.beta_0
        share = self.kind.lmbda if self.lmbda is None else self.lmbda
        return 1.0 - share, share

    @property
    def reads_rejected(self) -> bool:
        """Return whether completions of the student in the data have a weight in any step, so that rows need `rejected`."""
        return self.reads_own and self.on_policy < 1

    @property
    def reads_own(self) -> bool:
        """Return whether the student's completions have a weight in any step, those of the data or new ones."""
        return self.kind.follows_curriculum or self.weights[1] > 0

    @property
    def text_options(self) -> TextOptions:
        """Return the options of comparisons by text; the defaults of the loss where none is set."""
        default = self.kind.text or TextOptions("positions", 0.0, 1.0)
        crossentropy = default.crossentropy if self.crossentropy_weight is None else self.crossentropy_weight
        distillation = default.distillation if self.distillation_weight is None else self.distillation_weight
        return TextOptions(cast(Pairing, self.pairing or default.pairing), crossentropy, distillation)

    @property
    def alpha(self) -> float:
        """Return the fixed skew, used if alpha is not adaptive."""
        return self.schedule.alpha_0

    @property
    def srkl_gradient(self) -> Literal["full", "detached"]:
        """Return `srkl`, or else the gradient that belongs to the curriculum."""
        default = "full" if self.curriculum == "paper" else "detached"
        return cast(Literal["full", "detached"], self.srkl or default)

    def _check_read(self, name: str) -> None:
        """Reject options that the loss ignores."""
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        if unread := [
            each for each in LOSS_OPTIONS if each not in self.kind.settings and getattr(self, each) != defaults[each]
        ]:
            users = [other for other, kind in DISTILLATION_LOSSES.items() if unread[0] in kind.settings]
            raise ValueError(f"{unread[0]} is set, but {name} does not use it; it is an option of {', '.join(users)}")
        own = (*inspect.get_annotations(DistillationConfig), *FROM_DPO)
        of_preferences = [each for each in inspect.get_annotations(DPOConfig) if each not in own]
        if ignored := [each for each in of_preferences if getattr(self, each) != defaults[each]]:
            raise ValueError(
                f"{ignored[0]} is set, but is an option of preference losses, not of distillation: leave it out"
            )
        if self.precompute_ref_log_probs and not self.precompute_teacher:
            raise ValueError("precompute_ref_log_probs is for preference losses; for a teacher set precompute_teacher")

    def _check_teacher(self) -> None:
        if self.teacher_load_in_4bit and self.teacher_load_in_8bit:
            raise ValueError("teacher_load_in_4bit and teacher_load_in_8bit are both set: set one of them")
        if self.teacher_model_name_or_path is None:
            options = (each for each in (*TEACHER[1:5], "teacher_dtype") if getattr(self, each))
            if option := next(options, None):
                raise ValueError(f"{option} is set, but teacher_model_name_or_path, to which it applies, is not")
        if self.teacher_dtype is not None and "dtype" in (self.teacher_model_init_kwargs or {}):
            raise ValueError("teacher_dtype and teacher_model_init_kwargs both name a dtype: give one of them")
        if self.teacher_cache is not None and not self.precompute_teacher:
            raise ValueError("teacher_cache is set, but is only used with precompute_teacher: set both")

    def _check_numbers(self) -> None:
        for name in ("lmbda", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {value}")
        check_positive("temperature", self.temperature)
        if self.srkl not in (None, "full", "detached"):
            raise ValueError(f"srkl must be full or detached, not {self.srkl!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 tokens (one to read, one to predict), not {self.max_length}"
            )

    def _check_text(self) -> None:
        """Reject options of comparisons by text that are out of range, or without effect."""
        if self.pairing not in (None, *PAIRINGS) or self.merge not in MERGES:
            name, choices = ("merge", MERGES) if self.merge not in MERGES else ("pairing", PAIRINGS)
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.merge != "observed" and self.text_options.pairing != "text":
            raise ValueError("merge is set, but tokens compared by position are not merged: set pairing to text")
        for name in ("crossentropy_weight", "distillation_weight", "matched_weight", "unmatched_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, not {value}")
        if (self.matched_weight is None) != (self.unmatched_weight is None):
            raise ValueError("matched_weight and unmatched_weight belong together: set both, or neither")

    def _check_on_policy(self) -> None:
        """Reject options with which the student cannot write its completions, or does so in vain."""
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy must lie in [0, 1] (a share of steps), not {self.on_policy}")
        if not self.on_policy:
            unread = ("max_new_tokens", 128), ("sampling_temperature", 1.0)
            if given := [name for name, default in unread if getattr(self, name) != default]:
                raise ValueError(f"{given[0]} is set, but is only used with on_policy: set on_policy above 0")
            return
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        check_positive("sampling_temperature", self.sampling_temperature)
        if not self.reads_own:
            raise ValueError("on_policy is set, but the student's completions have no weight: set lmbda above 0")
        if self.precompute_teacher:
            raise ValueError(
                "on_policy writes completions in every step, and precompute_teacher reads the teacher on given ones: set one of them"
            )

    def _schedule(self, preset: Curriculum) -> Curriculum:
        """Return the preset with the options that are set.

        Args:
            preset: one of `CURRICULA`.

        Raises:
            ValueError: an option has no effect, or is out of range.
        """
        overrides = {each: value for each in SCHEDULE if (value := getattr(self, each)) is not None}
        moves = dataclasses.replace(
            preset, **{n: overrides[n] for n in ("adaptive_alpha", "gradual_beta") if n in overrides}
        )
        for switch, readers in (
            ("gradual_beta", ("beta_max", "beta_ramp")),
            ("adaptive_alpha", ("alpha_low", "alpha_high")),
        ):
            if not getattr(moves, switch) and (unread := [name for name in readers if name in overrides]):
                raise ValueError(
                    f"{unread[0]} is set, but is only used with {switch}, which is False: set {switch} to True"
                )
        if (not self.kind.follows_curriculum or not moves.adaptive_alpha) and (
            alpha := overrides.get("alpha_0")
        ) is not None:
            overrides |= {
                "alpha_low": min(PAPER.low, alpha),
                "alpha_high": max(PAPER.high, alpha),
            }  # alpha does not move
        names = {"alpha_low": "low", "alpha_high": "high", "loss_factor": "factor", "beta_ramp": "ramp"}
        return dataclasses.replace(preset, **{names.get(name, name): value for name, value in overrides.items()})

    def _check_curriculum(self) -> None:
        if self.curriculum not in CURRICULA:
            raise ValueError(
                f"curriculum must be one of {', '.join(CURRICULA)}, not {self.curriculum!r}{did_you_mean(self.curriculum, CURRICULA)}"
            )
        self.schedule: Curriculum = self._schedule(CURRICULA[self.curriculum])
        if self.first_epoch < 1 or (self.all_epochs is not None and self.all_epochs < self.first_epoch):
            raise ValueError(
                f"first_epoch must be 1 or more and at most all_epochs, not {self.first_epoch} of {self.all_epochs}"
            )
        if not self.kind.follows_curriculum or (self.max_steps > 0 and self.all_epochs is None):
            return
        moving = [name for name in ("adaptive_alpha", "gradual_beta") if getattr(self.schedule, name)]
        if self.schedule.ramp is not None:
            moving = [name for name in moving if name != "gradual_beta"]  # a ramp counts steps
        if moving and (self.all_epochs or self.num_train_epochs) <= 1:
            raise ValueError(
                f"{moving[0]} needs several epochs (alpha adapts from the second one on, beta is 1 throughout a single one), and "
                "there is one: raise num_train_epochs, or all_epochs where runs are rounds, or set curriculum to released"
            )
