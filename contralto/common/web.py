"""Read replies of HTTP servers with limits of size and time; aiohttp makes the connections."""

import json
import time
import zlib
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from contralto.common.texts import Secrets, printable, short

__all__ = ["COMPRESSED", "BadReplyError", "address_of", "decoded", "read_body", "read_json", "retry_after"]

COMPRESSED = {"gzip", "x-gzip", "deflate"}
"""Content codings that are read, though none is asked for."""
BLOCK = 2**16


class BadReplyError(ValueError):
    """A reply that cannot be read: too large, compressed in an unknown way, cut off, or not what the protocol says."""


async def read_body(response: Any, *, limit: int) -> bytes:
    """Read and decompress the body of a response, up to a limit.

    Args:
        response: of an `aiohttp.ClientSession` with `auto_decompress=False`, since aiohttp sets no limit to what it expands.
        limit: bytes of the expanded body.

    Returns:
        The body.

    Raises:
        BadReplyError: the body is larger, or its coding is unknown or broken.
    """
    coding = response.headers.get("Content-Encoding", "identity").strip().lower() or "identity"
    if coding != "identity" and coding not in COMPRESSED:
        raise BadReplyError(f"the reply is in Content-Encoding {short(coding, 40)!r}, which was not asked for")
    expander = None if coding == "identity" else zlib.decompressobj(wbits=47)  # 47: gzip or zlib, by the header
    body = bytearray()
    async for block in response.content.iter_chunked(BLOCK):
        body += block if expander is None else _expanded(expander, block, limit + 1 - len(body))
        if len(body) > limit:
            response.close()  # what is left is not read
            raise BadReplyError(f"the reply is larger than {limit:,} bytes")
    if expander is not None and not expander.eof:
        raise BadReplyError(f"the {coding} of the reply is cut off")
    return bytes(body)


def _expanded(expander: Any, block: bytes, most: int) -> bytes:
    try:
        return bytes(expander.decompress(block, most))
    except zlib.error as error:
        raise BadReplyError(f"the reply is not compressed as its Content-Encoding says: {error}") from error


def decoded(body: bytes) -> str:
    """Return a JSON body as a string: UTF-8 (RFC 8259), whatever charset the server names.

    Args:
        body: the body.

    Raises:
        BadReplyError: it is not UTF-8.

    Examples:
        >>> decoded("{}".encode("utf-8-sig"))
        '{}'
    """
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadReplyError(f"the reply is not UTF-8: {error.reason} at byte {error.start}") from error


def read_json(text: str, kind: str | None, secrets: Secrets) -> Any:
    """Return the JSON of a reply.

    Args:
        text: the body.
        kind: the header `Content-Type`, which tells pages of proxies and event streams from damaged JSON.
        secrets: hidden before what came is cut.

    Raises:
        BadReplyError: it is not JSON; the error says what came instead.

    Examples:
        >>> read_json("<html>Sign in</html>", "text/html", Secrets())
        Traceback (most recent call last):
        contralto.common.web.BadReplyError: the reply is not JSON: text/html, '<html>Sign in</html>'
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = short(secrets.hide(kind or "no Content-Type"), 60)
        if not text.strip():
            raise BadReplyError(f"the reply is empty, not JSON: {printable(what)}") from error
        where = f" from character {error.pos} on" if error.pos else ""
        came = repr(short(secrets.hide(text), 120))
        raise BadReplyError(f"the reply is not JSON{where}: {printable(what)}, {came}") from error


def retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float:
    """Return the seconds that a server asks to wait: not negative, possibly infinite.

    Args:
        headers: of the response; `Retry-After` holds seconds or a date. What is neither counts as 0.
        now: seconds since 1970; default: the clock.

    Examples:
        >>> retry_after({"Retry-After": "2.5"}), retry_after({"Retry-After": "soon"})
        (2.5, 0.0)
        >>> retry_after({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=20.0)
        40.0
    """
    header = headers.get("Retry-After", "")
    try:
        seconds = float(header)
    except ValueError:
        seconds = _seconds_until(header, time.time() if now is None else now)
    return seconds if seconds > 0 else 0.0  # also for NaN


def _seconds_until(date: str, now: float) -> float:
    try:
        return parsedate_to_datetime(date).timestamp() - now
    except (ValueError, TypeError, OverflowError, IndexError, OSError):
        return 0.0


def address_of(location: str | None) -> str:
    """Return an address without the parts that may be secret: user, password and query.

    Args:
        location: the header `Location`, or any address.

    Examples:
        >>> address_of("https://me:word@example.org:8000/v1?api-key=3#x"), address_of(None)
        ('https://example.org:8000/v1', 'nowhere')
    """
    if not location:
        return "nowhere"
    try:
        parts = urlsplit(location)
    except ValueError:
        return "an address that cannot be read"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if host else parts.path or "nowhere"
