"""Reuse the states of a prompt's beginning in later prompts: few-shot examples, a system message, a question before several answers.

    with reused_prefixes():
        for batch in batches:
            model.generate(**batch, custom_generate=method.loop())

Within the context every branch remembers its last prompts. Rows that begin like one of them take its keys and values, and only the columns
after these are read. The rows keep their layout: padding, then the text. So a row that is shorter than others of its batch reads a part
of the shared beginning again, in columns that are read for the others anyway.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from contralto.decoding.branches.base import model_state
from contralto.decoding.branches.prompts import Prompts

if TYPE_CHECKING:
    from contralto.decoding.branches.reader import CachedReader

__all__ = ["TOLERANCE", "PrefixCaches", "reused_prefixes"]

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest difference between two ways to read the same tokens, relative to the size of the values."""
LEAST = 16
"""The shortest beginning that is reused, in tokens."""
ROWS = 4
"""Rows that are remembered of a model: as many kinds of prompts may alternate, such as prompts and contrast prompts."""
_CURRENT: ContextVar["PrefixCaches | None"] = ContextVar("prefixes", default=None)
_VERDICTS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""By model: whether its first logits after a reused beginning were those of a plain forward pass."""


class _Text(NamedTuple):
    """The text of a row, without padding."""

    codes: Tensor
    """`(1, L)` its tokens, or `(2, L)` with their positions, on the CPU."""
    start: int
    """Number of columns of padding before it."""

    def shared(self, codes: Tensor) -> int:
        """Return the number of first tokens that are those of another text."""
        length = min(codes.shape[1], self.codes.shape[1])
        same = (codes[:, :length] == self.codes[:, :length]).all(0)
        return length if same.all() else int(same.int().argmin())


class _KnownText(NamedTuple):
    """A text that a model has read."""

    codes: Tensor
    """As of `_Text`."""
    states: list[tuple[Tensor, Tensor]]
    """The keys and values `(1, heads, L, head size)` of each layer."""


class PrefixCaches:
    """The last prompts of each model, with their keys and values.

    A beginning is reused only where the states are those of the tokens and positions alone: by decoder-only models with full attention in
    every layer, for prompts of text. Other models (sliding windows, recurrent layers, encoders) and prompts (images) are read as without it. The
    first time that a model reuses a beginning, the logits of a row are compared with those of a plain forward pass; a model whose logits
    differ reads whole prompts from then on.

    Args:
        rows: number of rows that are remembered of a model, at least 1. This bounds the memory: a row holds the keys and values of one
            prompt.

    Attributes:
        tokens: number of tokens of prompts so far, padding included.
        reused: number of those that were not read again.

    Raises:
        ValueError: `rows` below 1.
    """

    def __init__(self, rows: int = ROWS) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, not {rows}")
        self.limit, self.tokens, self.reused = rows, 0, 0
        self._rows: dict[Any, tuple[list[Any], list[_KnownText]]] = {}
        """By model and context: the state of the model's weights, and the rows, the latest first."""

    @classmethod
    def current(cls) -> "PrefixCaches | None":
        """Return those of the surrounding `reused_prefixes`; None outside of it."""
        return _CURRENT.get()

    @staticmethod
    def supports(model: Any) -> bool:
        """Return whether a model's states after a prompt can be cut to a beginning of it.

        Args:
            model: a transformers model.
        """
        if model.config.is_encoder_decoder or _VERDICTS.get(model) is False:
            return False
        # A cache without layers is made by the model layer by layer, of full attention.
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        return all(type(layer) is DynamicLayer for layer in layers)

    def prefill(self, reader: "CachedReader", prompts: Prompts, *, keep: int = 1, unread: Tensor | int = 0) -> Tensor:
        """Read prompts, but for the beginning that all rows share with remembered ones or with each other.

        Args:
            reader: whose cache is filled.
            prompts: `(R, T)` token ids with the inputs that belong to them.
            keep: see `CachedReader.prefill`.
            unread: see `CachedReader.prefill`.

        Returns:
            Logits `(R, keep, V)`.
        """
        texts = _texts(prompts) if _is_supported(reader, prompts) else None
        if texts is None:
            return reader.prefill_from(prompts, keep=keep, unread=unread)
        former = self._remembered(reader)
        found = [_longest(text, former) for text in texts]
        matches = [row if shared >= LEAST else None for row, shared in found]
        groups = [] if all(matches) else _groups(texts, matches)
        columns = _columns(texts, [shared for _, shared in found], groups, prompts.ids.shape[1] - keep)
        cache = None
        if columns:
            rows = _with_groups(reader, prompts, texts, matches, groups)
            columns *= _agrees(reader, prompts, texts, rows, columns)
            cache = _filled(rows, texts, columns) if columns else None
        logits = reader.prefill_from(prompts, cache=cache, known=columns, keep=keep, unread=unread)
        self.tokens += prompts.ids.numel()
        self.reused += columns * len(texts)
        self._remember(reader, texts, matches if columns else [None] * len(texts))
        return logits

    def _remembered(self, reader: "CachedReader") -> list[_KnownText]:
        """Return the rows that the model has read in its present state, and forget others."""
        state, (former, rows) = model_state(reader.model), self._rows.get(_key(reader), (None, []))
        rows = rows if former == state else []
        self._rows[_key(reader)] = state, rows
        return rows

    def _remember(self, reader: "CachedReader", texts: Sequence[_Text], matches: Sequence[_KnownText | None]) -> None:
        """Keep the last row of each kind, in place of the remembered row that it continues."""
        state, rows = self._rows[_key(reader)]
        last = {id(match): (match, row) for row, match in enumerate(matches)}
        new = [_copied(reader.cache, row, texts[row]) for _, row in last.values()]
        rest = [row for row in rows if id(row) not in last]
        self._rows[_key(reader)] = state, [*(row for row in new if row is not None), *rest][: self.limit]


