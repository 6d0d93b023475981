"""`DistillationPairTrainer`: a student learns from a teacher on pairs of texts, one of the teacher's and one of its own.

A row is that of a preference trainer: `chosen` is the teacher's text y_t, `rejected` the student's y_s, as the strategy
`teacher_student` of contralto.data_gen makes them. With p the teacher, q the student and D a divergence at a token:

    D(y) = 1/|y| sum_i D(p(. | x, y_<i), q(. | x, y_<i))        loss = w_t D_t(y_t) + w_s D_s(y_s)

`loss_type` says which:

| loss_type | D_t on the teacher's text | D_s on the student's | weights |
|---|---|---|---|
| `distillm2` | skew KL | skew reverse KL | of the curriculum: DistiLLM-2, Ko et al. 2025, arXiv 2503.07067 |
| `skew_kl` | skew KL | the same | 1 - lmbda, lmbda: DistiLLM's loss, Ko et al. 2024, arXiv 2402.03898 |
| `skew_reverse_kl` | skew reverse KL | the same | 1 - lmbda, lmbda: DistiLLM's other loss |
| `jsd` | generalised Jensen-Shannon | the same | 1 - lmbda, lmbda: GKD, Agarwal et al. 2024, arXiv 2306.13649 |
| `forward_kl` | forward KL | the same | 1, 0: knowledge distillation, Hinton et al. 2015, arXiv 1503.02531 |
| `reverse_kl` | reverse KL | the same | 0, 1: MiniLLM's divergence, Gu et al. 2024, arXiv 2306.08543, here per token |
| `tvd` | total variation | the same | 1 - lmbda, lmbda: Wen et al. 2023, arXiv 2307.15190 |
| `sft` | -log q | none | 1, 0: sequence-level distillation, Kim & Rush 2016, arXiv 1606.07947; no teacher is loaded |

A text that has no weight is not run through any model.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's recipe is a ValueError like any other mistake in it)

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig, IntervalStrategy, PreTrainedModel

from contralto.align.config import StagedConfig
from contralto.align.curriculum import PAPER, RELEASED, Curriculum
from contralto.align.divergences import Head, chunked_divergence, chunked_logps
from contralto.align.reference import reference_hash
from contralto.align.seams import (
    IGNORED,
    Batch,
    NoReference,
    Request,
    Scored,
    StagedTrainer,
    create_model_from_path,
    head_of,
    install_head,
)
from contralto.align.teacher import Rows, TeacherStates, WithStates, default_folder, load_head, save_head
from contralto.names import locate

__all__ = ["LOSSES", "DistillationConfig", "DistillationPairTrainer", "Found", "Teacher"]


class Kind(NamedTuple):
    """A loss: what is learned on which text, and from which settings."""

    chosen: str
    rejected: str
    lmbda: float
    """The default weight of the student's text."""
    settings: tuple[str, ...] = ()
    """Of `OWN`."""


SCHEDULE = ("alpha_0", "alpha_low", "alpha_high", "beta_0", "adaptive_alpha", "gradual_beta", "loss_factor")
"""What `curriculum` sets, and options of their own change."""
CURRICULA = {"paper": PAPER, "released": RELEASED}
TEACHER = (
    *("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs"),
    *("teacher_load_in_4bit", "teacher_load_in_8bit", "precompute_teacher", "teacher_cache"),
)
SKEW, SHARED = ("alpha_0",), ("temperature", *TEACHER)
LOSSES = {
    "distillm2": Kind(
        "skew_kl", "skew_reverse_kl", 0.5, (*SHARED, *SCHEDULE, "curriculum", "srkl", "first_epoch", "all_epochs")
    ),
    "skew_kl": Kind("skew_kl", "skew_kl", 0.5, (*SHARED, *SKEW, "lmbda")),
    "skew_reverse_kl": Kind("skew_reverse_kl", "skew_reverse_kl", 0.5, (*SHARED, *SKEW, "srkl", "lmbda")),
    "jsd": Kind("jsd", "jsd", 0.5, (*SHARED, "beta", "lmbda")),
    "forward_kl": Kind("forward_kl", "forward_kl", 0.0, (*SHARED, "lmbda")),
    "reverse_kl": Kind("reverse_kl", "reverse_kl", 1.0, (*SHARED, "lmbda")),
    "tvd": Kind("tvd", "tvd", 0.5, (*SHARED, "lmbda")),
    "sft": Kind("nll", "nll", 0.0),
}
"""The losses by name; see the table above."""
OWN = tuple(dict.fromkeys(name for kind in LOSSES.values() for name in kind.settings))
OF_PREFERENCES = (
    *("loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing", "padding_free"),
    *("use_weighting", "discopop_tau", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
)
"""Options of `DPOConfig` that have no meaning here."""


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text.replace("%", "%%"), **metadata})


