"""The head of a model, measured: what turns the hidden states of its last layer into logits, for any of its layers.

Between the last layer and the logits lie a final norm, the head's matrix, and in some families a scale or a soft cap. They
are not known here by name. A forward of a few tokens shows which modules lead from the last layer to what the head reads,
and which module hands it on (the backbone). From then on a forward hook puts earlier layers, taken through the same modules,
beside the last one, as more rows of what the backbone hands on; so the model's own code makes their logits, whatever it does.
The measurement ends with a test: the last layer, taken that way, must give the model's own logits.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from contralto.decoding.placement import input_device

__all__ = ["Head", "find_head", "read_layers"]

PROBE = 3
"""Tokens of the forward that shows the head."""
TOLERANCE = 1e-2
"""How far logits may lie from the model's own, relative to their spread: rounding in half precision."""
_HEADS: WeakKeyDictionary[Any, "Head"] = WeakKeyDictionary()


class Head(NamedTuple):
    """How a model gets from its last layer to its logits."""

    backbone: str
    """Name of the module whose output the head reads."""
    final: tuple[str, ...]
    """Names of the modules between the last layer and that output, in order: usually the final norm alone."""
    first: int
    """Which layer comes first in the model's `hidden_states`: 0, the embeddings, in nearly all; 1 in Mamba."""


class _Call(NamedTuple):
    """A module's call in the forward that shows the head."""

    name: str
    is_block: bool
    """Whether the module has parts of its own, as every layer has and no norm."""
    given: list[Tensor]
    result: Tensor | None
    output: Any


def find_head(model: Any) -> Head:
    """Measure how a model gets from its last layer to its logits. The result is kept for the model's lifetime.

    Args:
        model: a decoder-only transformers model.

    Returns:
        `Head`, with names for `model.get_submodule`.

    Raises:
        ValueError: the model's hidden states do not lead to its logits through modules, so its layers have no logits.

    Examples:
        >>> from contralto import testbed
        >>> find_head(testbed.load("expert"))
        Head(backbone='model', final=('model.norm',), first=0)
    """
    if model not in _HEADS:
        with torch.no_grad():
            _HEADS[model] = _measure(model)
    return _HEADS[model]


@contextmanager
def read_layers(model: Any, layers: Sequence[int], *, keep: int, final_norm: bool = True) -> Iterator[None]:
    """Let the model's forward return the logits of earlier layers too, as more rows after its own.

    Inside the context, a forward of `B` rows with `output_hidden_states=True` returns logits `((1 + L) * B, keep, V)`: the
    model's own, then those of each layer. Other threads that use the model are not affected.

    Args:
        model: a decoder-only transformers model.
        layers: 0 for the embeddings, 1 for the first layer, ...
        keep: number of last positions that are read; also pass `logits_to_keep=keep` where the model takes it.
        final_norm: whether earlier layers pass the modules between the last layer and the head.

    Raises:
        ValueError: see `find_head`.

    Examples:
        >>> from contralto import testbed
        >>> model = testbed.load("expert")
        >>> with torch.no_grad(), read_layers(model, [1, 2], keep=1):
        ...     model(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True, logits_to_keep=1).logits.shape[:2]
        torch.Size([3, 1])
    """
    head = find_head(model)
    if min(layers) < head.first:
        raise _unreadable(model, "it returns no embeddings with its hidden states, and layer 0 is the embeddings")
    final = [model.get_submodule(name) for name in head.final] if final_norm else []

    def early(output: Any) -> list[Tensor]:
        return [_through(final, output.hidden_states[layer - head.first][:, -keep:]) for layer in layers]

    with _more_rows(model.get_submodule(head.backbone), early, keep):
        yield


