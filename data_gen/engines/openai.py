"""The engine for endpoints of the OpenAI protocol: vLLM, SGLang, TGI, llama.cpp, hosted ones.

Network errors, damaged or unreadable replies, timeouts, 408, 409, 425, 429 and 5xx are tried again after a pause that doubles, with
full jitter (Brooker 2015), and not before `Retry-After`, for at most `LONGEST_HOLD` seconds. A rejected key or an unknown model ends
the run (`Failure.stops`); every other error of the endpoint fails the request with the endpoint's own words, as does a reply that
cannot be read. Replies are read up to a size that depends on the request. The key is hidden in everything that is recorded.
"""

import asyncio
import json
import logging
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from contralto.common.texts import Secrets, short
from contralto.common.web import address_of, decoded, read_body, read_json, retry_after
from contralto.data_gen.engines.base import Outcome
from contralto.data_gen.engines.bodies import chat_messages, most_bytes, raw_prompt, token_guess
from contralto.data_gen.engines.endpoint_options import check_address, check_extra_body, read_key
from contralto.data_gen.engines.feed import Feed, Outlet, all_of
from contralto.data_gen.engines.limiter import Flow, Limiter
from contralto.data_gen.engines.replies import read_answer, refused
from contralto.data_gen.engines.window import Window, checked_concurrency
from contralto.data_gen.ranges import check_number, check_texts
from contralto.data_gen.types import Answer, Failure, Request

__all__ = ["OpenAIEngine"]

AGAIN = {408, 409, 425, 429}
FULL = {429, 503}
"""Refusals of an endpoint that is asked too much."""
FATAL = {401, 403, 404}
LONGEST_PAUSE = 60.0
LONGEST_HOLD = 300.0
"""Longest time in seconds for which requests are held because an endpoint asks to wait."""
LOGGED_HOLD = 5.0
"""Shortest such time in seconds that is logged."""
LIMITS: dict[str, dict[str, Any]] = {
    "attempts": {"above": 0, "most": 1000, "whole": True},
    "timeout": {"above": 0, "most": 86_400},
}

logger = logging.getLogger(__name__)


