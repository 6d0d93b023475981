"""Score whole candidates: a model's forward that reads the sequences of a batch of prompts, a few at a time.

`install_sequences` gives `model.forward` an argument `task`, so that one call of the wrapped model does everything and
`DistributedDataParallel` sees one forward pass. The candidates are read in chunks under `torch.utils.checkpoint`: what stays in memory
until the backward pass is a number per candidate, and the activations of one chunk at a time are computed anew there.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from contralto.decoding.executors.diverse import ENDED
from contralto.decoding.rules.sequences import similarities
from contralto.decoding.sequences import encode_sources, read_sequences

__all__ = ["SequenceScores", "SequenceTask", "install_sequences"]


class SequenceTask(NamedTuple):
    """Prompts with references and candidates, to be scored by one forward."""

    inputs: dict[str, Tensor]
    """`input_ids` and `attention_mask`, `(B, S)`."""
    references: Tensor | None
    """`(B, T)`, padded with `ENDED`."""
    candidates: Tensor
    """`(B, n, T')`, padded with `ENDED`; a candidate without tokens is absent."""
    label_smoothing: float = 0.0
    """Of the likelihood of references."""
    chunk_size: int = 8
    """Candidates per forward pass."""


class SequenceScores(NamedTuple):
    """The result, differentiable."""

    nll: Tensor | None
    """The mean negative log-likelihood of the references' tokens, smoothed; None without references."""
    logps: Tensor
    """`(B, n)` summed log-probabilities of the candidates, 0 where absent."""
    lengths: Tensor
    """`(B, n)` tokens of the candidates."""
    similarity: Tensor | None
    """`(B, 1 + n)` cosine of the source and the reference, then the candidates; None without a projection, 0 where absent."""


def install_sequences(model: Any) -> None:
    """Add an argument `task` to `model.forward`, a `SequenceTask` whose `SequenceScores` are returned. A second call does nothing.

    The submodule `cont_projection` of the model, if there is one, is the projection of similarities.

    Args:
        model: a decoder or an encoder-decoder of transformers, not wrapped.
    """
    if getattr(model, "reads_sequences", False):
        return
    stock = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(self: Any, *args: Any, task: SequenceTask | None = None, **kwargs: Any) -> Any:
        return stock(*args, **kwargs) if task is None else _score(self, stock, task)

    model.forward, model.reads_sequences = MethodType(forward, model), True


def _score(model: Any, stock: Callable[..., Any], task: SequenceTask) -> SequenceScores:
    """Read the references in one forward pass, and the candidates in chunks."""
    projection = getattr(model, "cont_projection", None)
    encoded = encode_sources(model, task.inputs)
    nll = source = of_reference = None
    if task.references is not None:
        read = read_sequences(model, task.inputs, task.references, encoded=encoded, forward=stock)
        logits = read.logits.flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = cross_entropy(logits, read.targets.flatten(), ignore_index=ENDED, label_smoothing=task.label_smoothing)
        if projection is not None:
            source, of_reference = projection.source(read), projection.candidate(read)
    present = (task.candidates != ENDED).any(-1)

    def read_chunk(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        sequences = task.candidates[rows, numbers]
        width = int((sequences != ENDED).sum(-1).max())
        inputs = {name: value[rows] for name, value in task.inputs.items()}
        own = None if encoded is None else encoded[rows]
        read = read_sequences(model, inputs, sequences[:, :width], encoded=own, forward=stock)
        return read.log_probs, read.log_probs if projection is None else projection.candidate(read)

    chunks = [_recomputed(read_chunk, *chunk.T) for chunk in torch.split(present.nonzero(), task.chunk_size)]
    logps, states = (torch.cat(each) for each in zip(*chunks, strict=True))
    placed = logps.new_zeros(present.shape).masked_scatter(present, logps)
    similarity = None
    if source is not None and of_reference is not None:
        cosines = similarities(source[present.nonzero()[:, 0]], states[:, None])[:, 0]
        own = similarities(source, of_reference[:, None])
        similarity = torch.cat([own, cosines.new_zeros(present.shape).masked_scatter(present, cosines)], 1)
    return SequenceScores(nll, placed, (task.candidates != ENDED).sum(-1), similarity)


def _recomputed(function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Call a function, keeping no activations for the backward pass."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    result: tuple[Tensor, Tensor] = checkpoint(function, *tensors, use_reentrant=False)
    return result
