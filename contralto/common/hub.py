"""Models as users name them: a folder, a hub id, or `testbed:NAME` for an embedded model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contralto.common.errors import during

__all__ = [
    "check_weights",
    "from_pretrained",
    "locate",
    "remote_code",
    "trusts_remote_code",
    "with_adapter",
]

_trusts = False
"""Whether models may run code that comes with them; set by the flag `--trust-remote-code` of a command. For all threads."""


def locate(name: str) -> str:
    """The folder or hub id of a model's name.

    Examples:
        >>> locate("testbed:expert").endswith("expert-0"), locate("org/model")
        (True, 'org/model')
    """
    if not name.startswith("testbed:"):
        return name
    from contralto import testbed

    return str(testbed.path(name.removeprefix("testbed:")))


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
