"""Measure the output layer of a model: its input, and the operations that the model's forward applies to its result.

Families differ in what stands between the last hidden state and the logits: a dense layer and a norm before the output layer, a
factor or a soft cap behind it, and wrappers of several models leave out what a text model of their own would do. In the first
forward pass of a model its output layer is watched: the states that it reads are taken there, its product is compared with its
weight and bias, and in some places its result is replaced by known numbers, from which a factor or a cap can be read off the
logits. The log-probabilities that follow are compared with those of the model's own forward. Where they differ, or a layer does
more than multiply (an adapter on it, say), the logits themselves are taken from that forward.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from contralto.common.head.hooks import hooked, probe_ids

__all__ = ["Gather", "Head", "HeadForm", "HeadInputs", "head_inputs", "head_of"]

logger = logging.getLogger(__name__)

PROBED = 16
"""Number of rows of the first batch whose log-probabilities are compared."""
GRID, SPAN = 3, 1e4
"""Number of rows of known numbers that stand for the output layer's result, and the greatest of these numbers."""
OFF = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest mean difference from the log-probabilities of the model's forward, in nats per token; half precision rounds by 0.1."""

Select = Callable[[Tensor], Tensor]
"""Selects from `(B, T, X)` the rows `(N, X)` that predict the tokens to be scored."""
Gather = Callable[[Any], AbstractContextManager[Any]]
"""Returns for a model a context in which the weights of its output layer are whole on this process."""


class Head(NamedTuple):
    """A language-model head: `logits = cap(scale * (h W^T + b))`, `cap(x) = softcap * tanh(x / softcap)` if there is a cap."""

    weight: Tensor
    """`(V, H)`."""
    bias: Tensor | None = None
    """`(V,)`."""
    scale: float = 1.0
    """Cohere's `logit_scale`, 1 / Granite's `logits_scaling`, and the like."""
    softcap: float | None = None
    """Gemma's `final_logit_softcapping`."""


class HeadForm(NamedTuple):
    """The form of a model's head, as measured."""

    kind: Literal["head", "rows", "whole"]
    """`head`: `cap(scale * layer(state))`. `rows`: something else; the forward gives the logits of selected rows. `whole`: the
    layer is not called once with a state per token; the forward gives all logits."""
    scale: float = 1.0
    softcap: float | None = None
    direct: bool = True
    """Whether the layer reads the backbone's last hidden state."""


class HeadInputs(NamedTuple):
    """The rows of a forward pass that predict the tokens to be scored."""

    rows: Tensor
    """`(N, H)` inputs of the head; `(N, V)` logits if there is none."""
    head: Head | None
    backbone: Any
    """The output of `model.base_model`."""
    aux_loss: Tensor | None
    """The load-balancing loss of a mixture of experts, if the forward gives one."""


class _WatchedPass:
    """The output layer and the backbone in one forward pass."""

    def __init__(self) -> None:
        self.calls = 0
        self.states: Tensor | None = None
        self.result: Tensor | None = None
        self.backbone: Any = None
        self.aux_loss: Tensor | None = None

    def inputs(self, rows: Tensor, head: Head | None) -> HeadInputs:
        """Return `rows` with the other outputs of the pass."""
        return HeadInputs(rows, head, self.backbone, self.aux_loss)


def head_inputs(
    model: Any,
    forward: Callable[..., Any],
    select: Select,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any],
    gather: Gather = nullcontext,
) -> HeadInputs:
    """Run a model's own forward with its head on the scored tokens alone.

    The first call measures the head, and keeps its form as `model.measured_head`.

    Args:
        model: a causal language model of transformers, not wrapped.
        forward: the forward of the model.
        select: the rows of a tensor with a row per token that predict the tokens to be scored.
        args: positional arguments of the forward.
        kwargs: keyword arguments of the forward.
        gather: makes the weights of the output layer whole, for models whose weights are sharded.

    Raises:
        ValueError: a model without a row of logits per token.
    """

    def run(rows: Select | None, *, replace: bool = False, is_idle: bool = False) -> tuple[_WatchedPass, Tensor]:
        watched = _WatchedPass()
        with _watching(model, watched, rows, replace=replace), _idle(model) if is_idle else nullcontext():
            output = forward(*args, **kwargs)
        watched.backbone = output if watched.backbone is None else watched.backbone
        watched.aux_loss = getattr(output, "aux_loss", None)
        return watched, output.logits

    form: HeadForm | None = getattr(model, "measured_head", None)
    if form is None:
        watched, logits = run(lambda states: _with_places(select(states)), replace=True)
        form, certain = _measure(model, watched, logits, select, gather)
        if certain:
            model.measured_head = form
            _warn(model, form)
        if form.kind == "head":
            assert watched.states is not None
            return watched.inputs(select(watched.states), _head(model, form))
    if form.kind == "head":
        watched, _ = run(lambda states: states[:1, :0].detach(), is_idle=True)
        assert watched.states is not None
        return watched.inputs(select(watched.states), _head(model, form))
    rows = None if form.kind == "whole" else (lambda states: select(states)[None])
    watched, logits = run(rows)
    return watched.inputs(select(logits) if rows is None else logits[0], None)