class OpenAIEngine:
    """Request answers from an endpoint of the OpenAI protocol.

    Args:
        base_url: the address, including `/v1`.
        model: the name of the model at the endpoint.
        served_by: replaces `base_url` in the keys of answers, for endpoints whose address changes, or of which several serve
            the same model; the address itself by default.
        key_env: the environment variable that holds the API key. Left out: OPENAI_API_KEY, if it is set. None: no key is sent.
            The key is written nowhere, and is sent to no other address.
        concurrency: the largest number of requests at the same time, up to 10,000; or `auto`, which finds it below 256: more as long
            as all are answered, fewer after 429, 503, a timeout, or when answers slow down, see `Window`.
        rpm: requests per minute, see `Limiter`.
        tpm: tokens per minute, see `Limiter`.
        attempts: the largest number of attempts for a request.
        timeout: seconds for one attempt, reading included; at most a day.
        max_tokens_field: the field for the limit of new tokens; newer hosted models require `max_completion_tokens`.
        extra_body: further fields of every request, such as `{"chat_template_kwargs": {"enable_thinking": false}}`.

    Raises:
        ValueError: the address is none or holds a password, a number is outside its range, a key would be recorded,
            `extra_body` is not JSON or sets fields of the engine; at the first request, the key is not set.
    """

    rows_together = 1

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        served_by: str | None = None,
        key_env: str | None = "",
        concurrency: int | str = 32,
        rpm: int | None = None,
        tpm: int | None = None,
        attempts: int = 8,
        timeout: float = 600.0,
        max_tokens_field: str = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        check_address(base_url)
        texts = {"model": model, "max_tokens_field": max_tokens_field}
        check_texts(texts, "an endpoint", *texts)
        self.concurrency, self._is_adaptive = checked_concurrency(concurrency)
        for name, value in {"attempts": attempts, "timeout": timeout}.items():
            check_number(name, value, **LIMITS[name])
        Limiter(rpm=rpm, tpm=tpm)
        self._url, self._model = base_url.rstrip("/"), model
        self._key, self._no_key = read_key(key_env)
        self.secrets = Secrets(self._key)
        self._attempts, self._timeout = attempts, timeout
        self._limits = {"rpm": rpm, "tpm": tpm}
        self._field, self._extra = max_tokens_field, check_extra_body(extra_body)
        self.identity = {
            "engine": "openai",
            "model": model,
            "served_by": served_by or self._url,
            "extra_body": self._extra,
        }
        if self.secrets.occur_in(json.dumps(self.identity)):
            raise ValueError(
                "an option contains the API key itself, which would be recorded: name its variable in key_env"
            )
        self._flows: list[Flow] = []

    def check_ready(self) -> None:
        """Raise an error if the API key is missing; only requests need it.

        Raises:
            ValueError: the variable that `key_env` names is not set, or cannot hold a key.
        """
        if self._no_key:
            raise ValueError(self._no_key)

    def stop(self) -> None:
        """Fail requests that wait for another attempt; requests already sent still get their answers."""
        for flow in list(self._flows):
            flow.stop()

    def body(self, request: Request) -> dict[str, Any]:
        """Return the JSON of a request.

        Args:
            request: the request.
        """
        sampling = request.sampling
        body: dict[str, Any] = {"model": self._model, self._field: sampling.max_new_tokens}
        if request.messages is None:
            body["prompt"] = raw_prompt(request)
        else:
            body["messages"] = chat_messages(request)
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        body |= {"seed": request.seed % 2**31}  # some servers keep 32 bits
        body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        body |= {"stop": list(sampling.stop)} if sampling.stop else {}
        if sampling.logprobs:
            body["logprobs"] = True if request.messages is not None else 1
        return body | self._extra

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Outcome]]:
        """Yield outcomes as they arrive, with many requests at the same time.

        Args:
            requests: the requests; the iterator may block.
        """
        self.check_ready()
        outcomes: queue.SimpleQueue[list[Outcome] | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(requests, outcomes), daemon=True).start()
        while True:
            arrived = all_of(outcomes)
            ready = [outcome for some in arrived if isinstance(some, list) for outcome in some]
            if ready:
                yield ready
            end = arrived[-1]
            if isinstance(end, BaseException):
                raise end
            if end is None:
                return

    def _run(self, requests: Iterable[Request], outcomes: Any) -> None:
        try:
            asyncio.run(self._serve(requests, outcomes))
            outcomes.put(None)
        except BaseException as error:  # noqa: BLE001 - the thread that reads the outcomes raises it
            outcomes.put(error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error)

    async def _serve(self, requests: Iterable[Request], outcomes: Any) -> None:
        import aiohttp

        window = Window(self.concurrency, is_adaptive=self._is_adaptive)
        feed, flow = Feed(requests, self.concurrency), Flow(Limiter(**self._limits), window)
        outlet = Outlet(outcomes)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        connector = aiohttp.TCPConnector(limit=self.concurrency)
        refused: Failure | None = None

        async def work(session: Any) -> None:
            nonlocal refused
            while not flow.is_stopping and (request := await feed.take()) is not None:
                outcome = refused or await self._ask(session, flow, request)
                outlet.put((request, outcome))
                if isinstance(outcome, Failure) and outcome.stops:
                    refused = outcome

        self._flows.append(flow)
        try:
            async with (
                aiohttp.ClientSession(
                    headers=headers, timeout=timeout, connector=connector, auto_decompress=False
                ) as session,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(self.concurrency):
                    group.create_task(work(session))
        finally:
            self._flows.remove(flow)
            feed.close()
            outlet.flush()

    async def _ask(self, session: Any, flow: Flow, request: Request) -> Answer | Failure:
        """Send a request until it has an outcome or no attempts are left. An error fails this request alone."""
        try:
            body = self.body(request)
        except Exception as error:  # noqa: BLE001 - an image that cannot be read
            return Failure(f"the request cannot be sent: {self._described(error)}")
        reason = ""
        for attempt in range(self._attempts):
            with flow.pausing():
                if attempt:
                    await asyncio.sleep(self._pause(attempt))
                await flow.window.enter()
                booking = await flow.limiter.wait(token_guess(request))
            sent = time.monotonic()
            try:
                outcome, is_final = await self._attempt(session, flow, booking, request, body)
            except TimeoutError:
                reason = f"no answer within {self._timeout:g} s"
                flow.window.refused(sent)
            except Exception as error:  # noqa: BLE001 - a reply of another program may be anything
                reason = self._described(error)
            else:
                if is_final:
                    return outcome
                reason = outcome.reason if isinstance(outcome, Failure) else ""
            finally:
                await flow.window.leave()
        return Failure(f"{reason} (after {self._attempts} attempts)")

    async def _attempt(
        self, session: Any, flow: Flow, booking: list[float], request: Request, body: Mapping[str, Any]
    ) -> tuple[Answer | Failure, bool]:
        """Send a request once; return its outcome, and whether another attempt is pointless."""
        path = "/completions" if request.messages is None else "/chat/completions"
        sent = time.monotonic()
        async with session.post(self._url + path, json=body, allow_redirects=False) as response:
            data = await read_body(response, limit=most_bytes(request))
            if response.status == 200:
                flow.window.answered(sent)
                reply = read_json(decoded(data), response.headers.get("Content-Type"), self.secrets)
                outcome = read_answer(reply, request)
                if isinstance(outcome, Answer):
                    flow.limiter.correct(booking, outcome.prompt_tokens + outcome.completion_tokens)
                return self.without_key(outcome), True
            failed = self._refusal(response.status, data.decode("utf-8", "replace"), response.headers)
            if failed.stops or (response.status not in AGAIN and response.status < 500):
                return failed, True
            if response.status in FULL:
                flow.window.refused(sent)
            self._hold(flow.limiter, retry_after(response.headers))
            return failed, False

    @staticmethod
    def _pause(attempt: int) -> float:
        """Return the seconds before another attempt."""
        return random.uniform(0, min(LONGEST_PAUSE, 2.0 ** min(attempt, 10) / 2))

    def _hold(self, limiter: Limiter, seconds: float) -> None:
        """Hold all requests as long as the endpoint asks, at most `LONGEST_HOLD` seconds, and log it."""
        waited = min(seconds, LONGEST_HOLD)
        if limiter.hold(waited) and waited >= LOGGED_HOLD:
            logger.warning(
                "%s asks to wait %s s: no requests are sent to it for %g s", self._url, f"{seconds:,.0f}", waited
            )

    def _refusal(self, status: int, text: str, headers: Mapping[str, str]) -> Failure:
        """Return the failure that an error of the endpoint means."""
        message = refused(status, text, self.secrets)
        if status in FATAL or "insufficient_quota" in text:
            hint = "" if self._key or status not in (401, 403) else " (no key was sent: name its variable in key_env)"
            return Failure(f"{self._url} rejects model {self._model!r}: {message}{hint}", stops=True)
        if 300 <= status < 400:
            target = short(self.secrets.hide(address_of(headers.get("Location"))))
            return Failure(f"{self._url} redirects to {target}: use that as base_url", stops=True)
        return Failure(message)

    def _described(self, error: BaseException) -> str:
        """Return an exception in one line, without the key."""
        return short(self.secrets.hide(f"{type(error).__name__}: {error}"))

    def without_key(self, outcome: Answer | Failure) -> Answer | Failure:
        """Hide the key in an outcome, since an endpoint may repeat it.

        Args:
            outcome: an outcome of the endpoint, from a reply or a batch file.
        """
        if isinstance(outcome, Failure):
            return replace(outcome, reason=self.secrets.hide(outcome.reason))
        text, reason = map(self.secrets.hide_in_completion, (outcome.text, outcome.finish_reason))
        is_same = text == outcome.text and reason == outcome.finish_reason
        return outcome if is_same else replace(outcome, text=text, finish_reason=reason)
