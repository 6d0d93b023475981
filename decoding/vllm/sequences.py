"""Run another model on the running sequences of an engine. This module does not import vLLM."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from contralto.common.placement import input_device
from contralto.decoding.branches.padding import KnownTokens
from contralto.decoding.branches.prompts import prepare_images
from contralto.decoding.branches.reader import CachedReader, join_readers

__all__ = ["SequenceReader", "token_bytes", "weight_bytes"]


class SequenceReader:
    """A model with a cache of the sequences of the last step, in batches that are joined as the sequences grow.

    Args:
        model: a transformers decoder-only model.
        most: largest number of tokens, padding included, that the cache holds, at least those of the longest sequence; None for no
            limit. Sequences beyond it are read from their beginning in every step, one after the other.
        warn: called with a sentence when this happens for the first time.
    """

    def __init__(self, model: Any, *, most: int | None = None, warn: Callable[[str], Any] = warnings.warn) -> None:
        self._model, self._tokens = model, KnownTokens.of(model)
        self._batches: list[_Batch] = []
        self._most, self._warn, self._is_full = most, warn, False

    @torch.no_grad()
    def __call__(self, sequences: Sequence[list[int]], size: int) -> Tensor:
        """Return the logits after each sequence.

        Args:
            sequences: token ids; those that add one token to a sequence of the last call reuse its cache.
            size: vocabulary size of the logits.

        Returns:
            `(B, size)`, `-inf` for tokens that the model does not have.
        """
        wanted = list(dict.fromkeys(map(tuple, sequences)))
        room = self._room(wanted)
        unchanged, grown = self._reused(sequences)
        unchanged = _first(unchanged, room)
        grown = _first(grown, room - _count(unchanged))
        reused = {sequence for batch in [*unchanged, *grown] for sequence in batch.sequences}
        new = [sequence for sequence in wanted if sequence not in reused]
        kept, passing = new[: room - len(reused)], new[room - len(reused) :]
        self._batches = [*unchanged, *self._grow(grown), *([self._read(kept)] if kept else [])]
        rows = {s: logits for batch in self._batches for s, logits in zip(batch.sequences, batch.logits, strict=True)}
        rows |= {sequence: self._read([sequence]).logits[0] for sequence in passing}
        logits = torch.stack([rows[tuple(sequence)] for sequence in sequences])
        extra = size - logits.shape[-1]
        return pad(logits, (0, extra), value=-torch.inf) if extra > 0 else logits[:, :size]

    def _room(self, wanted: Sequence[tuple[int, ...]]) -> int:
        """Return the number of sequences that are cached: all of them, or as many as fit beside one that is only read."""
        longest = max(map(len, wanted))
        if self._most is None or len(wanted) * longest <= self._most:
            return len(wanted)
        room = max(self._most // longest - 1, 0)
        if not self._is_full:
            self._is_full = True
            self._warn(
                f"{len(wanted)} sequences of up to {longest} tokens do not fit the {self._most} tokens of the cache: "
                f"{len(wanted) - room} of them are read from their beginning in every step, which is slow"
            )
        return room

    def _reused(self, sequences: Sequence[list[int]]) -> tuple[list["_Batch"], list["_Batch"]]:
        """Return the cached sequences that are unchanged, and those with one token more, which the model has not read yet."""
        unchanged, grown, wanted = [], [], {tuple(sequence) for sequence in sequences}
        longer: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for sequence in wanted:
            longer.setdefault(sequence[:-1], []).append(sequence)
        for batch in self._batches:
            same = [row for row, sequence in enumerate(batch.sequences) if sequence in wanted]
            rows = {row: longer[s] for row, s in enumerate(batch.sequences) if s in longer and row not in same}
            if same:
                unchanged.append(batch.select(same, copy=bool(rows)))
            if rows:
                selected = batch.select([row for row, group in rows.items() for _ in group])
                selected.sequences = [sequence for group in rows.values() for sequence in group]
                grown.append(selected)
        return unchanged, grown

    def _grow(self, batches: list["_Batch"]) -> list["_Batch"]:
        """Read the last tokens of sequences whose other tokens are cached, in one batch if the caches can be joined."""
        if not batches:
            return []
        sequences = [sequence for batch in batches for sequence in batch.sequences]
        reader = batches[0].reader
        if not join_readers([batch.reader for batch in batches]):
            return [self._read(sequences)]
        ids = self._known(torch.tensor([[sequence[-1]] for sequence in sequences]))
        return [_Batch(sequences, reader, reader.read(ids)[:, -1])]

    def _read(self, sequences: list[tuple[int, ...]]) -> "_Batch":
        """Read sequences from their beginning, padded on the left."""
        width = max(map(len, sequences))
        ids = torch.tensor([[0] * (width - len(sequence)) + list(sequence) for sequence in sequences])
        lengths = torch.tensor([[len(sequence)] for sequence in sequences])
        mask = (torch.arange(width) >= width - lengths).long().to(input_device(self._model))
        reader = CachedReader(self._model)
        prompts = prepare_images(self._model, self._known(ids, mask), {"attention_mask": mask}, len(ids))
        return _Batch(sequences, reader, reader.prefill(prompts)[:, -1])

    def _known(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return tokens `(B, T)` on the model's device, with ids outside its vocabulary replaced."""
        ids = ids.to(input_device(self._model))
        return self._tokens.replace(ids, torch.ones_like(ids) if mask is None else mask)


class _Batch:
    """Sequences that share a cache, with the next-token logits `(B, V)` of each."""

    def __init__(self, sequences: list[tuple[int, ...]], reader: CachedReader, logits: Tensor) -> None:
        self.sequences, self.reader, self.logits = sequences, reader, logits

    def select(self, rows: list[int], *, copy: bool = False) -> "_Batch":
        """Return some of the rows; the cache is changed in place unless a copy is needed."""
        reader = self.reader.fork() if copy else self.reader
        if copy or rows != list(range(len(self.sequences))):
            index, sequences = torch.tensor(rows, device=self.logits.device), [self.sequences[row] for row in rows]
            reader.reorder(index)
            reader.trim(reader.length - max(map(len, sequences)))
            return _Batch(sequences, reader, self.logits[index])
        return _Batch(list(self.sequences), reader, self.logits)


def _count(batches: Sequence[_Batch]) -> int:
    return sum(len(batch.sequences) for batch in batches)


def _first(batches: Sequence[_Batch], count: int) -> list[_Batch]:
    """Return the first `count` rows of batches."""
    first = []
    for batch in batches:
        rows = min(len(batch.sequences), count)
        if rows:
            first.append(batch if rows == len(batch.sequences) else batch.select(list(range(rows))))
        count -= rows
    return first


def weight_bytes(model: Any) -> int:
    """Return the size of a model's weights in bytes.

    Args:
        model: a transformers model.

    Examples:
        >>> from contralto import testbed
        >>> weight_bytes(testbed.load("amateur")) == 4 * testbed.load("amateur").num_parameters()
        True
    """
    return sum(p.numel() * p.element_size() for p in model.parameters())


def token_bytes(model: Any) -> int:
    """Return the size of a token in a model's cache in bytes: `2 * layers * key-value heads * head size` numbers.

    Args:
        model: a transformers model.

    Examples:
        >>> from contralto import testbed
        >>> token_bytes(testbed.load("amateur"))
        256
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * next(model.parameters()).element_size())
