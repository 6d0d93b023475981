"""Train the critic of critic-guided decoding: a frozen language model with a head that predicts the reward of a text from its beginning.

`texts` samples and scores texts, `returns` computes the targets, `training` trains, `report` measures on held-out prompts, `card`
describes, and `making` is the whole.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.align.critic.making import TrainedCritic as TrainedCritic
    from contralto.align.critic.making import make_critic as make_critic
    from contralto.align.critic.returns import lambda_returns as lambda_returns
    from contralto.align.critic.settings import CriticConfig as CriticConfig

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "making": ["TrainedCritic", "make_critic"],
        "returns": ["lambda_returns"],
        "settings": ["CriticConfig"],
    },
)
