"""Validation of outcomes before they are recorded.

Engines are written by many people, and endpoints may send anything. Every outcome becomes an `Answer` that the store can hold and a
strategy can use, or a `Failure` with the reason.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from contralto.common.texts import Secrets, clean, short
from contralto.data_gen.types import Answer, Failure, Request

__all__ = ["MOST_TOKENS", "checked", "checked_outcomes"]

MOST_TOKENS = 2**53
"""Largest count of tokens; SQLite holds no integers from 2**63 on."""
USUAL = {"stop", "length"}
"""Reasons for an end that need no cleaning."""
BROKEN_OFF = {"abort", "content_filter", "error", "refusal"}
"""Reasons for an end that are neither the model's own nor the limit: of OpenAI, Anthropic, OpenRouter and vLLM."""


def checked(outcome: Any) -> Answer | Failure:
    """Return an answer that can be recorded, or a failure.

    An answer without text is a failure, and so is one that a content filter or an error broke off, since neither can be trained
    on. An answer that was cut off at its limit (`length`) stays an answer.

    Args:
        outcome: the value that an engine yielded for a request.

    Examples:
        >>> checked(Answer(text=" ", finish_reason="length", completion_tokens=512)).reason
        'no text (finish_reason length after 512 tokens)'
        >>> checked(None).reason
        'the engine returned None, not an Answer or a Failure'
    """
    if isinstance(outcome, Failure):
        reason = Secrets.of_process().hide(str(outcome.reason or "no reason given"))
        return Failure(short(reason, 1000), stops=bool(outcome.stops))
    if not isinstance(outcome, Answer):
        return Failure(f"the engine returned {kind_of(outcome)}, not an Answer or a Failure")
    try:
        answer = _checked_answer(outcome)
    except (TypeError, ValueError, OverflowError) as error:
        return Failure(f"not a valid answer: {short(str(error))}")
    if answer.finish_reason.lower() in BROKEN_OFF:
        return Failure(f"the answer was cut off by {answer.finish_reason} after {answer.completion_tokens} tokens")
    if not answer.text.strip():
        return Failure(f"no text (finish_reason {answer.finish_reason} after {answer.completion_tokens} tokens)")
    return answer


def _checked_answer(answer: Answer) -> Answer:
    """Return the answer in plain Python types, without lone surrogates.

    Raises:
        TypeError: a field is of another type.
        ValueError: a number is outside its range.
    """
    if _is_plain(answer):
        return answer
    for name in ("text", "finish_reason"):
        if not isinstance(getattr(answer, name), str):
            raise TypeError(f"{name} is {kind_of(getattr(answer, name))}, not a string")
    return Answer(
        text=clean(str(answer.text)),
        finish_reason=short(answer.finish_reason, 100) or "unknown",
        prompt_tokens=_count("prompt_tokens", answer.prompt_tokens),
        completion_tokens=_count("completion_tokens", answer.completion_tokens),
        logprobs=None if answer.logprobs is None else tuple(_logprob(value) for value in answer.logprobs),
    )


def _is_plain(answer: Answer) -> bool:
    """Return True if an answer obviously holds what `_checked_answer` would return, as most do."""
    return (
        type(answer) is Answer
        and type(answer.text) is type(answer.finish_reason) is str
        and answer.text.isascii()
        and answer.finish_reason in USUAL
        and type(answer.prompt_tokens) is type(answer.completion_tokens) is int
        and 0 <= answer.prompt_tokens <= MOST_TOKENS
        and 0 <= answer.completion_tokens <= MOST_TOKENS
        and answer.logprobs is None
    )


def _count(name: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | str | float):
        raise TypeError(f"{name} is {short(repr(value), 40)}, not a whole number")
    count = operator.index(value)
    if not 0 <= count <= MOST_TOKENS:
        raise ValueError(f"{name} is {short(repr(count), 40)}, which is not a number of tokens")
    return count


def _logprob(value: Any) -> float:
    if isinstance(value, bool | str):
        raise TypeError(f"a log-probability is {short(repr(value), 40)}, not a number")
    number = float(value)
    if math.isnan(number):
        raise ValueError("a log-probability is NaN")
    return number


def described(error: BaseException, *, by: str) -> str:
    """Return an exception in one line, without the secrets of the environment.

    Args:
        error: the exception.
        by: the name of the code that raised it.

    Examples:
        >>> described(KeyError("no"), by="my:scorer")
        "my:scorer raised KeyError: 'no'"
    """
    return short(Secrets.of_process().hide(f"{by} raised {type(error).__name__}: {error}"), 500)


def kind_of(value: Any) -> str:
    """Return the type of a value in words; the value itself may be of any size.

    Args:
        value: any value.

    Examples:
        >>> kind_of(None), kind_of([1]), kind_of(int)
        ('None', 'a value of type list', 'a value of type type')
    """
    return "None" if value is None else f"a value of type {type(value).__name__}"


def checked_outcomes(outcomes: Any, waiting: dict[str, Request]) -> list[tuple[Request, Answer | Failure]]:
    """Validate a list that an engine yielded, and remove its requests from the pending ones.

    Args:
        outcomes: pairs of a request and its outcome.
        waiting: requests that were handed to the engine and are not answered yet, by key; the answered ones are removed.

    Raises:
        TypeError: not a list of pairs.
        ValueError: a request that was not handed to the engine, or that was answered before.
    """
    if not isinstance(outcomes, Iterable):
        raise TypeError(f"an engine must yield lists of (request, answer), not {kind_of(outcomes)}")
    validated = []
    for outcome in outcomes:
        if not isinstance(outcome, Sequence) or len(outcome) != 2 or not isinstance(outcome[0], Request):
            raise TypeError(f"an engine must yield lists of (request, answer), but one contains {kind_of(outcome)}")
        request, value = outcome
        if waiting.pop(request.key, None) is None:
            raise ValueError(f"the engine answered an unknown request, or one request twice: {request.key}")
        validated.append((request, checked(value)))
    return validated
