"""Strategies make preference pairs of rows: generator functions that yield requests, receive answers, and return pairs.

Settings such as `target` and `judge` name roles: the engines that the recipe gives to these roles generate the text, with the
sampling that the recipe gives to the role. `registry` holds the strategies by name; packages add theirs by entry points of the
group `contralto.strategies`, and a recipe may name any other one as `module:function`.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.data_gen.strategies.registry import STRATEGIES as STRATEGIES
    from contralto.data_gen.strategies.registry import StrategyFunction as StrategyFunction

__getattr__, __dir__, __all__ = exports(__name__, {"registry": ["STRATEGIES", "StrategyFunction"]})
