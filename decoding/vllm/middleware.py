"""Validate requests in front of vLLM's OpenAI-compatible server, and answer invalid ones at once with status 400.

    python -m vllm.entrypoints.openai.api_server ... --middleware contralto.decoding.vllm.middleware.PairMiddleware

The requests of one completion pass together, when all of them have arrived and match. So a request without its partner never
reaches the engine. `contralto serve` sets this up; `GET /v1/contralto` returns the marker and the timeout.

vLLM runs middlewares before its authentication. So a request without a body is sent to the server first, to learn whether it
admits the client; of other clients nothing is kept. Requests of different clients (API keys, or addresses where there are no
keys) never form a completion, whatever ids they choose.

A server that listens on this machine alone and has no API key answers requests to the names of this machine alone. Otherwise a page in a
browser here could read its replies under a name of its own that it lets point to 127.0.0.1 (DNS rebinding). Nor does it answer pages of
other origins, which vLLM lets read everything unless `--allowed-origins` names those that may (CORS).
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Hashable, Mapping, MutableMapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from contralto.common.hashing import content_digest
from contralto.decoding.vllm.limits import ENVIRONMENT, Limits
from contralto.decoding.vllm.session import REFUSED
from contralto.decoding.vllm.settings import PREFIX, Row
from contralto.decoding.vllm.waiting import FullError, GoneError, PendingCompletion, WaitingRoom

__all__ = ["PairMiddleware"]

INFO = "/v1/contralto"
PATHS = ("/v1/completions", "/v1/chat/completions")
WATCHED = ("max_tokens", "max_completion_tokens", "min_tokens", "ignore_eos", "stop", "stop_token_ids")
"""Fields that branches must share to end together."""
UNSAID = (
    "the engine rejected this request: its prompts do not fit a step, the KV cache or max_model_len, or "
    "its contrast_id is in use; send it without stream to get the reason"
)
NOT_LOCAL = (
    "this server has no API key and answers requests to localhost alone, not to the name in Host: let a proxy send Host: localhost, "
    "or start the server with --api-key"
)
FOREIGN = (
    "this server has no API key and answers no web pages but those of this machine: start it with --api-key, or name the origins of the "
    "pages in --allowed-origins"
)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class StatusError(Exception):
    """A request that is rejected with a status of its own."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class PairMiddleware:
    """An ASGI middleware, as vLLM's flag `--middleware` takes it.

    Args:
        app: the server.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        settings = json.loads(os.environ.get(ENVIRONMENT, "{}"))
        self._is_local, self._has_origins = (bool(settings.pop(name, False)) for name in ("local", "origins"))
        self._limits = Limits(**{name: value for name, value in settings.items() if name != "marker"})
        self._info = {"timeout": self._limits.timeout, **{n: v for n, v in settings.items() if n == "marker"}}
        self._room = WaitingRoom(self._limits)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on to the server; the branches of a completion wait for each other."""
        if self._is_local and scope["type"] in ("http", "websocket") and (refusal := self._refusal(scope)):
            await _turn_away(scope, send, *refusal)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        is_ours = path == INFO or (path in PATHS and scope["method"] == "POST")
        if not is_ours:
            await self._app(scope, receive, send)
        elif refused := await _unknown(self._app, scope):
            for message in refused:
                await send(message)
        elif path == INFO:
            await _answer(send, 200, self._info)
        else:
            await self._take(scope, receive, send)

    def _refusal(self, scope: Mapping[str, Any]) -> tuple[str, int] | None:
        """Return the reason and the status for a request that a page of another site may have made; None for others.

        No browser leaves the headers out or lets a page set them. `Origin: null` is a file or a frame of any site.
        """
        headers = {name: value.decode("latin-1") for name, value in scope.get("headers", ())}
        if not _is_local(f"//{headers.get(b'host', 'localhost')}"):
            return NOT_LOCAL, 421
        return None if self._has_origins or _is_local(headers.get(b"origin", "//localhost")) else (FOREIGN, 403)

    async def _take(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Read a request, and pass it on when all branches of its completion have arrived."""
        with suppress(GoneError):
            try:
                body = await self._body(scope, receive)
                request = _parsed(body)
                row = _row(request)
            except StatusError as error:
                await _refuse(send, str(error), error.status)
            except (ValueError, TypeError, OverflowError) as error:
                await _refuse(send, str(error))
            else:
                if row is None:
                    await self._app(scope, _again(body, receive), send)
                else:
                    await self._meet(scope, receive, send, request, row, len(body))

    async def _meet(
        self, scope: Mapping[str, Any], receive: Receive, send: Send, request: Mapping[str, Any], row: Row, size: int
    ) -> None:
        """Wait for the other branches, then pass the request on."""
        key = (_client(scope), type(row.group), row.group)
        options = {name: request.get(name) for name in WATCHED}
        try:
            text = await self._room.meet(key, row, options, size=size, gone=lambda: _closed(receive))
        except FullError as error:
            await _refuse(send, str(error), 503)
        except ValueError as error:
            await _refuse(send, str(error))
        else:
            body, scope = _renamed(request, text, scope)
            try:
                await self._app(scope, _again(body, receive), _Watch(send, text.id, row.group))
            finally:
                self._room.leave(key)

    async def _body(self, scope: Mapping[str, Any], receive: Receive) -> bytes:
        """Read the whole body of a request.

        Raises:
            StatusError: it is too large, or too slow.
            GoneError: the client closed the connection.
        """
        limits = self._limits
        too_large = StatusError(413, f"a request may have at most {limits.body:,} bytes, the limit of this server")
        length = dict(scope.get("headers", ())).get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limits.body:
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(limits.reading):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise GoneError
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > limits.body:
                        raise too_large
        except TimeoutError as error:
            raise StatusError(408, f"the request did not arrive within {limits.reading:g} seconds") from error
        return b"".join(parts)


def _is_local(address: str) -> bool:
    """Return whether an address, such as `http://localhost:3000`, is of this machine."""
    try:
        name = urlsplit(address).hostname or ""
        return name.rstrip(".") == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


async def _turn_away(scope: Mapping[str, Any], send: Send, why: str, status: int) -> None:
    """Answer a request of another site."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await _refuse(send, why, status)


async def _unknown(app: Any, scope: Mapping[str, Any]) -> list[Message]:
    """Request the same path by GET, and return the server's answer if it rejects the client; else []."""
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)

    await app({**scope, "method": "GET"}, receive, send)
    return messages if messages and messages[0].get("status") in (401, 403) else []


