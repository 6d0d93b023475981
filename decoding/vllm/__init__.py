"""Contrastive decoding in vLLM, on stock vLLM: the branches of a text are requests of their own, tied together.

`settings` says how requests are tied, `processor` weighs their logits, `scheduler` keeps them in step, `engine` starts vLLM
with all of it, `pairs` asks it in this process, `client` over HTTP, `middleware` checks what comes over HTTP. `amateur` is the
other way, for a different small model. vLLM is imported only by what needs it.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

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

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "amateur": ["AmateurContrast"],
        "client": ["PairClient"],
        "engine": ["make_llm", "server_flags"],
        "pairs": ["PairOutput", "generate_pairs"],
        "processor": ["PairedContrast"],
        "scheduler": ["AsyncPairScheduler", "PairScheduler", "pair_scheduler"],
        "settings": ["Row"],
    },
)