def head_of(model: Any, *, gather: Gather = nullcontext) -> Head | None:
    """Return the language-model head of a transformers model, with the scale and the cap of its logits.

    Args:
        model: a causal language model, not wrapped. One that has not been measured runs on a few tokens.
        gather: makes the weights of the output layer whole, for models whose weights are sharded.

    Returns:
        The head; None for a model whose logits are no function of a weight, a factor and a cap.

    Examples:
        >>> from transformers import CohereConfig, CohereForCausalLM
        >>> shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
        >>> head = head_of(CohereForCausalLM(CohereConfig(**shape, logit_scale=0.25)))
        >>> head.weight.shape, head.scale, head.softcap
        (torch.Size([9, 8]), 0.25, None)
    """
    form: HeadForm | None = getattr(model, "measured_head", None)
    if form is not None:
        return _head(model, form) if form.kind == "head" else None
    training, kwargs = model.training, {"input_ids": probe_ids(model)}
    with torch.no_grad():
        inputs = head_inputs(
            model.eval(), model.forward, lambda states: states.flatten(0, 1), kwargs=kwargs, gather=gather
        )
    model.train(training)
    return inputs.head


def _head(model: Any, form: HeadForm) -> Head:
    layer = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return Head(_unsharded(layer.weight), None if bias is None else _unsharded(bias), form.scale, form.softcap)


