"""Measure the path from a model's last layer to its logits, and apply it to earlier layers.

Between the last layer and the logits lie a final norm, the head's matrix, and in some families a scale or a soft cap. A forward
pass of a few tokens shows which modules lead from the last layer to what the head reads, and which module hands it on (the
backbone). From then on a forward hook puts earlier layers, taken through the same modules, beside the last one, as further rows
of the backbone's output; so the model's own code computes their logits, whatever it does. The measurement ends with a test: the
last layer, taken that way, must give the model's own logits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from contralto.common.head.hooks import hooked, in_this_thread, probe_ids

__all__ = ["LayerPath", "find_path", "read_layers"]

TOLERANCE = 1e-2
"""Largest difference from the model's own logits, relative to their standard deviation: rounding in half precision."""
_PATHS: WeakKeyDictionary[Any, "LayerPath"] = WeakKeyDictionary()


class LayerPath(NamedTuple):
    """The path from a model's last layer to its logits."""

    backbone: str
    """Name of the module whose output the head reads."""
    final: tuple[str, ...]
    """Names of the modules between the last layer and that output, in order: usually the final norm alone."""
    first: int
    """Number of the layer that comes first in the model's `hidden_states`: 0, the embeddings, in nearly all; 1 in Mamba."""


class _ModuleCall(NamedTuple):
    """The call of a module in the forward pass that is recorded."""

    name: str
    is_block: bool
    """Whether the module has submodules, as every layer has and no norm."""
    inputs: list[Tensor]
    result: Tensor | None
    output: Any


def find_path(model: Any) -> LayerPath:
    """Measure the path from a model's last layer to its logits. The result is kept for the model's lifetime.

    Args:
        model: a decoder-only transformers model.

    Returns:
        The path, with names for `model.get_submodule`.

    Raises:
        ValueError: the model's hidden states do not lead to its logits through modules, so its layers have no logits.

    Examples:
        >>> from contralto import testbed
        >>> find_path(testbed.load("expert"))
        LayerPath(backbone='model', final=('model.norm',), first=0)
    """
    if model not in _PATHS:
        with torch.no_grad():
            _PATHS[model] = _measure(model)
    return _PATHS[model]


@contextmanager
def read_layers(model: Any, layers: Sequence[int], *, keep: int, final_norm: bool = True) -> Iterator[None]:
    """Make the model's forward pass also return the logits of earlier layers, as rows after its own.

    Inside the context, a forward pass of `B` rows with `output_hidden_states=True` returns logits `((1 + L) * B, keep, V)`: the
    model's own, then those of each layer. Other threads that use the model are not affected.

    Args:
        model: a decoder-only transformers model.
        layers: numbers of layers: 0 for the embeddings, 1 for the first layer, ...
        keep: number of last positions that are read; also pass `logits_to_keep=keep` where the model takes it.
        final_norm: whether earlier layers pass the modules between the last layer and the head.

    Raises:
        ValueError: see `find_path`.

    Examples:
        >>> from contralto import testbed
        >>> model = testbed.load("expert")
        >>> with torch.no_grad(), read_layers(model, [1, 2], keep=1):
        ...     model(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True, logits_to_keep=1).logits.shape[:2]
        torch.Size([3, 1])
    """
    path = find_path(model)
    if min(layers) < path.first:
        raise _unreadable(model, "it returns no embeddings with its hidden states, and layer 0 is the embeddings")
    final = [model.get_submodule(name) for name in path.final] if final_norm else []

    def early(output: Any) -> list[Tensor]:
        return [_through(final, output.hidden_states[layer - path.first][:, -keep:]) for layer in layers]

    with _further_rows(model.get_submodule(path.backbone), early, keep):
        yield


@contextmanager
def _further_rows(backbone: Any, rows: Callable[[Any], Sequence[Tensor]], keep: int) -> Iterator[None]:
    """Append rows to the last hidden states `(B, keep, H)` that the backbone hands to the head."""

    def append(_module: Any, _inputs: Any, output: Any) -> Any:
        last = output.last_hidden_state[:, -keep:]
        output["last_hidden_state"] = torch.cat([last, *(part.to(last) for part in rows(output))])
        return output

    with hooked([backbone.register_forward_hook(in_this_thread(append))]):
        yield


def _through(modules: Sequence[Any], hidden: Tensor) -> Tensor:
    for module in modules:
        hidden = module(hidden)
    return hidden


def _measure(model: Any) -> LayerPath:
    """Follow the calls of a forward pass back from the output of the backbone to the last layer, and test the path."""
    ids = probe_ids(model)
    calls, logits = _record(model, ids)
    backbone = next((call for call in reversed(calls) if _is_backbone(model, call)), None)
    if backbone is None:
        raise _unreadable(model, "no part of it hands on the hidden states of every layer")
    states = backbone.output.hidden_states
    traced = _trace(calls, backbone.output.last_hidden_state, states)
    if traced is None or traced[1].shape != states[-2].shape:
        raise _unreadable(model, "what its head reads does not follow from the output of its last layer by modules")
    path, last_layer = traced[0]._replace(backbone=backbone.name), traced[1]
    modules = [model.get_submodule(name) for name in path.final]
    with _further_rows(model.get_submodule(backbone.name), lambda _: [_through(modules, last_layer)], ids.shape[1]):
        again = model(input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True).logits
    wrong = (again[1:] - logits).float().abs().amax() / logits.float().std()
    if again.shape[0] != 2 or not wrong < TOLERANCE:
        raise _unreadable(model, f"its last layer gives other logits than the model, by {wrong:.2g} of their spread")
    return path


def _record(model: Any, ids: Tensor) -> tuple[list[_ModuleCall], Tensor]:
    """Return the calls of modules in a forward pass, in the order in which they ended, and its logits."""
    calls: list[_ModuleCall] = []

    def hook(name: str) -> Any:
        def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            first = output[0] if isinstance(output, tuple | list) and output else output
            is_block = next(module.children(), None) is not None
            calls.append(_ModuleCall(name, is_block, tensors, first if isinstance(first, Tensor) else None, output))

        return in_this_thread(note)

    parts = [(name, module) for name, module in model.named_modules() if name]
    with hooked(module.register_forward_hook(hook(name), with_kwargs=True) for name, module in parts):
        outputs = model(input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True)
    return calls, outputs.logits


def _is_backbone(model: Any, call: _ModuleCall) -> bool:
    """Return whether a module returned the hidden states of every layer and the input of the head."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    states = getattr(call.output, "hidden_states", None)
    last = getattr(call.output, "last_hidden_state", None)
    return isinstance(last, Tensor) and isinstance(states, tuple) and len(states) == depth + 1


def _trace(calls: Sequence[_ModuleCall], last: Tensor, states: Sequence[Tensor]) -> tuple[LayerPath, Tensor] | None:
    """Return the modules from the last layer's output to `last`, and that output; None if they do not connect."""
    names: list[str] = []
    for call in reversed(calls):
        if call.result is None or not _same(call.result, last):
            continue
        for first, read in enumerate(states[:-4:-1][1:]):
            starts_here = first == 0 or _same(last, states[-2])
            if starts_here and call.is_block and any(_same(tensor, read) for tensor in call.inputs):
                return LayerPath("", tuple(names), first), last
        if len(call.inputs) == 1 and not _same(call.inputs[0], last):  # else it does nothing, as dropout in evaluation
            names, last = [call.name, *names], call.inputs[0]
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1).to(one))


def _unreadable(model: Any, reason: str) -> ValueError:
    return ValueError(
        f"the layers of {type(model).__name__} have no logits that could be contrasted: {reason}; use another method"
    )
