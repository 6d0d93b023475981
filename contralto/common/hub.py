"""Load models by the names that users give: a folder, a hub id, or `testbed:NAME` for an embedded model."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contralto.common.errors import during
from contralto.common.options import Option, OptionError
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
"""Whether models may run code that comes with them, in all threads; see `remote_code`."""


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
    """Allow or forbid `from_pretrained` to run the code that comes with models, within the block.

    Args:
        trusted: whether the user allows it.
    """
    global _trusts
    before, _trusts = _trusts, trusted
    try:
        yield
    finally:
        _trusts = before


def check_weights(name: str) -> None:
    """Raise if a local folder has damaged files of weights, such as an incomplete copy or a pointer of Git LFS.

    Args:
        name: the name of a model; a hub id is not checked.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    from safetensors import safe_open

    for file in sorted(Path(locate(name)).glob("*.safetensors")):
        with during(f"cannot load {name}: {file.name} is damaged"), safe_open(file, framework="pt"):
            pass


def trusts_remote_code() -> bool:
    """Return True if models may run code that comes with them."""
    return _trusts


def from_pretrained(auto: Any, name: str, *, trust_remote_code: bool | None = None, **options: Any) -> Any:
    """Load a model, a configuration, a tokenizer or a processor. All parts of contralto load them with this function.

    transformers asks on the terminal whether to run a model's own code, unless `trust_remote_code` is given.

    Args:
        auto: a class with `from_pretrained`.
        name: a folder, a hub id, or `testbed:NAME`.
        trust_remote_code: run the code that comes with the model; None follows `remote_code`, by default no.
        options: keyword arguments of `auto.from_pretrained`.

    Raises:
        OSError: there is no such model.
        OptionError: the model needs code of its own, and it may not run.
        ValueError: the model cannot be loaded.
    """
    trusted = _trusts if trust_remote_code is None else trust_remote_code
    with during(f"cannot load {name}"):  # errors do not always say which model
        try:
            return auto.from_pretrained(locate(name), trust_remote_code=trusted, **options)
        except ValueError as error:
            if trusted or "trust_remote_code" not in str(error):
                raise
            raise OptionError(
                "it needs code that comes with it, which is not run by default: read that code, then give {option}",
                option=Option("trust_remote_code", True),
            ) from error


def with_adapter(model: Any, adapter: str, **options: Any) -> Any:
    """Put a PEFT adapter onto a model.

    Args:
        model: the model.
        adapter: a folder or a hub id.
        options: keyword arguments of `PeftModel.from_pretrained`.
    """
    from peft import PeftModel

    return PeftModel.from_pretrained(model, locate(adapter), **options)
