"""The registry of decoding methods."""

from typing import Any

from contralto.common.registry import Registry
from contralto.decoding.methods.base import Method

__all__ = ["METHODS", "register"]


def _check(entry: Any) -> None:
    """Raise ValueError unless an entry is a declaration."""
    if not isinstance(entry, Method):
        raise ValueError(f"it must be a Method of contralto.decoding.methods, not a {type(entry).__name__}")  # noqa: TRY004


METHODS: Registry[Method] = Registry("method", group="contralto.methods", check=_check)
"""Every decoding method by name."""


def register(method: Method) -> Method:
    """Add a decoding method, so that every command and every part of the library knows it.

    A package that is installed can name its declaration as an entry point of the group `contralto.methods` instead.

    Args:
        method: its declaration.

    Returns:
        The declaration.

    Raises:
        ValueError: the name is taken.
    """
    return METHODS.register(method)
