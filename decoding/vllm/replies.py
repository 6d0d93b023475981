"""Parse the replies of an OpenAI-compatible server, whole or in pieces."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

from contralto.common.texts import clean, short
from contralto.common.web import BadReplyError
from contralto.decoding.vllm.session import BranchReply, agreed, before_marker

__all__ = [
    "LONGEST_EVENT",
    "MOST_BYTES",
    "ReplyChunk",
    "error_message",
    "event_lines",
    "first_choice",
    "is_agreed",
    "join_chunks",
    "reply_chunk",
    "reply_field",
]

LONGEST_EVENT = 2**24
"""Largest event of a stream in bytes; the first event holds the tokens of the prompt."""
MOST_BYTES = 2**26
"""Largest reply in bytes."""


class ReplyChunk(NamedTuple):
    """A piece of the reply to one request."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None
    stop_reason: int | str | None


async def event_lines(response: Any) -> AsyncIterator[bytes]:
    """Yield the lines of a stream.

    Raises:
        BadReplyError: the stream is compressed or too long.
    """
    from aiohttp.http import HttpProcessingError

    coding = response.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise BadReplyError(f"a stream in Content-Encoding {short(coding, 40)!r}, which was not requested")
    lines, size = aiter(response.content), 0
    while size <= MOST_BYTES:
        try:
            line = await anext(lines)
        except StopAsyncIteration:
            return
        except (ValueError, HttpProcessingError) as error:
            raise BadReplyError(f"a line of the stream is longer than {LONGEST_EVENT:,} bytes") from error
        size += len(line)
        yield line
    raise BadReplyError(f"the stream is longer than {MOST_BYTES:,} bytes")


def error_message(error: Any) -> str:
    """Return the message of an error in a stream."""
    message = error.get("message") if isinstance(error, Mapping) else error
    return str(message or "the server failed")


def first_choice(answer: Any) -> Mapping[str, Any]:
    """Return the first choice of a reply.

    Raises:
        BadReplyError: the reply has none.
    """
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError):
        choice = None
    if not isinstance(choice, Mapping):
        raise BadReplyError(f"not a reply of the OpenAI protocol: {short(answer)}")
    return choice


def reply_field(answer: Any, name: str, kind: type) -> Any:
    """Return a field of a reply.

    Raises:
        RuntimeError: the field is missing or of another type.
    """
    value = answer.get(name) if isinstance(answer, Mapping) else None
    if not isinstance(value, kind):
        raise RuntimeError(f"the server's reply has no {name}: {short(answer)}")  # noqa: TRY004 - a server's mistake
    return value


def reply_chunk(choice: Mapping[str, Any]) -> ReplyChunk:
    """Convert a choice of a reply, complete or streamed, to a chunk."""
    try:
        message = choice.get("message") or choice.get("delta") or {}
        logs = choice.get("logprobs") or {}
        values = logs.get("token_logprobs") or [entry["logprob"] for entry in logs.get("content") or ()]
        text, tokens = choice.get("text") or message.get("content") or "", choice.get("token_ids") or []
        ends = choice.get("finish_reason"), choice.get("stop_reason")
    except (KeyError, TypeError, AttributeError) as error:
        raise BadReplyError(f"not an answer of the OpenAI protocol: {short(choice)}") from error
    if not (isinstance(text, str) and _are(tokens, int) and _are(values, int | float) and _are(ends[:1], str | None)):
        raise BadReplyError(f"not an answer of the OpenAI protocol: {short(choice)}")
    return ReplyChunk(clean(text), tokens, values, *ends)


def _are(values: Any, kind: Any) -> bool:
    """Return whether `values` is a list of elements of type `kind`."""
    return isinstance(values, list | tuple) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def join_chunks(chunks: Sequence[ReplyChunk]) -> BranchReply:
    """Return the pieces of one request as a reply."""
    return BranchReply(
        tokens=[token for chunk in chunks for token in chunk.tokens],
        logprobs=[value for chunk in chunks for value in chunk.logprobs],
        finish_reason=chunks[-1].finish_reason if chunks else None,
        stop_reason=chunks[-1].stop_reason if chunks else None,
        text="".join(chunk.text for chunk in chunks),
    )


def is_agreed(streams: Sequence[Sequence[ReplyChunk]], place: int, marker: int) -> bool:
    """Return whether all branches have the tokens of the main branch up to and including a piece."""
    branches = [[token for chunk in chunks for token in chunk.tokens] for chunks in streams]
    count = sum(len(chunk.tokens) for chunk in streams[0][: place + 1])
    return len(agreed([before_marker(tokens, marker) for tokens in branches])) >= count
