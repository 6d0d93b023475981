"""`DistillationPairTrainer`: a student learns from a teacher on pairs of completions, one of the teacher's and one of its own.

A row is that of a preference trainer: `chosen` is the teacher's completion y_t, `rejected` the student's y_s, as the strategy
`teacher_student` of contralto.data_gen makes them. With p the teacher, q the student and D a divergence at a token:

    D(y) = 1/|y| sum_i D(p(. | x, y_<i), q(. | x, y_<i))        loss = w_t D_t(y_t) + w_s D_s(y_s)

`loss_type` selects the divergences and weights, see `contralto.align.trainers.distillation_config`.

A completion without a weight is not run through any model; with a curriculum, in the steps in which it has none. Where the student's
never has one (`sft`, `forward_kl`, and others with `lmbda` 0), rows need no `rejected`.
"""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from contralto.align.caches.blocks import TokenRows, default_folder
from contralto.align.caches.teacher import TeacherStates, load_head, save_head
from contralto.align.cards.methods import distillation_methods
from contralto.align.cards.model_card import TrainedCard
from contralto.align.losses.chunked import Head, chunked_divergence, chunked_logps, first_tokens, vocabulary_size
from contralto.align.monitoring.audit_callback import DataAudit
from contralto.align.monitoring.log_report import LogReport
from contralto.align.trainers.base import StagedTrainer
from contralto.align.trainers.batches import PairBatch
from contralto.align.trainers.checks import located
from contralto.align.trainers.collators import TeacherPromptsCollator, TeacherStatesCollator
from contralto.align.trainers.config import require_config, with_adapter_dtype
from contralto.align.trainers.distillation_checks import (
    check_distillation,
    check_vocabulary_size,
    with_unread_rejected,
)
from contralto.align.trainers.distillation_config import LOSS_OPTIONS, DistillationConfig
from contralto.align.trainers.distillation_results import DistillationLoss, TeacherOutput, row_means
from contralto.align.trainers.on_policy import is_drawn, sampling_of, with_own_completions
from contralto.align.trainers.scoring import Scoring, TokenScores, install_head
from contralto.align.trainers.selection import CompletionBatch, select_sides
from contralto.align.trainers.teachers import (
    load_teacher,
    state_bytes,
    states_head,
    teacher_digest,
    teacher_states,
    without_adapter,
)
from contralto.align.trainers.text_comparison import TextComparison
from contralto.align.trl_compat import NoReference, gathered
from contralto.common.head import head_of

__all__ = ["DistillationLoss", "DistillationPairTrainer", "TeacherOutput"]

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")


