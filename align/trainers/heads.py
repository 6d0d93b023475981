"""The head of a model, measured: which states go into its output layer, and what its forward makes of that layer's result.

Families differ in what stands between the last hidden state and the logits: a dense layer and a norm before the output layer, a
factor or a soft cap behind it, and wrappers of several models leave out what a text model of their own would do. None of that is
read from names. In the first forward of a model its output layer is watched: the states that go into it are taken there, the layer's
product is compared with its weight and bias, and in some places its result is replaced by known numbers, from which a factor or a cap
can be read off the logits. The log-probabilities that follow are compared with those of the model's own forward. Where they
differ, or a layer does more than multiply (an adapter on it, say), the logits themselves are taken from that forward.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from trl.trainer.utils import maybe_gather_lm_head_ctx

from contralto.align.losses.chunked import Head

__all__ = ["Measured", "Taken", "gathered", "head_of", "take"]

logger = logging.getLogger(__name__)

PROBED = 16
"""Rows of the first batch whose log-probabilities are compared."""
GRID, SPAN = 3, 1e4
"""Rows of known numbers that stand for the output layer's result, and the greatest of them."""
OFF = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far log-probabilities may be from those of the model's forward, in nats per token; half precision rounds by 0.1."""

Select = Callable[[Tensor], Tensor]
"""Of `(B, T, X)`, the rows `(N, X)` that predict the tokens to be scored."""


class Measured(NamedTuple):
    """What the forward of a model makes of its output layer."""

    kind: Literal["head", "rows", "whole"]
    """`head`: `cap(scale * layer(state))`. `rows`: something else, which `layer` is left to in the forward, with the rows that count.
    `whole`: the layer is not called once with a state per token, and all logits are taken."""
    scale: float = 1.0
    softcap: float | None = None
    direct: bool = True
    """Whether the backbone's last hidden state is what goes into the layer."""


class Taken(NamedTuple):
    """The rows of a forward that predict the tokens to be scored."""

    rows: Tensor
    """`(N, H)` what goes into the head; `(N, V)` logits if there is none."""
    head: Head | None
    backbone: Any
    """The output of `model.base_model`."""
    aux_loss: Tensor | None
    """The load-balancing loss of a mixture of experts, if the forward gives one."""


class _Watched:
    """The output layer and the backbone in one forward."""

    def __init__(self) -> None:
        self.calls = 0
        self.states: Tensor | None = None
        self.result: Tensor | None = None
        self.backbone: Any = None
        self.aux_loss: Tensor | None = None

    def taken(self, rows: Tensor, head: Head | None) -> Taken:
        """Return what was seen with these rows."""
        return Taken(rows, head, self.backbone, self.aux_loss)


def take(model: Any, forward: Callable[..., Any], select: Select, *args: Any, **kwargs: Any) -> Taken:
    """Run a model's own forward with its head on the scored tokens alone.

    The first call measures the head, and keeps the result as `model.measured_head`.

    Args:
        model: a causal language model of transformers, not wrapped.
        forward: its own forward.
        select: the rows of a tensor with a row per token that predict the tokens to be scored.
        args: of the forward.
        kwargs: of the forward.

    Raises:
        ValueError: a model without a row of logits per token.
    """
    known: Measured | None = getattr(model, "measured_head", None)
    if known is None:
        watched, logits = _run(model, forward, lambda states: _probes(select(states)), *args, replace=True, **kwargs)
        known, certain = _measure(model, watched, logits, select)
        if certain:
            model.measured_head = known
            _tell(model, known)
        if known.kind == "head":
            assert watched.states is not None
            return watched.taken(select(watched.states), _head(model, known))
    if known.kind == "head":
        watched, _ = _run(model, forward, lambda states: states[:1, :1].detach(), *args, **kwargs)
        assert watched.states is not None
        return watched.taken(select(watched.states), _head(model, known))
    rows = None if known.kind == "whole" else (lambda states: select(states)[None])
    watched, logits = _run(model, forward, rows, *args, **kwargs)
    return watched.taken(select(logits) if rows is None else logits[0], None)


