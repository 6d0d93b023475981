"""Change the attention of some layers of a model in this thread: what lies between the scores and the weighted values.

A layer reads the name of its attention function from its configuration. For the time of a change, the attention modules have one
that names a function of this module, which computes scores and weights as the eager implementation does and lets the change act
between them. Other threads that use the model meanwhile get the function that the model had. In the same way `grouped_attention` reads keys of
groups without repeating them.

Read from transformers 5.23.0: `AttentionInterface.register`, a public extension point; attention modules call
`(module, query, key, value, attention_mask, scaling=..., **kwargs)` with heads in dimension 1, keys of groups not repeated, and a mask
that is None, bool or float, `(B or 1, 1, q, keys)`.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from contralto.common.head import find_layers

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionPass",
    "attention_module",
    "changed_attention",
    "check_implementation",
    "grouped_attention",
    "grouped_modules",
]

IMPLEMENTATIONS = ("eager", "sdpa")
"""Implementations of attention whose masks can be added to the scores."""
NAME = "contralto_changed_attention"
"""The name of the function of this module in the registry of transformers."""


class AttentionPass(NamedTuple):
    """The attention of one layer in one forward pass, after its mask and before its softmax."""

    module: nn.Module
    """The attention module."""
    layer: int
    """Its number, from 0."""
    scores: Tensor
    """`(B, H, q, keys)`, the lowest finite number where a query does not see a key."""
    values: Tensor
    """`(B, H, keys, d)`, repeated to the number of heads."""

    def weights(self, scores: Tensor | None = None) -> Tensor:
        """Return the attention weights `(B, H, q, keys)` of the scores, or of others in their place.

        Args:
            scores: `(B, H, q, keys)`; None for those of the layer.
        """
        given = self.scores if scores is None else scores
        return given.softmax(-1, dtype=torch.promote_types(given.dtype, torch.float32)).to(self.values.dtype)


Change = Callable[[AttentionPass], Tensor]
"""Returns attention weights `(B, H, q, keys)`."""


class _ChangedConfig:
    """A configuration that names the function of this module, and is another one in all else.

    Args:
        config: the other one.
    """

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self.original = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


class _Installed(NamedTuple):
    """The configuration of an attention module before any change, and the number of changes in progress."""

    config: Any
    uses: int


_INSTALLED: WeakKeyDictionary[nn.Module, _Installed] = WeakKeyDictionary()
_LOCK = threading.Lock()
_THREAD = threading.local()


@contextmanager
def changed_attention(model: Any, changes: Mapping[int, Change]) -> Iterator[None]:
    """Change the attention of layers within the block, in this thread.

    Args:
        model: a decoder-only transformers model, whose attention is `eager` or `sdpa`.
        changes: by number of a layer, from 0, the function that makes its attention weights.

    Raises:
        ValueError: another implementation of attention, or a layer without exactly one attention module; in a forward pass, attention
            with sinks, whose weights do not sum to 1.

    Examples:
        >>> from contralto import testbed
        >>> model, ids = testbed.load("expert"), torch.tensor([[5, 6, 7]])
        >>> with torch.no_grad(), changed_attention(model, {0: lambda own: own.weights(own.scores * 0)}):
        ...     even = model(ids).logits
        >>> torch.equal(even, model(ids).logits)
        False
    """
    check_implementation(model)
    parts: Any = model.get_submodule(find_layers(model).name)
    modules = {attention_module(parts[layer], layer): change for layer, change in changes.items()}
    before = getattr(_THREAD, "changes", {})
    for module in modules:
        _install(module)
    _THREAD.changes = {**before, **modules}
    try:
        yield
    finally:
        _THREAD.changes = before
        for module in modules:
            _uninstall(module)


def grouped_modules(model: Any) -> list[nn.Module]:
    """Return the attention modules of a model whose heads share keys in groups, and which transformers computes by `sdpa`.

    Args:
        model: a transformers model.
    """
    found: list[Any] = [
        m for m in model.modules() if getattr(m, "num_key_value_groups", 1) > 1 and hasattr(m, "config")
    ]
    return [module for module in found if getattr(module.config, "_attn_implementation", None) == "sdpa"]


@contextmanager
def grouped_attention(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let attention under a mask read keys of groups as they are within the block, in this thread.

    transformers repeats keys and values for every head of a group where several queries have a mask. The heads of a group can as well be
    queries of the same head: nothing is copied, and the result is the same.

    Args:
        modules: of `grouped_modules`.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=4, num_key_value_heads=2))
        >>> ids, mask = torch.tensor([[1, 2, 3]]), torch.eye(3, dtype=torch.bool)[None, None]
        >>> with torch.no_grad(), grouped_attention(grouped_modules(model)):
        ...     grouped = model(ids, attention_mask=mask).logits
        >>> torch.allclose(grouped, model(ids, attention_mask=mask).logits, atol=1e-6)
        True
    """
    before: frozenset[nn.Module] = getattr(_THREAD, "grouped", frozenset())
    for module in modules:
        _install(module)
    _THREAD.grouped = before | set(modules)
    try:
        yield
    finally:
        _THREAD.grouped = before
        for module in modules:
            _uninstall(module)


