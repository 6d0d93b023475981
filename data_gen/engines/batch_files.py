"""Batch files of the OpenAI protocol: write unanswered requests, read answers."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from contralto.common.files import lines_of
from contralto.common.texts import Secrets, short
from contralto.data_gen.engines.openai import OpenAIEngine
from contralto.data_gen.engines.replies import read_answer, refused
from contralto.data_gen.store import TrackedRequest
from contralto.data_gen.types import Answer, Failure, Request

__all__ = ["BatchOutput", "batch_line", "read_batch_line", "read_batch_output"]


def batch_line(engine: OpenAIEngine, request: Request) -> str:
    """Return a request as a line of the OpenAI batch format, which `vllm run-batch` reads too.

    Args:
        engine: the engine that would send the request.
        request: the request; its key is the `custom_id` of the line.
    """
    url = "/v1/completions" if request.messages is None else "/v1/chat/completions"
    line = {"custom_id": request.key, "method": "POST", "url": url, "body": engine.body(request)}
    return json.dumps(line, ensure_ascii=False) + "\n"


def read_batch_line(line: str) -> tuple[str, Any]:
    """Return the key of a request, and the body of its response or the failure in its place.

    Args:
        line: of a batch's output.

    Raises:
        ValueError: not a line of a batch's output.

    Examples:
        >>> read_batch_line('{"custom_id": "k", "response": {"status_code": 429, "body": {}}, "error": null}')
        ('k', Failure(reason='status 429: {}', stops=False))
    """
    try:
        output = json.loads(line)
        key, response, error = output["custom_id"], output.get("response"), output.get("error")
        if not isinstance(key, str):
            raise TypeError("custom_id is not a string")
        if error or not response:
            return key, Failure(short(error or "no response"))
        if response.get("status_code", 200) != 200:
            return key, Failure(refused(response["status_code"], json.dumps(response.get("body")), Secrets()))
        return key, response["body"]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a line of a batch's output (custom_id, response, error): {short(line)}") from error


class BatchOutput(NamedTuple):
    """The outcomes in the output of a batch."""

    outcomes: list[tuple[TrackedRequest, Answer | Failure]]
    unknown: int
    """The number of lines whose request is not open."""
    unreadable: list[tuple[int, str]]
    """Numbers of the lines that cannot be read, each with the reason."""


def read_batch_output(content: bytes, tracked: Sequence[TrackedRequest], engine: OpenAIEngine) -> BatchOutput:
    """Read the output of a batch. An invalid line fails its own request only.

    Args:
        content: the file.
        tracked: the open requests.
        engine: the engine that would have sent them; its key is hidden in the outcomes.
    """
    waiting = {each.request.key: each for each in tracked}
    outcomes: list[tuple[TrackedRequest, Answer | Failure]] = []
    unknown, unreadable = 0, []
    for number, line in enumerate(lines_of(content.decode("utf-8", "replace")), 1):
        if not line.strip():
            continue
        try:
            key, body = read_batch_line(line)
        except ValueError as error:
            unreadable.append((number, str(error)))
            continue
        if key in waiting:
            outcomes.append((waiting[key], engine.without_key(_outcome(body, waiting[key].request))))
        else:
            unknown += 1
    return BatchOutput(outcomes, unknown, unreadable)


def _outcome(body: Any, request: Request) -> Answer | Failure:
    if isinstance(body, Failure):
        return body
    try:
        return read_answer(body, request)
    except Exception as error:  # noqa: BLE001 - a reply of another program may be anything
        return Failure(short(f"{type(error).__name__}: {error}"))