@contextmanager
def reused_prefixes(rows: int = ROWS) -> Iterator[PrefixCaches]:
    """Reuse the beginnings of prompts in all branches of this thread, until the context ends and frees what is remembered.

    The logits are those of whole prompts but for rounding.

    Args:
        rows: see `PrefixCaches`.

    Yields:
        The caches, which count the tokens that were not read again.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> from contralto.decoding.branches import reused_prefixes
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> method = ContrastiveDecodingLogitsProcessor(testbed.load("amateur"))
        >>> with reused_prefixes() as caches:
        ...     for end in ("Ben went", "Ben saw a"):
        ...         prompt = tokenizer("Anna went out to the barn. Tom went out to the pond. " * 2 + end, return_tensors="pt")
        ...         text = model.generate(**prompt, custom_generate=method.loop(), max_new_tokens=4)
        >>> caches.reused > caches.tokens / 4
        True
    """
    caches = PrefixCaches(rows)
    token = _CURRENT.set(caches)
    try:
        yield caches
    finally:
        _CURRENT.reset(token)


def _key(reader: "CachedReader") -> tuple[Any, Callable[[], Any]]:
    return reader.model, reader.context


def _is_supported(reader: "CachedReader", prompts: Prompts) -> bool:
    """Return whether a model's states are those of tokens and positions alone, and prompts have no other inputs."""
    variant = getattr(reader.context, "__self__", None)
    if reader.is_variation or not (reader.context is nullcontext or getattr(variant, "reads_alike", False)):
        return False
    names = {name for name, value in prompts.kwargs.items() if value is not None}
    positions = prompts.kwargs.get("position_ids")
    if names - {"attention_mask", "position_ids"} or not (positions is None or positions.shape == prompts.ids.shape):
        return False
    return PrefixCaches.supports(reader.model)


def _texts(prompts: Prompts) -> list[_Text] | None:
    """Return the texts of the rows; None if they are not padded on the left."""
    ids, mask = prompts.ids.cpu(), prompts.kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask.cpu()
    if mask.shape != ids.shape or (mask[:, 1:] < mask[:, :-1]).any():
        return None
    positions = prompts.kwargs.get("position_ids")
    codes = torch.stack([ids] if positions is None else [ids, positions.cpu()])  # (1 or 2, R, T)
    starts = (mask == 0).sum(-1).tolist()
    return [_Text(codes[:, row, start:], start) for row, start in enumerate(starts)]


def _longest(text: _Text, rows: Sequence[_KnownText]) -> tuple[_KnownText | None, int]:
    """Return the remembered row that shares most of a text, with the number of tokens."""
    found = [(row, text.shared(row.codes)) for row in rows]
    return max(found, key=lambda each: each[1], default=(None, 0))


