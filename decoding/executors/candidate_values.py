"""Read a critic's values of the candidates for the next token: one forward pass of k tokens per row on a cached prefix.

The candidates are read as contrastive search reads them, as a tree or as replicas, see `search`. The chosen candidate stays in the
cache, so that the next step needs no forward pass of its own.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from contralto.common.placement import input_device
from contralto.decoding.branches.padding import KnownTokens, fit_mask
from contralto.decoding.branches.prefixes import TOLERANCE
from contralto.decoding.branches.values import ValueReader, is_critic, takes_cache, values_of
from contralto.decoding.executors.search_state import CandidateReader, choose_reader

__all__ = ["CandidateValues"]

_VERDICTS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""By critic: whether its first values with a cache were those of a plain forward pass."""


class CandidateValues:
    """The values of candidates under a critic.

    A critic that takes a cache reads the candidates on the cached prefix. Its first values are compared with those of a plain forward
    pass; a critic whose values differ, such as one with bidirectional attention, is read without a cache from then on.

    Args:
        critic: a module that returns `logits` `(R, T, 1)`.
    """

    def __init__(self, critic: Any) -> None:
        self._critic = critic
        self._caches = is_critic(critic) and takes_cache(critic)
        self.reset()

    def reset(self) -> None:
        """Discard the rows of the last call and their cache."""
        self._seen: Tensor | None = None  # the rows of the last call
        self._mask: Tensor | None = None
        self._reader: ValueReader | None = None
        self._candidates: Tensor | None = None  # those that the cache holds
        self._candidate_reader: CandidateReader | None = None

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, candidates: Tensor) -> Tensor:
        """Return the value of each candidate as the next token of its row.

        Args:
            ids: `(B, T)` int64, the rows.
            mask: `(B, T)`, 0 for padding before the rows.
            candidates: `(B, k)` int64.

        Returns:
            Logits `(B, k)`, on the device of `candidates`.

        Raises:
            TypeError: the critic returns one value per row.
            ValueError: a row is longer than the context of the critic, or holds tokens that it does not know.
        """
        if not self._caches or _VERDICTS.get(self._critic) is False:
            return self._plain(ids, mask, candidates)
        device, tokens = input_device(self._critic), KnownTokens.of(self._critic)
        rows, visible = ids.to(device, copy=True), mask.to(device)
        known = tokens.replace(rows, visible)
        asked = _known_candidates(tokens, known[:, -1:], candidates.to(device))
        if not self._continue(rows, visible, known[:, -1:]):
            self._start(known, visible, asked)
        assert self._candidate_reader is not None
        self._seen, self._mask, self._candidates = rows, visible, asked
        values = self._candidate_reader.read(asked).logits[..., 0]
        if self._critic not in _VERDICTS:
            _VERDICTS[self._critic] = self._agrees(known, visible, asked, values)
            if not _VERDICTS[self._critic]:
                self.reset()
                return self._plain(ids, mask, candidates)
        return values.to(candidates.device)

    def _plain(self, ids: Tensor, mask: Tensor, candidates: Tensor) -> Tensor:
        """Return the values `(B, k)` by a forward pass of whole rows, one for each candidate."""
        count = candidates.shape[-1]
        rows = torch.cat([ids.repeat_interleave(count, dim=0), candidates.reshape(-1, 1)], dim=1)
        visible = fit_mask(mask.repeat_interleave(count, dim=0), rows.shape[1])
        return values_of(self._critic, rows, visible)[:, 0].view_as(candidates)

    def _agrees(self, ids: Tensor, mask: Tensor, candidates: Tensor, values: Tensor) -> bool:
        """Return whether the values of the last candidates are those of a plain forward pass."""
        plain = self._plain(ids, mask, candidates[:, -1:])[:, 0].float()
        differences = (plain - values[:, -1].float()).abs() / (1 + plain.abs())
        return bool((differences <= TOLERANCE.get(values.dtype, 5e-2)).all())

    def _start(self, ids: Tensor, mask: Tensor, candidates: Tensor) -> None:
        """Read whole rows."""
        self.reset()
        reader = ValueReader(self._critic)
        reader.begin(ids, mask)
        self._reader, self._candidate_reader = reader, choose_reader(reader, candidates, "auto")

    def _continue(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> bool:
        """Continue the cached rows by their next tokens `(B, 1)`; return False if the rows do not continue them."""
        seen, reader, held = self._seen, self._reader, self._candidates
        if seen is None or reader is None or held is None or ids.shape[1] != seen.shape[1] + 1:
            return False
        assert self._candidate_reader is not None
        assert self._mask is not None
        order = _order(seen, self._mask, ids[:, :-1], mask[:, :-1])
        if order is None:
            return False
        hits = held[order] == tokens  # (B, k)
        in_place = len(order) == len(seen) and torch.equal(order, torch.arange(len(seen), device=order.device))
        if in_place and hits.any(-1).all():
            self._candidate_reader.keep(hits.int().argmax(-1))
            return True
        self._candidate_reader.drop()
        if not in_place:
            reader.reorder(order)
        reader.read(tokens)
        return True


def _known_candidates(tokens: KnownTokens, last: Tensor, candidates: Tensor) -> Tensor:
    """Return candidates `(B, k)` that the critic knows; after the end `(B, 1)` of a row any token may follow."""
    pairs = torch.stack([last.expand_as(candidates), candidates], dim=-1).reshape(-1, 2)
    return tokens.replace(pairs, torch.ones_like(pairs))[:, 1].view_as(candidates)


def _order(seen: Tensor, seen_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor | None:
    """Return for each row `(B, T)` the row of the last call that it equals, `(B,)`; None if it equals none."""
    if seen.shape == ids.shape and torch.equal(seen, ids) and torch.equal(seen_mask, mask):
        return torch.arange(len(ids), device=ids.device)
    places = {key: at for at, key in reversed(list(enumerate(_keys(seen, seen_mask))))}
    rows = [places.get(key, -1) for key in _keys(ids, mask)]
    return None if -1 in rows else torch.tensor(rows, device=ids.device)


def _keys(ids: Tensor, mask: Tensor) -> list[bytes]:
    """Return the tokens and the mask of each row as bytes."""
    return [row.tobytes() for row in torch.cat([ids, mask.to(ids)], dim=1).cpu().numpy()]
