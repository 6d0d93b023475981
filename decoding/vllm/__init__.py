"""Contrastive decoding on stock vLLM: each branch of a completion is a request, and the requests are kept in step.

`settings` defines the `contrast_...` arguments that tie requests together, `processor` combines their logits, `scheduler`
keeps them in step, `checks` rejects engine options that would schedule them apart, `engine` starts vLLM with all of it.
`offline` generates with an engine in this process, for which `images` makes prompts, `client` over HTTP, whose `replies` it parses; both keep the state of a
completion in `session`. `middleware` validates HTTP requests, and `waiting` holds them until all branches of a
completion have arrived. `amateur` is the alternative for contrast with another, smaller model, which reads the `sequences` of
the engine. vLLM is imported only by the modules that need it.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.decoding.vllm.amateur import AmateurContrast as AmateurContrast
    from contralto.decoding.vllm.client import PairClient as PairClient
    from contralto.decoding.vllm.engine import make_llm as make_llm
    from contralto.decoding.vllm.engine import server_flags as server_flags
    from contralto.decoding.vllm.images import noised_image as noised_image
    from contralto.decoding.vllm.offline import generate_pairs as generate_pairs
    from contralto.decoding.vllm.processor import PairedContrast as PairedContrast
    from contralto.decoding.vllm.scheduler import AsyncPairScheduler as AsyncPairScheduler
    from contralto.decoding.vllm.scheduler import PairScheduler as PairScheduler
    from contralto.decoding.vllm.scheduler import pair_scheduler as pair_scheduler
    from contralto.decoding.vllm.session import PairOutput as PairOutput
    from contralto.decoding.vllm.settings import Row as Row

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "amateur": ["AmateurContrast"],
        "client": ["PairClient"],
        "engine": ["make_llm", "server_flags"],
        "images": ["noised_image"],
        "offline": ["generate_pairs"],
        "processor": ["PairedContrast"],
        "scheduler": ["AsyncPairScheduler", "PairScheduler", "pair_scheduler"],
        "session": ["PairOutput"],
        "settings": ["Row"],
    },
)
