"""Define the results of the stages of a distillation: the teacher's distributions, and the loss."""

from typing import NamedTuple

from torch import Tensor

from contralto.align.losses.chunked import Head
from contralto.align.trainers.batches import PairBatch
from contralto.align.trainers.text_spans import Spans

__all__ = ["DistillationLoss", "TeacherOutput", "row_means"]


class TeacherOutput(NamedTuple):
    """The teacher's distributions at the completion tokens: N of the student, or M of a teacher with another tokenizer."""

    states: Tensor
    """Hidden states `(N, H)`, or logits `(N, V)` if there is no head."""
    head: Head | None
    spans: Spans | None = None
    """The spans of tokens that are compared, for a loss that compares different vocabularies."""
    targets: Tensor | None = None
    """`(M,)` the teacher's tokens, for the same losses."""
    row_of: Tensor | None = None
    """`(M,)` the completion of each of them."""

    def with_spans(self, spans: Spans, batch: PairBatch) -> "TeacherOutput":
        """Return the distributions with the spans that are compared.

        Args:
            spans: the spans.
            batch: the completions that the teacher has read.
        """
        return self._replace(spans=spans, targets=batch.labels[:, 1:][batch.mask], row_of=batch.mask.nonzero()[:, 0])


class DistillationLoss(NamedTuple):
    """The loss of R completions of N tokens, as the student's forward computes it."""

    total: Tensor
    """The scalar to minimise."""
    values: Tensor
    """`(R,)` mean divergence of each completion, without gradient."""
    alpha: Tensor | None
    """`(R,)` skew; None for other divergences."""
    logps: Tensor | None
    """`(R,)` the student's mean log-probability per token; None where neither alpha nor the log needs it."""
    teacher_logps: Tensor | None
    """`(R,)` the same of the teacher."""
    more: dict[str, Tensor] = {}  # noqa: RUF012  # nobody writes to it
    """Further sums over pairs whose means are logged, by name."""


def row_means(values: Tensor, row_of: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean of values over each completion's tokens, `(R,)`, without gradient.

    Args:
        values: `(N,)`.
        row_of: `(N,)` the completion of each value.
        lengths: `(R,)` the number of values of each completion, at least 1.
    """
    values = values.detach()
    return values.new_zeros(len(lengths)).index_add_(0, row_of, values) / lengths
