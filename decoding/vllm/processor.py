"""Combine the logits of the branches of a completion, for both of vLLM's model runners."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contralto.decoding.validity import check_shape
from contralto.decoding.vllm.checks import check_config
from contralto.decoding.vllm.members import Members
from contralto.decoding.vllm.sampling import Warp, draw, end_broken, seeds_of
from contralto.decoding.vllm.settings import Row, Rule, check_request

__all__ = ["PairedContrast"]


class _BranchRequest(NamedTuple):
    """A request in the batch that is a branch of a completion."""

    row: Row
    output: Sequence[int]
    """V1 runner: vLLM's own list, which grows."""


class _RuleGroup(NamedTuple):
    """Completions that share a rule: the rows of their branches, and the sampling of their tokens."""

    rule: Rule
    places: Tensor
    """`(K, P)` int64, rows of the logits by branch and completion."""
    markers: Tensor
    """`(P, 1)`"""
    seeds: Tensor
    """`(P,)`"""
    warp: Warp | None
    """None for greedy decoding of all of them."""
    first: np.ndarray[Any, Any]
    """`(P,)` indices of the main branches among the requests."""
    start: np.ndarray[Any, Any]
    """`(P,)` number of tokens of each completion that its prompts contain already."""


class _BatchPlan(NamedTuple):
    """The index tensors of a step, which stay valid while the batch does not change."""

    parts: list[_RuleGroup]
    lone: Tensor
    """Rows of the logits whose partners are missing or out of step."""
    markers: Tensor