@contextmanager
def _more_rows(backbone: Any, more: Any, keep: int) -> Iterator[None]:
    """Put more rows after those that the backbone hands to the head."""
    thread = threading.get_ident()

    def add(module: Any, given: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return output
        last = output.last_hidden_state[:, -keep:]
        output["last_hidden_state"] = torch.cat([last, *(rows.to(last) for rows in more(output))])
        return output

    hook = backbone.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def _through(modules: Sequence[Any], hidden: Tensor) -> Tensor:
    for module in modules:
        hidden = module(hidden)
    return hidden


# ---------------------------------------------------------------------------------------------------- the measurement


def _measure(model: Any) -> Head:
    """Follow a forward's calls back from the output of the backbone to the last layer, and test what was found."""
    ids = _probe(model)
    calls, logits = _record(model, ids)
    backbone = next((call for call in reversed(calls) if _is_backbone(model, call)), None)
    if backbone is None:
        raise _unreadable(model, "no part of it hands on the hidden states of every layer")
    states = backbone.output.hidden_states
    found = _trace(calls, backbone.output.last_hidden_state, states)
    if found is None or found[1].shape != states[-2].shape:
        raise _unreadable(model, "what its head reads does not follow from the output of its last layer by modules")
    head, raw = found[0]._replace(backbone=backbone.name), found[1]
    modules = [model.get_submodule(name) for name in head.final]
    with _more_rows(model.get_submodule(backbone.name), lambda output: [_through(modules, raw)], ids.shape[1]):
        again = model(input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True).logits
    wrong = (again[1:] - logits).float().abs().amax() / logits.float().std()
    if again.shape[0] != 2 or not wrong < TOLERANCE:
        raise _unreadable(model, f"its last layer gives other logits than the model, by {wrong:.2g} of their spread")
    return head


def _probe(model: Any) -> Tensor:
    """A few token ids `(1, PROBE)` that stand for no image and mean nothing special."""
    special = set(_numbers(model.config.to_dict()))
    count = model.get_input_embeddings().num_embeddings
    plain = (token for token in [*range(count // 2, count), *range(count // 2)] if token not in special)
    ids = [token for token, _ in zip(plain, range(PROBE), strict=False)]
    return torch.tensor([ids], device=input_device(model))


def _numbers(config: Mapping[Any, Any]) -> Iterator[int]:
    """All token ids that a configuration names."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif "token" in str(name) and isinstance(value, int):
            yield value


def _record(model: Any, ids: Tensor) -> tuple[list[_Call], Tensor]:
    """A forward's calls of modules, in the order in which they ended, and its logits."""
    calls: list[_Call] = []
    thread = threading.get_ident()

    def hook(name: str) -> Any:
        def note(module: Any, given: Any, named: Any, output: Any) -> None:
            if threading.get_ident() != thread:
                return
            tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
            first = output[0] if isinstance(output, tuple | list) and output else output
            is_block = next(module.children(), None) is not None
            calls.append(_Call(name, is_block, tensors, first if isinstance(first, Tensor) else None, output))

        return note

    parts = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in parts]
    try:
        outputs = model(input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True)
    finally:
        for each in hooks:
            each.remove()
    return calls, outputs.logits


def _is_backbone(model: Any, call: _Call) -> bool:
    """Whether a part of the model returned the hidden states of every layer, and what the head reads."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    states = getattr(call.output, "hidden_states", None)
    last = getattr(call.output, "last_hidden_state", None)
    return isinstance(last, Tensor) and isinstance(states, tuple) and len(states) == depth + 1


def _trace(calls: Sequence[_Call], last: Tensor, states: Sequence[Tensor]) -> tuple[Head, Tensor] | None:
    """The modules from the last layer's output to `last`, and that output; None if something else lies between."""
    names: list[str] = []
    for call in reversed(calls):
        if call.result is None or not _same(call.result, last):
            continue
        for first, read in enumerate(states[:-4:-1][1:]):
            starts_here = first == 0 or _same(last, states[-2])
            if starts_here and call.is_block and any(_same(each, read) for each in call.given):
                return Head("", tuple(names), first), last
        if len(call.given) == 1 and not _same(call.given[0], last):  # else it does nothing, as a dropout at rest
            names, last = [call.name, *names], call.given[0]
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1).to(one))


def _unreadable(model: Any, reason: str) -> ValueError:
    return ValueError(
        f"the layers of {type(model).__name__} have no logits that could be contrasted: {reason}; use another method"
    )
