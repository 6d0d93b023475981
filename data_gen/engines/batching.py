"""Batches of requests for engines that decode locally."""

from collections.abc import Iterable, Iterator
from dataclasses import astuple
from typing import Any

from contralto.data_gen.types import Request

__all__ = ["batches"]


def batches(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """Yield batches of similar length, the longest first, each of one sampling, with or without template and images.

    The batches do not depend on the order of the requests.

    Args:
        requests: a round of requests.
        size: the largest number of requests in a batch.
    """
    kinds: dict[Any, list[Request]] = {}
    for request in requests:
        kind = (astuple(request.sampling), request.prompt is None, bool(request.images))
        kinds.setdefault(kind, []).append(request)
    for _, alike in sorted(kinds.items(), key=str):
        alike.sort(key=lambda request: (-_length(request), request.key))
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def _length(request: Request) -> int:
    """Return the characters of a prompt, which approximate its tokens without a tokenizer."""
    return (
        len(request.prompt)
        if request.prompt is not None
        else sum(len(str(m["content"])) for m in request.messages or ())
    )
