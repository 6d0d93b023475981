"""Draft tokens for speculative decoding: distribution, acceptance and length of a draft."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from contralto.decoding.rules import plausible

__all__ = ["CopyLength", "DraftLength", "Drafter", "Passage", "accept_or_redraw", "look_up"]

WARPERS = (
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
)
"""The warpers that depend on the distribution alone: drafts are drawn through them too.

A warper that is missing here makes the acceptance of drafts less likely; the generated tokens stay the same.
"""

LONGEST_DRAFT = 16
TOKEN_COST = 0.05
"""Estimated cost of one more token in a forward pass of the expert, in passes of one token."""
TOKEN_COST_ON_CPU = 0.15
"""The same on a CPU: SmolLM2 (135M) on one thread reads 2, 4 and 9 tokens in 1.05, 1.6 to 1.8 and 2.1 to 2.3 of the time of one."""
TOKEN_VALUE = 0.35
"""Estimated saving of one more amateur pass if the draft before it is accepted, in passes of the expert."""
RECENT_TOKENS = 8
"""The share accepted lately is a moving average over about so many tokens."""


def accept_or_redraw(target: Tensor, proposal: Tensor, draft: Tensor) -> Tensor:
    """Convert draws from one distribution to draws from another by speculative sampling, which keeps most of them.

        keep x with probability min(1, P(x) / Q(x)), else draw from norm(max(0, P - Q))

    If `x ~ Q`, the result is distributed as `P`, and is `x` with probability `sum_v min(P(v), Q(v))`. Leviathan et al. 2023
    (arXiv 2211.17192, algorithm 1), with the contrastive distribution for `P` in Yuan et al. 2023 (arXiv 2311.08981).

    Args:
        target: `P`, `(B, V)` probabilities.
        proposal: `Q`, `(B, V)` probabilities.
        draft: `x`, `(B,)` one draw from every row of `Q`.

    Returns:
        `(B,)` tokens.

    Examples:
        A token that P excludes is never kept, and one that is at least as likely under P as under Q is always kept.

        >>> P, Q = torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([[0.5, 0.5, 0.0]])
        >>> accept_or_redraw(P, Q, torch.tensor([0])), accept_or_redraw(P, Q, torch.tensor([1]))
        (tensor([2]), tensor([1]))
    """
    p, q = (probabilities.gather(-1, draft[:, None]).squeeze(-1) for probabilities in (target, proposal))
    kept = torch.rand_like(p) * q < p
    if kept.all():
        return draft
    residual = (target - proposal).clamp(min=0)
    # Kept rows may have no residual; a rejected row has one, unless rounding has eaten it.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)
    return torch.where(kept, draft, torch.multinomial(residual, 1).squeeze(-1))


class Passage(NamedTuple):
    """An earlier place of a row that reads like its end, and goes on."""

    tokens: Tensor
    """`(n,)` int64, what follows there."""
    match: int
    """The number of tokens before them that are also the last tokens of the row."""


def look_up(row: Tensor, *, count: int, ngram_size: int = 2) -> Passage | None:
    """Return what followed the last tokens of a row where they stood before: prompt look-up decoding (Saxena 2023).

    The longest n-gram of at most `ngram_size` tokens at the end of the row that has occurred before is continued as it was continued the
    last time that `count` tokens followed it, else the first time.

    Args:
        row: `(T,)` int64.
        count: number of tokens to return, at most.
        ngram_size: length of the longest n-gram.

    Returns:
        1 to `count` tokens; None if the last token is new.

    Examples:
        >>> look_up(torch.tensor([5, 6, 7, 8, 5, 6]), count=2)
        Passage(tokens=tensor([7, 8]), match=2)
        >>> look_up(torch.tensor([5, 6, 7, 9, 6, 7]), count=9, ngram_size=1)
        Passage(tokens=tensor([9, 6, 7]), match=2)
        >>> look_up(torch.tensor([5, 6, 7]), count=2) is None
        True
    """
    for size in range(min(ngram_size, len(row) - 1), 0, -1):
        windows = row[:-1].unfold(0, size, 1)  # without that of the end itself
        starts = ((windows == row[-size:]).all(-1).nonzero().flatten() + size).tolist()
        if starts:
            start = max((start for start in starts if start + count <= len(row)), default=starts[0])
            equal = row[:start].flip(0) == row[-start:].flip(0)
            return Passage(row[start : start + count], int(equal.long().cumprod(0).sum()))
    return None


class Drafter:
    """The distribution `Q` that drafts are drawn from, and the draws.

    Args:
        warpers: the processors that act on the scores of the contrast; those of `WARPERS` act on drafts too.
        alpha: plausibility threshold of the amateur's own distribution.
        sample: draw tokens; otherwise take the most likely ones.
    """

    def __init__(self, warpers: Any, alpha: float, *, sample: bool) -> None:
        self._warpers: Any = LogitsProcessorList([warper for warper in warpers if isinstance(warper, WARPERS)])
        self._alpha, self._sample = alpha, sample

    def proposal(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return `Q` from the amateur's logits.

        Args:
            ids: `(B, T)` int64.
            logits: `(B, V)` for the token after each row.

        Returns:
            `(B, V)` probabilities.
        """
        logits = logits.masked_fill(~plausible(logits, alpha=self._alpha), -math.inf)
        probabilities: Tensor = self._warpers(ids, logits).softmax(-1)
        return probabilities

    def draw(self, probabilities: Tensor) -> Tensor:
        """Choose a token `(B,)` for each row of `probabilities` `(B, V)`."""
        return torch.multinomial(probabilities, 1).squeeze(1) if self._sample else probabilities.argmax(-1)

    def choose(self, scores: Tensor, proposal: Tensor | None, draft: Tensor | None) -> tuple[Tensor, Tensor]:
        """Accept or replace a draft.

        Args:
            scores: `(B, V)` of the contrast, warped.
            proposal: `(B, V)` probabilities, `Q`; None if the amateur has not run.
            draft: `(B,)` int64, the drafted tokens; None if there are none.

        Returns:
            The token of each row, `(B,)`, and the probability that a draft from `proposal` is accepted, `(B,)`; without one 0.
        """
        if proposal is None:
            tokens = self.draw(scores.softmax(-1)) if self._sample else scores.argmax(-1)
            return tokens, torch.zeros_like(scores[:, 0])
        if not self._sample:
            tokens = scores.argmax(-1)
            return tokens, (tokens == self.draw(proposal)).float()
        target = scores.softmax(-1)
        tokens = self.draw(target) if draft is None else accept_or_redraw(target, proposal, draft)
        return tokens, torch.minimum(target, proposal).sum(-1)


