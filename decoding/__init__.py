"""Decoding by contrast.

`rules` holds the mathematics: pure functions of logits, which import nothing but torch. `branches` says where a contrast
distribution comes from, `processors` joins the two for an unmodified `generate()`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contralto.decoding.branches import AdaptersOff as AdaptersOff
    from contralto.decoding.processors import (
        ContrastiveDecodingLogitsProcessor as ContrastiveDecodingLogitsProcessor,
    )

_HOME = {"AdaptersOff": "branches", "ContrastiveDecodingLogitsProcessor": "processors"}

__all__ = ["AdaptersOff", "ContrastiveDecodingLogitsProcessor"]


def __getattr__(name: str) -> Any:
    """Import what needs transformers when it is asked for, so that `contralto.decoding.rules` needs torch alone."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
