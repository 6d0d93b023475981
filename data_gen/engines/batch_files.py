"""Batch files of the OpenAI protocol: open requests out, answers in."""

import json
from typing import Any

from contralto.common.texts import Secrets, short
from contralto.data_gen.engines.openai import OpenAIEngine
from contralto.data_gen.engines.replies import refused
from contralto.data_gen.types import Failure, Request

__all__ = ["batch_line", "read_batch_line"]


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
            raise TypeError("custom_id is no string")
        if error or not response:
            return key, Failure(short(error or "no response"))
        if response.get("status_code", 200) != 200:
            return key, Failure(refused(response["status_code"], json.dumps(response.get("body")), Secrets()))
        return key, response["body"]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a line of a batch's output (custom_id, response, error): {short(line)}") from error