class DraftLength:
    """Decides how many tokens the amateur drafts, by the rule in the docstring of `SpeculativeContrastiveDecoding`.

    Args:
        fixed: number of tokens in every round; None to decide token by token.
        cost_ratio: cost of a forward pass of the amateur, in passes of the expert.
        token_cost: cost of one more token in a forward pass, in passes of one token.
        waits: begin at rest, where it costs nothing to see whether drafts would be accepted.
    """

    CLASSES = 5

    def __init__(self, fixed: int | None, cost_ratio: float, token_cost: float, *, waits: bool = False) -> None:
        self._fixed = fixed
        self._least = (cost_ratio + token_cost) / (cost_ratio + TOKEN_VALUE)
        self._least_draft = 2 * token_cost
        # Start with one observation per class: likelier drafts are accepted more often.
        self._accepted = [math.sqrt((k + 0.5) / self.CLASSES) for k in range(self.CLASSES)]
        self._observed = [1.0] * self.CLASSES
        self._lately, self._agreed = 0.0 if waits else 0.5, 0.0
        self.start()

    @property
    def rests(self) -> bool:
        """Return whether nothing is drafted, since the last tokens would not have been accepted."""
        return self._fixed is None and self._lately < self._least_draft

    def start(self) -> None:
        """Begin a round."""
        self._drafted, self._reach = 0, 1.0

    def allows_pass(self) -> bool:
        """Return whether the amateur should run on its drafted tokens."""
        if self._fixed is not None:
            return self._drafted < self._fixed
        most = min(LONGEST_DRAFT, 2 + 2 * self._agreed)  # no long draft of an amateur that has not been right yet
        return self._drafted < most and self._reach >= self._least

    def allows_draft(self, confidences: Sequence[float]) -> bool:
        """Return whether to draft another token.

        Args:
            confidences: the amateur's largest probability in each row.
        """
        for confidence in confidences:
            k = self._class(confidence)
            self._reach *= self._accepted[k] / self._observed[k]
        self._drafted += 1
        return self._fixed is not None or (not self.rests and self._reach >= self._least_draft)

    def learn(self, confidences: Sequence[float], agreements: Sequence[float]) -> None:
        """Update the estimated chance that a draft is accepted, and the share accepted lately.

        Tokens that nobody drafted count too: the amateur has scored them for the contrast, so drafts start again without a trial.

        Args:
            confidences: the amateur's largest probability in each row.
            agreements: the probability that its draft is accepted.
        """
        for confidence, agreement in zip(confidences, agreements, strict=True):
            self._accepted[self._class(confidence)] += agreement
            self._observed[self._class(confidence)] += 1
        if agreements:
            self._lately += (min(agreements) - self._lately) / RECENT_TOKENS
            self._agreed += min(agreements)

    def _class(self, confidence: float) -> int:
        return min(int(confidence * self.CLASSES), self.CLASSES - 1)


class CopyLength:
    """Decides how many tokens of an earlier passage are copied: the longer it has matched, the likelier it goes on.

    Let `p_k` be the probability that a copied token is accepted whose passage matches the text before it by k tokens, in classes 1, 2-3, 4-7,
    8-15, ..., a moving average over about eight tokens of this call. Tokens are copied as long as the product of their `p_k` is at least
    twice what it costs to read one more.

    Args:
        token_cost: cost of one more token in a forward pass, in passes of one token.

    Examples:
        >>> length = CopyLength(token_cost=0.1)
        >>> length.allowed([2], 8), length.allowed([20], 8)
        (4, 8)
        >>> for _ in range(20):
        ...     length.learn([2], [0.0])
        >>> length.allowed([2], 8)
        0
    """

    FIRST = (0.4, 0.6, 0.8, 0.9, 0.95)
    """The estimates of the classes before anything was copied."""

    def __init__(self, token_cost: float) -> None:
        self._least = 2 * token_cost
        self._accepted = list(self.FIRST)

    def allowed(self, matches: Sequence[int], count: int) -> int:
        """Return how many tokens to copy.

        Args:
            matches: by row, the number of tokens that its passage matches.
            count: the number of tokens to choose from.
        """
        reach = 1.0
        for i in range(count):
            for match in matches:
                reach *= self._accepted[self._class(match + i)]
            if reach < self._least:
                return i
        return count

    def learn(self, matches: Sequence[int], agreements: Sequence[float]) -> None:
        """Update the estimates.

        Args:
            matches: by row, the number of tokens that the passage matched before a token.
            agreements: the probability that this token is accepted.
        """
        for match, agreement in zip(matches, agreements, strict=True):
            k = self._class(match)
            self._accepted[k] += (agreement - self._accepted[k]) / RECENT_TOKENS

    def _class(self, match: int) -> int:
        return min(match.bit_length() - 1, len(self.FIRST) - 1)
