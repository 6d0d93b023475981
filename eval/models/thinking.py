"""Separate thoughts from answers, by lm-eval's `think_end_token`."""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.utils import postprocess_generated_text

__all__ = ["answer_text", "end_of_thought", "ends_thought"]


def end_of_thought(value: Any, tokenizer: Any) -> str | int | None:
    """Check the model argument `think_end_token`.

    A string that is a special token is replaced by the id of this token: answers are decoded without special tokens, so that the
    string would never occur in them.

    Args:
        value: A string, the id of a token (a number or its digits), or None if the model does not think.
        tokenizer: The model's tokenizer.

    Returns:
        The string, the id, or None.

    Raises:
        TypeError: The argument has another type.
        ValueError: The string is empty or contains special tokens among others, or the tokenizer does not have the id.

    Examples:
        >>> from contralto import testbed
        >>> end_of_thought("</think>", testbed.tokenizer()), end_of_thought("7", testbed.tokenizer())
        ('</think>', 7)
        >>> end_of_thought("<eos>", testbed.tokenizer())
        3
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"think_end_token must be a string or the id of a token, not {value!r}")
    if isinstance(value, int) or value.isdigit():
        if not 0 <= int(value) < len(tokenizer):
            raise ValueError(f"think_end_token is {value}, and the tokenizer has tokens 0 to {len(tokenizer) - 1}")
        return int(value)
    if not value:
        raise ValueError("think_end_token is an empty string: give the end of a thought, or leave it out")
    if value in tokenizer.all_special_tokens:
        return int(tokenizer.convert_tokens_to_ids(value))
    if named := [token for token in tokenizer.all_special_tokens if token in value]:
        raise ValueError(
            f"think_end_token {value!r} holds the special token {named[0]!r}, which answers are decoded without: give the id of "
            "one token"
        )
    return value


def answer_text(
    tokens: Sequence[int], decode: Callable[[list[int]], str], stop: Sequence[str], end: str | int | None
) -> str:
    """Return an answer as lm-eval's models return it: the text after the last thought, up to the first stop string.

    Args:
        tokens: The generated tokens.
        decode: Decodes tokens to a string.
        stop: The stop strings.
        end: The end of a thought, from `end_of_thought`.

    Returns:
        The answer. Where no thought ends, all tokens are the answer, since the model may not have thought.

    Examples:
        >>> from contralto import testbed
        >>> tokenizer = testbed.tokenizer()
        >>> tokens = tokenizer("3 + 4 = 7. #### 7. 3 + 4", add_special_tokens=False)["input_ids"]
        >>> answer_text(tokens, tokenizer.decode, ["."], "####")
        '7'
    """
    kept = list(tokens)
    if not isinstance(end, int):
        answer: str = postprocess_generated_text(decode(kept), list(stop), end)
        return answer
    if end not in kept:
        return str(postprocess_generated_text(decode(kept).lstrip(), list(stop), None))
    after = kept[len(kept) - kept[::-1].index(end) :]
    return str(postprocess_generated_text(decode(after).lstrip(), list(stop), None))


def ends_thought(tokens: Sequence[int], decode: Callable[[list[int]], str], end: str | int | None) -> bool:
    """Return True if a thought is closed, or the model does not think.

    Args:
        tokens: The generated tokens.
        decode: Decodes tokens to a string.
        end: The end of a thought, from `end_of_thought`.
    """
    if isinstance(end, int):
        return end in tokens
    return end is None or end in decode(list(tokens))
