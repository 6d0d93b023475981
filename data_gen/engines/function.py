"""The engine that calls a Python function."""

import inspect
from collections.abc import Iterable, Iterator

from contralto.common.hashing import source_digest
from contralto.data_gen.engines.base import Outcome
from contralto.data_gen.engines.outcomes import described, kind_of
from contralto.data_gen.functions import find_function
from contralto.data_gen.types import Answer, Failure, Request

__all__ = ["FunctionEngine"]


class FunctionEngine:
    """Answer requests with a Python function, such as a program, a scorer, or a model of another library.

    Recorded answers belong to the code of the function, see `contralto.common.hashing.source_digest`: new code is asked again.

    Args:
        use: the function as `module:function`. It is called with a `Request` (its prompt is
            `request.messages[-1]["content"]`) and returns a text, an `Answer` or a `Failure`.
            An exception, or a value of another type, fails the request.

    Raises:
        ValueError: there is no such function, or it is a coroutine or a generator function.

    Examples:
        >>> from contralto.data_gen.types import Ask, Sampling, make_request
        >>> engine = FunctionEngine(use="reprlib:repr")
        >>> request = make_request(Ask(role="a", prompt="?"), engine=engine.identity, sampling=Sampling(), seed=0, row="0")
        >>> [[(_, answer)]] = engine.answer([request])
        >>> answer.text.startswith("Request(")
        True
    """

    rows_together = 1
    function_options = ("use",)

    def __init__(self, *, use: str) -> None:
        self._function = find_function(use)
        deferred = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(is_kind(self._function) for is_kind in deferred):
            raise ValueError(f"{use} must return a string, but it is a coroutine or a generator function")
        self.identity = {"engine": "function", "model": use, "source": source_digest(self._function)}

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Outcome]]:
        """Answer one request after another.

        Args:
            requests: the requests.
        """
        for request in requests:
            yield [(request, self._call(request))]

    def _call(self, request: Request) -> Answer | Failure:
        name = self.identity["model"]
        try:
            result = self._function(request)
        except Exception as error:  # noqa: BLE001 - an error of the user's function fails the request, not the run
            return Failure(described(error, by=name))
        if isinstance(result, Answer | Failure):
            return result
        if not isinstance(result, str):
            return Failure(f"{name} returned {kind_of(result)}: it must return a string, an Answer or a Failure")
        return Answer(text=result)
