"""Run another model on the running sequences of an engine. This module does not import vLLM."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from contralto.common.placement import input_device
from contralto.decoding.branches.padding import KnownTokens
from contralto.decoding.branches.prompts import prepare_images
from contralto.decoding.branches.reader import CachedReader, join_readers

__all__ = ["SequenceReader", "bytes_needed"]


class SequenceReader:
    """A model with a cache of the sequences of the last step, in batches that are joined as the sequences grow.

    Args:
        model: a transformers decoder-only model.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._tokens = model, KnownTokens.of(model)
        self._batches: list[_Batch] = []

    @torch.no_grad()
    def __call__(self, sequences: Sequence[list[int]], size: int) -> Tensor:
        """Return the logits after each sequence.

        Args:
            sequences: token ids; those that add one token to a sequence of the last call reuse its cache.
            size: vocabulary size of the logits.

        Returns:
            `(B, size)`, `-inf` for tokens that the model does not have.
        """
        unchanged, grown = self._reused(sequences)
        reused = {sequence for batch in [*unchanged, *grown] for sequence in batch.sequences}
        new = [sequence for sequence in dict.fromkeys(map(tuple, sequences)) if sequence not in reused]
        self._batches = [*unchanged, *self._grow(grown), *([self._read(new)] if new else [])]
        rows = {s: logits for batch in self._batches for s, logits in zip(batch.sequences, batch.logits, strict=True)}
        logits = torch.stack([rows[tuple(sequence)] for sequence in sequences])
        extra = size - logits.shape[-1]
        return pad(logits, (0, extra), value=-torch.inf) if extra > 0 else logits[:, :size]

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
            index = torch.tensor(rows, device=self.logits.device)
            reader.reorder(index)
            return _Batch([self.sequences[row] for row in rows], reader, self.logits[index])
        return _Batch(list(self.sequences), reader, self.logits)


def bytes_needed(model: Any, tokens: int) -> int:
    """Return the memory that a model takes beside vLLM, in bytes: its weights, and the keys and values of its cache.

    Args:
        model: a transformers model.
        tokens: number of tokens of all running requests, padding included.

    Examples:
        >>> from contralto import testbed
        >>> bytes_needed(testbed.load("amateur"), 0) == 4 * testbed.load("amateur").num_parameters()
        True
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = next(model.parameters()).element_size()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return int(weights + 2 * config.num_hidden_layers * heads * size * tokens * width)
