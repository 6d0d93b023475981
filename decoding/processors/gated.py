"""Provide the gate, which contrasts only where the main model is not sure of the next token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from contralto.decoding.processors.base import ContrastiveLogitsProcessor
from contralto.decoding.rules.gate import check_gate, gated, sure

__all__ = ["GateStatistics", "GatedLogitsProcessor"]


@dataclass
class GateStatistics:
    """The number of steps of a call. A step is one token per row of the batch."""

    steps: int = 0
    skipped: int = 0
    """Number of steps at which every unfinished row was sure, so that no branch with a forward pass of its own had to run."""


class GatedLogitsProcessor(ContrastiveLogitsProcessor):
    """A contrast only where it matters: a method whose branches run only where the main model is not sure of the next token.

        contrast = GatedLogitsProcessor(ContrastiveDecodingLogitsProcessor(amateur), gate=0.9)
        expert.generate(**inputs, custom_generate=contrast.loop())

    Rows whose largest probability is at least `gate` have the main model's log-probabilities as scores, without plausibility
    constraint, all others the scores of the method: the gate of M3ID (Favero et al. 2024, arXiv 2403.14003), see `rules.gated`. The
    first token is always contrasted. The scores of a row do not depend on the other rows.

    At a step where all rows of the batch are sure, the branches do not run; their caches catch up in one forward pass of several
    tokens when a row needs them. So gains shrink with the batch size. Nothing is saved by branches that `loop()` reads in the forward pass
    of the main model: other prompts of the same model, which are further rows of it, and early layers. Likelihoods (`score`) have the
    same scores and need all branches.

    In half precision a forward pass of several tokens rounds differently from passes of one: near ties may be decided differently.

    Args:
        method: a logits processor with branches.
        gate: probability of the likeliest token from which a row is sure, and has no contrast, in (0, 1]; see `rules.sure`.

    Attributes:
        statistics: the steps of the last call, and those without a contrast.

    Raises:
        TypeError: `method` is not a contrastive logits processor.
        ValueError: `gate` outside (0, 1], a method without branches.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
        >>> inputs = tokenizer("Mia went to the", return_tensors="pt")
        >>> contrast = GatedLogitsProcessor(ContrastiveDecodingLogitsProcessor(amateur), gate=0.9)
        >>> output = expert.generate(**inputs, custom_generate=contrast.loop(), max_new_tokens=20)
        >>> 0 < contrast.statistics.skipped < contrast.statistics.steps
        True
    """

    def __init__(self, method: ContrastiveLogitsProcessor, *, gate: float) -> None:
        if not isinstance(method, ContrastiveLogitsProcessor):
            raise TypeError(
                "method must be a logits processor such as ContrastiveDecodingLogitsProcessor(amateur), not "
                f"{type(method).__name__}"
            )
        if not method.branches:
            raise ValueError(f"a gate skips the branches of a method, and {type(method).__name__} has none")
        check_gate(gate)
        self.method, self.gate = method, gate
        self.branches, self.rule, self.threshold = method.branches, method.rule, method.threshold
        self._forget()

    def _forget(self) -> None:
        self.statistics = GateStatistics()
        self._prompt: Tensor | None = None  # the rows at the first call
        self._length = 0  # of the rows at the last call

    def check_model(self, model: Any) -> None:
        """Compare the main model's tokenizer with those of the branches' models, see `ContrastiveLogitsProcessor`.

        Args:
            model: the model that generates.

        Raises:
            ValueError: see `ContrastiveLogitsProcessor.check_model`.
        """
        self.method.check_model(model)

    def reset(self) -> None:
        """Discard the state of the last call, and free the caches of the branches."""
        self.method.reset()
        self._forget()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return gated scores; `generate()` calls this.

        Rows that begin with those of an earlier call, and are at most one token longer than those of the last one, continue that call;
        all others are new prompts.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: `(B, V)` of the main model.

        Returns:
            `(B, V)`.

        Raises:
            ValueError: see `combine`.
        """
        for branch in self.branches:
            branch.limit_tokens(scores.shape[-1])
        step = self.step(input_ids)

        def run() -> list[Tensor]:
            return [branch.catch_up(input_ids) if step else branch(input_ids) for branch in self.branches]

        return self.contrast_where_needed(input_ids, scores, run, step)

    def step(self, input_ids: Tensor) -> int:
        """Return the number of tokens that were generated after the prompts.

        Args:
            input_ids: `(B, T)` int64, the rows.
        """
        length = input_ids.shape[1]
        if self._prompt is None or length > self._length + 1 or not _continue(self._prompt, input_ids):
            self._prompt = input_ids.clone()
        self._length = length
        return int(length - self._prompt.shape[1])

    def contrast_where_needed(
        self,
        input_ids: Tensor,
        scores: Tensor,
        run: Callable[[], Sequence[Tensor]],
        step: int,
        unfinished: Tensor | None = None,
    ) -> Tensor:
        """Return gated scores, after a run of the branches unless every row is sure.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: `(B, V)` of the main model.
            run: runs the branches, and returns the logits `(B, V)` of each.
            step: number of tokens generated before.
            unfinished: `(B,)` bool, the rows that have not ended; None for all.

        Returns:
            `(B, V)`.
        """
        if not step:
            self.statistics = GateStatistics()
        self.statistics.steps += 1
        is_sure = sure(scores, gate=self.gate)
        if step and bool((is_sure if unfinished is None else is_sure | ~unfinished.to(is_sure.device)).all()):
            self.statistics.skipped += 1
            return scores.log_softmax(-1)
        return self.contrast(input_ids, scores, run(), step)

    def contrast(self, input_ids: Tensor, scores: Tensor, contrasts: Sequence[Tensor], step: int) -> Tensor:
        """Return gated scores in a decoding loop, which has run the branches.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: `(B, V)` of the main model.
            contrasts: `(B, V)` of each branch.
            step: number of tokens generated before.

        Returns:
            `(B, V)`.
        """
        return gated(self.method.contrast(input_ids, scores, contrasts, step), scores, gate=self.gate, step=step)

    def combine(
        self,
        scores: Tensor,
        contrasts: Sequence[Tensor],
        step: int | Tensor,
        *,
        place: Callable[..., str] | None = None,
        **changed: Any,
    ) -> Tensor:
        """Apply the rule of the method and the gate.

        Args:
            scores: `(..., V)` of the main model.
            contrasts: `(..., V)` of each branch.
            step: number of tokens generated before.
            place: see `ContrastiveLogitsProcessor.combine`.
            changed: see `ContrastiveLogitsProcessor.combine`.

        Returns:
            `(..., V)`.

        Raises:
            ValueError: see `ContrastiveLogitsProcessor.combine`.
        """
        combined = self.method.combine(scores, contrasts, step, place=place, **changed)
        return gated(combined, scores, gate=self.gate, step=step)

    def fit(self, scores: Tensor, contrasts: Sequence[Tensor]) -> list[Tensor]:
        """Bring the logits of the branches to the dtype, device and vocabulary of the main scores.

        Args:
            scores: `(..., V)` of the main model.
            contrasts: the logits of each branch.

        Returns:
            The logits `(..., V)` of each branch.

        Raises:
            ValueError: see `ContrastiveLogitsProcessor.fit`.
        """
        return self.method.fit(scores, contrasts)


def _continue(prompt: Tensor, rows: Tensor) -> bool:
    """Return whether rows `(B, T)` are a prompt `(B, T')` with generated tokens."""
    begun = rows[:, : prompt.shape[1]]
    same = begun.shape == prompt.shape and rows.shape[1] > prompt.shape[1] and begun.device == prompt.device
    return same and bool((begun == prompt).all())
