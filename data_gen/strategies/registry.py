"""Strategies by name."""

import inspect
from collections.abc import Callable
from typing import Any

from contralto.common.registry import Registry
from contralto.data_gen.strategies.best_of_n import best_of_n
from contralto.data_gen.strategies.c_rag import c_rag
from contralto.data_gen.strategies.clair import clair
from contralto.data_gen.strategies.con_j import con_j
from contralto.data_gen.strategies.images import mvc
from contralto.data_gen.strategies.judge import off_policy_judge, verify_direction
from contralto.data_gen.strategies.on_policy import on_policy_judge, stronger_preferred, teacher_student
from contralto.data_gen.strategies.popalign import SIX, popalign
from contralto.data_gen.strategies.qcrd import qcrd
from contralto.data_gen.strategies.translation import mono_system
from contralto.data_gen.strategies.voting import vote
from contralto.data_gen.types import Strategy

__all__ = ["STRATEGIES", "StrategyFunction", "check_strategy"]

StrategyFunction = Callable[..., Strategy]
"""A generator function of a row and keyword-only settings."""


def check_strategy(function: Any) -> None:
    """Reject an object that cannot be a strategy.

    Args:
        function: the object.

    Raises:
        ValueError: it is not a generator function, or takes no row.
    """
    if not inspect.isgeneratorfunction(function):
        raise ValueError("is not a strategy: a strategy must be a generator function that yields requests")
    if not inspect.signature(function).parameters:
        raise ValueError("takes no row")


STRATEGIES: Registry[StrategyFunction] = Registry("strategy", group="contralto.strategies", check=check_strategy)
"""The strategies by name. Packages add theirs by entry points of the group `contralto.strategies`."""
_BUILT_IN: list[StrategyFunction] = [clair, *SIX.values(), popalign, best_of_n, con_j, mono_system, off_policy_judge]
_BUILT_IN += [on_policy_judge, stronger_preferred, teacher_student, verify_direction, vote, mvc, c_rag, qcrd]
for _strategy in _BUILT_IN:
    STRATEGIES.register(_strategy, name=_strategy.__name__)
