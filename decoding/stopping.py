"""Stop strings for any vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

__all__ = ["StopStrings"]

MARGIN = 8
"""Tokens besides those of the string: it may begin and end within tokens."""


class StopStrings(StoppingCriteria):
    """Ends a row where one of `strings` is in what was generated; the prompt does not count.

    It looks at the last tokens, as many as the longest string has bytes and a few more, which no spelling of it exceeds.
    transformers' own `StopStringCriteria` does not read word-level vocabularies.

    Args:
        tokenizer: of the model.
        strings: what ends a row, at least one.
        start: how many tokens of the rows are the prompt's.
        skip_special_tokens: whether special tokens are left out of the text, as in a finished answer; then no string can name one.

    Example:
        >>> from contralto import testbed
        >>> from contralto.names import from_pretrained
        >>> from transformers import AutoTokenizer
        >>> tokenizer = from_pretrained(AutoTokenizer, "testbed:expert")
        >>> ids = tokenizer(["3 + 4", "3 - 4"], return_tensors="pt").input_ids
        >>> StopStrings(tokenizer, ["+"], 0)(ids, None).tolist()
        [True, False]
    """

    def __init__(
        self, tokenizer: Any, strings: Sequence[str], start: int, *, skip_special_tokens: bool = False
    ) -> None:
        self._tokenizer, self._strings, self._start = tokenizer, strings, start
        self._skip = skip_special_tokens
        self._reach = max(len(text.encode()) for text in strings) + MARGIN

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tail = input_ids[:, self._start :][:, -self._reach :]
        texts = self._tokenizer.batch_decode(tail, skip_special_tokens=self._skip)
        return torch.tensor([any(s in text for s in self._strings) for text in texts], device=input_ids.device)
