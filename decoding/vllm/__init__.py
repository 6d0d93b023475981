"""Contrastive decoding in vLLM, on stock vLLM: the branches of a text are requests of their own, tied together.

`settings` says how requests are tied, `processor` weighs their logits, `scheduler` keeps them in step, `engine` starts vLLM
with all of it, `pairs` asks it in this process, `client` over HTTP, `middleware` checks what comes over HTTP. `amateur` is the
other way, for a different small model. vLLM is imported only by what needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contralto.decoding.vllm.amateur import AmateurContrast as AmateurContrast
    from contralto.decoding.vllm.client import PairClient as PairClient
    from contralto.decoding.vllm.engine import make_llm as make_llm
    from contralto.decoding.vllm.engine import server_flags as server_flags
    from contralto.decoding.vllm.pairs import PairOutput as PairOutput
    from contralto.decoding.vllm.pairs import generate_pairs as generate_pairs
    from contralto.decoding.vllm.processor import PairedContrast as PairedContrast
    from contralto.decoding.vllm.scheduler import AsyncPairScheduler as AsyncPairScheduler
    from contralto.decoding.vllm.scheduler import PairScheduler as PairScheduler
    from contralto.decoding.vllm.scheduler import pair_scheduler as pair_scheduler
    from contralto.decoding.vllm.settings import Row as Row

_HOME = {
    "amateur": ["AmateurContrast"],
    "client": ["PairClient"],
    "engine": ["make_llm", "server_flags"],
    "pairs": ["PairOutput", "generate_pairs"],
    "processor": ["PairedContrast"],
    "scheduler": ["AsyncPairScheduler", "PairScheduler", "pair_scheduler"],
    "settings": ["Row"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that the HTTP client and the settings do without vLLM."""
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
