"""Make an amateur of an expert that has no smaller sibling: fewer layers, healed on texts that the expert writes.

`layers` removes layers, `choice` chooses them, `texts` are written by the expert, `training` distils, `report` compares, `card`
describes, and `making` is the whole.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.align.amateur.layers import cut_model as cut_model
    from contralto.align.amateur.making import Amateur as Amateur
    from contralto.align.amateur.making import make_amateur as make_amateur
    from contralto.align.amateur.settings import AmateurConfig as AmateurConfig

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "layers": ["cut_model"],
        "making": ["Amateur", "make_amateur"],
        "settings": ["AmateurConfig"],
    },
)
