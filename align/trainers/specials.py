"""Find misplaced special tokens: in prompts that will be rendered again, or repeated at the beginning or the end.

Rows that hold text already rendered with a chat template are a common accident. As conversations they are rendered a second time; as
plain text they keep their own beginning-of-sequence token, before which most tokenizers put another, and their own end-of-sequence token,
after which TRL puts another unless the text ends with that very token.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["SpecialTokens", "contains_none", "end_tokens", "message_texts"]

TAIL = 4
"""Tokens at the end among which an end-of-sequence token is looked for: chat templates may close with a line break."""


def end_tokens(model: Any, processing_class: Any) -> set[int]:
    """Return the ids of the end-of-sequence tokens of the tokenizer and of the generation configuration.

    Args:
        model: a model of transformers.
        processing_class: its tokenizer or processor.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def message_texts(value: Any) -> Iterator[str]:
    """Yield the text of messages, of contents that are strings or lists of parts.

    Args:
        value: a list of messages; anything else has none.

    Examples:
        >>> list(message_texts([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]))
        ['What?']
    """
    for message in value if isinstance(value, list) else ():
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


class SpecialTokens:
    """The special tokens of a tokenizer, with methods that find them in rows.

    Args:
        tokenizer: the tokenizer of the model.
        ends: ids of end-of-sequence tokens.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        names = {str(token) for token in tokenizer.all_special_tokens} | {str(each) for each in added if each.special}
        longest_first = sorted((name for name in names if name.strip()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._beginning, self._ends = tokenizer.bos_token_id, frozenset(ends)
        outer = [token for token in (self._beginning, *sorted(self._ends)) if token is not None]
        self._outer = set(tokenizer.convert_ids_to_tokens(outer))

    def in_messages(self, row: Mapping[str, Any]) -> str:
        """Return the first special token in the messages of a row, or an empty string.

        Args:
            row: a row with `prompt`, `chosen` and `rejected`; strings are not searched, since no chat template renders them.
        """
        return self.first(text for name in ("prompt", "chosen", "rejected") for text in message_texts(row.get(name)))

    def first(self, texts: Iterable[str]) -> str:
        """Return the first special token in strings, or an empty string.

        Args:
            texts: the strings, in order.
        """
        if self._pattern is None:
            return ""
        return next((found.group() for text in texts if (found := self._pattern.search(text))), "")

    def is_outer(self, token: str) -> bool:
        """Return whether a token begins or ends whole sequences, so that text which holds it has been rendered.

        Args:
            token: a result of `in_messages`.
        """
        return token in self._outer

    def begins_twice(self, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Return whether a sequence begins with two beginning-of-sequence tokens.

        Args:
            prompt: ids of the prompt.
            completion: ids of the completion.
        """
        return self._beginning is not None and [*prompt[:2], *completion[:2]][:2] == [self._beginning] * 2

    def ends_twice(self, completion: Sequence[int]) -> bool:
        """Return whether an end-of-sequence token stands twice among the last tokens.

        Args:
            completion: ids of the completion.
        """
        tail = list(completion[-TAIL:])
        return any(tail.count(token) > 1 for token in self._ends)


def contains_none(value: Any) -> bool:
    """Return whether a nested value contains a mapping with a key whose value is None.

    Args:
        value: tools, or tool calls.

    Examples:
        >>> contains_none([{"city": "Oslo", "x": None}]), contains_none([{"city": "Oslo"}, None])
        (True, False)
    """
    if isinstance(value, dict):
        return any(each is None or contains_none(each) for each in value.values())
    return isinstance(value, list) and any(map(contains_none, value))
