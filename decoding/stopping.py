"""Stop generation at strings, also for models that generate a thought before the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

__all__ = ["StopStrings", "StopStringsAfterThought"]

MARGIN = 8
"""Number of tokens to look at besides those of the string, which may begin and end within tokens."""


class StopStrings(StoppingCriteria):
    """End a row where one of `strings` occurs in the generated text, not in the prompt.

    The last tokens are decoded, as many as the longest string has bytes and a few more, which no tokenization of it exceeds.
    transformers' own `StopStringCriteria` does not support word-level vocabularies.

    Args:
        tokenizer: the model's tokenizer.
        strings: the strings that end a row, at least one.
        start: number of tokens of the prompts.
        skip_special_tokens: whether special tokens are left out of the text, as in a finished answer; then no string can contain one.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.common.hub import from_pretrained
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
        """Return the rows that end; `generate()` calls this.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: not used.
            kwargs: not used.

        Returns:
            `(B,)` bool.
        """
        tail = input_ids[:, self._start :][:, -self._reach :]
        texts = self._tokenizer.batch_decode(tail, skip_special_tokens=self._skip)
        return torch.tensor([any(s in text for s in self._strings) for text in texts], device=input_ids.device)


class StopStringsAfterThought(StopStrings):
    """End a row where one of `strings` occurs in its answer, which begins after the end of its thought.

    Stop strings within the thought are ignored, and so is the white space between the thought and the answer. A thought that the
    prompt itself closes, as chat templates do to switch thinking off, has ended from the start. Where several thoughts end, the
    answer is the text after the last one.

    Args:
        tokenizer: the model's tokenizer.
        strings: the strings that end a row, at least one.
        start: number of tokens of the prompts.
        end: the end of a thought, such as `"</think>"`, or the id of its token.

    Examples:
        >>> from contralto import testbed
        >>> tokenizer = testbed.tokenizer()
        >>> texts = ["3 + 4 = 7 . 3 + 4", "3 + 4 = 7 . 3 - 4"]
        >>> rows = tokenizer(texts, return_tensors="pt", add_special_tokens=False)["input_ids"]
        >>> StopStringsAfterThought(tokenizer, ["+"], 0, end="=")(rows, None).tolist()
        [True, False]
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], start: int, *, end: str | int) -> None:
        super().__init__(tokenizer, strings, start)
        self._end = end
        self._reach = max(self._reach, len(str(end).encode()) + MARGIN)
        self._rows: Tensor | None = None
        self._states: list[_State] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return the rows that end; `generate()` calls this.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: not used.
            kwargs: not used.

        Returns:
            `(B,)` bool.
        """
        rows = input_ids[:, self._start :]
        known = 0 if self._rows is None else self._rows.shape[1]
        if self._rows is None or not torch.equal(rows[:, :known], self._rows):  # another text, or reordered beams
            known, self._states = 0, [self._begin(row) for row in input_ids[:, : self._start].tolist()]
        self._rows = rows
        answers = [self._answer(*row, known) for row in zip(rows.tolist(), self._states, strict=True)]
        over = [any(string in answer for string in self._strings) for answer in answers]
        return torch.tensor(over, device=input_ids.device)

    def _begin(self, prompt: list[int]) -> "_State":
        """Return the state after a prompt; if the prompt closes its thought, its end is decoded with the row."""
        tail = prompt[-self._reach :]
        ends, text = self._after(tail)
        return _State(tail if ends and not text else [])

    def _answer(self, row: list[int], state: "_State", known: int) -> str:
        """Return the answer so far, or only its last tokens if it is long; "" within the thought."""
        tokens, recent = state.before + row, max(len(state.before) + known - self._reach, 0)
        inside = state.answer is not None and recent >= state.answer
        start = recent if inside or state.begin is None else state.begin
        ends, text = self._after(tokens[start:])
        if not ends:
            return self._tokenizer.decode(tokens[start:]) if inside else ""
        if (start, ends) != (state.begin, state.ends):  # a thought has ended just now
            state.begin, state.ends, state.answer = start, ends, None
        if state.answer is None and text:
            state.answer = len(tokens)
        return text

    def _after(self, tokens: list[int]) -> tuple[int, str]:
        """Return the number of thoughts that end in the tokens, and the text after the last end."""
        if isinstance(self._end, str):
            text = self._tokenizer.decode(tokens)
            return text.count(self._end), text.rpartition(self._end)[2].lstrip()
        ends = tokens.count(self._end)
        last = len(tokens) - tokens[::-1].index(self._end) if ends else 0
        return ends, self._tokenizer.decode(tokens[last:]).lstrip()


@dataclass
class _State:
    """The state of a row; positions count the tokens from the beginning of `before`."""

    before: list[int]
    """The end of the prompt if a thought ends there, else nothing."""
    begin: int | None = None
    """The position from which the last end of a thought was decoded; None within the first thought."""
    ends: int = 0
    """The number of ends decoded from there."""
    answer: int | None = None
    """The position from which all tokens belong to the answer; None before its first character."""
