"""The rounds of speculative decoding: draft tokens with the amateur, verify them with the expert."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.decoding.branches.layer import LayerReader
from contralto.decoding.branches.prompts import Prompts
from contralto.decoding.branches.reader import CachedReader
from contralto.decoding.executors.drafting import CopyLength, Drafter, DraftLength, look_up
from contralto.decoding.executors.generation import Generation
from contralto.decoding.processors.base import ContrastiveLogitsProcessor
from contralto.decoding.validity import check_logits
from contralto.decoding.vocabulary import fit_vocabulary

__all__ = ["RowReader", "SpeculativeRounds", "Statistics"]


@dataclass
class Statistics:
    """The statistics of a call. A position is a column of the batch: a draft is accepted if it is accepted in all rows."""

    rounds: int = 0
    drafted: int = 0
    """Number of positions that the amateur drafted."""
    accepted: int = 0
    """Number of drafted positions that were accepted."""
    expert_forwards: int = 0
    amateur_forwards: int = 0
    tokens: int = 0
    """Number of tokens generated, over all rows."""
    agreement: float = 0.0
    """Sum over these tokens of the probability that a draft in their place is accepted; 0 where a gate has left the amateur out."""

    @property
    def acceptance(self) -> float:
        """Return the paper's lambda: the mean probability that a draft token is accepted, over all positions."""
        return self.agreement / max(self.tokens, 1)


class RowReader:
    """A cached reader that takes whole rows, runs on their new tokens, and can return to an earlier length.

    Args:
        reader: of the model.
        prompts: the prompts as the model reads them, with an empty cache.
        hidden: number of first columns of the rows that the model does not read.
        prepare: returns the rows as the model reads them, from the rows `(B, T)` and the finished ones `(B,)`.
    """

    def __init__(
        self,
        reader: CachedReader,
        prompts: Prompts,
        *,
        hidden: int = 0,
        prepare: Callable[[Tensor, Tensor], Tensor] = lambda ids, finished: ids,
    ) -> None:
        self.reader, self.forwards = reader, 0
        self._prompts, self._hidden, self._prepare = prompts, hidden, prepare

    @property
    def length(self) -> int:
        """Return the number of columns in the cache; 0 before the first call."""
        return self.reader.length and self.reader.length + self._hidden

    def read(self, ids: Tensor, finished: Tensor, *, along: bool = False) -> Tensor:
        """Read the new columns of the rows.

        Args:
            ids: `(B, T)` int64, at first the prompts.
            finished: `(B,)` bool, the rows that have ended.
            along: return the logits of early layers, too, behind the model's own, as a `LayerReader` does.

        Returns:
            `(B, new, V)` float32 logits, on the device of `ids`; only those of the last position for the prompts.
        """
        rows = self._prepare(ids, finished)[:, self._hidden :]
        if isinstance(self.reader, LayerReader):
            self.reader.reads_layers = along
        logits = None
        if not self.length:
            logits = self.reader.prefill(self._prompts)
            self.reader.record_past()  # not before, or sliding windows would keep the whole prompt
            self.forwards += 1
        if ids.shape[1] > self.length:
            logits = self.reader.read(rows, new=ids.shape[1] - self.length)
            self.forwards += 1
        assert logits is not None
        return logits.to(device=ids.device, dtype=torch.float32)

    def forget(self, length: int) -> None:
        """Crop the cache to at most `length` columns."""
        if self.length:
            self.reader.crop(min(length, self.length) - self._hidden)


class _Place(NamedTuple):
    """The amateur's distribution for one position."""

    logits: Tensor
    """`(B, V)`."""
    proposal: Tensor
    """`(B, V)` probabilities, see `Drafter.proposal`."""
    confidences: Tensor
    """`(B,)` the largest of them."""
    matches: Tensor | None = None
    """`(B,)` where drafts are copies of earlier passages, see `Passage.match`; None where they are draws from the amateur."""


class _Copies(NamedTuple):
    """Passages that all unfinished rows could copy."""

    tokens: Tensor
    """`(B, n)`."""
    matches: Tensor
    """`(B,)`, see `Passage.match`."""


