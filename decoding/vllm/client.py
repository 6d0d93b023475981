"""Generate completions by contrast with vLLM's OpenAI-compatible server: one request per branch, sent together.

    async with PairClient("http://localhost:8000/v1", "my-model") as client:
        output = await client.generate([prompt, other_prompt], method="cad", alpha=0.5, max_tokens=256)
        async for piece in client.stream([prompt, other_prompt], method="cad", max_tokens=256):
            print(piece.text, end="", flush=True)

The server must be started by `contralto serve`. vLLM is not needed here, aiohttp is (`pip install 'contralto[data]'`).
"""

import asyncio
import json
import math
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

from contralto.common.texts import Secrets, short
from contralto.common.web import BadReplyError, address_of, decoded, read_body, read_json
from contralto.decoding.vllm.replies import (
    LONGEST_EVENT,
    MOST_BYTES,
    ReplyChunk,
    error_message,
    event_lines,
    first_choice,
    is_agreed,
    join_chunks,
    reply_chunk,
    reply_field,
)
from contralto.decoding.vllm.session import (
    BranchReply,
    PairOutput,
    PairProgress,
    RefusedError,
    check_prompts,
    contrast_values,
)
from contralto.decoding.vllm.settings import PREFIX

__all__ = ["PairClient", "Piece"]

OFF = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "n": 1}
OFF |= {"presence_penalty": 0, "frequency_penalty": 0}
"""Sampling options that vLLM must not apply; without them the server uses the generation configuration of the model."""


class Piece(NamedTuple):
    """A part of a completion that is being generated."""

    text: str
    tokens: list[int]
    output: PairOutput | None = None
    """The whole completion, with the last piece."""