@dataclass
class DistillationConfig(StagedConfig):
    """The options of `DistillationPairTrainer`.

    Those of `trl.DPOConfig` (1.16) and `transformers.TrainingArguments`, without those of preference losses. An option that the
    loss does not read is refused, as is everything else that can be seen to be wrong before a model is loaded.

    Args:
        loss_type: one of `LOSSES`.
        lmbda: the weight of the student's texts, in [0, 1] (GKD's lambda); None takes the default of the loss.
        beta: of `jsd`: the teacher's share of the mixture, in [0, 1].
        temperature: both models' logits are divided by it in the divergence.
        curriculum: of `distillm2`: `paper`, or `released` for what the released code does (SKL + SRKL, alpha 0.1, the
            skew reverse KL's mixture held fixed).
        alpha_0, alpha_low, alpha_high, beta_0, adaptive_alpha, gradual_beta, loss_factor: these of the curriculum otherwise, see
            `contralto.align.curriculum.Curriculum`; `alpha_0` is also the alpha of `skew_kl` and `skew_reverse_kl`.
        srkl: the gradient of the skew reverse KL, `full` or `detached`, see `contralto.align.divergences.skew_reverse_kl`.
        first_epoch: the curriculum's epoch that this run begins with, where runs are rounds of one training.
        all_epochs: the curriculum's number of epochs E; None takes that of this run.
        teacher_model_name_or_path: a folder, a hub id, or `testbed:NAME`; a folder with an adapter is loaded with its base.
        teacher_model_revision: of a hub id.
        teacher_model_init_kwargs: for `from_pretrained`. Unless it names a dtype, the teacher has that of its weights on an
            accelerator, and float32 on a CPU.
        teacher_load_in_4bit, teacher_load_in_8bit: quantised by bitsandbytes (NF4, or LLM.int8).
        precompute_teacher: compute the teacher's last hidden states once, keep them on disk, and train without the teacher.
        teacher_cache: the folder for them; None takes one beside the caches of `datasets`.

    Raises:
        ValueError: whatever is wrong, in one sentence.

    Example:
        >>> DistillationConfig("out", loss_type="jsd", lmbda=1.0, report_to="none").weights
        (0.0, 1.0)
        >>> DistillationConfig("out", loss_type="sft", beta=0.1, report_to="none")
        Traceback (most recent call last):
            ...
        ValueError: beta is set, and sft does not read it; it belongs to jsd
    """

    learning_rate: float = _option(5e-5, "The initial learning rate for AdamW.")
    loss_type: list[str] = field(
        default_factory=lambda: ["distillm2"], metadata={"help": f"The loss, one of: {', '.join(LOSSES)}."}
    )
    lmbda: float | None = _option(None, "Weight of the student's texts (default: that of the loss).")
    beta: float = _option(0.5, "Of jsd: the teacher's share of the mixture.")
    temperature: float = _option(1.0, "Both models' logits are divided by it in the divergence.")
    curriculum: str = _option("paper", "Of distillm2: the schedules of alpha and beta.", choices=list(CURRICULA))
    alpha_0: float | None = _option(None, "The skew where it does not adapt.")
    alpha_low: float | None = _option(None, "The least alpha.")
    alpha_high: float | None = _option(None, "The greatest alpha.")
    beta_0: float | None = _option(None, "The least weight of the student's texts in the curriculum.")
    adaptive_alpha: bool | None = _option(None, "Whether alpha adapts to each text, from the second epoch on.")
    gradual_beta: bool | None = _option(None, "Whether the weight of the student's texts grows.")
    loss_factor: float | None = _option(None, "What stands before the loss of distillm2: 0.5 in the paper.")
    srkl: str | None = _option(None, "Gradient of the skew reverse KL.", choices=["full", "detached"])
    first_epoch: int = _option(1, "The curriculum's epoch that this run begins with.")
    all_epochs: int | None = _option(None, "The curriculum's number of epochs (default: that of this run).")
    teacher_model_name_or_path: str | None = _option(None, "The teacher: a folder, a hub id, or testbed:NAME.")
    teacher_model_revision: str | None = _option(None, "The teacher's revision.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For the teacher's from_pretrained."}
    )
    teacher_load_in_4bit: bool = _option(False, "Load the teacher in 4 bits (NF4, bitsandbytes).")
    teacher_load_in_8bit: bool = _option(False, "Load the teacher in 8 bits (LLM.int8, bitsandbytes).")
    precompute_teacher: bool = _option(
        False, "Keep the teacher's hidden states on disk, and train without the teacher."
    )
    teacher_cache: str | None = _option(None, "Folder of precomputed teachers (default: beside datasets' caches).")

    _VALID_DICT_FIELDS = [*StagedConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        given = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if len(given) != 1 or given[0] not in LOSSES:
            raise ValueError(
                f"loss_type must be one of {', '.join(LOSSES)}, not {', '.join(map(str, given)) or 'none'}"
            )
        self.loss_type, self.kind = given, LOSSES[given[0]]
        self._check_read(given[0])
        self._check_teacher()
        self._check_numbers()
        self._check_curriculum()
        self.precompute_ref_log_probs = self.precompute_teacher  # so DPOTrainer asks for the columns of all data sets
        super().__post_init__()
        alone = self.per_device_train_batch_size * self.world_size == 1
        if alone and self.kind is LOSSES["distillm2"] and self.schedule.adaptive_alpha:
            raise ValueError(
                "adaptive_alpha compares the texts of a batch, and per_device_train_batch_size is 1: raise it, or set "
                "adaptive_alpha to False"
            )

    @property
    def weights(self) -> tuple[float, float]:
        """Of the teacher's text and of the student's; those of `distillm2` at beta_0."""
        if self.kind is LOSSES["distillm2"]:
            return self.schedule.factor * (1 - self.schedule.beta_0), self.schedule.factor * self.schedule.beta_0
        share = self.kind.lmbda if self.lmbda is None else self.lmbda
        return 1.0 - share, share

    @property
    def alpha(self) -> float:
        """The skew where it does not adapt."""
        return self.schedule.alpha_0

    @property
    def srkl_gradient(self) -> Literal["full", "detached"]:
        """`srkl`, or what goes with the curriculum."""
        default = "detached" if self.curriculum == "released" else "full"
        return cast(Literal["full", "detached"], self.srkl or default)

    def _check_read(self, name: str) -> None:
        """Nothing is set that nobody reads."""
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        if unread := [each for each in OWN if each not in self.kind.settings and getattr(self, each) != defaults[each]]:
            users = [other for other, kind in LOSSES.items() if unread[0] in kind.settings]
            raise ValueError(f"{unread[0]} is set, and {name} does not read it; it belongs to {', '.join(users)}")
        if strange := [each for each in OF_PREFERENCES if getattr(self, each) != defaults[each]]:
            raise ValueError(
                f"{strange[0]} is set, and belongs to preference losses, not to distillation: leave it out"
            )
        if self.precompute_ref_log_probs and not self.precompute_teacher:
            raise ValueError("precompute_ref_log_probs is for preference losses; for a teacher set precompute_teacher")

    def _check_teacher(self) -> None:
        if self.teacher_load_in_4bit and self.teacher_load_in_8bit:
            raise ValueError("teacher_load_in_4bit and teacher_load_in_8bit are both set: set one of them")
        if self.teacher_model_name_or_path is None:
            options = (each for each in TEACHER[1:5] if getattr(self, each))
            if option := next(options, None):
                raise ValueError(f"{option} is set, and no teacher_model_name_or_path, to which it applies")
        if self.teacher_cache is not None and not self.precompute_teacher:
            raise ValueError("teacher_cache is set, and is only used with precompute_teacher: set both")

    def _check_numbers(self) -> None:
        for name in ("lmbda", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {value}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, not {self.temperature}")
        if self.srkl not in (None, "full", "detached"):
            raise ValueError(f"srkl must be full or detached, not {self.srkl!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 tokens (one to read, one to predict), not {self.max_length}"
            )

    def _check_curriculum(self) -> None:
        if self.curriculum not in CURRICULA:
            raise ValueError(f"curriculum must be one of {', '.join(CURRICULA)}, not {self.curriculum!r}")
        names = {"alpha_low": "low", "alpha_high": "high", "loss_factor": "factor"}
        given = {names.get(each, each): value for each in SCHEDULE if (value := getattr(self, each)) is not None}
        if self.kind is not LOSSES["distillm2"] and (alpha := given.get("alpha_0")) is not None:
            given |= {"low": min(PAPER.low, alpha), "high": max(PAPER.high, alpha)}  # alpha does not move
        self.schedule: Curriculum = dataclasses.replace(CURRICULA[self.curriculum], **given)
        if self.first_epoch < 1 or (self.all_epochs is not None and self.all_epochs < self.first_epoch):
            raise ValueError(
                f"first_epoch must be 1 or more and at most all_epochs, not {self.first_epoch} of {self.all_epochs}"
            )
        if self.kind is not LOSSES["distillm2"] or (self.max_steps > 0 and self.all_epochs is None):
            return
        moving = [name for name in ("adaptive_alpha", "gradual_beta") if getattr(self.schedule, name)]
        if moving and (self.all_epochs or self.num_train_epochs) <= 1:
            raise ValueError(
                f"{moving[0]} needs several epochs (alpha adapts from the second one on, beta is 1 throughout a single one), and "
                "there is one: raise num_train_epochs, or all_epochs where runs are rounds, or set curriculum to released"
            )


class Teacher(NamedTuple):
    """What the teacher says of the tokens that count."""

    states: Tensor
    """`(N, H)`."""
    head: Head


class Found(NamedTuple):
    """What the student's forward finds, of R texts of N tokens."""

    total: Tensor
    """The loss."""
    values: Tensor
    """`(R,)` the mean divergence of each text, without gradient."""
    alpha: Tensor | None
    """`(R,)` how much it is skewed; None for other divergences."""
    logps: Tensor | None
    """`(R,)` the student's mean log-probability per token; None where nobody wants it."""
    teacher_logps: Tensor | None


class Texts(NamedTuple):
    """The texts of a batch that count."""

    batch: Batch
    rows: dict[str, slice]
    """Which of its rows are `chosen`, and which `rejected`."""
    pairs: int


class DistillationPairTrainer(StagedTrainer):
    """Trains a student on a teacher's texts and its own by divergences between the two models at every token.

    Everything that TRL's `DPOTrainer` takes, it takes: data, collators, callbacks, PEFT, saving, accelerate. Only the tokens of the texts
    go through the heads, a few at a time, and no logits are kept. Where the two vocabularies differ in size, as they do where models of
    one family pad theirs, both softmaxes are over the tokens that both have.

    The curriculum's mean gap m is over the batch of all processes. An evaluation takes alpha_0 and beta_0, so that its losses
    compare over time.

    Args:
        model: the student: a name or folder, a model of transformers, or one with an adapter of peft.
        teacher: a loaded model, quantised or not; None takes `args.teacher_model_name_or_path`.
        args: a `DistillationConfig`.
        how: the other arguments of `DPOTrainer`: `train_dataset`, `eval_dataset`, `processing_class`, `peft_config`, `callbacks`,
            `data_collator`, `optimizers`, `quantization_config`.

    Raises:
        ValueError: whatever is wrong, in one sentence; before a model is loaded where that can be.

    Example:
        >>> DistillationPairTrainer("any", args=DistillationConfig("out", report_to="none", num_train_epochs=2))
        Traceback (most recent call last):
            ...
        ValueError: distillm2 needs a teacher: pass a loaded model, or set teacher_model_name_or_path
    """

    _tag_names = ["trl", "contralto", "distillation"]  # noqa: RUF012
    _name = "DistillationPairTrainer"
    _paper: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, model: Any, teacher: Any = None, args: DistillationConfig | None = None, **how: Any) -> None:
        if not isinstance(args, DistillationConfig):
            raise ValueError(f"args must be a DistillationConfig, not {type(args).__name__}")
        _check(model, teacher, args, how)
        self.uses_teacher = args.loss_type != ["sft"]
        self.sides = {
            side: name
            for side, name, weight in zip(("chosen", "rejected"), args.kind[:2], args.weights, strict=True)
            if weight or args.loss_type == ["distillm2"]
        }
        self._teacher: Any = _without_adapter(teacher)
        self._head: Head | None = None
        if isinstance(model, str) and how.get("peft_config") is not None and torch.accelerator.is_available():
            args.model_init_kwargs = {"dtype": "bfloat16"} | dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
        super().__init__(model, self._reference_at_start(args), args=args, **how)
        if not self.uses_teacher or args.precompute_teacher:
            self.ref_model = None
        else:
            _check_vocabulary(self.processing_class, self.unwrapped(self.ref_model).config.get_text_config().vocab_size)
        self._teacher = None
        self.data_collator = WithStates(self.data_collator)

    def _reference_at_start(self, args: DistillationConfig) -> Any:
        """What `DPOTrainer.__init__` takes for the reference."""
        if not self.uses_teacher or args.precompute_teacher:
            return NoReference() if args.deepspeed_plugin is None else None
        return self._loaded(args)

    # ------------------------------------------------------------------------------------------------------ the stages

    def reference(self, batch: Batch) -> Teacher | None:
        """The teacher's hidden states at the tokens that count, from disk or by a forward."""
        if not self.uses_teacher:
            return None
        if self.args.precompute_teacher:
            assert batch.teacher_states is not None
            assert self._head is not None
            return Teacher(batch.teacher_states.to(self._head.weight.dtype), self._head)
        with self.as_reference() as (model, bare):
            states = self.ask(model, self.texts(batch).batch, Request(hidden=True)).hidden
            head = head_of(bare)
        assert states is not None
        return Teacher(states.to(head.weight.dtype), head)

    def score(self, model: Any, batch: Batch, reference: Teacher | None) -> Scored:
        """The student's forward, and the divergences."""
        texts = self.texts(batch)
        batch = texts.batch
        if self.aux_loss_enabled:
            batch = batch._replace(inputs=batch.inputs | {"output_router_logits": True})
        return self.ask(model, batch, Request(function=partial(self.compare, texts, reference)))

    def loss(self, batch: Batch, policy: Scored, reference: Teacher | None) -> Found:
        """What the forward found."""
        found: Found = policy.found
        return found

    def report(self, batch: Batch, policy: Scored, reference: Teacher | None, loss: Found) -> None:
        """The mean of each side's divergence, alpha, beta, and the models' log-probabilities per token."""
        texts = self.texts(batch)
        sums = {"pairs": torch.tensor(texts.pairs), "tokens": texts.batch.inputs["attention_mask"].sum()}
        per_text = {"loss": loss.values, "alpha": loss.alpha, "logps": loss.logps, "teacher_logps": loss.teacher_logps}
        for side, rows in texts.rows.items():
            sums |= {f"{name}/{side}": each[rows].sum() for name, each in per_text.items() if each is not None}
        if policy.aux_loss is not None:
            sums["aux_loss"] = policy.aux_loss * texts.pairs
        totals = self.gathered(sums)
        self.count_tokens(round(totals["tokens"]))
        self.note(
            **{name: value / totals["pairs"] for name, value in totals.items() if name not in ("pairs", "tokens")}
        )
        if self.args.loss_type == ["distillm2"] and self.mode == "train":
            self.note(beta=self.args.schedule.beta(**self.moment()))

    # -------------------------------------------------------------------------------------------------- the comparison

    def texts(self, batch: Batch) -> Texts:
        """The batch without the texts that have no weight."""
        pairs = len(batch.labels) // 2
        halves = {"chosen": slice(0, pairs), "rejected": slice(pairs, 2 * pairs)}
        if len(self.sides) == 2:
            return Texts(batch, halves, pairs)
        (side,) = self.sides
        rows = halves[side]
        if batch.inputs.keys() <= {"input_ids", "attention_mask"}:
            inputs = {name: value[rows] for name, value in batch.inputs.items()}
            kept = batch._replace(
                inputs=inputs, labels=batch.labels[rows], mask=batch.mask[rows], lengths=batch.lengths[rows]
            )
            return Texts(kept, {side: slice(0, pairs)}, pairs)
        own = torch.zeros_like(batch.lengths, dtype=torch.bool)  # images do not lie row by row: all rows stay
        own[rows] = True
        labels, mask = batch.labels.masked_fill(~own[:, None], IGNORED), batch.mask & own[:, None]
        return Texts(batch._replace(labels=labels, mask=mask), {side: rows}, pairs)

    def compare(self, texts: Texts, teacher: Teacher | None, hidden: Tensor, head: Head, targets: Tensor) -> Found:
        """The loss of the batch, from what goes into the student's head; runs within its forward."""
        mask = texts.batch.mask
        text, lengths = mask.nonzero()[:, 0], mask.sum(-1).clamp(min=1)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weights = self._weights(texts, lengths.to(exact))[text]
        if teacher is None:
            of_targets = chunked_logps(hidden, head, targets).logps
            return Found(-(weights * of_targets).sum(), -_means(of_targets, text, lengths), None, None, None)
        size = min(len(head.weight), len(teacher.head.weight))
        teacher = Teacher(teacher.states, _first(teacher.head, size))
        logps = self._logps(hidden, _first(head, size), teacher, targets, text, lengths)
        alpha = self._alpha(texts, *logps, like=weights.new_empty(len(lengths)))
        counts = {side: int(count) for side, count in zip(texts.rows, _counts(texts), strict=True)}
        names = {name: sum(n for side, n in counts.items() if self.sides[side] == name) for name in self.sides.values()}
        total, values = self._divergence(
            names, hidden, _first(head, size), teacher, weights, None if alpha is None else alpha[text]
        )
        return Found(total, _means(values, text, lengths), alpha, *logps)

    def _divergence(
        self, names: dict[str, int], hidden: Tensor, head: Head, teacher: Teacher, weights: Tensor, alpha: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        args, learning = self.args, torch.is_grad_enabled()
        found = chunked_divergence(
            names,
            hidden,
            head,
            teacher.states,
            teacher.head,
            weights=weights if learning else None,
            alpha=args.alpha if alpha is None else alpha,
            beta=args.beta,
            srkl=args.srkl_gradient,
            temperature=args.temperature,
        )
        total = (weights * found.divergence).sum() if found.total is None else found.total
        return total, found.divergence.detach()

    def _weights(self, texts: Texts, lengths: Tensor) -> Tensor:
        """`(R,)` what a token of each text counts."""
        args = self.args
        weights: tuple[float, float] = args.weights
        if args.loss_type == ["distillm2"] and self.mode == "train":
            weights = args.schedule.weights(**self.moment())
        found = torch.zeros_like(lengths)
        for side, rows in texts.rows.items():
            found[rows] = weights[side == "rejected"] / texts.pairs
        return found / lengths

    @torch.no_grad()
    def _logps(
        self, hidden: Tensor, head: Head, teacher: Teacher, targets: Tensor, text: Tensor, lengths: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(R,)` mean log-probabilities per token of student and teacher, where alpha or the log needs them."""
        if not (self._adapts() or self.reports()):
            return None, None
        own = head._replace(weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        both = ((hidden.detach(), own), (teacher.states, teacher.head))
        student, teachers = (_means(chunked_logps(*model, targets).logps, text, lengths) for model in both)
        return student, teachers

    def _adapts(self) -> bool:
        moves = self.args.loss_type == ["distillm2"] and self.args.schedule.adaptive_alpha
        return moves and self.mode == "train" and self.moment()["epoch"] > 1

    def _alpha(
        self, texts: Texts, logps: Tensor | None, teacher_logps: Tensor | None, *, like: Tensor
    ) -> Tensor | None:
        """`(R,)`."""
        if not any(name.startswith("skew") for name in self.sides.values()):
            return None
        found = torch.full_like(like, self.args.alpha)
        if not self._adapts() or logps is None or teacher_logps is None:
            return found
        for side, rows in texts.rows.items():
            own, other = (teacher_logps[rows], logps[rows]) if side == "chosen" else (logps[rows], teacher_logps[rows])
            mean = self._mean(own.exp() - other.exp())
            found[rows] = self.args.schedule.alpha(own, other, epoch=self.moment()["epoch"], mean_gap=mean).to(found)
        return found

    def _mean(self, values: Tensor) -> Tensor:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return values.mean()
        total = self.accelerator.reduce(torch.stack([values.sum(), values.new_tensor(len(values))]), "sum")
        mean: Tensor = total[0] / total[1]
        return mean

    def moment(self) -> dict[str, int]:
        """Where the curriculum stands: the arguments of `Curriculum.weights`."""
        args, state = self.args, self.state
        epochs = args.all_epochs or state.num_train_epochs
        per_epoch = state.max_steps / state.num_train_epochs
        done = args.first_epoch - 1
        return {
            "epoch": min(done + int(state.epoch or 0) + 1, epochs),
            "epochs": epochs,
            "step": min(round(done * per_epoch) + state.global_step, round(epochs * per_epoch)),
            "steps": round(epochs * per_epoch),
        }

    # --------------------------------------------------------------------------------------- the teacher, and its states

    def _loaded(self, args: DistillationConfig) -> Any:
        if self._teacher is None:
            self._teacher = _load(args)
        if not self._teacher.get_output_embeddings().weight.is_floating_point():
            raise ValueError(
                "the teacher's head is quantised, and it is read row by row: leave it out of the quantisation"
            )
        return self._teacher

    def precompute(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The data set with the places of the teacher's states, from disk or computed now."""
        if self._teacher is None and self.args.teacher_model_name_or_path is None:
            raise ValueError("the teacher was a loaded model, which is gone: pass this data set as eval_dataset")
        key = _key(self._teacher, self.args, self.accelerator.mixed_precision, list(self.sides))
        states = TeacherStates(
            self.args.teacher_cache or default_folder(),
            key,
            lambda rows: self._states_of(rows, batch_size),
            lambda: _bytes_per_token(self._loaded(self.args)),
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            wait=self.accelerator.wait_for_everyone,
        )
        dataset, path = states.add(dataset, name), states.folder / "head.safetensors"
        if self.accelerator.is_main_process and not path.is_file():
            save_head(head_of(self._loaded(self.args)), path)
        self.accelerator.wait_for_everyone()
        self._head = load_head(path, self.accelerator.device)
        return dataset

    @torch.no_grad()
    def _states_of(self, rows: Rows, batch_size: int) -> list[tuple[Tensor, list[int]]]:
        """The states of rows, in batches of similar length."""
        teacher = self._loaded(self.args)
        _check_vocabulary(self.processing_class, teacher.config.get_text_config().vocab_size)
        if not getattr(teacher, "is_quantized", False):
            teacher.to(self.accelerator.device)
        install_head(teacher.eval())
        found: dict[int, tuple[Tensor, list[int]]] = {}
        order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i].values())))
        for start in range(0, len(order), batch_size):
            own = order[start : start + batch_size]
            texts = self.texts(Batch.of(self._prepare_inputs(self.data_collator([dict(rows[i]) for i in own]))))
            with self.accelerator.autocast():
                states = self.ask(teacher, texts.batch, Request(hidden=True)).hidden
            assert states is not None
            lengths = texts.batch.mask.sum(-1).tolist()
            split = dict(enumerate(torch.split(states.cpu(), lengths)))
            for at, i in enumerate(own):
                places = [part.start + at for part in texts.rows.values()]
                found[i] = torch.cat([split[place] for place in places]), [lengths[place] for place in places]
        return [found[i] for i in range(len(rows))]


def _means(values: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
    """`(R,)` the mean of each text's tokens, without gradient."""
    values = values.detach()
    return values.new_zeros(len(lengths)).index_add_(0, text, values) / lengths


def _counts(texts: Texts) -> list[int]:
    """Tokens per side, with one wait for the device."""
    counts: list[int] = torch.stack([texts.batch.mask[rows].sum() for rows in texts.rows.values()]).tolist()
    return counts


def _first(head: Head, size: int) -> Head:
    """The head of the first tokens alone."""
    return head._replace(weight=head.weight[:size], bias=None if head.bias is None else head.bias[:size])


# ------------------------------------------------------------------------------------------------------------ the teacher


def _load(args: DistillationConfig) -> Any:
    """The teacher that the options name."""
    name = cast(str, args.teacher_model_name_or_path)
    cpu = args.device.type == "cpu"
    options: dict[str, Any] = {"dtype": "float32" if cpu else "auto", "trust_remote_code": args.trust_remote_code}
    if args.teacher_model_revision is not None:
        options["revision"] = args.teacher_model_revision
    if args.teacher_load_in_4bit or args.teacher_load_in_8bit:
        kind: dict[str, Any] = {"load_in_8bit": True}
        if args.teacher_load_in_4bit:
            kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        options["quantization_config"] = BitsAndBytesConfig(**kind)  # type: ignore[no-untyped-call]
        options["device_map"] = {"": str(args.device)}
    more = cast(dict[str, Any], args.teacher_model_init_kwargs or {})
    return create_model_from_path(locate(name), **{"device_map": None} | options | more)


def _without_adapter(teacher: Any) -> Any:
    """A model of peft as the model that its adapter was put into, where the adapter stays in force."""
    return teacher.get_base_model() if isinstance(teacher, PeftModel) else teacher


def _key(teacher: Any, args: DistillationConfig, precision: str, sides: list[str]) -> str:
    """A hash of all that a teacher's states depend on but the rows."""
    how = (precision, args.max_length, args.truncation_mode, sides)
    if teacher is not None:
        return reference_hash(teacher, is_peft=False, more=how)
    from hashlib import sha256

    from contralto.data_gen.engines import weights_digest

    name = cast(str, args.teacher_model_name_or_path)
    options = [getattr(args, each) for each in TEACHER[1:5]]
    return sha256(repr((weights_digest(name), options, args.device.type, how)).encode()).hexdigest()


def _bytes_per_token(teacher: Any) -> int:
    size: int = teacher.config.get_text_config().hidden_size
    return int(size * teacher.dtype.itemsize)


# --------------------------------------------------------------------------------------- what can be seen before loading


def _check(model: Any, teacher: Any, args: DistillationConfig, how: Mapping[str, Any]) -> None:
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise ValueError(f"model must be a name, a folder or a loaded model, not a {type(model).__name__}")
    _check_teacher(model, teacher, args)
    config = how.get("peft_config")
    if config is not None and not isinstance(config, PeftConfig):
        raise ValueError(f"peft_config must be a configuration of peft, not a {type(config).__name__}")
    if config is not None and isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already, and peft_config asks for another: leave peft_config out")
    if config is not None and config.is_prompt_learning:
        raise ValueError("learned prompts change which tokens stand where, and a divergence compares them: use LoRA")
    _check_shards(args)
    _check_datasets(args, how)
    if args.teacher_model_name_or_path is not None:
        _check_tokenizers(model, args, how.get("processing_class"))


def _check_teacher(model: Any, teacher: Any, args: DistillationConfig) -> None:
    (name,) = args.loss_type
    if name == "sft":
        if teacher is not None:
            raise ValueError("sft learns from the teacher's texts alone: leave the teacher out")
        return
    if teacher is None and args.teacher_model_name_or_path is None:
        raise ValueError(f"{name} needs a teacher: pass a loaded model, or set teacher_model_name_or_path")
    if teacher is not None and args.teacher_model_name_or_path is not None:
        raise ValueError("there are two teachers, the model and teacher_model_name_or_path: give one")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise ValueError(f"teacher must be a loaded model, not a {type(teacher).__name__}; a name goes into the config")
    if teacher is not None and teacher is model:
        raise ValueError("the teacher is the student itself, and would be trained with it: pass another model")


def _check_shards(args: DistillationConfig) -> None:
    zero_3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    sharding: Any = args.fsdp_config or {}
    fsdp_1 = bool(args.fsdp) and int(sharding.get("version", 2)) == 1
    if (zero_3 or fsdp_1) and args.loss_type != ["sft"] and not args.precompute_teacher:
        raise ValueError(
            "the teacher's whole head is read, which ZeRO 3 and FSDP 1 keep in shards: set precompute_teacher, or use FSDP 2 or ZeRO 2"
        )


def _check_datasets(args: DistillationConfig, how: Mapping[str, Any]) -> None:
    train, evaluation = how.get("train_dataset"), how.get("eval_dataset")
    if train is None:
        raise ValueError("train_dataset is missing: give the pairs to train on")
    if isinstance(train, IterableDataset) and args.max_steps <= 0:
        raise ValueError("a streamed train_dataset has no length: set max_steps")
    if args.eval_strategy != "no" and evaluation is None:
        raise ValueError(
            f"eval_strategy is {IntervalStrategy(args.eval_strategy).value}, and there is no eval_dataset: give one"
        )
    splits = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    for name, dataset in {"train_dataset": train, **splits}.items():
        if dataset is not None:
            _check_dataset(name, dataset, args)


def _check_dataset(name: str, dataset: Any, args: DistillationConfig) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(f"{name} must be a datasets.Dataset or IterableDataset, not a {type(dataset).__name__}")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} has no rows")
    if missing := [column for column in ("chosen", "rejected") if column not in first]:
        raise ValueError(
            f"{name} has no column {missing[0]}; a row has prompt, chosen (the teacher's text) and rejected (the student's)"
        )
    if args.precompute_teacher and isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is streamed, and precompute_teacher goes through all rows beforehand: set it to False"
        )
    if args.precompute_teacher and {"image", "images"} & set(first):
        raise ValueError(
            f"{name} has images, which are read as they come: precompute_teacher is for text, set it to False"
        )


def _check_tokenizers(model: Any, args: DistillationConfig, processing_class: Any) -> None:
    name = cast(str, args.teacher_model_name_or_path)
    student = model if isinstance(model, str) else str(model.config.name_or_path)
    own = getattr(processing_class, "tokenizer", processing_class) or AutoTokenizer.from_pretrained(student)
    other = AutoTokenizer.from_pretrained(locate(name), revision=args.teacher_model_revision or "main")
    theirs = other.get_vocab()
    if differing := sorted(token for token, id_ in own.get_vocab().items() if theirs.get(token) != id_):
        raise ValueError(
            f"{student} and {name} have different tokenizers ({len(differing)} tokens of the student's differ, such as "
            f"{differing[0]!r}), and distillation compares probabilities token by token"
        )


def _check_vocabulary(processing_class: Any, size: int) -> None:
    tokens = len(getattr(processing_class, "tokenizer", processing_class))
    if tokens > size:
        raise ValueError(
            f"the student's tokenizer has {tokens} tokens, and the teacher's head only {size}: distillation compares "
            "probabilities token by token, so both need the same tokenizer"
        )