def _groups(texts: Sequence[_Text], rows: Sequence[_KnownText | None]) -> list[tuple[list[int], int]]:
    """Return the rows that share a beginning with each other, and its length, of those without a remembered one."""
    groups, left = [], [row for row, known in enumerate(rows) if known is None]
    while left:
        first, *rest = left
        shared = {row: texts[first].shared(texts[row].codes) for row in rest}
        others = [row for row in rest if shared[row] >= LEAST]
        if others:
            groups.append(([first, *others], min(shared[row] for row in others)))
        left = [row for row in rest if row not in others]
    return groups


def _columns(texts: Sequence[_Text], shared: Sequence[int], groups: Sequence[tuple[list[int], int]], most: int) -> int:
    """Return the number of first columns that need not be read; 0 if reading the beginnings of groups would cost more."""
    lengths = list(shared)
    for rows, length in groups:
        for row in rows:
            lengths[row] = length
    columns = min([most, *(text.start + length for text, length in zip(texts, lengths, strict=True))])
    cost = sum(length for _, length in groups)
    return columns if columns >= LEAST and columns * len(texts) > cost else 0


def _with_groups(
    reader: "CachedReader",
    prompts: Prompts,
    texts: Sequence[_Text],
    rows: Sequence[_KnownText | None],
    groups: Sequence[tuple[list[int], int]],
) -> list[_KnownText | None]:
    """Read the beginning of each group once, and return the rows with it."""
    found = list(rows)
    for members, length in groups:
        first, text = members[0], texts[members[0]]
        one = reader.alike()
        one.prefill_from(_part(prompts, first, text.start, text.start + length))
        beginning = _copied(one.cache, 0, _Text(text.codes[:, :length], 0))
        if beginning is None:  # the model keeps its states in another way than its configuration says
            _VERDICTS[reader.model] = False
        for row in members:
            found[row] = beginning
    return found


def _part(prompts: Prompts, row: int, start: int, end: int | None = None) -> Prompts:
    """Return a part of one row as prompts of their own."""
    kwargs = {n: None if value is None else value[row : row + 1, start:end] for n, value in prompts.kwargs.items()}
    return Prompts(prompts.ids[row : row + 1, start:end], kwargs)


def _agrees(
    reader: "CachedReader", prompts: Prompts, texts: Sequence[_Text], rows: Sequence[_KnownText | None], columns: int
) -> bool:
    """Return whether the logits after a reused beginning are those of a plain forward pass, from the longest row."""
    if reader.model not in _VERDICTS:
        row = min(range(len(texts)), key=lambda each: texts[each].start)
        one, known = _part(prompts, row, texts[row].start), columns - texts[row].start
        plain = reader.alike().prefill_from(one).double()
        reused = reader.alike().prefill_from(
            one, cache=_filled([rows[row]], [texts[row]._replace(start=0)], known), known=known
        )
        differences = (plain - reused.double()).abs() / (1 + plain.abs())
        _VERDICTS[reader.model] = bool((differences <= TOLERANCE.get(reused.dtype, 5e-2)).all())
    return _VERDICTS[reader.model]


def _filled(rows: Sequence[_KnownText | None], texts: Sequence[_Text], columns: int) -> DynamicCache:
    """Return a cache with the first columns of each row: zeros for its padding, then the states of its beginning."""
    states = next(row for row in rows if row is not None).states
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(states):
        both = [state.new_zeros(len(rows), state.shape[1], columns, state.shape[3]) for state in (keys, values)]
        for at, (row, text) in enumerate(zip(rows, texts, strict=True)):
            if text.start < columns:
                assert row is not None, "rows without a beginning are padding in all columns that are reused"
                for filled, known in zip(both, row.states[layer], strict=True):
                    filled[at, :, text.start :] = known[0, :, : columns - text.start]
        cache.update(both[0], both[1], layer)
    return cache


def _copied(cache: Any, row: int, text: _Text) -> _KnownText | None:
    """Copy the states of a text from a cache that holds it; None if a layer that ran does not hold all of its tokens."""
    width = text.start + text.codes.shape[1]
    layers: list[Any] = list(cache.layers) if type(cache) is DynamicCache else []
    if any(type(layer) is not DynamicLayer for layer in layers):
        return None
    ran = [layer for layer in layers if layer.is_initialized]  # the others are those that an early exit leaves out
    pairs = [(layer.keys, layer.values) for layer in ran]
    if not ran or ran != layers[: len(ran)] or any(each.ndim != 4 or each.shape[2] != width for each in chain(*pairs)):
        return None
    copies = [[each[row : row + 1, :, text.start :].clone() for each in pair] for pair in pairs]
    return _KnownText(text.codes, [(keys, values) for keys, values in copies])
