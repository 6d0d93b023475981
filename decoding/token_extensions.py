"""Find the tokens of an amateur that a text may be inside of, where an expert has written the beginning of their bytes.

The expert writes " token", and the amateur's tokenizer reads one token for it. Had the text gone on with "ization", the amateur might
have taken its single token " tokenization" instead. So its next token after " token" does not tell how likely "ization" is: that is
the probability of " tokenization" one token earlier (token healing; in Phan et al. 2024, arXiv 2410.09303, a sum over the tokens that
cover the end of the text).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from contralto.decoding.byte_tokens import ByteTokens

__all__ = ["Extended", "TokenExtensions"]

MEMO = 4096
"""Number of endings that are remembered."""


class Extended(NamedTuple):
    """Amateur tokens that a text may be inside of."""

    tokens: Tensor
    """`(n,)` int64, their ids."""
    next: Tensor
    """`(n,)` int64, the expert's next token if the text goes on with each of them."""


class TokenExtensions:
    """The amateur's tokens whose bytes are several tokens of the expert, sorted by their bytes.

    Args:
        pieces: ids of the amateur, with their bytes and the expert's tokens of them.
        expert: the tokens of the expert.
    """

    def __init__(self, pieces: Iterable[tuple[int, bytes, list[int]]], expert: ByteTokens) -> None:
        rows = sorted((text, token, parts) for token, text, parts in pieces if len(parts) > 1)
        self._texts = [text for text, _, _ in rows]
        lengths = torch.tensor([0, *(len(parts) for _, _, parts in rows)])
        self._starts = lengths.cumsum(0)
        self._tokens = torch.tensor([token for _, token, _ in rows], dtype=torch.long).repeat_interleave(lengths[1:])
        self._parts = torch.tensor([part for _, _, parts in rows for part in parts], dtype=torch.long)
        self._ends = _ends([parts for _, _, parts in rows], expert.texts)
        self._found: dict[tuple[bytes, int], Extended | None] = {}

    def find(self, text: bytes, last: int) -> Extended | None:
        """Return the amateur tokens that begin with these bytes and go on with a token of the expert.

        Args:
            text: the bytes of the last tokens that the amateur reads.
            last: the last token of the expert, which ends the bytes.

        Returns:
            The tokens; None if there are none.
        """
        key = text, last
        if key not in self._found:
            if len(self._found) >= MEMO:
                self._found.clear()
            self._found[key] = self._search(text, last)
        return self._found[key]

    def _search(self, text: bytes, last: int) -> Extended | None:
        low = bisect_left(self._texts, text)
        high = bisect_right(self._texts, text, low, key=lambda own: own[: len(text)])
        begin, end = int(self._starts[low]), int(self._starts[high])
        own = (self._ends[begin:end] == len(text)) & (self._parts[begin:end] == last)
        at = own.nonzero().flatten() + begin
        at = at[at + 1 < end]
        at = at[self._tokens[at + 1] == self._tokens[at]]
        return Extended(self._tokens[at], self._parts[at + 1]) if len(at) else None


def _ends(rows: list[list[int]], texts: Mapping[int, bytes]) -> Tensor:
    """Return the number of bytes up to the end of each piece, for all rows in turn."""
    ends: list[int] = []
    for parts in rows:
        length = 0
        for part in parts:
            length += len(texts[part])
            ends.append(length)
    return torch.tensor(ends, dtype=torch.long)