def _unsharded(weight: Tensor) -> Tensor:
    """Return the full weight if FSDP2 keeps a shard of it per process."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _with_places(rows: Tensor) -> Tensor:
    """Return some rows followed by rows for known numbers, `(1, n + GRID, H)`."""
    rows = rows[:PROBED].detach()
    return torch.cat([rows, rows.new_zeros(GRID, rows.shape[-1])])[None]


@contextmanager
def _watching(model: Any, watched: _WatchedPass, rows: Select | None, *, replace: bool) -> Iterator[None]:
    """Hook the output layer and the backbone, and replace the layer's input by the result of `rows`.

    Args:
        model: a causal language model.
        watched: records the pass.
        rows: returns the states `(1, N, H)` that the layer reads in place of its input `(B, T, H)`; None for its input.
        replace: whether known numbers take the place of the last `GRID` rows of the layer's result.
    """

    def before(_layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        watched.calls += 1
        if watched.calls > 1 or len(inputs) != 1 or inputs[0].dim() != 3 or rows is None:
            watched.states = None
            return None
        watched.states = inputs[0]
        return (rows(inputs[0]),)

    def after(_layer: nn.Module, _inputs: Any, result: Tensor) -> Any:
        if not replace or watched.states is None:
            return None
        watched.result = result.detach()[0, :-GRID]
        precise = torch.promote_types(result.dtype, torch.float32)
        return torch.cat([watched.result.to(precise), _known_numbers(result[0, -GRID:].to(precise))])[None]

    def keep(_module: nn.Module, _inputs: Any, result: Any) -> None:
        watched.backbone = result

    layer, backbone = model.get_output_embeddings(), model.base_model
    handles = [] if backbone is model else [backbone.register_forward_hook(keep)]
    if layer is not None:
        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    with hooked(handles):
        yield


@contextmanager
def _idle(model: Any) -> Iterator[None]:
    """Let the output layer, which is given no rows, cast nothing either, and hand on a row of zeros.

    Autocast casts the weight however few the rows are, and on a CPU the product of a single row in half precision copies it.
    """
    layer, switched_off = model.get_output_embeddings(), ExitStack()

    def before(_layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        switched_off.enter_context(torch.autocast(inputs[0].device.type, enabled=False))
        return (inputs[0].to(layer.weight.dtype),)

    def after(_layer: nn.Module, _inputs: Any, result: Any) -> Any:
        switched_off.close()
        return result.new_zeros(1, 1, result.shape[-1]) if isinstance(result, Tensor) else None

    handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)]
    with switched_off, hooked(handles):
        yield


def _known_numbers(like: Tensor) -> Tensor:
    """Return values to replace the output layer's result `(GRID, V)`: magnitudes up to `SPAN`, permuted in each row."""
    size = like.shape[-1]
    sizes = torch.logspace(-2, math.log10(SPAN), size, dtype=like.dtype, device=like.device)
    signed = sizes * torch.tensor([1.0, -1.0], device=like.device).repeat(size)[:size]
    return torch.stack([signed.roll(row * (size // GRID)) for row in range(GRID)])


def _measure(
    model: Any, watched: _WatchedPass, logits: Tensor, select: Select, gather: Gather
) -> tuple[HeadForm, bool]:
    """Return the form of the head, and whether any token was compared."""
    layer = model.get_output_embeddings()
    if watched.states is None or watched.result is None or watched.calls != 1:
        return HeadForm("whole"), True
    if logits.shape != (1, len(watched.result) + GRID, watched.result.shape[-1]):
        raise ValueError(
            f"{type(model).__name__} has no row of logits per token and token of its output layer, which scoring needs"
        )
    form = _fit(_known_numbers(logits[0, -GRID:]), logits[0, -GRID:])
    if form is None or not _only_multiplies(layer):
        return HeadForm("rows"), True
    rows, own = select(watched.states)[:PROBED].detach(), logits[0, :-GRID].detach()
    with torch.no_grad(), gather(model):
        computed = _logits(rows.to(layer.weight.device), _head(model, form)).to(own)
    off = (computed.log_softmax(-1) - own.log_softmax(-1)).abs()
    likely = off[own.softmax(-1) > 1e-6]  # far down the tail only rounding is left
    near = likely.numel() == 0 or float(likely.mean()) < OFF.get(watched.result.dtype, 0.1)
    last = getattr(watched.backbone, "last_hidden_state", None)
    direct = (
        isinstance(last, Tensor) and last.shape == watched.states.shape and torch.equal(select(last)[:PROBED], rows)
    )
    return (form._replace(direct=direct) if near else HeadForm("rows")), len(rows) > 0


def _only_multiplies(layer: Any) -> bool:
    """Return whether a layer has only a weight and a bias, and no adapter or quantised weight."""
    names = {name for name, _ in layer.named_parameters()}
    return names <= {"weight", "bias"} and bool(names) and layer.weight.is_floating_point()


def _logits(rows: Tensor, head: Head) -> Tensor:
    """Return the logits `(N, V)` of rows `(N, H)`, in float32 at least."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(precise)
    with torch.autocast(rows.device.type, enabled=False):
        logits = linear(rows.to(precise), head.weight.to(precise), bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _fit(numbers: Tensor, results: Tensor) -> HeadForm | None:
    """Fit a factor, or a factor and a cap, that maps known numbers to the observed outputs.

    Args:
        numbers: `(n, V)` known numbers.
        results: `(n, V)` the logits that the model made of them.

    Returns:
        The form of the head; None if the results are neither `s x` nor `c tanh(s x / c)`.
    """
    x, y = numbers.double(), results.detach().double().to(numbers.device)
    if not y.isfinite().all():
        return None
    scale = _ratio(x, y)
    if _close(scale * x, y):
        return HeadForm("head", scale)
    cap = float(y.abs().max())
    small = x.abs() * abs(_ratio(x[x.abs() < 1], y[x.abs() < 1])) < cap / 10
    if not small.any():
        return None
    scale = _ratio(x[small], cap * torch.atanh(y[small] / cap))
    return HeadForm("head", scale, cap) if _close(cap * torch.tanh(scale * x / cap), y) else None


def _ratio(x: Tensor, y: Tensor) -> float:
    """Return the median of y / x; exactly 1 if it differs from 1 by rounding alone."""
    ratio = float((y / x).median())
    return 1.0 if abs(ratio - 1) < 1e-6 else ratio


def _close(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-6))


def _warn(model: Any, form: HeadForm) -> None:
    if form.kind != "head":
        logger.warning(
            "the logits of %s are more than its output layer's weight with a factor or a cap: they are taken from its own forward, "
            "which holds those of all %s tokens in memory",
            type(model).__name__,
            "scored" if form.kind == "rows" else "given",
        )