def check_implementation(model: Any) -> None:
    """Raise ValueError unless the scores of a model's attention take a mask that is added to them.

    Args:
        model: a transformers model.
    """
    name = model.config.get_text_config(decoder=True)._attn_implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"the attention of the model is {name!r}, and only {' and '.join(IMPLEMENTATIONS)} take a float mask: load it with "
            "attn_implementation='sdpa'"
        )


def attention_module(layer: nn.Module, number: int) -> nn.Module:
    """Return the self-attention module of a layer.

    Args:
        layer: the layer.
        number: its number, for the error.

    Raises:
        ValueError: the layer has none, or several.
    """
    found = [each for each in layer.modules() if "Attention" in type(each).__name__ and hasattr(each, "layer_idx")]
    if len(found) != 1:
        raise ValueError(
            f"layer {number} has {len(found)} attention modules, and attention can be changed in layers with one: leave it out of layers"
        )
    return found[0]


def _install(module: Any) -> None:
    with _LOCK:
        known = _INSTALLED.get(module, _Installed(module.config, 0))
        if not known.uses:
            module.config = _ChangedConfig(known.config)
        _INSTALLED[module] = known._replace(uses=known.uses + 1)


def _uninstall(module: Any) -> None:
    with _LOCK:
        known = _INSTALLED[module]
        _INSTALLED[module] = known._replace(uses=known.uses - 1)
        if known.uses == 1:
            module.config = known.config
            del _INSTALLED[module]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a module with the change of this thread, or as the model does where there is none."""
    change = getattr(_THREAD, "changes", {}).get(module)
    if change is None:
        plain = (module, query, key, value, attention_mask)
        given = _packed(*plain) if module in getattr(_THREAD, "grouped", ()) and not args else plain
        output, weights = _former(module)(*given, *args, **kwargs)
        return (output, weights) if given[0] is module else (_unpacked(output, query), None)
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks, and attention with sinks cannot be changed")
    scaling = kwargs.get("scaling")
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if (cap := kwargs.get("softcap")) is not None:
        scores = (scores / cap).tanh() * cap
    is_causal = kwargs.get("is_causal")
    seen = _masked(scores, attention_mask, is_causal=module.is_causal if is_causal is None else is_causal)
    weights = change(AttentionPass(module, module.layer_idx, seen, values))
    return (weights.to(values.dtype) @ values).transpose(1, 2).contiguous(), weights


def _packed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the arguments of attention with the heads of a group as queries `(B, groups, heads * q, d)` of one head; as they are without gain."""
    batch, heads, count, width = query.shape
    groups = key.shape[1]
    if mask is None or count == 1 or groups == heads or mask.shape[1] != 1:
        return module, query, key, value, mask
    packed = query.reshape(batch, groups, heads // groups * count, width)
    return SimpleNamespace(is_causal=False), packed, key, value, mask.repeat(1, 1, heads // groups, 1)


def _unpacked(output: Tensor, query: Tensor) -> Tensor:
    """Return the output `(B, q, H, d)` of `(B, heads * q, groups, d)`."""
    batch, heads, count, _ = query.shape
    return output.transpose(1, 2).reshape(batch, heads, count, -1).transpose(1, 2).contiguous()


def _former(module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the attention function that a module had before."""
    name = _INSTALLED[module].config._attn_implementation
    plain: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    registry: Any = AttentionInterface  # which has no annotations
    found: Callable[..., tuple[Tensor, Tensor | None]] = registry().get_interface(name, plain)
    return found


def _masked(scores: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Return scores `(B, H, q, keys)` in which a key that a query does not see has the lowest finite number."""
    low = torch.finfo(scores.dtype).min
    count, keys = scores.shape[-2:]
    if mask is None:
        if count == 1 or not is_causal:
            return scores
        rows = torch.arange(keys - count, keys, device=scores.device)[:, None]
        return scores.masked_fill(torch.arange(keys, device=scores.device)[None] > rows, low)
    mask = mask[..., :keys]
    return scores.masked_fill(~mask, low) if mask.dtype == torch.bool else (scores + mask).clamp(min=low)


AttentionInterface.register(NAME, _attend)
