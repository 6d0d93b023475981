"""Limits of the requests of a contrastive server. No torch is imported here, for a fast `contralto serve --help`."""

import math
from dataclasses import dataclass

from contralto.common.options import Option, OptionError
from contralto.decoding.vllm.checks import DEFAULT_TIMEOUT

__all__ = ["ENVIRONMENT", "MIB", "Limits"]

ENVIRONMENT = "CONTRALTO_SERVE"
"""The environment variable by which `contralto serve` passes settings to the middleware, as JSON: `{"marker": ..., "timeout": ...,
"body": ..., "waiting": ..., "held": ..., "local": ..., "origins": ...}`."""
MIB = 2**20
LONGEST_TIMEOUT = 3600.0
"""Seconds."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of requests that have not reached the engine.

    Args:
        timeout: seconds that a request waits for the other branches of its completion.
        body: largest request in bytes.
        waiting: largest number of requests that wait at a time.
        held: largest size of all waiting requests in bytes.
        reading: seconds within which a request must have arrived.

    Raises:
        OptionError: a limit is not a positive finite number.

    Examples:
        >>> Limits(timeout=0)
        Traceback (most recent call last):
            ...
        contralto.common.options.OptionError: timeout must be above 0 and at most 3600, not 0
    """

    timeout: float = DEFAULT_TIMEOUT
    body: int = 64 * MIB
    waiting: int = 1024
    held: int = 512 * MIB
    reading: float = 60.0

    def __post_init__(self) -> None:
        for name in ("timeout", "reading"):
            if not 0 < getattr(self, name) <= LONGEST_TIMEOUT:
                raise OptionError(
                    "{name} must be above 0 and at most {most:g}, not {value}",
                    name=Option(name),
                    most=LONGEST_TIMEOUT,
                    value=getattr(self, name),
                )
        for name in ("body", "waiting", "held"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError("{name} must be above 0, not {value}", name=Option(name), value=getattr(self, name))