def _client(scope: Mapping[str, Any]) -> Hashable:
    """Return the identity of a client: a hash of the API key, or else the address."""
    key = dict(scope.get("headers", ())).get(b"authorization")
    return content_digest(key) if key else (scope.get("client") or (None,))[0]


async def _closed(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    if (await receive())["type"] != "http.disconnect":  # a server that repeats the body; it tells nothing
        await asyncio.Event().wait()


def _parsed(body: bytes) -> Mapping[str, Any]:
    """Return the fields of a request; {} for a body that is no JSON object, which vLLM rejects itself."""
    try:
        fields = json.loads(body)
    except RecursionError:
        raise ValueError("the request is nested too deeply") from None
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _row(fields: Mapping[str, Any]) -> Row | None:
    """Return the contrast arguments of a request; None if it has none.

    Raises:
        ValueError: they are invalid.
    """
    arguments = fields.get("vllm_xargs")
    if not isinstance(arguments, dict | None):
        raise ValueError(f"vllm_xargs must be an object, not {arguments!r:.80}")  # noqa: TRY004  status 400 like the others
    row = Row.of(arguments)
    if row is not None:
        _check(fields)
    return row


def _renamed(
    fields: Mapping[str, Any], text: PendingCompletion, scope: Mapping[str, Any]
) -> tuple[bytes, Mapping[str, Any]]:
    """Return the body with the engine's id of the completion, and the scope with the length of that body."""
    body = json.dumps({**fields, "vllm_xargs": {**fields["vllm_xargs"], f"{PREFIX}id": text.id}}).encode()
    headers = [(name, value) for name, value in scope.get("headers", ()) if name != b"content-length"]
    return body, {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


def _check(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for fields that would put branches out of step without an error of vLLM."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        raise ValueError(
            f"a branch of a completion must have one prompt, not {len(prompt)}: send one request per prompt"
        )
    if "messages" in fields and fields.get("max_tokens", fields.get("max_completion_tokens")) is None:
        raise ValueError("a branch of a completion needs max_tokens, because its default depends on the prompt")
    if fields.get("use_beam_search"):
        raise ValueError("use_beam_search: beam search is not supported with contrastive branches")


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields a body again."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return messages.pop() if messages else await receive()

    return read


class _Watch:
    """A `send` that turns the engine's rejection of a completion into status 400.

    Args:
        send: sends messages to the client.
        text_id: the engine's id of the completion, which the client does not know.
        group: the client's id of it.
    """

    def __init__(self, send: Send, text_id: str, group: str | int) -> None:
        self._send, self._refused = send, False
        self._names = repr(text_id), repr(group)
        self._start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif self._start is not None:
            why = _refusal(message.get("body", b""))
            if why is not None:
                self._refused = True
                await _refuse(self._send, why.replace(*self._names))
            else:
                await self._send(self._start)
                await self._send(message)
            self._start = None
        elif not self._refused:
            await self._send(message)


def _refusal(body: bytes) -> str | None:
    """Return the scheduler's error message in a response, None without one; such a stream has no chunks."""
    event = _parsed(body.removeprefix(b"data: ").split(b"\n\n")[0])  # from our own server
    if body.startswith(b"data: ") and not event.get("choices"):
        return UNSAID
    reason = (event.get("choices") or [{}])[0].get("stop_reason")
    return reason.removeprefix(REFUSED) if isinstance(reason, str) and reason.startswith(REFUSED) else None


async def _refuse(send: Send, why: str, status: int = 400) -> None:
    """Send an error response in OpenAI's format."""
    kind = "BadRequestError" if status < 500 else "ServiceUnavailableError"
    await _answer(send, status, {"error": {"message": why, "type": kind, "param": None, "code": status}})


async def _answer(send: Send, status: int, content: Mapping[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
