"""Special tokens where they do not belong: in texts that are rendered again, twice at a beginning or at an end.

Rows that hold text already rendered with a chat template are a common accident. As conversations they are rendered a second time;
as texts they keep their own beginning-of-sequence token, before which most tokenizers put another, and their own end, after which
TRL puts another unless the text ends with that very token.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Specials", "end_tokens", "holds_null", "texts_of"]

TAIL = 4
"""Tokens at the end of a text among which an end of sequence is looked for: templates may close with a line break."""


def end_tokens(model: Any, processing_class: Any) -> set[int]:
    """Return the ids of the tokens that end a text, by the tokenizer or by the generation configuration.

    Args:
        model: of transformers.
        processing_class: its tokenizer or processor.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    said = getattr(model.generation_config, "eos_token_id", None)
    listed = said if isinstance(said, list) else [said]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def texts_of(value: Any) -> Iterator[str]:
    """Yield the texts of messages: their contents, whole or in parts.

    Args:
        value: a list of messages; anything else has none.

    Examples:
        >>> list(texts_of([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]))
        ['What?']
    """
    for message in value if isinstance(value, list) else ():
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


class Specials:
    """The special tokens of a tokenizer, looked for in rows.

    Args:
        tokenizer: of the model.
        ends: ids of the tokens that end a text.
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
            row: with `prompt`, `chosen` and `rejected`; texts that are no messages are not looked at, since they are not rendered.
        """
        return self.first(text for name in ("prompt", "chosen", "rejected") for text in texts_of(row.get(name)))

    def first(self, texts: Iterable[str]) -> str:
        """Return the first special token in texts, or an empty string.

        Args:
            texts: looked at in turn.
        """
        if self._pattern is None:
            return ""
        return next((found.group() for text in texts if (found := self._pattern.search(text))), "")

    def is_outer(self, token: str) -> bool:
        """Whether a token begins or ends whole texts, as only a rendered text holds it.

        Args:
            token: as `in_messages` returned it.
        """
        return token in self._outer

    def begins_twice(self, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Whether the beginning-of-sequence token stands twice at the beginning.

        Args:
            prompt: its ids.
            completion: the ids after it.
        """
        return self._beginning is not None and [*prompt[:2], *completion[:2]][:2] == [self._beginning] * 2

    def ends_twice(self, completion: Sequence[int]) -> bool:
        """Whether one end-of-sequence token stands twice among the last tokens.

        Args:
            completion: its ids.
        """
        tail = list(completion[-TAIL:])
        return any(tail.count(token) > 1 for token in self._ends)


def holds_null(value: Any) -> bool:
    """Whether an object in a value, at any depth, has a key whose value is None.

    Args:
        value: tools, or calls of them.

    Examples:
        >>> holds_null([{"city": "Oslo", "x": None}]), holds_null([{"city": "Oslo"}, None])
        (True, False)
    """
    if isinstance(value, dict):
        return any(each is None or holds_null(each) for each in value.values())
    return isinstance(value, list) and any(map(holds_null, value))