class SpeculativeRounds:
    """One call of `generate()`: rounds of drafting and verifying.

    Args:
        generation: the rows.
        expert: reader of the model that generates.
        amateur: reader of the amateur.
        vocabulary: size of the expert's vocabulary.
        drafter: draws the drafts.
        draft_length: decides how many tokens the amateur drafts.
        copy_length: decides how many tokens are copied.
        method: the contrast, which may have a gate.
        statistics: updated in place.
        lookup: the longest draft by look-up, and the longest n-gram; None drafts by the amateur alone.
        early: the branch of an amateur whose logits the expert's reader can read along, see `EarlyExitBranch`; None for others.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        expert: RowReader,
        amateur: RowReader,
        vocabulary: int,
        drafter: Drafter,
        draft_length: DraftLength,
        copy_length: CopyLength,
        method: ContrastiveLogitsProcessor,
        statistics: Statistics,
        lookup: tuple[int, int] | None = None,
        early: Any = None,
    ) -> None:
        self._generation, self._expert, self._amateur = generation, expert, amateur
        self._drafter, self._draft_length, self._method = drafter, draft_length, method
        self._vocabulary, self._statistics, self._lookup = vocabulary, statistics, lookup
        self._copy_length, self._early = copy_length, early
        self._declined: _Copies | None = None

    def run(self) -> None:
        """Draft tokens, and append those that the expert accepts and one more."""
        copies = self._copies()
        if copies is not None:
            self._verify(list(copies.tokens.unbind(1)), self._look_along(copies))
        elif self._has_amateur and self._draft_length.rests:
            self._step_alone()
        else:
            self._verify(*self._draft())
        self._statistics.rounds += 1
        for reader in (self._expert, self._amateur):
            reader.forget(self._generation.ids.shape[1] - 1)

    def count_forwards(self) -> None:
        """Write the number of forward passes into the statistics."""
        self._statistics.expert_forwards = self._expert.forwards
        self._statistics.amateur_forwards = self._amateur.forwards

    def _draft(self) -> tuple[list[Tensor], list[_Place]]:
        """Return the drafted tokens `(B,)`, and the amateur's distributions as far as it was run."""
        generation = self._generation
        ids, drafts = generation.ids, list[Tensor]()
        room = generation.remaining - 1 if self._expert.length else 0  # none while the prompts are read
        rows = generation.unpadded
        self._draft_length.start()
        places = [self._look(ids)]
        while len(drafts) < room and self._draft_length.allows_draft(places[-1].confidences[rows].tolist()):
            drafts.append(self._drafter.draw(places[-1].proposal))
            ids = torch.cat([ids, drafts[-1][:, None]], dim=1)
            if len(drafts) == room or generation.would_finish(drafts[-1]) or not self._draft_length.allows_pass():
                break
            places.append(self._look(ids))
        return drafts, places

    @property
    def _has_amateur(self) -> bool:
        """Return whether the amateur can be read without the prompt: it has been, or the expert's own pass yields its logits."""
        return self._early is not None or bool(self._amateur.length)

    def _copies(self) -> _Copies | None:
        """Return what all unfinished rows copy from their own text; None if it is too seldom accepted, or one of them has nothing to copy."""
        generation = self._generation
        reads = self._expert.length and self._has_amateur
        room, self._declined = generation.remaining - 1, None
        if self._lookup is None or not reads or room < 1:
            return None
        most, ngram_size = self._lookup
        ids, rows = generation.ids, generation.unpadded.nonzero().flatten().tolist()
        found = [look_up(ids[row], count=min(most, room), ngram_size=ngram_size) for row in rows]
        passages = [passage for passage in found if passage is not None]
        if len(passages) < len(found):
            return None
        count = min(len(passage.tokens) for passage in passages)
        copies = _Copies(ids[:, -1:].repeat(1, count), torch.zeros_like(ids[:, 0]))  # of ended rows it does not matter
        copies.tokens[rows] = torch.stack([passage.tokens[:count] for passage in passages])
        copies.matches[rows] = torch.tensor([passage.match for passage in passages], device=ids.device)
        if count := self._copy_length.allowed(copies.matches[generation.unfinished].tolist(), count):
            return copies._replace(tokens=copies.tokens[:, :count])
        self._declined = copies
        return None

    def _look_along(self, copies: _Copies) -> list[_Place]:
        """Return the amateur's distributions for the places of copies and for the one behind them, from one forward pass."""
        generation, drafts = self._generation, copies.tokens
        logits = self._amateur.read(torch.cat([generation.ids, drafts], dim=1), ~generation.unfinished)
        *places, last = [self._place(each, i) for i, each in enumerate(logits[:, -drafts.shape[1] - 1 :].unbind(1))]
        copied = [
            place._replace(
                proposal=torch.zeros_like(place.proposal).scatter_(-1, drafts[:, i, None], 1),
                matches=copies.matches + i,
            )
            for i, place in enumerate(places)
        ]
        return [*copied, last]

    def _step_alone(self) -> None:
        """Append one token to each row without a draft.

        The amateur comes out of the expert's pass, or runs where the contrast needs it: a gate may leave it out.
        """
        generation, place = self._generation, None
        logits = self._expert.read(generation.ids, ~generation.unfinished, along=self._early is not None)
        main, early = (logits, None) if self._early is None else self._early.split_joint(logits)

        def run() -> list[Tensor]:
            nonlocal place
            place = self._look(generation.ids) if early is None else self._place(early[:, -1], 0)
            return [place.logits]

        def contrast(scores: Tensor) -> Tensor:
            return self._method.contrast_where_needed(
                generation.ids, scores, run, generation.generated, generation.unfinished
            )

        generation.step(main[:, -1], contrast, lambda scores: self._choose(scores, place, None))

    def _look(self, ids: Tensor) -> _Place:
        """Return the amateur's distribution for the token after `ids` `(B, T)`."""
        logits = self._amateur.read(ids, ~self._generation.unfinished)[:, -1]
        return self._place(logits, ids.shape[1] - self._generation.ids.shape[1])

    def _place(self, logits: Tensor, drafted: int) -> _Place:
        """Return the distribution of the amateur's logits `(B, V)` behind so many drafts."""
        generation = self._generation
        ids, logits = generation.ids, fit_vocabulary(logits, self._vocabulary)
        step = generation.generated + drafted + 1
        check_logits(
            [logits],
            lambda: [f"logits of the amateur ({self._amateur.reader.name})"],
            lambda row: f"in row {row}, at step {step}",
        )
        proposal = self._drafter.proposal(ids, logits)
        return _Place(logits, proposal, proposal.amax(-1))

    def _verify(self, drafts: list[Tensor], places: list[_Place]) -> None:
        """Append the accepted part of the draft, and one more token.

        Rows end their round together. That is exact: where a row's round ends does not depend on the token that it would
        have generated next.
        """
        generation = self._generation
        ids = torch.cat([generation.ids, *(draft[:, None] for draft in drafts)], dim=1)
        table = self._expert.read(ids, ~generation.unfinished)  # (B, drafts + 1, V)
        self._statistics.drafted += len(drafts)
        for i, draft in enumerate([*drafts, None]):
            if i == len(places):
                places.append(self._look(generation.ids))
            tokens = self._step(table[:, i], places[i], draft)
            if draft is None or (tokens != draft)[generation.unpadded].any():
                return
            self._statistics.accepted += 1
            if not generation.unfinished.any():
                return

    def _step(self, logits: Tensor, place: _Place, draft: Tensor | None) -> Tensor:
        """Append one token per row, drafted or not, and return the chosen tokens `(B,)`."""
        generation = self._generation
        return generation.step(
            logits,
            lambda scores: self._method.combine(scores, [place.logits], generation.generated),
            lambda scores: self._choose(scores, place, draft),
        )

    def _choose(self, scores: Tensor, place: _Place | None, draft: Tensor | None) -> Tensor:
        """Return tokens `(B,)` from the warped scores, and learn from them."""
        tokens, agreement = self._drafter.choose(scores, None if place is None else place.proposal, draft)
        self._note(place, tokens, agreement[self._generation.unfinished].tolist())
        return tokens

    def _note(self, place: _Place | None, tokens: Tensor, agreement: list[float]) -> None:
        """Learn from the agreement of the unfinished rows, also about copies that were not drafted."""
        rows = self._generation.unfinished
        if place is not None and place.matches is None:
            self._draft_length.learn(place.confidences[rows].tolist(), agreement)
        elif place is not None and place.matches is not None:
            self._copy_length.learn(place.matches[rows].tolist(), agreement)
        if self._declined is not None:
            equal = (self._declined.tokens[:, 0] == tokens)[rows].float().tolist()
            self._copy_length.learn(self._declined.matches[rows].tolist(), equal)
            self._declined = None
        self._statistics.tokens += len(agreement)
        self._statistics.agreement += sum(agreement)