class PairedContrast(Members):
    """Decodes completions by contrast whose branches are requests of one batch; other requests are unchanged.

        scores = rule(logits of branch 0, logits of branch 1, ...),    token = argmax scores, or a draw from softmax(scores)

    for the rules of `contralto.decoding.rules`. All branches of a completion receive the same token. Branches must be in step,
    that is, have equally many generated tokens. A branch that is out of step, or whose partners are missing, is ended by the
    marker token; so tokens that all branches have in common, markers excluded, were always chosen together. `PairScheduler`
    keeps branches in step; `generate_pairs` and `PairClient` resume those that are not.

    `LLM(logits_processors=["contralto.decoding.vllm:PairedContrast"])`; `make_llm` does that and more.
    """

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        """Take vLLM's arguments: `(vllm_config, device, is_pin_memory)` from V1, `(vllm_config, req_states)` from V2."""
        super().__init__(vllm_config, *rest)
        check_config(vllm_config)
        self._changed()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Reject a request that cannot be a branch; over HTTP with status 400.

        Args:
            sampling_params: vLLM's `SamplingParams`.

        Raises:
            ValueError: see `settings.Row.of` and `settings.check_request`.
        """
        row = Row.of(sampling_params.extra_args)
        if row is not None:
            check_request(row, sampling_params)

    def _member(self, params: Any, prompt: Sequence[int], output: Sequence[int]) -> _BranchRequest | None:
        """Return the state to keep for a branch, and forget an earlier request for the same branch.

        Model Runner V2 does not report requests that leave.
        """
        row = Row.of(params.extra_args)
        if row is None:
            return None
        branch = (row.group, row.branch)
        for other in [i for i, m in self._members.items() if (m.row.group, m.row.branch) == branch]:
            del self._members[other]
        return _BranchRequest(row, output)

    def _changed(self) -> None:
        """Sort the requests by completion and branch, those of complete completions first."""
        texts: dict[str | int, list[int]] = {}
        for index in sorted(self._members, key=lambda i: self._members[i].row.branch):
            texts.setdefault(self._members[index].row.group, []).append(index)
        whole = [t for t in texts.values() if len(t) == len(self._members[t[0]].row.rule.branches)]
        rest = [t for t in texts.values() if len(t) != len(self._members[t[0]].row.rule.branches)]
        self._order = np.array([index for text in [*whole, *rest] for index in text], dtype=np.int64)
        self._sizes = np.array([len(text) for text in whole], dtype=np.int64)
        self._starts = np.concatenate([[0], self._sizes.cumsum()])[: len(whole)].astype(np.int64)
        self._key: tuple[bytes, ...] | None = None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Combine and sample, and write the same scores to all branches of a completion, in place; return all logits."""
        if not len(self._order):
            return logits
        places, lengths = self._seen_v1() if ctx is None else self._seen_v2(ctx)
        in_step = self._in_step(lengths)
        key = (places.tobytes(), in_step.tobytes(), (lengths >= 0).tobytes())
        if key != self._key:
            self._key, self._plan = key, self._make_plan(places, lengths, in_step)
        for part in self._plan.parts:
            self._weigh(logits, part, lengths)
        if len(self._plan.lone):
            logits.index_fill_(0, self._plan.lone, -torch.inf)
            logits[self._plan.lone, self._plan.markers] = 0.0
        return logits

    def _seen_v1(self) -> tuple[Any, Any]:
        """Return the rows of the requests in the logits, and the number of tokens that each has generated."""
        return self._order, np.array([len(self._members[index].output) for index in self._order.tolist()])

    def _seen_v2(self, ctx: Any) -> tuple[Any, Any]:
        """Return the same as `_seen_v1`; -1 for requests that are absent or still process their prompts."""
        at = np.full(self._states.max_num_reqs, -1)
        at[ctx.idx_mapping_np] = np.arange(len(ctx.idx_mapping_np))
        places = at[self._order]
        seen = ctx.seq_lens_upper_bound_np[places]
        reads = (places < 0) | (seen < self._states.prefill_len.np[self._order])
        return places, np.where(reads, -1, seen - self._states.prompt_len.np[self._order])

    def _in_step(self, lengths: Any) -> Any:
        """Return for each complete completion whether its branches have equally many tokens."""
        if not len(self._starts):
            return np.zeros(0, dtype=bool)
        of_whole = lengths[: self._sizes.sum()]
        least = np.minimum.reduceat(of_whole, self._starts)
        return (least >= 0) & (least == np.maximum.reduceat(of_whole, self._starts))

    def _make_plan(self, places: Any, lengths: Any, in_step: Any) -> _BatchPlan:
        """Return the index tensors for a batch."""
        rows = [self._members[index].row for index in self._order.tolist()]
        by_rule: dict[Rule, list[int]] = {}
        alone = lengths >= 0
        for start, size in zip(self._starts[in_step].tolist(), self._sizes[in_step].tolist(), strict=True):
            by_rule.setdefault(rows[start].rule, []).append(start)
            alone[start : start + size] = False
        parts = [self._make_part(rule, [rows[f] for f in firsts], places, firsts) for rule, firsts in by_rule.items()]
        markers = [row.marker for row, is_alone in zip(rows, alone.tolist(), strict=True) if is_alone]
        return _BatchPlan(parts, self._send(places[alone]), self._send(markers))

    def _make_part(self, rule: Rule, rows: Sequence[Row], places: Any, firsts: Sequence[int]) -> _RuleGroup:
        first = np.array(firsts)
        return _RuleGroup(
            rule,
            self._send([places[first + branch] for branch in range(len(rule.branches))]),
            self._send([row.marker for row in rows])[:, None],
            seeds_of([row.seed for row in rows]).to(self._device),
            Warp.of([row.sampling for row in rows], self._device)
            if any(r.sampling.temperature for r in rows)
            else None,
            first,
            np.array([row.start for row in rows]),
        )

    def _send(self, values: Any) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self._device, non_blocking=True)

    def _weigh(self, logits: Tensor, part: _RuleGroup, lengths: Any) -> None:
        """Draw the next tokens of all completions that share a rule."""
        branches = logits[part.places].float()
        markers = part.markers.expand(len(branches), -1, -1)  # (K, P, 1)
        branches.scatter_(2, markers, -torch.inf)  # before the plausible tokens are selected
        steps = self._send(lengths[part.first] + part.start)
        scores = part.rule(list(branches), steps)
        check_shape(scores, branches[0])
        if part.warp is not None:
            scores = draw(scores, part.warp, part.seeds, steps)
        scores = end_broken(scores, branches, part.markers)
        logits[part.places] = scores.to(logits.dtype).expand_as(branches)