class PairClient:
    """A client that generates completions by contrast, many at a time from one event loop.

    As in `generate_pairs`, branches that get out of step are detected, and the completion is resumed from their common tokens.

    Args:
        base_url: address of the server, up to and including `/v1`.
        model: name of the model at the server; or one name per branch, where branches are LoRA adapters (`--lora-modules`).
        api_key: sent as a bearer token, to no other address, and hidden in errors.
        marker: a token id that no completion contains; None to ask the server.
        timeout: seconds that a request may take, including its time in the server's queue; None for no limit.

    Raises:
        ImportError: aiohttp is not installed.
        ValueError: a timeout that is not positive; an address with a user, a password or a query; a key that no header can hold.
    """

    def __init__(
        self,
        base_url: str,
        model: str | Sequence[str],
        *,
        api_key: str | None = None,
        marker: int | None = None,
        timeout: float | None = 3600.0,
    ) -> None:
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be above 0 and finite (None is no limit), not {timeout!r}")
        _check_secrets(base_url, api_key)
        try:
            import aiohttp
        except ImportError as error:
            raise ImportError("PairClient needs aiohttp: pip install 'contralto[data]'") from error
        self._http = aiohttp
        self._url, self._model, self._marker = base_url.rstrip("/"), model, marker
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._secrets, self._timeout = Secrets(api_key or ""), timeout
        self._session: Any = None

    async def __aenter__(self) -> Self:
        """Open a session; connections are made when they are needed."""
        connector = self._http.TCPConnector(limit=0)
        timeout = self._http.ClientTimeout(total=self._timeout)
        self._session = self._http.ClientSession(
            headers=self._headers,
            connector=connector,
            timeout=timeout,
            auto_decompress=False,
            read_bufsize=LONGEST_EVENT // 2,  # aiohttp takes lines of up to twice this size
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session."""
        await self._session.close()

    async def generate(self, prompts: Sequence[Any], *, method: str, **options: Any) -> PairOutput:
        """Generate one completion.

        Args:
            prompts: the prompts of its branches, in the method's order: strings, lists of token ids, or conversations.
            method: name of a method that vLLM supports.
            options: `max_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `seed`, the method's parameters, `logprobs=False`;
                `body`: further fields of the requests, such as `{"stop": ["\\n"]}`; `main_body`: those of the main branch
                alone, such as `{"structured_outputs": {"choice": ["yes", "no"]}}`.

        Raises:
            ValueError: a request that the server rejects, with its message, or options that exclude each other.
            RuntimeError: the server fails, or the branches do not stay in step.
        """
        completion = await self._completion(prompts, method=method, **options)
        while True:
            if completion.progress.take(
                await _together([self._ask(completion, body) for body in completion.next_round()])
            ):
                return await self._finish(completion)

    async def stream(self, prompts: Sequence[Any], *, method: str, **options: Any) -> AsyncIterator[Piece]:
        """Stream one completion, each piece as soon as all branches agree on it.

        Args:
            prompts: as for `generate`.
            method: as for `generate`.
            options: as for `generate`.

        Yields:
            The pieces; the last one has the whole completion.

        Raises:
            ValueError: as `generate`.
            RuntimeError: as `generate`, or a completion with a grammar or a stop string would have to be restarted.
        """
        completion = await self._completion(prompts, method=method, **options)
        while True:
            chunks: list[list[ReplyChunk]] = [[] for _ in prompts]
            sent = 0
            async for branch, chunk in _merged([self._chunks(completion, body) for body in completion.next_round()]):
                chunks[branch].append(chunk)
                while sent < len(chunks[0]) and is_agreed(chunks, sent, completion.progress.marker):
                    if chunks[0][sent].text:
                        yield Piece(chunks[0][sent].text, chunks[0][sent].tokens)
                    sent += 1
            if not all(chunks):
                raise RefusedError("the engine rejected this request; send it without streaming to get the reason")
            branches = [join_chunks(pieces) for pieces in chunks]
            if completion.progress.take(branches):
                rest = "".join(chunk.text for chunk in chunks[0][sent:])
                yield Piece(
                    rest, [t for chunk in chunks[0][sent:] for t in chunk.tokens], await self._finish(completion)
                )
                return
            if completion.progress.whole:
                raise RuntimeError(
                    "the branches of a streamed completion got out of step, and a completion with a grammar or stop "
                    "string cannot be resumed"
                )

    async def _completion(
        self,
        prompts: Sequence[Any],
        *,
        method: str,
        form: str | None = None,
        max_tokens: int = 16,
        seed: int = 0,
        logprobs: bool = True,
        body: Mapping[str, Any] | None = None,
        main_body: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> "_ClientCompletion":
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        marker = self._marker if self._marker is not None else await self._ask_marker()
        given = contrast_values(method=method, form=form, marker=marker, seed=seed, **values)
        check_prompts([prompts], given)
        models = [self._model] * len(prompts) if isinstance(self._model, str) else list(self._model)
        if len(models) != len(prompts):
            raise ValueError(
                f"model must be one name, or one name for each of the {len(prompts)} branches, not {len(models)} names"
            )
        shared, own = dict(body or {}), dict(main_body or {})
        restarts = {"stop", "structured_outputs", "response_format"} & {*shared, *own}
        if any(_holds_images(prompt) for prompt in prompts):
            raise ValueError(
                "images are not sent to a server: use generate_pairs, or contralto.decoding with transformers"
            )
        progress = PairProgress(marker, max_tokens, whole=bool(restarts))
        return _ClientCompletion(list(prompts), models, given, shared, own, logprobs, progress)

    async def _finish(self, completion: "_ClientCompletion") -> PairOutput:
        """Return the output of a completion that has ended; the server decodes it if it took several rounds."""
        progress = completion.progress
        assert progress.ended is not None
        text = progress.ended.text
        if not progress.is_one_round:
            tokens = progress.tokens[: -1 if progress.ended.finish_reason == "stop" else None]
            body = {"model": completion.models[0], "tokens": tokens}
            answer = await self._json("POST", f"{self._url.removesuffix('/v1')}/detokenize", body)
            text = reply_field(answer, "prompt", str)
        return progress.output(text, completion.prompt_tokens())

    async def _ask_marker(self) -> int:
        try:
            self._marker = reply_field(await self._json("GET", f"{self._url}/contralto"), "marker", int)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self._url} returns no marker token, so it is not a server of contralto serve: pass marker, a token "
                f"that never occurs in completions ({error})"
            ) from error
        return self._marker

    async def _ask(self, completion: "_ClientCompletion", body: dict[str, Any]) -> BranchReply:
        """Send one request and return the whole reply."""
        async with self._response("POST", f"{self._url}/{completion.route(body)}", body) as response:
            answer = await self._read(response)
            choice = first_choice(answer)
            completion.remember(body, choice.get("prompt_token_ids") or answer.get("prompt_token_ids"))
            return join_chunks([reply_chunk(choice)])

    async def _json(self, method: str, url: str, body: Any = None) -> Any:
        """Send a request and return the JSON of the reply.

        Raises:
            ValueError: the server rejects the request.
            RuntimeError: the server fails, takes too long, or sends a reply that cannot be read.
        """
        async with self._response(method, url, body) as response:
            return await self._read(response)

    async def _read(self, response: Any) -> Any:
        """Return the JSON of a response."""
        text = decoded(await read_body(response, limit=MOST_BYTES))
        return read_json(text, response.headers.get("Content-Type"), self._secrets)

    @asynccontextmanager
    async def _response(self, method: str, url: str, body: Any) -> AsyncIterator[Any]:
        """Yield a response of status 200; errors while it is read become one sentence without the API key."""
        try:
            async with self._session.request(method, url, json=body, allow_redirects=False) as response:
                await self._check(response)
                yield response
        except TimeoutError as error:
            raise RuntimeError(f"{self._url} did not answer in time (timeout: {self._timeout} s)") from error
        except (self._http.ClientError, BadReplyError, RecursionError, json.JSONDecodeError) as error:
            message = short(self._secrets.hide(f"{type(error).__name__}: {error}"))
            raise RuntimeError(f"{self._url} sent an unreadable reply: {message}") from None

    async def _check(self, response: Any) -> None:
        """Raise an error with the server's message unless the status is 200."""
        if response.status == 200:
            return
        text = (await read_body(response, limit=MOST_BYTES)).decode("utf-8", "replace")
        if 300 <= response.status < 400:
            target = self._secrets.hide(address_of(response.headers.get("Location")))
            raise ValueError(f"{self._url} redirects to {short(target)}: use that as base_url")
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError, RecursionError):
            message = text.strip() or response.reason
        message = short(self._secrets.hide(str(message)), 1000)
        if 400 <= response.status < 500:
            raise ValueError(message)
        raise RuntimeError(f"the server failed with status {response.status}: {message}")

    async def _chunks(self, completion: "_ClientCompletion", body: dict[str, Any]) -> AsyncIterator["ReplyChunk"]:
        """Send one request and yield the reply in pieces."""
        url = f"{self._url}/{completion.route(body)}"
        async with self._response("POST", url, {**body, "stream": True}) as response:
            async for line in event_lines(response):
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(decoded(line.removeprefix(b"data: ")))
                if not isinstance(event, Mapping):
                    raise BadReplyError(f"an event that is not an object: {short(event)}")
                if "error" in event:
                    raise RuntimeError(short(self._secrets.hide(error_message(event["error"])), 1000))
                if event.get("choices"):
                    choice = first_choice(event)
                    completion.remember(body, choice.get("prompt_token_ids") or event.get("prompt_token_ids"))
                    yield reply_chunk(choice)


class _ClientCompletion:
    """A completion that is being generated, and the bodies of its requests."""

    def __init__(
        self,
        prompts: list[Any],
        models: list[str],
        values: Mapping[str, Any],
        shared: Mapping[str, Any],
        main: Mapping[str, Any],
        logprobs: bool,
        progress: PairProgress,
    ) -> None:
        self.prompts, self.models, self.values, self.progress = prompts, models, values, progress
        self._shared, self._main, self._logprobs = shared, main, logprobs
        self._read: dict[int, list[int]] = {}
        """The token ids of the prompts by branch, as the server tokenized them."""

    def next_round(self) -> list[dict[str, Any]]:
        """Return the request bodies of the next round, one per branch."""
        name = uuid.uuid4().hex
        return [self._body(branch, name) for branch in range(len(self.prompts))]

    def _body(self, branch: int, name: str) -> dict[str, Any]:
        done, progress = len(self.progress.tokens), self.progress
        own = {f"{PREFIX}id": name, f"{PREFIX}branch": branch, f"{PREFIX}start": done}
        body = {**OFF, **self._shared, **({} if branch else self._main), "model": self.models[branch]}
        body |= {"vllm_xargs": {**self.values, **own}, "max_tokens": progress.remaining, "return_token_ids": True}
        body["stop_token_ids"] = [*self._shared.get("stop_token_ids", ()), progress.marker]
        if "min_tokens" in body:
            body["min_tokens"] = max(0, body["min_tokens"] - done)
        return body | self._prompt(branch)

    def _prompt(self, branch: int) -> dict[str, Any]:
        """Return the prompt of a branch: in the first round as passed, later as token ids with the generated tokens."""
        given, logs = self.prompts[branch], self._logprobs
        if self.progress.tokens:
            return {"prompt": [*self._read[branch], *self.progress.tokens], "logprobs": 0 if logs else None}
        if _is_chat(given):
            return {"messages": given, "logprobs": logs, "top_logprobs": 0 if logs else None}
        return {"prompt": given, "logprobs": 0 if logs else None}

    @staticmethod
    def route(body: Mapping[str, Any]) -> str:
        """Return the route that a body is sent to."""
        return "chat/completions" if "messages" in body else "completions"

    def remember(self, body: Mapping[str, Any], read: list[int] | None) -> None:
        """Keep the token ids of a prompt for later rounds."""
        if read:
            self._read.setdefault(body["vllm_xargs"][f"{PREFIX}branch"], read)

    def prompt_tokens(self) -> list[int]:
        """Return the number of tokens in the prompt of each branch."""
        return [len(self._read.get(branch, ())) for branch in range(len(self.prompts))]


def _check_secrets(base_url: str, api_key: str | None) -> None:
    """Reject an address that holds what may be secret, since errors name it, and a key that cannot be sent. Neither is repeated."""
    if set("@?#") & set(base_url):
        raise ValueError("base_url must not contain a user, a password or a query: pass the key as api_key")
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError(
            "api_key contains characters that cannot be sent in a header, such as a line break: set it again"
        )


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def _holds_images(prompt: Any) -> bool:
    parts = [part for message in prompt for part in message.get("content") or ()] if _is_chat(prompt) else []
    return any(isinstance(part, Mapping) and part.get("type") != "text" for part in parts)


async def _together(requests: Sequence[Any]) -> list[BranchReply]:
    """Return the replies to all requests; if one fails, cancel the others."""
    tasks = [asyncio.ensure_future(one) for one in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _stop(tasks)


async def _merged(streams: Sequence[AsyncIterator[ReplyChunk]]) -> AsyncIterator[tuple[int, ReplyChunk]]:
    """Yield the pieces of all streams as they arrive, each with the index of its stream."""
    queue: asyncio.Queue[tuple[int, ReplyChunk] | BaseException | None] = asyncio.Queue()

    async def read(place: int) -> None:
        try:
            async for chunk in streams[place]:
                queue.put_nowait((place, chunk))
            queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001  the reader of the queue raises it
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(read(place)) for place in range(len(streams))]
    try:
        open_streams = len(tasks)
        while open_streams:
            found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                open_streams -= 1
            else:
                yield found
    finally:
        await _stop(tasks)


async def _stop(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
