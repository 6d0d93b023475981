"""Models as users name them: a folder, a hub id, or `testbed:NAME` for an embedded model."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contralto.common.errors import during
from contralto.common.registry import Registry

__all__ = [
    "SOURCES",
    "check_weights",
    "from_pretrained",
    "locate",
    "remote_code",
    "trusts_remote_code",
    "with_adapter",
]

SOURCES = Registry[Callable[[str], str | os.PathLike[str]]]("source of models", group="contralto.models")
"""Functions that return the folder of a model, by the prefix of the model's name: `testbed:expert` is `expert` in the source `testbed`.
Packages add sources by entry points; the testbed does, so that no part of the library imports it."""

_trusts = False
"""Whether models may run code that comes with them; set by the flag `--trust-remote-code` of a command. For all threads."""


def locate(name: str) -> str:
    """Return the folder or the hub id of a model.

    Args:
        name: a folder, a hub id, or `SOURCE:NAME`, where `SOURCE` is an entry of `SOURCES`.

    Raises:
        ValueError: the source has no model of that name.

    Examples:
        >>> locate("testbed:expert").endswith("expert-0"), locate("org/model")
        (True, 'org/model')
    """
    source, colon, rest = name.partition(":")
    return str(SOURCES.get(source)(rest)) if colon and source in SOURCES else name


@contextmanager
def remote_code(*, trusted: bool) -> Iterator[None]:
    """Let `from_pretrained` run the code that comes with models, or not, for as long as the context lasts.

    Args:
        trusted: whether the user has said so.
    """
    global _trusts
    before, _trusts = _trusts, trusted
    try:
        yield
    finally:
        _trusts = before


def check_weights(name: str) -> None:
    """Reject damaged files of weights in a local folder before anything is loaded: a copy that was cut short, a pointer of Git LFS.

    Args:
        name: a model's name; those of the Hub are not looked at.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    from safetensors import safe_open

    for file in sorted(Path(locate(name)).glob("*.safetensors")):
        with during(f"cannot load {name}: {file.name} is damaged"), safe_open(file, framework="pt"):
            pass


def trusts_remote_code() -> bool:
    """Return whether the user lets models run code that comes with them."""
    return _trusts


def from_pretrained(auto: Any, name: str, *, trust_remote_code: bool | None = None, **how: Any) -> Any:
    """Load a model, a configuration, a tokenizer or a processor. All of contralto loads them here.

    transformers asks on the terminal whether to run a model's own code, unless it is told.

    Args:
        auto: a class with `from_pretrained`.
        name: a folder, a hub id, or `testbed:NAME`.
        trust_remote_code: run the code that comes with the model; None is what the user said, by default no.
        how: further arguments of `from_pretrained`.

    Raises:
        OSError: there is no such model.
        ValueError: it needs code of its own.
    """
    trusted = _trusts if trust_remote_code is None else trust_remote_code
    with during(f"cannot load {name}"):  # errors do not always say which model
        try:
            return auto.from_pretrained(locate(name), trust_remote_code=trusted, **how)
        except ValueError as error:
            if trusted or "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                "it needs code that comes with it, which is not run unasked: read that code, then give "
                "--trust-remote-code, or trust_remote_code=True"
            ) from error


def with_adapter(model: Any, adapter: str, **how: Any) -> Any:
    """Put a PEFT adapter onto a model.

    Args:
        model: the model.
        adapter: a folder or a hub id.
        how: further arguments of `PeftModel.from_pretrained`.
    """
    from peft import PeftModel

    return PeftModel.from_pretrained(model, locate(adapter), **how)
