"""Endpoints of the OpenAI protocol: vLLM, SGLang, TGI, llama.cpp, hosted ones. And their batch files.

An answer costs money, so the engine asks as often as it is worth it and never twice for what it has: network errors, cut or
unreadable answers, timeouts, 408, 409, 425, 429 and 5xx are tried again after a pause that doubles, with full jitter (Brooker
2015), and not before `Retry-After`; a refused key or an unknown model ends the run (`Failure.stops`); whatever else the endpoint
refuses is a failed request with the endpoint's own words.
"""

import asyncio
import base64
import io
import json
import math
import os
import queue
import random
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from contralto.data_gen.engines import Outcome
from contralto.data_gen.requests import Answer, Failure, Request

__all__ = ["Limiter", "OpenAIEngine", "batch_line", "read_batch_line", "token_guess"]

AGAIN = {408, 409, 425, 429}
FATAL = {401, 403, 404}
LONGEST_PAUSE = 60.0
CHARACTERS_PER_TOKEN = 3.5  # of English text; only the limiter and estimates guess


class Limiter:
    """At most so many requests and tokens per minute, in every window of a minute.

    Requests are spread: at most one second's share leaves within a second, since hosts count in short windows, too. Tokens are
    booked with a guess when a request leaves and corrected when its answer tells how many they were.

    Args:
        rpm: requests per minute; None is no limit.
        tpm: tokens per minute, those of prompts and answers together; None is no limit.

    Raises:
        ValueError: a limit that is not positive.
    """

    def __init__(self, *, rpm: int | None = None, tpm: int | None = None) -> None:
        for name, value in {"rpm": rpm, "tpm": tpm}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 (leave it out for no limit), not {value}")
        self._rpm, self._tpm = rpm, tpm
        self._left: deque[float] = deque()
        self._booked: deque[list[float]] = deque()
        self._turn = asyncio.Lock()
        self._not_before = 0.0

    async def wait(self, tokens: int) -> list[float]:
        """Wait until a request of so many tokens may leave; the booking is for `correct`."""
        async with self._turn:
            tokens = min(tokens, self._tpm or tokens)
            while (pause := self._pause(time.monotonic(), tokens)) > 0:
                await asyncio.sleep(pause)
            now = time.monotonic()
            booking = [now, float(tokens)]
            if self._rpm:
                self._left.append(now)
            if self._tpm:
                self._booked.append(booking)
            return booking

    def correct(self, booking: list[float], tokens: int) -> None:
        """Say how many tokens a request was."""
        booking[1] = float(tokens)

    def hold(self, seconds: float) -> None:
        """Let nothing leave for so long: the endpoint said so."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _pause(self, now: float, tokens: int) -> float:
        """How long a request has to wait, as far as can be told."""
        waits = [self._not_before - now]
        if self._rpm:
            while self._left and self._left[0] <= now - 60:
                self._left.popleft()
            share = max(1, self._rpm // 60)
            for count, window in ((self._rpm, 60.0), (share, 60.0 * share / self._rpm)):
                if len(self._left) >= count:
                    waits.append(self._left[-count] + window - now)
        if self._tpm:
            while self._booked and self._booked[0][0] <= now - 60:
                self._booked.popleft()
            if self._booked and sum(booking[1] for booking in self._booked) + tokens > self._tpm:
                waits.append(self._booked[0][0] + 60 - now)
        return max(waits)


class OpenAIEngine:
    """An endpoint of the OpenAI protocol.

    Args:
        base_url: up to and with `/v1`.
        model: as the endpoint calls it.
        served_by: what stands for `base_url` in the keys of answers, for endpoints whose address changes, or of which
            several serve the same model; the address itself by default.
        key_env: environment variable that holds the key; if it is not set, no key is sent. The key is written nowhere.
        concurrency: at most so many requests at a time.
        rpm, tpm: limits, see `Limiter`.
        attempts: how often a request is tried.
        timeout: seconds that an attempt may take.
        max_tokens_field: how the endpoint calls the limit of new tokens; newer hosted models want `max_completion_tokens`.
        extra_body: more fields of every request, such as `{"chat_template_kwargs": {"enable_thinking": false}}`.

    Raises:
        ValueError: an address that is none or holds a password, a number outside its range.
    """

    rows_together = 1

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        served_by: str | None = None,
        key_env: str = "OPENAI_API_KEY",
        concurrency: int = 32,
        rpm: int | None = None,
        tpm: int | None = None,
        attempts: int = 8,
        timeout: float = 600.0,
        max_tokens_field: str = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must be an address such as http://localhost:8000/v1, not {base_url!r}")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "base_url holds a user, a password or a query, which would be written to the store: "
                "put the key into an environment variable and name it in key_env"
            )
        for name, value in {"concurrency": concurrency, "attempts": attempts, "timeout": timeout}.items():
            if value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        Limiter(rpm=rpm, tpm=tpm)
        self._url, self._model = base_url.rstrip("/"), model
        self._key = os.environ.get(key_env, "")
        self.concurrency, self._attempts, self._timeout = concurrency, attempts, timeout
        self._limits = {"rpm": rpm, "tpm": tpm}
        self._field, self._extra = max_tokens_field, dict(extra_body or {})
        self.identity = {
            "engine": "openai",
            "model": model,
            "served_by": served_by or self._url,
            "extra_body": self._extra,
        }

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON that is sent for a request."""
        sampling = request.sampling
        said: dict[str, Any] = {"model": self._model, self._field: sampling.max_new_tokens}
        if request.messages is None:
            said["prompt"] = request.prompt
        else:
            said["messages"] = _with_images(request)
        said |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        said |= {"seed": request.seed % 2**31}  # some servers keep 32 bits
        said |= {"top_k": sampling.top_k} if sampling.top_k else {}
        said |= {"stop": list(sampling.stop)} if sampling.stop else {}
        if sampling.logprobs:
            said["logprobs"] = True if request.messages is not None else 1
        return said | self._extra

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Outcome]]:
        """Answers as they come, many requests at a time."""
        outcomes: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(iter(requests), outcomes), daemon=True).start()
        while (outcome := outcomes.get()) is not None:
            if isinstance(outcome, BaseException):
                raise outcome
            yield [outcome]

    def _run(self, requests: Iterator[Request], outcomes: Any) -> None:
        try:
            asyncio.run(self._serve(requests, outcomes))
            outcomes.put(None)
        except BaseException as error:  # noqa: BLE001 - whoever asked has to see it, not this thread
            outcomes.put(error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error)

    async def _serve(self, requests: Iterator[Request], outcomes: Any) -> None:
        import aiohttp

        taking, limiter = asyncio.Lock(), Limiter(**self._limits)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        connector = aiohttp.TCPConnector(limit=self.concurrency)

        refused: Failure | None = None

        async def work(session: Any) -> None:
            nonlocal refused
            while True:
                async with taking:
                    request = await asyncio.to_thread(next, requests, None)
                if request is None:
                    return
                said = refused or await self._ask(session, limiter, request)
                outcomes.put((request, said))
                if isinstance(said, Failure) and said.stops:
                    refused = said

        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(self.concurrency):
                group.create_task(work(session))

    async def _ask(self, session: Any, limiter: Limiter, request: Request) -> Answer | Failure:
        """One request, as often as it takes."""
        import aiohttp

        body = self.body(request)
        path = "/completions" if request.messages is None else "/chat/completions"
        reason = ""
        for attempt in range(self._attempts):
            if attempt:
                await asyncio.sleep(self._pause(attempt))
            booking = await limiter.wait(token_guess(request))
            try:
                async with session.post(self._url + path, json=body, allow_redirects=False) as response:
                    text = await response.text()
                    failed = self._refusal(response.status, text, response.headers)
                    if failed is None:
                        answer = read_answer(json.loads(text), request)
                        limiter.correct(booking, answer.prompt_tokens + answer.completion_tokens)
                        return answer
                    if failed.stops or (response.status not in AGAIN and response.status < 500):
                        return failed
                    reason = failed.reason
                    limiter.hold(_retry_after(response.headers))
            except TimeoutError:
                reason = f"no answer within {self._timeout:g} s"
            except (aiohttp.ClientError, json.JSONDecodeError, UnicodeDecodeError, _UnreadableAnswerError) as error:
                reason = self._hide(f"{type(error).__name__}: {error}")
        return Failure(f"{reason} (after {self._attempts} attempts)")

    @staticmethod
    def _pause(attempt: int) -> float:
        """Seconds before another attempt."""
        return random.uniform(0, min(LONGEST_PAUSE, 2.0**attempt / 2))

    def _refusal(self, status: int, text: str, headers: Mapping[str, str]) -> Failure | None:
        """What the endpoint says if it did not answer."""
        if status == 200:
            return None
        said = self._hide(f"{status}: {_message(text)}")
        if status in FATAL or "insufficient_quota" in text:
            return Failure(f"{self._url} refuses model {self._model!r}: {said}", stops=True)
        if 300 <= status < 400:
            return Failure(f"{self._url} points to {headers.get('Location')}: give that as base_url", stops=True)
        return Failure(said)

    def _hide(self, text: str) -> str:
        """The key, should an endpoint repeat it."""
        return text.replace(self._key, "***") if self._key else text


