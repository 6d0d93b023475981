"""Find the list of a model's layers, and run a forward pass with some of them alone.

The list is found by watching a forward pass, not by the names of modules.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from contralto.common.head.hooks import hooked, in_this_thread, probe_ids

__all__ = ["LayerList", "find_layers", "running_layers"]

_FOUND: WeakKeyDictionary[Any, "LayerList"] = WeakKeyDictionary()
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Locks that are held while layers of a model are skipped: forwards that two threads replace could not be restored in turn."""


class LayerList(NamedTuple):
    """The layers of a model."""

    name: str
    """Name of the list, for `model.get_submodule`."""
    depth: int
    """Number of layers."""
    returns_tuple: bool
    """Whether a layer returns its hidden states in a tuple."""


def find_layers(model: Any) -> LayerList:
    """Find the list of a model's layers by watching a forward pass. The result is kept for the model's lifetime.

    Args:
        model: a decoder-only transformers model.

    Returns:
        The list whose modules run once each, in their order, and are as many as the configuration says.

    Raises:
        ValueError: an encoder-decoder, or a model without such a list.

    Examples:
        >>> from contralto import testbed
        >>> find_layers(testbed.load("expert"))
        LayerList(name='model.layers', depth=3, returns_tuple=False)
    """
    if model not in _FOUND:
        _FOUND[model] = _find(model)
    return _FOUND[model]


def _find(model: Any) -> LayerList:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder, and layers are skipped or removed in decoder-only models alone"
        )
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {
        path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth
    }
    calls: dict[str, list[int]] = {path: [] for path in lists}
    tuples: dict[str, bool] = {}

    def note(path: str, index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            calls[path].append(index)
            tuples[path] = isinstance(output, tuple)

        return in_this_thread(hook)

    handles = [
        layer.register_forward_hook(note(path, index))
        for path, part in lists.items()
        for index, layer in enumerate(part)
    ]
    with torch.no_grad(), hooked(handles):
        model(input_ids=probe_ids(model), use_cache=False)
    found = [path for path, order in calls.items() if order == list(range(depth))]
    if len(found) != 1:
        raise ValueError(
            f"{name} has {len(found) or 'no'} lists of {depth} layers that run one after the other, so its layers cannot be "
            "skipped or removed"
        )
    return LayerList(found[0], depth, tuples[found[0]])


@contextmanager
def running_layers(model: Any, kept: Collection[int]) -> Iterator[None]:
    """Skip all but some layers of a model within the block: the others return their input, and compute nothing.

    Other threads that use the model are not affected; those that skip layers, too, wait.

    Args:
        model: a decoder-only transformers model.
        kept: numbers of the layers that run, from 0.

    Raises:
        ValueError: see `find_layers`.

    Examples:
        >>> from contralto import testbed
        >>> model, ids = testbed.load("expert"), torch.tensor([[5, 6, 7]])
        >>> with torch.no_grad(), running_layers(model, [0]):
        ...     early = model(ids).logits
        >>> states = model(ids, output_hidden_states=True).hidden_states
        >>> torch.equal(early, model.lm_head(model.model.norm(states[1])))
        True
    """
    layers = find_layers(model)
    parts: Any = model.get_submodule(layers.name)
    skipped = [layer for index, layer in enumerate(parts) if index not in kept]
    with _LOCKS.setdefault(model, threading.RLock()):
        before = [layer.__dict__.get("forward") for layer in skipped]
        try:
            for layer in skipped:
                layer.forward = _identity(layer.forward, layers)
            yield
        finally:
            for layer, own in zip(skipped, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own


def _identity(forward: Callable[..., Any], layers: LayerList) -> Callable[..., Any]:
    """Return a forward pass of a layer that returns its input unchanged in this thread, and runs the layer in others."""
    thread = threading.get_ident()

    def identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return forward(hidden_states, *args, **kwargs)
        return (hidden_states,) if layers.returns_tuple else hidden_states

    return identity
