"""Compute the loss of a distillation whose models are compared by text: ULD and GOLD."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.losses.chunked import Head, chunked_logps, first_tokens, vocabulary_size
from contralto.align.losses.cross_tokenizer import (
    Comparison,
    MatchedTokens,
    SpanDistributions,
    chunked_comparison,
    hybrid,
    sorted_distance,
)
from contralto.align.trainers.batches import PairBatch
from contralto.align.trainers.distillation_checks import same_vocabulary, teacher_tokenizer
from contralto.align.trainers.distillation_config import DistillationConfig
from contralto.align.trainers.distillation_results import DistillationLoss, TeacherOutput, row_means
from contralto.align.trainers.selection import CompletionBatch
from contralto.align.trainers.text_alignment import OtherTokens, SameTokens
from contralto.align.trainers.text_spans import Spans

__all__ = ["TextComparison"]


def _gold(matched: Callable[[], MatchedTokens], args: DistillationConfig) -> Comparison:
    return hybrid(matched(), beta=args.beta, matched_weight=args.matched_weight, unmatched_weight=args.unmatched_weight)


def _uld(matched: Callable[[], MatchedTokens], args: DistillationConfig) -> Comparison:
    return sorted_distance


COMPARISONS: Mapping[str, Callable[[Callable[[], MatchedTokens], DistillationConfig], Comparison]] = {
    "uld": _uld,
    "gold": _gold,
}
"""The comparisons of models with different vocabularies, by the names of divergences."""


class _Tokens(NamedTuple):
    """R completions of N tokens of the student."""

    targets: Tensor
    """`(N,)` ids."""
    row_of: Tensor
    """`(N,)` the completion of each token."""
    lengths: Tensor
    """`(R,)` tokens, at least 1."""
    weights: Tensor
    """`(R,)` weight of each completion."""


class TextComparison:
    """Compares a student and a teacher span by span.

    With D the divergence at a span of S spans, and `L_CE` the mean of -log q over the tokens of a completion:

        loss = w_D / S sum_s D_s + w_CE L_CE      (L_CE of the teacher's completions alone)

    Args:
        trainer: a `DistillationPairTrainer` whose models and tokenizer are there.

    Raises:
        ValueError: a tokenizer cannot be read as bytes.
    """

    def __init__(self, trainer: Any) -> None:
        args, teacher = trainer.args, trainer.unwrap(trainer.ref_model)
        tokenizer = teacher_tokenizer(teacher, args)
        self.args: DistillationConfig = args
        self.alignment: SameTokens | OtherTokens = SameTokens()
        if not same_vocabulary(trainer.processing_class, tokenizer):
            options = {"pairing": args.text_options.pairing, "merge": args.merge}
            self.alignment = OtherTokens(trainer.policy, trainer.processing_class, teacher, tokenizer, **options)

    def with_prompts(self, dataset: Any) -> Any:
        """Return a tokenised data set with the column `TEACHER_PROMPTS`.

        Args:
            dataset: a data set, several by name, or None.
        """
        return self.alignment.with_prompts(dataset)

    def read(self, completions: CompletionBatch) -> tuple[PairBatch, Spans]:
        """Return the completions as the teacher reads them, and the spans.

        Args:
            completions: R completions.
        """
        return self.alignment.read(completions)

    def loss(
        self,
        completions: CompletionBatch,
        teacher: TeacherOutput,
        student: tuple[Tensor, Head | None],
        tokens: tuple[Tensor, Tensor],
        divergence: str,
        *,
        logs: bool,
    ) -> DistillationLoss:
        """Return the loss of a batch.

        Args:
            completions: R completions of N tokens.
            teacher: the teacher's distributions at M tokens, with spans.
            student: the student's hidden states `(N, H)`, or logits, and its head.
            tokens: `(N,)` ids of the student's tokens, and `(R,)` weights of the completions.
            divergence: a key of `COMPARISONS`.
            logs: compute the mean log-probabilities of both models.
        """
        mask = completions.batch.mask
        own = _Tokens(tokens[0], mask.nonzero()[:, 0], mask.sum(-1).clamp(min=1), tokens[1])
        if isinstance(self.alignment, SameTokens):
            size = min(vocabulary_size(*student), vocabulary_size(teacher.states, teacher.head))
            student = first_tokens(*student, size)
            states, head = first_tokens(teacher.states, teacher.head, size)
            teacher = teacher._replace(states=states, head=head)
        total, values = self._compare(teacher, student, own, divergence)
        assert teacher.spans is not None
        aligned = (teacher.spans.tokens / own.lengths).to(values)
        more = {f"aligned/{side}": aligned[rows].sum() for side, rows in completions.rows.items()}
        if (weight := self.args.text_options.crossentropy) and "chosen" in completions.rows:
            likelihood, more["crossentropy/chosen"] = self._crossentropy(completions.rows["chosen"], student, own)
            total = total + weight * likelihood
        logps, teacher_logps = self._logps(teacher, student, own) if logs else (None, None)
        return DistillationLoss(total, values, None, logps, teacher_logps, more)

    def _compare(
        self, teacher: TeacherOutput, student: tuple[Tensor, Head | None], own: _Tokens, divergence: str
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the divergences, and the mean of each completion `(R,)`."""
        spans, targets = teacher.spans, teacher.targets
        assert spans is not None
        assert targets is not None
        hidden, head = student
        count = torch.zeros_like(own.lengths).index_add_(0, spans.row, torch.ones_like(spans.row))
        scale = self._log_scale(student, own.targets, spans.student_others, len(spans.row))
        with torch.no_grad():
            teacher_scale = self._log_scale(
                (teacher.states, teacher.head), targets, spans.teacher_others, len(spans.row)
            )
        sizes = vocabulary_size(*student), vocabulary_size(teacher.states, teacher.head)
        total, values = chunked_comparison(
            COMPARISONS[divergence](lambda: self.alignment.matched(*sizes), self.args),
            SpanDistributions(hidden[spans.student], head, scale),
            SpanDistributions(teacher.states[spans.teacher], teacher.head, teacher_scale),
            weights=(own.weights / count.clamp(min=1))[spans.row] * self.args.text_options.distillation,
            temperature=self.args.temperature,
        )
        return total, row_means(values, spans.row, count.clamp(min=1))

    def _log_scale(self, model: tuple[Tensor, Head | None], targets: Tensor, others: Tensor, spans: int) -> Tensor:
        """Return the log-probability `(S,)` of the tokens of each span besides the one whose distribution counts."""
        hidden, head = model
        exact = torch.promote_types(hidden.dtype, torch.float32)
        scale = hidden.new_zeros(spans, dtype=exact)
        token, span = others
        if not len(token):
            return scale
        logps = chunked_logps(hidden[token], head, targets[token], temperature=self.args.temperature).logps
        return scale.index_add(0, span, logps.to(exact))

    def _crossentropy(self, taught: slice, student: tuple[Tensor, Head | None], own: _Tokens) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the mean -log q of the teacher's completions, and the sum of these means."""
        hidden, head = student
        kept = (own.row_of >= taught.start) & (own.row_of < taught.stop)
        row_of = own.row_of[kept]
        logps = chunked_logps(hidden[kept], head, own.targets[kept]).logps
        return -((own.weights / own.lengths)[row_of] * logps).sum(), -row_means(logps, row_of, own.lengths).sum()

    @torch.no_grad()
    def _logps(
        self, teacher: TeacherOutput, student: tuple[Tensor, Head | None], own: _Tokens
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probability `(R,)` of each completion under student and teacher, per token of the student."""
        assert teacher.targets is not None
        assert teacher.row_of is not None
        models = (student, own.targets, own.row_of), ((teacher.states, teacher.head), teacher.targets, teacher.row_of)
        logps, teacher_logps = (
            row_means(chunked_logps(*model, targets).logps, row_of, own.lengths) for model, targets, row_of in models
        )
        return logps, teacher_logps
