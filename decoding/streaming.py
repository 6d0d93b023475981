"""Stream the texts of a batch in the order of the prompts."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

__all__ = ["BatchTextStreamer"]

INCOMPLETE = "\ufffd"
"""The character in place of bytes that do not make up a character yet."""


class BatchTextStreamer(BaseStreamer):
    """A streamer for batches: the texts appear one after another, each as early as its place allows.

    transformers' `TextStreamer` supports one prompt. A batch grows in all rows at once, and a terminal shows one text at a
    time: here the first row is shown while it is generated, the text of the next row so far as soon as the first has ended,
    and so on. What is shown in the end does not depend on the times at which rows end.

        model.generate(**inputs, streamer=BatchTextStreamer(tokenizer, ends=[tokenizer.eos_token_id], skip_special_tokens=True))

    A `custom_generate` of this package is given it as its own `streamer`. The pieces of a row add up to the text that the
    tokenizer decodes from all of its tokens; a character of several tokens is held back until it is complete. Beam search
    cannot be streamed.

    Args:
        tokenizer: of the model.
        ends: token ids that end a row. After a row that ends otherwise, by a stop string, the next row appears when the whole
            batch has ended.
        show: called with the row's number, a piece of its text, and whether it is the last piece; None prints to standard
            output.
        skip_prompt: leave the prompts out.
        decode: keyword arguments of the tokenizer's `decode`, such as `skip_special_tokens`.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> prompts = tokenizer(["Ben went out to the barn.", "Mia saw"], return_tensors="pt", padding=True)
        >>> streamer = BatchTextStreamer(tokenizer, ends=[tokenizer.eos_token_id], skip_special_tokens=True)
        >>> _ = model.generate(**prompts, streamer=streamer, max_new_tokens=4, do_sample=False)
        He saw the old
        the heavy bell.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        ends: Collection[int],
        show: Callable[[int, str, bool], Any] | None = None,
        skip_prompt: bool = True,
        **decode: Any,
    ) -> None:
        self._tokenizer, self._ends, self._show = tokenizer, frozenset(ends), show or _print
        self._skip_prompt, self._decode = skip_prompt, decode
        self._reset()

    def _reset(self) -> None:
        self._rows: list[list[int]] = []
        self._ended: list[bool] = []
        self._current = 0  # the row whose text is shown as it grows
        self._shown = _Shown()

    def put(self, value: Tensor) -> None:
        """Receive the prompts `(B, T)`, then the tokens `(B,)` of each step; `generate()` calls this.

        Args:
            value: token ids.
        """
        if not self._rows:
            self._rows = [[] if self._skip_prompt else row for row in value.tolist()]
            self._ended = [False] * len(value)
            return
        for i, token in enumerate(value.tolist()):
            if not self._ended[i]:
                self._rows[i].append(token)
                self._ended[i] = token in self._ends
        self._advance()

    def end(self) -> None:
        """End all rows; `generate()` calls this."""
        self._ended = [True] * len(self._rows)
        self._advance()
        self._reset()

    def _advance(self) -> None:
        """Show what is new of the current row, and go on to the next one where it has ended."""
        while self._current < len(self._rows):
            has_ended = self._ended[self._current]
            piece = self._piece(self._rows[self._current], whole=has_ended)
            if piece or has_ended:
                self._show(self._current, piece, has_ended)
            if not has_ended:
                return
            self._current, self._shown = self._current + 1, _Shown()

    def _piece(self, tokens: list[int], *, whole: bool) -> str:
        """Return the text after what was shown of a row.

        The tokens of the last piece are decoded again before the new ones, so that the new ones have the spaces that they
        have within the text.
        """
        start, end = self._shown
        before = self._tokenizer.decode(tokens[start:end], **self._decode)
        text = self._tokenizer.decode(tokens[start:], **self._decode)
        if len(text) <= len(before) or (text.endswith(INCOMPLETE) and not whole):
            return ""
        self._shown = _Shown(end, len(tokens))
        return str(text[len(before) :])


class _Shown(NamedTuple):
    """The tokens of the last piece that was shown: those from `start` to `end`."""

    start: int = 0
    end: int = 0


def _print(row: int, text: str, is_last: bool) -> None:
    print(text, end="\n" if is_last else "", flush=True)