class IdleSides(TrainerCallback):
    """Warn, before the first step, of completions to which the curriculum gives no weight."""

    def __init__(self, trainer: "DistillationPairTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn: the number of epochs is known now.

        Args:
            args: see `transformers.TrainerCallback`.
            state: see `transformers.TrainerCallback`.
            control: see `transformers.TrainerCallback`.
            kwargs: see `transformers.TrainerCallback`.
        """
        self.trainer.warn_of_idle_sides()


class DistillationPairTrainer(StagedTrainer):
    """Trains a student on a teacher's completions and its own by divergences between the two models at every token.

    It takes everything that TRL's `DPOTrainer` takes but the options of preference losses: data, collators, callbacks, PEFT, saving,
    accelerate. Only the tokens of completions go through the heads, a few at a time, and no logits are kept. Where the two vocabularies
    differ in size, as they do where models of one family pad theirs, both softmaxes are over the tokens that both have. A teacher with
    another tokenizer is for `uld` and `gold`, see `contralto.align.trainers.text_comparison`.

    The curriculum's mean gap m is over the batch of all processes. An evaluation takes alpha_0 and beta_0, so that its losses are
    comparable over time.

    Args:
        model: the student: a name or folder, a model of transformers, or one with an adapter of peft.
        teacher: a loaded model, quantised or not; None takes `args.teacher_model_name_or_path`.
        args: a `DistillationConfig`.
        kwargs: the other arguments of `DPOTrainer`: `train_dataset`, `eval_dataset`, `processing_class`, `peft_config`, `callbacks`,
            `data_collator`, `optimizers`, `quantization_config`.

    Raises:
        ValueError: an argument is wrong; before a model is loaded where that can be.

    Examples:
        >>> DistillationPairTrainer("any", args=DistillationConfig("out", report_to="none", num_train_epochs=2))
        Traceback (most recent call last):
            ...
        ValueError: distillm2 needs a teacher: pass a loaded model, or set teacher_model_name_or_path
    """

    _tag_names = ["trl", "contralto", "distillation"]  # noqa: RUF012

    def __init__(self, model: Any, teacher: Any = None, args: DistillationConfig | None = None, **kwargs: Any) -> None:
        args, model = require_config(args, DistillationConfig), located(model)
        if not args.reads_rejected:
            kwargs = with_unread_rejected(kwargs)
        check_distillation(model, teacher, args, kwargs)
        self.uses_teacher = args.kind.uses_teacher
        self.divergences = {
            side: name
            for side, name, weight in zip(SIDES, args.kind[:2], args.weights, strict=True)
            if weight or args.kind.follows_curriculum
        }
        """The divergence of each side that has a weight in any step."""
        self._teacher: Any = without_adapter(teacher)
        self._head: Head | None = None
        self._batches = 0
        args = with_adapter_dtype(args, model, kwargs.get("peft_config"))
        originals = {name: kwargs.get(name) for name in ("train_dataset", "eval_dataset")}
        # where both models write the same, there is nothing wrong
        self.audit = DataAudit(self, originals, skip={"same"})
        callbacks = [self.audit, IdleSides(self), *([LogReport(self)] if args.report else [])]
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), *callbacks]
        super().__init__(model, self._initial_reference(args), args=args, **kwargs)
        if not self.uses_teacher or args.precompute_teacher:
            self.ref_model = None
        elif not args.kind.text:
            check_vocabulary_size(
                self.processing_class, self.unwrap(self.ref_model).config.get_text_config().vocab_size
            )
        self._teacher = None
        self.data_collator = TeacherStatesCollator(self.data_collator)
        self._text = TextComparison(self) if args.kind.text else None
        if self._text is not None:
            self.train_dataset, self.eval_dataset = map(
                self._text.with_prompts, (self.train_dataset, self.eval_dataset)
            )
            self.data_collator = TeacherPromptsCollator(self.data_collator)

    def _initial_reference(self, args: DistillationConfig) -> Any:
        """Return what `DPOTrainer.__init__` gets as `ref_model`: the teacher, or a placeholder if none is loaded."""
        if not self.uses_teacher or args.precompute_teacher:
            return NoReference() if args.deepspeed_plugin is None else None
        return self._loaded(args)

    def describe_training(self) -> TrainedCard:
        """Return the divergences, with their papers and formulas, for the model card."""
        loss, changes = self.args.loss_type[0], self.args.kind.follows_curriculum
        methods = distillation_methods(loss, self.divergences, follows_curriculum=changes)
        fixed = dict(zip(SIDES, self.args.weights, strict=True))
        weights = [None] * len(methods) if changes else [fixed[side] for side in self.divergences]
        return TrainedCard(
            methods=methods,
            weights=weights,
            verb="distilled",
            notation="p: the teacher, q: the student, at every token of a completion",
            tags=[loss],
            teacher=self.args.teacher_model_name_or_path,
            findings=self.audit.findings,
            unread=frozenset(LOSS_OPTIONS) - set(self.args.kind.settings),
        )

    # ------------------------------------------------------------------------------------------------------ the stages

    def compute_step(self, model: Any, inputs: Any, *, return_outputs: bool) -> Any:
        """Run the four stages on a batch, in some steps with completions that the student writes first.

        Args:
            model: the student, with wrappers.
            inputs: the batch as the collator returned it, on the device.
            return_outputs: see `StagedTrainer.compute_step`.
        """
        share, training = self.args.on_policy, self.mode == "train"
        self._batches += training
        part = self._batches % self.args.gradient_accumulation_steps
        key = (self.args.seed, self.state.global_step, part, self.accelerator.process_index)
        if share == 1 or (training and is_drawn(share, *key)):
            inputs = with_own_completions(self.unwrap(model), inputs, sampling_of(self))
        return super().compute_step(model, inputs, return_outputs=return_outputs)

    def reference(self, batch: PairBatch) -> TeacherOutput | None:
        """Return the teacher's hidden states at the completion tokens, read or computed; None without a teacher.

        Args:
            batch: the pairs.
        """
        if not self.uses_teacher:
            return None
        if self.args.precompute_teacher:
            states = self.weighted(batch).states
            assert states is not None
            assert self._head is not None
            return TeacherOutput(states.to(self._head.weight.dtype), self._head)
        own, spans = self.weighted(batch).batch, None
        if self._text is not None:
            own, spans = self._text.read(self.weighted(batch))
        with self.reference_model() as (model, bare):
            states = self.score_tokens(model, own, Scoring(hidden=True)).hidden
            head = head_of(bare, gather=gathered)
        assert states is not None
        output = TeacherOutput(states if head is None else states.to(head.weight.dtype), head)
        return output if spans is None else output.with_spans(spans, own)

    def score(self, model: Any, batch: PairBatch, reference: TeacherOutput | None) -> TokenScores:
        """Run the student's forward pass, which also computes the divergences, and return its result.

        Args:
            model: the student, with wrappers.
            batch: the pairs.
            reference: the result of the first stage.
        """
        completions = self.weighted(batch)
        batch = completions.batch
        if self.aux_loss_enabled:
            batch = batch._replace(inputs=batch.inputs | {"output_router_logits": True})
        return self.score_tokens(model, batch, Scoring(function=partial(self.compare, completions, reference)))

    def loss(self, batch: PairBatch, policy: TokenScores, reference: TeacherOutput | None) -> DistillationLoss:
        """Return the loss that the student's forward pass computed.

        Args:
            batch: the pairs.
            policy: the result of the second stage.
            reference: the result of the first stage.
        """
        loss: DistillationLoss = policy.result
        return loss

    def report(
        self, batch: PairBatch, policy: TokenScores, reference: TeacherOutput | None, loss: DistillationLoss
    ) -> None:
        """Record the mean of each side's divergence, alpha, beta, and the models' log-probabilities per token.

        Args:
            batch: the pairs.
            policy: the result of the second stage.
            reference: the result of the first stage.
            loss: the result of the third stage.
        """
        completions = self.weighted(batch)
        pairs, tokens = torch.tensor(completions.pairs), completions.batch.inputs["attention_mask"].sum()
        sums = {"pairs": pairs, "tokens": tokens, **loss.more}
        values = {"loss": loss.values, "alpha": loss.alpha, "logps": loss.logps, "teacher_logps": loss.teacher_logps}
        for side, rows in completions.rows.items():
            sums |= {f"{name}/{side}": value[rows].sum() for name, value in values.items() if value is not None}
        if policy.aux_loss is not None:
            sums["aux_loss"] = policy.aux_loss * completions.pairs
        totals = self.sum_over_processes(sums)
        self.count_tokens(round(totals.pop("tokens")))
        count = totals.pop("pairs")
        self.record_metrics(**{name: value / count for name, value in totals.items()})
        if self.args.kind.follows_curriculum:
            weights = self.weights()
            self.record_metrics(**{"weight/chosen": weights[0], "weight/rejected": weights[1]})
            if self.mode == "train":
                self.record_metrics(beta=self.args.schedule.beta(**self.curriculum_position()))

    # -------------------------------------------------------------------------------------------------- the curriculum

    def weights(self) -> tuple[float, float]:
        """Return the weights of the teacher's and of the student's completion in this step."""
        weights: tuple[float, float] = self.args.weights
        if self.args.kind.follows_curriculum and self.mode == "train":
            weights = self.args.schedule.weights(**self.curriculum_position())
        return weights

    def weighted(self, batch: PairBatch) -> CompletionBatch:
        """Return the completions that have a weight in this step.

        Args:
            batch: the pairs.
        """
        weights = dict(zip(SIDES, self.weights(), strict=True))
        sides = list(self.divergences)
        return select_sides(batch, [side for side in sides if weights[side]], cached=sides)

    def curriculum_position(self) -> dict[str, int]:
        """Return the arguments of `Curriculum.weights` for this step."""
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

    def _adapts_alpha(self) -> bool:
        if not (self.args.kind.follows_curriculum and self.args.schedule.adaptive_alpha):
            return False
        return self.mode == "train" and self.curriculum_position()["epoch"] > 1

    def warn_of_idle_sides(self) -> None:
        """Warn if the curriculum gives the completions of one side no weight in some steps, or in all."""
        if not self.args.kind.follows_curriculum or not self.accelerator.is_main_process:
            return
        epochs = self.curriculum_position()["epochs"]
        for side, share in zip(("teacher", "student"), self.args.schedule.idle(epochs), strict=True):
            if share > 0:
                steps = "any step" if share == 1 else f"{share:.0%} of the steps"
                logger.warning(
                    "with %s epoch%s the %s's texts have no weight in %s, and are skipped there: set beta_max below 1, or curriculum to "
                    "released_gradual, to keep them in the loss",
                    *(epochs, "s" * (epochs != 1), side, steps),
                )

    # -------------------------------------------------------------------------------------------------- the comparison

    def compare(
        self,
        completions: CompletionBatch,
        teacher: TeacherOutput | None,
        hidden: Tensor,
        head: Head | None,
        targets: Tensor,
    ) -> DistillationLoss:
        """Compute the loss of a batch within the student's forward pass, where its head is unsharded.

        Args:
            completions: R completions of N tokens.
            teacher: the teacher's distributions; None learns from the tokens alone.
            hidden: the student's hidden states `(N, H)`, or logits `(N, V)` if there is no head.
            head: the student's head.
            targets: `(N,)` ids of the tokens.
        """
        mask = completions.batch.mask  # (R, T - 1)
        row_of, lengths = mask.nonzero()[:, 0], mask.sum(-1).clamp(min=1)  # (N,), (R,)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weights = self._token_weights(completions, lengths.to(exact))[row_of]
        if teacher is None:
            logps = chunked_logps(hidden, head, targets).logps
            return DistillationLoss(-(weights * logps).sum(), -row_means(logps, row_of, lengths), None, None, None)
        if self._text is not None:
            weights = self._token_weights(completions, torch.ones_like(lengths, dtype=exact))
            logs, divergence = self.is_logging_step(), next(iter(self.divergences.values()))
            return self._text.loss(completions, teacher, (hidden, head), (targets, weights), divergence, logs=logs)
        size = min(vocabulary_size(hidden, head), vocabulary_size(teacher.states, teacher.head))
        teacher = TeacherOutput(*first_tokens(teacher.states, teacher.head, size))
        hidden, head = first_tokens(hidden, head, size)
        means = self._mean_logps((hidden, head), teacher, targets, row_of, lengths)
        alpha = self._alpha(completions, *means, like=weights.new_empty(len(lengths)))
        token_alpha = None if alpha is None else alpha[row_of]
        total, values = self._divergence(completions, (hidden, head), teacher, weights, token_alpha)
        return DistillationLoss(total, row_means(values, row_of, lengths), alpha, *means)

    def _divergence(
        self,
        completions: CompletionBatch,
        student: tuple[Tensor, Head | None],
        teacher: TeacherOutput,
        weights: Tensor,
        alpha: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum, and the divergence at every token `(N,)` without gradient."""
        tokens: dict[str, int] = {}  # tokens of each divergence, in the order of the rows
        for side, count in zip(completions.rows, completions.token_counts(), strict=True):
            tokens[self.divergences[side]] = tokens.get(self.divergences[side], 0) + count
        compared = chunked_divergence(
            tokens,
            *student,
            teacher.states,
            teacher.head,
            weights=weights if torch.is_grad_enabled() else None,
            alpha=self.args.alpha if alpha is None else alpha,
            beta=self.args.beta,
            srkl=self.args.srkl_gradient,
            temperature=self.args.temperature,
        )
        total = (weights * compared.divergence).sum() if compared.total is None else compared.total
        return total, compared.divergence.detach()

    def _token_weights(self, completions: CompletionBatch, lengths: Tensor) -> Tensor:
        """Return the weight of a token of each completion, `(R,)`."""
        step, weights = dict(zip(SIDES, self.weights(), strict=True)), torch.zeros_like(lengths)
        for side, rows in completions.rows.items():
            weights[rows] = step[side] / completions.pairs
        return weights / lengths

    @torch.no_grad()
    def _mean_logps(
        self,
        student: tuple[Tensor, Head | None],
        teacher: TeacherOutput,
        targets: Tensor,
        row_of: Tensor,
        lengths: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return mean log-probabilities per token `(R,)` of student and teacher, if alpha or the log needs them."""
        if not (self._adapts_alpha() or self.is_logging_step()):
            return None, None
        hidden, head = student
        if head is not None:
            head = head._replace(weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        models = ((hidden.detach(), head), (teacher.states, teacher.head))
        own, other = (row_means(chunked_logps(*model, targets).logps, row_of, lengths) for model in models)
        return own, other

    def _alpha(
        self, completions: CompletionBatch, logps: Tensor | None, teacher_logps: Tensor | None, *, like: Tensor
    ) -> Tensor | None:
        """Return the skew of each completion `(R,)`, None for other divergences."""
        if not self.args.kind.is_skewed:
            return None
        alpha = torch.full_like(like, self.args.alpha)
        if not self._adapts_alpha() or logps is None or teacher_logps is None:
            return alpha
        epoch = self.curriculum_position()["epoch"]
        for side, rows in completions.rows.items():
            # the gap between the model that wrote the completion and the other one
            own, other = (teacher_logps[rows], logps[rows]) if side == "chosen" else (logps[rows], teacher_logps[rows])
            mean = self._process_mean(own.exp() - other.exp())
            alpha[rows] = self.args.schedule.alpha(own, other, epoch=epoch, mean_gap=mean).to(alpha)
        return alpha

    def _process_mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes."""
        if self.accelerator.num_processes == 1:
            return values.mean()
        total = self.accelerator.reduce(torch.stack([values.sum(), values.new_tensor(len(values))]), "sum")
        mean: Tensor = total[0] / total[1]
        return mean

    # --------------------------------------------------------------------------------------- the teacher, and its states

    def _loaded(self, args: DistillationConfig) -> Any:
        if self._teacher is None:
            self._teacher = load_teacher(args)
        if not self._teacher.get_output_embeddings().weight.is_floating_point():
            raise ValueError(
                "the teacher's head is quantised, and it is read row by row: leave it out of the quantisation"
            )
        return self._teacher

    def precompute(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Return the data set with the locations of the teacher's states on disk; compute the missing ones.

        Args:
            dataset: a tokenised data set.
            name: its name, for the progress bar.
            batch_size: rows per forward pass.

        Raises:
            ValueError: the teacher is gone.
            OSError: the disk has no room.
        """
        if self._teacher is None and self.args.teacher_model_name_or_path is None:
            raise ValueError("the teacher was a loaded model, which is gone: pass this data set as eval_dataset")
        states = TeacherStates(
            self.args.teacher_cache or default_folder("teacher"),
            teacher_digest(self._teacher, self.args, self.accelerator.mixed_precision, list(self.divergences)),
            lambda rows: self._states_of(rows, batch_size),
            lambda: state_bytes(self._loaded(self.args)),
            self.processes(),
        )
        dataset, path = states.add(dataset, name), states.folder / "head.safetensors"
        if self.accelerator.is_main_process and not path.is_file():
            save_head(states_head(self._loaded(self.args)), path)
        self.accelerator.wait_for_everyone()
        self._head = load_head(path, self.accelerator.device)
        return dataset

    def _states_of(self, rows: TokenRows, batch_size: int) -> list[tuple[Tensor, list[int]]]:
        """Return the teacher's states of rows."""
        teacher = self._loaded(self.args)
        check_vocabulary_size(self.processing_class, teacher.config.get_text_config().vocab_size)
        if not getattr(teacher, "is_quantized", False):
            teacher.to(self.accelerator.device)
        states_head(teacher.eval())
        install_head(teacher)
        sides = list(self.divergences)
        return teacher_states(self, teacher, lambda batch: select_sides(batch, sides, cached=sides), rows, batch_size)
