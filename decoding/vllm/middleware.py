"""Before vLLM's OpenAI-compatible server: what is wrong with a text's requests is said at once, with status 400.

    python -m vllm.entrypoints.openai.api_server ... --middleware contralto.decoding.vllm.middleware.PairMiddleware

Requests of one text are let through together, when all of them are there and fit each other. So a request without its partner
never reaches the engine. `contralto serve` sets this up; `GET /v1/contralto` tells the marker and the waiting time.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from contralto.decoding.vllm.config import DEFAULT_TIMEOUT
from contralto.decoding.vllm.pairs import REFUSED
from contralto.decoding.vllm.settings import PREFIX, Row, check_group

__all__ = ["ENVIRONMENT", "PairMiddleware"]

ENVIRONMENT = "CONTRALTO_SERVE"
"""Where `contralto serve` leaves its settings: `{"marker": ..., "timeout": ...}`."""
PATHS = ("/v1/completions", "/v1/chat/completions")
WATCHED = ("max_tokens", "max_completion_tokens", "min_tokens", "ignore_eos", "stop", "stop_token_ids")
"""Fields that branches must share to end together."""
UNSAID = (
    "the engine refused this text: its prompts do not fit a step, the KV cache or max_model_len, or its contrast_id is in use; "
    "the same request without stream says which"
)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _Text:
    """A text whose requests are coming."""

    def __init__(self) -> None:
        self.branches: list[tuple[Row, Mapping[str, Any]]] = []
        self.whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class PairMiddleware:
    """An ASGI middleware, as vLLM's flag `--middleware` takes it.

    Args:
        app: the server.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._info: dict[str, Any] = {"timeout": DEFAULT_TIMEOUT} | json.loads(os.environ.get(ENVIRONMENT, "{}"))
        self._coming: dict[str, _Text] = {}

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """A request: those that are branches wait for each other."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == "/v1/contralto":
            await _answer(send, 200, self._info)
        elif scope["method"] != "POST" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
        else:
            body = await _body(receive)
            try:
                is_branch = await self._meet(body)
            except ValueError as error:
                await _refuse(send, str(error))
            else:
                await self._app(scope, _again(body, receive), _Watch(send) if is_branch else send)

    async def _meet(self, body: bytes) -> bool:
        """Whether a request is a branch of a text; returns when all its branches are there.

        Raises:
            ValueError: they do not fit each other, or one does not come.
        """
        asked = _parsed(body)
        row = Row.of(asked.get("vllm_xargs") or {})
        if row is None:
            return False
        _check(asked, row)
        text = self._coming.setdefault(row.group, _Text())
        text.branches.append((row, {name: asked.get(name) for name in WATCHED}))
        try:
            check_group(text.branches)
        except ValueError as error:
            self._coming.pop(row.group, None)
            text.whole.set_exception(error)
        if len(text.branches) == len(row.rule.branches) and not text.whole.done():
            del self._coming[row.group]
            text.whole.set_result(None)
        try:
            await asyncio.wait_for(asyncio.shield(text.whole), self._info["timeout"])
        except TimeoutError:
            self._coming.pop(row.group, None)
            there = {other.branch for other, _ in text.branches}
            missing = " and ".join(str(b) for b in range(len(row.rule.branches)) if b not in there)
            raise ValueError(
                f"{PREFIX}id {row.group!r}: branch {missing} did not come within {self._info['timeout']:g} seconds: send all "
                "branches of a text together"
            ) from None
        return True


def _parsed(body: bytes) -> Mapping[str, Any]:
    """A request's fields; what is no JSON object is left for vLLM to refuse."""
    try:
        asked = json.loads(body)
    except ValueError:
        return {}
    return asked if isinstance(asked, dict) else {}


def _check(asked: Mapping[str, Any], row: Row) -> None:
    """What would part branches, and vLLM would not notice."""
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        raise ValueError(f"a branch of a text has one prompt, not a list of {len(prompt)}: send a request for each")
    if "messages" in asked and asked.get("max_tokens", asked.get("max_completion_tokens")) is None:
        raise ValueError("max_tokens must be given in a branch of a text, or each would end by its own prompt's length")
    if asked.get("use_beam_search"):
        raise ValueError("use_beam_search: texts with branches know no beams")


async def _body(receive: Receive) -> bytes:
    """The whole body of a request."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, for the next to read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return messages.pop() if messages else await receive()

    return read


class _Watch:
    """Sends an answer on, unless it begins with the engine's refusal of a text: that becomes status 400."""

    def __init__(self, send: Send) -> None:
        self._send, self._refused = send, False
        self._start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif self._start is not None:
            why = _refusal(message.get("body", b""))
            if why is not None:
                self._refused = True
                await _refuse(self._send, why)
            else:
                await self._send(self._start)
                await self._send(message)
            self._start = None
        elif not self._refused:
            await self._send(message)


def _refusal(body: bytes) -> str | None:
    """The scheduler's sentence in an answer. A stream does not carry it: it has no piece at all then."""
    event = _parsed(body.removeprefix(b"data: ").split(b"\n\n")[0])
    if body.startswith(b"data: ") and not event.get("choices"):
        return UNSAID
    reason = (event.get("choices") or [{}])[0].get("stop_reason")
    return reason.removeprefix(REFUSED) if isinstance(reason, str) and reason.startswith(REFUSED) else None


async def _refuse(send: Send, why: str) -> None:
    """Status 400 in the form of OpenAI's errors."""
    await _answer(send, 400, {"error": {"message": why, "type": "BadRequestError", "param": None, "code": 400}})


async def _answer(send: Send, status: int, content: Mapping[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
