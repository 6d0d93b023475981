"""The protocol of engines.

An engine needs an `identity`, `rows_together`, and `answer`:

    class Echo:
        identity = {"engine": "echo"}
        rows_together = 1

        def answer(self, requests):
            for request in requests:
                yield [(request, Answer(text=request.messages[-1]["content"]))]

Its constructor takes keyword-only options, which a recipe names beside `engine`. An engine may also have

- `check_ready()`, called before the first request, which raises `ValueError` if something is missing, such as a key;
- `check(sampling)`, called with the sampling of every role, which raises `ValueError` if the engine does not support it;
- `stop()`, called from another thread when the run is to end, which gives up requests that wait for another attempt;
- `secrets`, the keys that must not appear in a recipe;
- `concurrency`, the number of requests that it answers at the same time;
- `option_names()`, a static method that returns the names which its constructor takes by `**`;
- `function_options`, the names of the options that hold `module:function`, which may lie beside the recipe.

Everything that an engine yields goes through `outcomes.checked` before it is recorded.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from contralto.data_gen.types import Answer, Failure, Request

__all__ = ["Engine", "Outcome"]

Outcome = tuple[Request, Answer | Failure]
"""A request and its answer, or the reason why it has none."""


class Engine(Protocol):
    """The interface of engines; the module lists the optional parts."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return all that determines an answer, as JSON values: engine, model, options. Keys include it."""
        ...

    @property
    def rows_together(self) -> int:
        """Return the number of rows whose requests are passed to `answer` together.

        1: each request is answered on its own, as it comes. More: the engine computes batches, and the pipeline hands it whole
        rounds of that many rows, the same ones in a resumed run.
        """
        ...

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Outcome]]:
        """Yield outcomes as they are ready, in lists that are recorded whole or not at all.

        Args:
            requests: if `rows_together` is 1, an iterator that may block, such as a queue; else a whole round, in which some
                requests are `known`.

        Raises:
            Exception: whatever makes further requests pointless, such as a wrong key. A request that cannot be answered is no
                exception, but a `Failure` in the list.
        """
        ...
