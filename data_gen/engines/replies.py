"""Replies of the OpenAI protocol, from endpoints and batch files: an answer, or the reason why there is none."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from contralto.common.texts import Secrets, short
from contralto.common.web import BadReplyError
from contralto.data_gen.engines.outcomes import checked, kind_of
from contralto.data_gen.types import Answer, Failure, Request

__all__ = ["error_message", "read_answer", "refused"]


def read_answer(body: Any, request: Request) -> Answer | Failure:
    """Return the answer in a response's JSON, or a failure.

    Failures are replies that explain why they hold no text: a refusal, calls of tools, reasoning that used up the limit, a
    content filter, nothing but white space.

    Args:
        body: the JSON.
        request: the request.

    Raises:
        BadReplyError: the JSON does not follow the protocol, so the reply may have been damaged on its way.

    Examples:
        >>> from contralto.data_gen.types import Sampling
        >>> request = Request(key="k", messages=[], prompt=None, images=(), sampling=Sampling(), seed=0)
        >>> choice = {"message": {"content": None}, "finish_reason": "length"}
        >>> read_answer({"choices": [choice], "usage": {"completion_tokens": 512}}, request).reason
        'no text (finish_reason length after 512 tokens)'
    """
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message = choice if request.messages is None else choice["message"]
        text = _text(choice["text"] if request.messages is None else message["content"])
        answer = Answer(
            text=text or "",
            finish_reason=choice.get("finish_reason") or "unknown",
            prompt_tokens=usage.get("prompt_tokens") or 0,
            completion_tokens=usage.get("completion_tokens") or 0,
            logprobs=_logprobs(choice.get("logprobs")) if request.sampling.logprobs else None,
        )
        instead = None if answer.text.strip() else _instead_of_text(message)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadReplyError(f"not a reply of the OpenAI protocol: {short(body)}") from error
    if text is None and answer.finish_reason == "stop" and instead is None:
        raise BadReplyError(f"an answer without text: {short(body)}")
    outcome = checked(answer)
    return Failure(f"{instead}: {outcome.reason}") if isinstance(outcome, Failure) and instead else outcome


def _text(content: Any) -> str | None:
    """Return a message's content as a string; some endpoints send it in parts.

    Raises:
        TypeError: it is neither a string nor parts.
    """
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(f"the content is {kind_of(content)}")
    return content


def _instead_of_text(message: Mapping[str, Any]) -> str | None:
    """Describe the content that a message has instead of text; None if there is no known one."""
    if message.get("refusal"):
        return f"the model refused ({short(message['refusal'], 200)})"
    if message.get("tool_calls") or message.get("function_call"):
        return "the model called tools instead of answering"
    if message.get("reasoning_content") or message.get("reasoning"):
        return "the reply contains only reasoning: raise max_new_tokens or request less reasoning"
    return None


def _logprobs(value: Any) -> tuple[Any, ...] | None:
    """Return the log-probabilities as they are in the reply; `checked` validates them."""
    if not value:
        return None
    if "content" in value:
        return tuple(token["logprob"] for token in value["content"] or ())
    return tuple(value["token_logprobs"])


def refused(status: Any, text: str, secrets: Secrets) -> str:
    """Return one line about a reply with the status of an error.

    Args:
        status: the status.
        text: the body, JSON or not.
        secrets: hidden before the line is cut.

    Examples:
        >>> refused(429, '{"error": "slower"}', Secrets()), refused(204, "", Secrets())
        ('status 429: slower', 'status 204, with an empty reply')
    """
    message = error_message(text, secrets)
    return f"status {status}: {message}" if message else f"status {status}, with an empty reply"


def error_message(text: str, secrets: Secrets) -> str:
    """Return the message in an error's body in one line, without the key.

    Args:
        text: the body, JSON or not.
        secrets: hidden before the line is cut.

    Examples:
        >>> error_message('{"error": {"message": "no"}}', Secrets())
        'no'
    """
    with suppress(Exception):  # a body in another form is shown as it is
        error = json.loads(text)["error"]
        return short(secrets.hide(error if isinstance(error, str) else error["message"]))
    return short(secrets.hide(text))
