"""Score completions: a model's forward whose language-model head runs on the labelled tokens alone.

`install_head` gives `model.forward` an argument `scoring`. TRL installs a head of its own in the same way, which projects every position
on a CPU. Everything that needs the head's weight happens within the forward, where FSDP and DeepSpeed have gathered it.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.align.losses.chunked import Head, chunked_divergence, chunked_logps
from contralto.align.trainers.batches import IGNORED
from contralto.align.trainers.layouts import Layout
from contralto.align.trl_compat import gathered
from contralto.common.head import head_inputs

__all__ = ["Scoring", "TokenScores", "install_head"]


class Scoring(NamedTuple):
    """Options of a forward that scores completions; without any it returns log-probabilities."""

    also: tuple[str, ...] = ()
    """Statistics of `chunked_logps` to return as well."""
    teacher: tuple[Tensor, Head | None] | None = None
    """The reference's hidden states `(N, H)` and its head: the forward KL and the reference's log-probabilities are returned too."""
    hidden: bool = False
    """Return hidden states `(N, H)` for the head of `head_of` in place of log-probabilities; logits `(N, V)` if that is None."""
    states: bool = False
    """Return the hidden states of all layers."""
    layout: Layout | None = None
    """Inputs of the backbone in place of the padded batch."""
    function: Callable[[Tensor, Head | None, Tensor], Any] | None = None
    """A function of hidden states `(N, H)`, head and targets `(N,)` to call in place of all that; its result is `TokenScores.result`."""


class TokenScores(NamedTuple):
    """The result of a forward that scores completions, with None for what was not requested.

    Tensors of shape `(2B, T - 1)` are 0 at tokens that are not scored.
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    kl: Tensor | None = None
    teacher_logps: Tensor | None = None
    hidden: Tensor | None = None
    states: list[Tensor] | None = None
    """`(2B, T - 1, H)` of every layer, without the embeddings."""
    aux_loss: Tensor | None = None
    """The load-balancing loss of a mixture of experts."""
    blind: Tensor | None = None
    """`logps` of `PairBatch.blind`."""
    result: Any = None
    """The result of `Scoring.function`."""

    def last(self, width: int) -> "TokenScores":
        """Return the scores of the last tokens.

        Args:
            width: tokens per row; prompt tuning puts virtual tokens before the others.
        """
        other = ("hidden", "states", "aux_loss", "blind", "result")
        tensors = {name: value for name, value in self._asdict().items() if value is not None and name not in other}
        return self._replace(**{name: value[:, -width:] for name, value in tensors.items()})


def install_head(model: Any) -> None:
    """Add an argument `scoring` to `model.forward`, with which only labelled tokens go through the head.

    Without the argument nothing changes. The head is measured in the first forward, see `contralto.common.head`. A second call
    does nothing.

    Args:
        model: a causal language model of transformers, not wrapped.
    """
    if getattr(model, "scores_completions", False):
        return
    stock = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(
        self: Any, *args: Any, scoring: Scoring | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if scoring is None:
            return stock(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        assert labels is not None
        return _score(self, stock, scoring, labels, *args, **kwargs)

    model.forward, model.scores_completions = MethodType(forward, model), True


def _score(
    model: Any, stock: Callable[..., Any], scoring: Scoring, labels: Tensor, *args: Any, **kwargs: Any
) -> TokenScores:
    """Run the model on everything, and its head on the labelled tokens."""
    layout = scoring.layout
    kwargs |= {} if layout is None else layout.inputs_for(model)
    kwargs |= {"use_cache": False} | ({"output_hidden_states": True} if scoring.states else {})
    valid = labels[:, 1:] != IGNORED  # (2B, T - 1)
    scored = valid if layout is None else layout.without_copies(valid)
    rows, head, out, aux_loss = head_inputs(
        model, stock, lambda states: _scored_rows(states, scored, layout), args=args, kwargs=kwargs, gather=gathered
    )
    if kwargs.get("output_router_logits") and aux_loss is None:
        raise ValueError(
            f"{type(model).__name__} gives no load-balancing loss: set output_router_logits to False in its config"
        )
    states = [_padded(layer, layout) for layer in out.hidden_states[1:]] if scoring.states else None
    device = rows.device if head is None else head.weight.device
    rows, labels, valid, scored = (tensor.to(device) for tensor in (rows, labels[:, 1:], valid, scored))
    if scoring.hidden:
        return TokenScores(hidden=rows, states=states)
    with gathered(model):
        if scoring.function is not None:
            return TokenScores(result=scoring.function(rows, head, labels[scored]), aux_loss=aux_loss)
        values = _through_head(rows, head, labels[scored], scoring)
    placed = {name: value.new_zeros(valid.shape).masked_scatter(scored, value) for name, value in values.items()}
    if layout is not None:
        layout = layout.to(device)
        placed = {name: layout.with_copies(value, valid) for name, value in placed.items()}
    return TokenScores(**placed, states=states, aux_loss=aux_loss)


def _scored_rows(states: Tensor, scored: Tensor, layout: Layout | None) -> Tensor:
    """Select the hidden states `(N, H)` that predict the scored tokens."""
    if layout is None:
        return states[:, :-1][scored.to(states.device)]  # (2B, T, H) by the mask (2B, T - 1)
    layout, scored = layout.to(states.device), scored.to(states.device)
    return states.flatten(0, 1).index_select(0, layout.source[:, :-1][scored])


def _padded(states: Tensor, layout: Layout | None) -> Tensor:
    """Return hidden states `(2B, T - 1, H)` at the positions of the padded batch."""
    return states[:, :-1] if layout is None else layout.to_padded(states)


def _through_head(rows: Tensor, head: Head | None, targets: Tensor, scoring: Scoring) -> dict[str, Tensor]:
    """Return `(N,)` scores by name."""
    if scoring.teacher is None:
        scores = chunked_logps(rows, head, targets, also=scoring.also)._asdict()
    else:
        compared = chunked_divergence("forward_kl", rows, head, *scoring.teacher, targets=targets)
        scores = {"logps": compared.logps, "kl": compared.divergence, "teacher_logps": compared.teacher_logps}
        if scoring.also:
            with torch.no_grad():
                scores = chunked_logps(rows, head, targets, also=scoring.also)._asdict() | scores
    return {name: value for name, value in scores.items() if value is not None}
