"""Repositories for `generate(custom_generate=...)`: a method of this package, called by name from the Hugging Face Hub.

    model.generate(**inputs, custom_generate="USER/contrastive-decoding", amateur=amateur, trust_remote_code=True)

`repositories` declares them, `contents` writes their files from the declarations of the methods, `run` runs them, `upload` uploads them.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.decoding.hub.contents import files as files
    from contralto.decoding.hub.contents import write as write
    from contralto.decoding.hub.repositories import REPOSITORIES as REPOSITORIES
    from contralto.decoding.hub.repositories import HubRepository as HubRepository
    from contralto.decoding.hub.run import decode as decode
    from contralto.decoding.hub.upload import push as push

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "run": ["decode"],
        "contents": ["files", "write"],
        "upload": ["push"],
        "repositories": ["REPOSITORIES", "HubRepository"],
    },
)
