"""A local HTTP server that speaks the OpenAI protocol, with configurable failures.

    with Server(reply) as server:           # reply(body) -> text, for every request that is answered
        OpenAIEngine(base_url=server.url, ...)

It runs in a thread of its own. `Faults` are drawn from a seeded generator, so a test sees the same ones every time.
`server.seen` is the log: when each request came, what became of it, and the body.
"""

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from aiohttp import web


@dataclass
class Faults:
    """How often what goes wrong: shares of all requests."""

    too_many: float = 0.0
    """429 with Retry-After."""
    broken: float = 0.0
    """500."""
    cut: float = 0.0
    """The connection is closed without an answer."""
    truncated: float = 0.0
    """The connection is closed in the middle of an answer."""
    slow: float = 0.0
    """The answer takes `delay` seconds."""
    delay: float = 1.0
    retry_after: str = "0.05"

    def draw(self, rng: random.Random) -> str:
        value = rng.random()
        for name in ("too_many", "broken", "cut", "truncated", "slow"):
            value -= getattr(self, name)
            if value < 0:
                return name
        return ""


class Seen(NamedTuple):
    """A request as the server saw it."""

    at: float
    fault: str
    body: dict[str, Any]
    headers: dict[str, str]
    tokens: int = 0


def words(body: dict[str, Any]) -> str:
    """A text that depends on the whole request."""
    said = body.get("prompt") or json.dumps(body["messages"])
    rng = random.Random(f"{said} {body.get('seed')}")
    return " ".join(rng.choice(["red", "green", "blue", "small", "large"]) for _ in range(6)) + f" {body.get('seed')}"


@dataclass
class Server:
    reply: Callable[[dict[str, Any]], str] = words
    faults: Faults = field(default_factory=Faults)
    latency: float = 0.0
    status: Callable[[dict[str, Any]], tuple[int, dict[str, Any]] | None] = lambda body: None
    """A refusal for some requests: status and body."""
    raw: Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]] | None = None
    """Makes the whole response for some requests, whatever it is."""
    other: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
    """Answers requests for all other paths."""
    seen: list[Seen] = field(default_factory=list)
    port: int = 0
    """0: any that is free."""

    def __enter__(self) -> Self:
        self._rng, self._ready = random.Random(0), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def answered(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.fault in ("", "slow")]

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_route("*", "/{path:.*}", self._answer_other)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=False, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        at, body, fault = time.monotonic(), await request.json(), self.faults.draw(self._rng)
        refused = self.status(body)
        log = Seen(at, fault if refused is None else "refused", body, dict(request.headers))
        if refused is not None:
            self.seen.append(log)
            return web.json_response(refused[1], status=refused[0])
        if self.raw and (response := await self.raw(request, body)) is not None:
            self.seen.append(log._replace(fault="raw"))
            return response
        if fault == "too_many":
            self.seen.append(log)
            return web.json_response(
                {"error": {"message": "slow down"}}, status=429, headers={"Retry-After": self.faults.retry_after}
            )
        if fault == "broken":
            self.seen.append(log)
            return web.Response(text="<html>oops</html>", status=500)
        if fault == "cut":
            self.seen.append(log)
            request.transport.abort()
            return web.Response()
        if self.latency:
            await asyncio.sleep(self.latency)
        said = self._said(request.path, body)
        self.seen.append(log._replace(tokens=said["usage"]["prompt_tokens"] + said["usage"]["completion_tokens"]))
        if fault == "slow":
            await asyncio.sleep(self.faults.delay)
        if fault == "truncated":
            return await self._truncate(request, json.dumps(said).encode())
        return web.json_response(said)

    async def _answer_other(self, request: web.Request) -> web.StreamResponse:
        if self.other is None:
            raise web.HTTPNotFound
        self.seen.append(Seen(time.monotonic(), "other", {}, dict(request.headers)))
        return await self.other(request)

    @staticmethod
    async def _truncate(request: web.Request, data: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        request.transport.abort()
        return response

    def _said(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        text = self.reply(body)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if path.endswith("/chat/completions"):
            choice["message"] = {"role": "assistant", "content": text}
            asked = json.dumps(body["messages"])
        else:
            choice["text"], asked = text, body["prompt"]
        usage = {"prompt_tokens": len(asked.split()), "completion_tokens": len(text.split())}
        return {"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


def model_reply(name: str) -> Callable[[dict[str, Any]], str]:
    """Answers of an embedded model, drawn with the request's seed."""
    from contralto.data_gen.engines import TransformersEngine
    from contralto.data_gen.types import Request, Sampling

    engine, lock = TransformersEngine(model=f"testbed:{name}"), threading.Lock()

    def reply(body: dict[str, Any]) -> str:
        sampling = Sampling(max_new_tokens=body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"])
        asked = {"messages": body.get("messages"), "prompt": body.get("prompt")}
        request = Request(key="", images=(), sampling=sampling, seed=body["seed"], **asked)
        with lock:
            [[(_, answer)]] = engine.answer([request])
        return answer.text

    return reply


if __name__ == "__main__":  # for benchmarks: a server in a process of its own; its port is its first line
    with Server(latency=float(sys.argv[1])) as running:
        print(running.port, flush=True)
        sys.stdin.read()