class _UnreadableAnswerError(ValueError):
    pass


def read_answer(body: Any, request: Request) -> Answer:
    """The answer in a response's JSON.

    Raises:
        ValueError: it is not what the protocol says.
    """
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        text = choice["message"]["content"] if request.messages is not None else choice["text"]
        reason = choice.get("finish_reason") or "unknown"
        if not isinstance(text, str) and reason == "stop":
            raise _UnreadableAnswerError(f"an answer without text: {_short(body)}")
        return Answer(
            text=(text or "").encode("utf-8", "replace").decode(),  # a lone surrogate could not be stored
            finish_reason=reason,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            logprobs=_logprobs(choice.get("logprobs")) if request.sampling.logprobs else None,
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _UnreadableAnswerError(f"not an answer of the OpenAI protocol: {_short(body)}") from error


def _logprobs(said: Any) -> tuple[float, ...] | None:
    if not said:
        return None
    if "content" in said:
        return tuple(float(token["logprob"]) for token in said["content"])
    return tuple(float(value) for value in said["token_logprobs"])


def _with_images(request: Request) -> list[dict[str, Any]]:
    """Messages whose image parts hold the images."""
    messages = [dict(message) for message in request.messages or ()]
    if not request.images:
        return messages
    places = [p for m in messages if isinstance(m["content"], list) for p in m["content"] if p["type"] == "image"]
    if not places:
        first = next(message for message in messages if message["role"] == "user")
        said = first["content"]
        parts = [{"type": "text", "text": said}] if isinstance(said, str) else said
        first["content"] = [{"type": "image"} for _ in request.images] + parts
    shown = iter(request.images)
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [_image_part(next(shown)) if p["type"] == "image" else p for p in message["content"]]
    return messages


def _image_part(image: Any) -> dict[str, Any]:
    if isinstance(image, str | Path):
        kind, data = Path(image).suffix.lstrip(".").lower().replace("jpg", "jpeg") or "png", Path(image).read_bytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        kind, data = "png", buffer.getvalue()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, from a number or a date."""
    said = headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(0.0, float(said))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    return 0.0


def _message(text: str) -> str:
    """The words of an error's body."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        error = json.loads(text)["error"]
        return _short(error if isinstance(error, str) else error["message"])
    return _short(text)


def _short(value: Any) -> str:
    text = re.sub(r"\s+", " ", value if isinstance(value, str) else json.dumps(value)).strip()
    return text if len(text) <= 300 else text[:297] + "..."


def token_guess(request: Request) -> int:
    """How many tokens a request may come to: its characters by 3.5, and the most it may answer."""
    texts = [request.prompt or "", *(str(message["content"]) for message in request.messages or ())]
    return math.ceil(sum(map(len, texts)) / CHARACTERS_PER_TOKEN) + request.sampling.max_new_tokens


# ------------------------------------------------------------------------------------------------------------ batch files


def batch_line(engine: OpenAIEngine, request: Request) -> str:
    """A request as a line of the OpenAI batch format, which `vllm run-batch` reads, too; its key is the `custom_id`."""
    url = "/v1/completions" if request.messages is None else "/v1/chat/completions"
    line = {"custom_id": request.key, "method": "POST", "url": url, "body": engine.body(request)}
    return json.dumps(line, ensure_ascii=False) + "\n"


def read_batch_line(line: str) -> tuple[str, dict[str, Any] | Failure]:
    """The key, and the response's body or why there is none.

    Raises:
        ValueError: not a line of a batch's output.

    Example:
        >>> read_batch_line('{"custom_id": "k", "response": {"status_code": 429, "body": {}}, "error": null}')
        ('k', Failure(reason='429: {}', stops=False))
    """
    try:
        said = json.loads(line)
        key, response, error = said["custom_id"], said.get("response"), said.get("error")
        if error or not response:
            return key, Failure(_short(error or "no response"))
        if response.get("status_code", 200) != 200:
            return key, Failure(f"{response['status_code']}: {_message(json.dumps(response.get('body')))}")
        return key, response["body"]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a line of a batch's output (custom_id, response, error): {_short(line)}") from error
