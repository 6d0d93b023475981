"""Find the layers of a model, and make a model of some of them.

The list of layers is found by watching a forward pass, not by the names of modules. The smaller model is built from a
configuration with fewer layers, and its logits are compared with those of the whole model whose other layers hand on their
input: where a layer depends on its number (attention types, shared caches), the two differ, and the model is rejected.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contralto.common.head.hooks import hooked, in_this_thread
from contralto.decoding.branches.context import context_length

__all__ = ["LayerList", "cut_config", "cut_model", "find_layers", "probe_rows", "skipping"]

TOLERANCE = 1e-3
"""Largest difference of logits, relative to their standard deviation: rounding in float32."""
LONGEST_PROBE = 2048
"""Largest number of tokens of the text that the comparison reads; beyond it no sliding window is reached."""


class LayerList(NamedTuple):
    """The layers of a model."""

    name: str
    """Name of the list, for `model.get_submodule`."""
    depth: int
    """Number of layers."""


def find_layers(model: Any) -> LayerList:
    """Find the list of a model's layers by watching a forward pass.

    Args:
        model: a decoder-only transformers model.

    Returns:
        The list whose modules run once each, in their order, and are as many as the configuration says.

    Raises:
        ValueError: an encoder-decoder, or a model without such a list.

    Examples:
        >>> from contralto import testbed
        >>> find_layers(testbed.load("expert"))
        LayerList(name='model.layers', depth=4)
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder, and layers are removed from decoder-only models alone")
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {
        path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth
    }
    calls: dict[str, list[int]] = {path: [] for path in lists}

    def note(path: str, index: int) -> Any:
        return in_this_thread(lambda *_: calls[path].append(index))

    handles = [
        layer.register_forward_hook(note(path, index))
        for path, part in lists.items()
        for index, layer in enumerate(part)
    ]
    with torch.no_grad(), hooked(handles):
        model(input_ids=probe_rows(model, 4), use_cache=False)
    found = [path for path, order in calls.items() if order == list(range(depth))]
    if len(found) != 1:
        raise ValueError(
            f"{name} has {len(found) or 'no'} lists of {depth} layers that run one after the other, so its layers cannot be "
            "removed: take a smaller model of its family"
        )
    return LayerList(found[0], depth)


def probe_rows(model: Any, length: int) -> Tensor:
    """Return one row of varied token ids.

    Args:
        model: a transformers model.
        length: number of tokens.
    """
    size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(length) * 7919 % max(1, size - 8) + min(4, size - 1)
    return ids.remainder(size)[None].to(model.device)


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """Return a configuration with some of the layers; lists with an entry per layer are cut, too.

    Args:
        config: the configuration of the whole model.
        kept: numbers of the layers that are kept, from 0, in order.

    Examples:
        >>> from transformers import Qwen2Config
        >>> whole = Qwen2Config(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"])
        >>> cut_config(whole, [0, 2]).layer_types
        ['full_attention', 'full_attention']
    """
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, name, type(value)(value[index] for index in kept))
    text.num_hidden_layers = len(kept)
    return smaller


def cut_model(model: Any, kept: Sequence[int]) -> Any:
    """Return a new model that consists of some of a model's layers, with the same weights.

    Args:
        model: a decoder-only transformers model.
        kept: numbers of the layers that are kept, from 0, in order.

    Returns:
        A model of the same class and dtype, on the same device, in evaluation mode.

    Raises:
        ValueError: the model's layers cannot be removed, or numbers that are not increasing or that it does not have.

    Examples:
        >>> from contralto import testbed
        >>> cut_model(testbed.load("expert"), [0, 3]).config.num_hidden_layers
        2
    """
    layers = find_layers(model)
    if list(kept) != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] >= layers.depth:
        raise ValueError(
            f"the layers to keep must be increasing numbers from 0 to {layers.depth - 1}, not {', '.join(map(str, kept))}"
        )
    _check_rebuild(model, layers)
    smaller = _build(model, layers, kept)
    _compare(smaller, model, layers, kept)
    return smaller


def _build(model: Any, layers: LayerList, kept: Sequence[int]) -> Any:
    """Return a model of the kept layers, built from a configuration and given the weights of the whole model."""
    smaller = type(model)(cut_config(model.config, kept)).to(dtype=model.dtype, device=model.device)
    places = {f"{layers.name}.{old}.": f"{layers.name}.{new}." for new, old in enumerate(kept)}
    weights = dict(_renamed(model.state_dict(), f"{layers.name}.", places))
    problems = smaller.load_state_dict(weights, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        name = (problems.missing_keys or problems.unexpected_keys)[0]
        raise ValueError(
            f"the weights of {type(model).__name__} do not fit the model with {len(kept)} layers, such as {name}: its layers cannot "
            "be removed"
        )
    smaller.tie_weights()
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval()


def _renamed(weights: dict[str, Tensor], prefix: str, places: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights outside of the layers, and those of the kept layers by their new names."""
    for name, value in weights.items():
        if not name.startswith(prefix):
            yield name, value
            continue
        number = name.removeprefix(prefix).split(".")[0]
        if (place := places.get(f"{prefix}{number}.")) is not None:
            yield place + name.removeprefix(f"{prefix}{number}."), value


def _check_rebuild(model: Any, layers: LayerList) -> None:
    """Raise ValueError unless a model that keeps all layers computes exactly what the model does."""
    again, ids = _build(model, layers, range(layers.depth)), _probe(model)
    if not torch.equal(_logits(again, ids), _logits(model, ids)):
        raise ValueError(
            f"{type(model).__name__} built anew from its configuration and weights gives other logits: its layers cannot be removed"
        )


def _compare(smaller: Any, model: Any, layers: LayerList, kept: Sequence[int]) -> None:
    """Raise ValueError unless the smaller model computes what the whole model does without the other layers."""
    ids = _probe(model)
    with skipping(model, layers, kept):
        expected = _logits(model, ids)
    off = float((_logits(smaller, ids) - expected).float().abs().max() / expected.float().std())
    if not off < (TOLERANCE if model.dtype in (torch.float32, torch.float64) else 0.1):
        raise ValueError(
            f"{type(model).__name__} with layers {', '.join(map(str, kept))} computes something else in another place, by {off:.2g} of "
            "the spread of its logits, so a layer depends on its number: keep other layers"
        )


def _probe(model: Any) -> Tensor:
    """Return a row that reaches past the model's sliding window, if it has a short one."""
    text = model.config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None) or 0
    most = min(context_length(model) or LONGEST_PROBE, LONGEST_PROBE)
    return probe_rows(model, min(max(16, window + 8 if window + 8 <= LONGEST_PROBE else 16), most))


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def skipping(model: Any, layers: LayerList, kept: Sequence[int]) -> Iterator[None]:
    """Make the other layers of a model hand on their input, within the block.

    Args:
        model: a model.
        layers: its list of layers.
        kept: numbers of the layers that run.
    """

    def identity(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    parts: Any = model.get_submodule(layers.name)
    with ExitStack() as stack:
        handles = [
            layer.register_forward_hook(in_this_thread(identity), with_kwargs=True)
            for index, layer in enumerate(parts)
            if index not in set(kept)
        ]
        stack.enter_context(hooked(handles))
        yield
