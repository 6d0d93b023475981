"""Find the spans of a completion at which the tokens of two tokenizers begin and end together.

A completion is read as bytes, so that tokens that hold a part of a character are exact, too. What has no counterpart is in no span: special
tokens that only one tokenizer has, and everything after the token that ends the text.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from contralto.decoding.byte_tokens import ByteTokens

__all__ = ["Merge", "Pairing", "Reading", "Spans", "in_order", "read_completion", "same_bytes", "spans_of"]

Run = tuple[range, range]
"""Tokens of student and teacher, by their places in the completion."""
Pairing = Literal["positions", "text"]
Merge = Literal["observed", "bayesian"]
PAIRINGS = ("positions", "text")
"""The first token with the first, and so on; or tokens that stand for the same text."""
MERGES = ("observed", "bayesian")
"""The distribution of a span of several tokens: at its first token, times the probabilities of the later ones; or at its last token,
times those of the earlier ones."""


class Reading(NamedTuple):
    """A completion in the teacher's tokens."""

    ids: list[int]
    """The teacher's tokens."""
    runs: list[Run]
    """The spans, in order."""


class Spans(NamedTuple):
    """The spans of R completions, which have N tokens of the student and M of the teacher."""

    student: Tensor
    """`(S,)` the student's token at which each span's distribution is."""
    teacher: Tensor
    """`(S,)` the same of the teacher."""
    row: Tensor
    """`(S,)` the completion of each span."""
    student_others: Tensor
    """`(2, n)` the student's other tokens of spans, and their spans."""
    teacher_others: Tensor
    """`(2, m)` the same of the teacher."""
    tokens: Tensor
    """`(R,)` the number of the student's tokens that are in a span."""


def same_bytes(own: Sequence[int], other: Sequence[int]) -> list[Run]:
    """Return the shortest runs of tokens of two tokenizers that stand for the same bytes.

    Args:
        own: the number of bytes of each token of one tokenizer.
        other: the same of the other tokenizer, for the same text.

    Returns:
        Runs in order. A token without bytes belongs to the run after it, or to none at the end.

    Examples:
        >>> same_bytes([3, 2, 4], [5, 1, 3])  # the|re|fore and there|f|ore
        [(range(0, 2), range(0, 1)), (range(2, 3), range(1, 3))]
    """
    ends, other_ends = list(accumulate(own)), list(accumulate(other))
    runs, start, other_start = [], 0, 0
    for end in sorted({*ends} & {*other_ends} - {0}):
        stop, other_stop = bisect_left(ends, end) + 1, bisect_left(other_ends, end) + 1
        runs.append((range(start, stop), range(other_start, other_stop)))
        start, other_start = stop, other_stop
    return runs


def in_order(own: int, other: int) -> list[Run]:
    """Return runs of one token each: the first with the first, as far as the shorter completion goes.

    Args:
        own: the number of tokens of one completion.
        other: the number of tokens of the other one.

    Examples:
        >>> in_order(3, 2)
        [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 2))]
    """
    return [(range(i, i + 1), range(i, i + 1)) for i in range(min(own, other))]


def read_completion(
    own: ByteTokens,
    other: ByteTokens,
    ids: Sequence[int],
    *,
    ends: Collection[int],
    end: int | None,
    after_special: tuple[bool, bool] = (False, False),
) -> Reading:
    """Read a completion in the tokens of the teacher.

    Args:
        own: the student's tokenizer.
        other: the teacher's tokenizer.
        ids: the student's tokens of the completion.
        ends: the student's tokens that end a text.
        end: the teacher's token that ends a text, or None.
        after_special: whether the completion follows a special token, for the student and for the teacher. There, some tokenizers put a
            space that is no part of the text.

    Returns:
        The teacher's tokens and the spans. Text that the teacher's tokens cannot spell is in no span.
    """
    names = {at: content for content, at in own.special.items()}
    read, runs = list[int](), list[Run]()
    for part in _parts(own, ids, {*ends}):
        first = ids[part.start]
        if first in own.texts and first not in ends:
            found = _read_text(own, other, [ids[i] for i in part], after_special)
            runs += [(_moved(run, part.start), _moved(of_teacher, len(read))) for run, of_teacher in found.runs]
            read += found.ids
            after_special = False, False
            continue
        token = end if first in ends else other.special.get(names.get(first, ""))
        if token is not None:
            runs.append((part, range(len(read), len(read) + 1)))
            read.append(token)
        elif first not in ends:
            read += other.encode(names.get(first, "").encode())
        if first in ends:
            break
        after_special = True, token is not None
    return Reading(read, runs)


def spans_of(readings: Sequence[Sequence[Run]], lengths: Sequence[tuple[int, int]], merge: Merge) -> Spans:
    """Return the spans of several completions, whose tokens lie one after the other.

    Args:
        readings: the runs of each completion.
        lengths: the number of tokens of student and teacher of each completion.
        merge: see `MERGES`.
    """
    at = 0 if merge == "observed" else -1
    offsets = list(accumulate(lengths, lambda a, b: (a[0] + b[0], a[1] + b[1]), initial=(0, 0)))
    sides: tuple[list[range], list[range]] = ([], [])
    row_of: list[int] = []
    for row, (offset, own) in enumerate(zip(offsets, readings, strict=False)):
        for run in own:
            row_of.append(row)
            for side in (0, 1):
                sides[side].append(_moved(run[side], offset[side]))
    others = [[(token, span) for span, run in enumerate(runs) for token in run if token != run[at]] for runs in sides]
    return Spans(
        student=torch.tensor([run[at] for run in sides[0]], dtype=torch.long),
        teacher=torch.tensor([run[at] for run in sides[1]], dtype=torch.long),
        row=torch.tensor(row_of, dtype=torch.long),
        student_others=torch.tensor(others[0], dtype=torch.long).reshape(-1, 2).T,
        teacher_others=torch.tensor(others[1], dtype=torch.long).reshape(-1, 2).T,
        tokens=torch.tensor([sum(len(run) for run, _ in own) for own in readings], dtype=torch.long),
    )


def _parts(own: ByteTokens, ids: Sequence[int], ends: Collection[int]) -> Iterator[range]:
    """Yield runs of tokens that stand for text, and all other tokens one by one."""
    start = 0
    for i, token in enumerate(ids):
        if token in own.texts and token not in ends:
            continue
        if start < i:
            yield range(start, i)
        yield range(i, i + 1)
        start = i + 1
    if start < len(ids):
        yield range(start, len(ids))


def _read_text(own: ByteTokens, other: ByteTokens, ids: Sequence[int], after_special: tuple[bool, bool]) -> Reading:
    """Read tokens that stand for text; the spaces that the tokenizers put after special tokens have no length."""
    pieces = [own.texts[token] for token in ids]
    if after_special[0] and own.prepends_always:
        pieces[0] = pieces[0].removeprefix(b" ")
    text = b"".join(pieces)
    is_spaced = after_special[1] and other.prepends_always and bool(text)
    read = other.encode(b" " + text if is_spaced else text)
    spelled = [other.texts[token] for token in read]
    if is_spaced:
        spelled[0] = spelled[0].removeprefix(b" ")
    is_exact = b"".join(spelled) == text
    return Reading(read, same_bytes(list(map(len, pieces)), list(map(len, spelled))) if is_exact else [])


def _moved(run: range, by: int) -> range:
    return range(run.start + by, run.stop + by)
