"""Hook the modules of a model during a forward pass, and choose token ids for measuring passes."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from contralto.common.placement import input_device

__all__ = ["hooked", "in_this_thread", "probe_ids"]

PROBE = 3
"""Number of tokens of a pass that only serves to measure."""


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks at the end of the context.

    Args:
        handles: as `register_forward_hook` returns them.
    """
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that does nothing in other threads, which may use the model at the same time.

    Args:
        hook: a forward hook, with or without keyword arguments.
    """
    thread = threading.get_ident()

    def guarded(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    return guarded


def probe_ids(model: Any) -> Tensor:
    """Return a few token ids `(1, PROBE)` without a special meaning: none that the configuration names, such as an image token.

    Args:
        model: a transformers model with input embeddings.
    """
    special = set(_token_ids(model.config.to_dict()))
    count = model.get_input_embeddings().num_embeddings
    plain = (token for token in [*range(count // 2, count), *range(count // 2)] if token not in special)
    ids = [token for token, _ in zip(plain, range(PROBE), strict=False)]
    return torch.tensor([ids], device=input_device(model))


def _token_ids(config: Mapping[Any, Any]) -> Iterator[int]:
    """Iterate over all token ids that a configuration names."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _token_ids(value)
        elif "token" in str(name) and isinstance(value, int):
            yield value