def head_of(model: Any) -> Head | None:
    """Return the language-model head of a transformers model, with what its forward does to the logits.

    Args:
        model: a causal language model, not wrapped. One that has not been measured runs on two tokens.

    Returns:
        The head, None for a model whose logits are no function of a weight, a factor and a cap.

    Examples:
        >>> from transformers import CohereConfig, CohereForCausalLM
        >>> shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 5}
        >>> head = head_of(CohereForCausalLM(CohereConfig(**shape, logit_scale=0.25)))
        >>> head.weight.shape, head.scale, head.softcap
        (torch.Size([5, 8]), 0.25, None)
    """
    if getattr(model, "measured_head", None) is None:
        training = model.training
        ids = torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device)
        with torch.no_grad():
            taken = take(model.eval(), model.forward, lambda states: states.flatten(0, 1), input_ids=ids)
        model.train(training)
        return taken.head
    known = model.measured_head
    return _head(model, known) if known.kind == "head" else None


def _head(model: Any, known: Measured) -> Head:
    layer = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return Head(_whole(layer.weight), None if bias is None else _whole(bias), known.scale, known.softcap)


def _whole(weight: Tensor) -> Tensor:
    """Gather a weight of which FSDP2 keeps a shard per process."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _probes(rows: Tensor) -> Tensor:
    """Some rows, and places for numbers of ours, `(1, n, H)`."""
    rows = rows[:PROBED].detach()
    return torch.cat([rows, rows.new_zeros(GRID, rows.shape[-1])])[None]


def _run(
    model: Any, forward: Callable[..., Any], rows: Select | None, *args: Any, replace: bool = False, **kwargs: Any
) -> tuple[_Watched, Tensor]:
    """Run the forward with other rows for the output layer; return what was seen, and the logits."""
    watched = _Watched()
    with _watching(model, watched, rows, replace=replace):
        out = forward(*args, **kwargs)
    if watched.backbone is None:
        watched.backbone = out
    watched.aux_loss = getattr(out, "aux_loss", None)
    return watched, out.logits


@contextmanager
def _watching(model: Any, watched: _Watched, rows: Select | None, *, replace: bool) -> Iterator[None]:
    """Watch the output layer and the backbone of the forwards that follow."""

    def before(_layer: nn.Module, given: tuple[Any, ...]) -> Any:
        watched.calls += 1
        if watched.calls > 1 or len(given) != 1 or given[0].dim() != 3 or rows is None:
            watched.states = None
            return None
        watched.states = given[0]
        return (rows(given[0]),)

    def after(_layer: nn.Module, _given: Any, result: Tensor) -> Any:
        if not replace or watched.states is None:
            return None
        watched.result = result.detach()[0, :-GRID]
        precise = torch.promote_types(result.dtype, torch.float32)
        return torch.cat([watched.result.to(precise), _grid(result[0, -GRID:].to(precise))])[None]

    layer, backbone = model.get_output_embeddings(), model.base_model
    handles = [] if backbone is model else [backbone.register_forward_hook(_keep(watched))]
    if layer is not None:
        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(watched: _Watched) -> Callable[..., None]:
    def hook(_module: nn.Module, _given: Any, result: Any) -> None:
        watched.backbone = result

    return hook


def _grid(like: Tensor) -> Tensor:
    """Known numbers in place of the output layer's result: of all sizes up to `SPAN`, in another order in each row."""
    size = like.shape[-1]
    sizes = torch.logspace(-2, torch.tensor(SPAN).log10().item(), size, dtype=like.dtype, device=like.device)
    signed = sizes * torch.tensor([1.0, -1.0], device=like.device).repeat(size)[:size]
    return torch.stack([signed.roll(row * (size // GRID)) for row in range(GRID)])


def _measure(model: Any, watched: _Watched, logits: Tensor, select: Select) -> tuple[Measured, bool]:
    """Return what the head is, and whether any token was compared."""
    layer = model.get_output_embeddings()
    if watched.states is None or watched.result is None or watched.calls != 1:
        return Measured("whole"), True
    if logits.shape != (1, len(watched.result) + GRID, watched.result.shape[-1]):
        raise ValueError(
            f"{type(model).__name__} has no row of logits per token and token of its output layer, which scoring needs"
        )
    form = _form(_grid(logits[0, -GRID:]), logits[0, -GRID:])
    if form is None or not _only_multiplies(layer):
        return Measured("rows"), True
    rows, own = select(watched.states)[:PROBED].detach(), logits[0, :-GRID].detach()
    with torch.no_grad(), gathered(model):
        found = _logits(rows.to(layer.weight.device), _head(model, form)).to(own)
    off = (found.log_softmax(-1) - own.log_softmax(-1)).abs()
    likely = off[own.softmax(-1) > 1e-6]  # far down the tail only rounding is left
    near = likely.numel() == 0 or float(likely.mean()) < OFF.get(watched.result.dtype, 0.1)
    last = getattr(watched.backbone, "last_hidden_state", None)
    direct = (
        isinstance(last, Tensor) and last.shape == watched.states.shape and torch.equal(select(last)[:PROBED], rows)
    )
    return (form._replace(direct=direct) if near else Measured("rows")), len(rows) > 0


def gathered(model: Any) -> AbstractContextManager[Any]:
    """Return a context in which a process has the whole output layer, of which ZeRO 3 keeps parts."""
    layer = model.get_output_embeddings()
    if layer is None:
        return nullcontext()
    bias: Any = getattr(layer, "bias", None)
    context: AbstractContextManager[Any] = maybe_gather_lm_head_ctx(layer.weight, bias)
    return context


def _only_multiplies(layer: Any) -> bool:
    """Whether a layer has a weight and a bias and nothing else, such as an adapter or a quantised weight."""
    names = {name for name, _ in layer.named_parameters()}
    return names <= {"weight", "bias"} and bool(names) and layer.weight.is_floating_point()


def _logits(rows: Tensor, head: Head) -> Tensor:
    precise = torch.promote_types(rows.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(precise)
    with torch.autocast(rows.device.type, enabled=False):
        found = linear(rows.to(precise), head.weight.to(precise), bias) * head.scale
    return found if head.softcap is None else head.softcap * torch.tanh(found / head.softcap)


def _form(given: Tensor, found: Tensor) -> Measured | None:
    """Read a factor, or a factor and a cap, off what became of known numbers.

    Args:
        given: `(n, V)` numbers.
        found: `(n, V)` what the model made of them.

    Returns:
        The measured head, None if `found` is neither `s x` nor `c tanh(s x / c)`.
    """
    x, y = given.double(), found.detach().double().to(given.device)
    if not y.isfinite().all():
        return None
    scale = _ratio(x, y)
    if _close(scale * x, y):
        return Measured("head", scale)
    cap = float(y.abs().max())
    small = x.abs() * abs(_ratio(x[x.abs() < 1], y[x.abs() < 1])) < cap / 10
    if not small.any():
        return None
    scale = _ratio(x[small], cap * torch.atanh(y[small] / cap))
    return Measured("head", scale, cap) if _close(cap * torch.tanh(scale * x / cap), y) else None


def _ratio(x: Tensor, y: Tensor) -> float:
    """Return y / x where both are small and large alike, 1 if it is that but for rounding."""
    ratio = float((y / x).median())
    return 1.0 if abs(ratio - 1) < 1e-6 else ratio


def _close(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-6))


def _tell(model: Any, known: Measured) -> None:
    if known.kind != "head":
        logger.warning(
            "the logits of %s are more than its output layer's weight with a factor or a cap: they are taken from its own forward, "
            "which holds those of all %s tokens in memory",
            type(model).__name__,
            "scored" if known.kind == "rows" else "given",
        )
