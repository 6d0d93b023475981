"""Make a model of some of a model's layers.

The smaller model is built from a configuration with fewer layers, and its logits are compared with those of the whole model whose
other layers are skipped: where a layer depends on its number (attention types, shared caches), the two differ, and the model
is rejected.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from contralto.common.errors import during
from contralto.common.head import LayerList, find_layers, running_layers
from contralto.decoding.branches.context import context_length

__all__ = ["cut_config", "cut_model", "probe_rows"]

TOLERANCE = 1e-3
"""Largest difference of logits, relative to their standard deviation: rounding in float32."""
LONGEST_PROBE = 2048
"""Largest number of tokens of the text that the comparison reads; beyond it no sliding window is reached."""


def probe_rows(model: Any, length: int) -> Tensor:
    """Return one row of varied token ids.

    Args:
        model: a transformers model.
        length: number of tokens.
    """
    size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(length) * 7919 % max(1, size - 8) + min(4, size - 1)
    rows: Tensor = ids.remainder(size)[None].to(model.device)
    return rows


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
        >>> cut_model(testbed.load("expert"), [0, 2]).config.num_hidden_layers
        2
    """
    layers = find_layers(model)
    if list(kept) != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] >= layers.depth:
        raise ValueError(
            f"the layers to keep must be increasing numbers from 0 to {layers.depth - 1}, not {', '.join(map(str, kept))}"
        )
    _check_rebuild(model, layers)
    smaller = _build(model, layers, kept)
    _compare(smaller, model, kept)
    return smaller


def _build(model: Any, layers: LayerList, kept: Sequence[int]) -> Any:
    """Return a model of the kept layers, built from a configuration and given the weights of the whole model."""
    with during(f"{type(model).__name__} cannot be built with layers {', '.join(map(str, kept))}"):
        smaller = type(model)(cut_config(model.config, kept)).to(device=model.device)
    places = {f"{layers.name}.{old}.": f"{layers.name}.{new}." for new, old in enumerate(kept)}
    weights = {name: value.clone() for name, value in _renamed(model.state_dict(), f"{layers.name}.", places)}
    # Assigned, not copied: each weight keeps its dtype, and buffers that are not stored (rotary frequencies) keep their precision.
    problems = smaller.load_state_dict(weights, strict=False, assign=True)
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


def _compare(smaller: Any, model: Any, kept: Sequence[int]) -> None:
    """Raise ValueError if the smaller model's logits differ from those of the whole model with the other layers skipped."""
    ids = _probe(model)
    with running_layers(model, kept):
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
