"""Define the logits processor that every method of contrast is: a rule and its branches."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from contralto.decoding.branches.base import Branch
from contralto.decoding.branches.input import InputBranch
from contralto.decoding.branches.model import ModelBranch
from contralto.decoding.validity import branch_names, check_logits
from contralto.decoding.vocabulary import Vocabulary, vocabulary_size

if TYPE_CHECKING:
    from contralto.decoding.executors.loop import ContrastiveLoop

__all__ = ["ContrastiveLogitsProcessor", "Rule", "contrast_branch", "try_rule"]

Rule = Callable[..., Tensor]


class ContrastiveLogitsProcessor(LogitsProcessor):
    """A rule and the branches whose distributions it contrasts with that of the model that generates.

    The methods of this module are its subclasses. A method of one's own needs no more than a function and a branch:

        ContrastiveLogitsProcessor(lambda main, other: rules.combine((main, other), (2, -1)), [ModelBranch(model)])

    Works with greedy search, sampling, beam search and several returned sequences, with batches of left-padded prompts,
    with encoder-decoders, and in assisted decoding. It runs after repetition penalty, minimum length and the like, and
    before temperature, top-k and top-p, see `order`. `loop()` is the same method as a faster `custom_generate`,
    `score.score` its likelihoods.

    Args:
        rule: scores `(B, V)` from the main model's `(B, V)` and each branch's, all in one dtype on one device.
        branches: where they come from, in the rule's order.
        threshold: the rule's keyword for its plausibility threshold, if it has one; likelihoods are scored without.
        tokenizer: the tokenizer that all models share. It is compared with those that are found beside their weights, see
            `vocabulary`, and lets vocabularies differ in size by more than can be told to be padding.

    Raises:
        ValueError: two of the models have different tokenizers.
    """

    supports_continuous_batching = False

    def __init__(
        self, rule: Rule, branches: Sequence[Branch], *, threshold: str | None = None, tokenizer: Any = None
    ) -> None:
        self.rule = rule
        self.branches = list(branches)
        self.threshold = threshold
        self._vocabulary = Vocabulary([b.model for b in self.branches if b.model is not None], tokenizer)

    def check_model(self, model: Any) -> None:
        """Compare the main model's tokenizer with those of the branches' models, where they can be found.

        The loop, `score` and `trace` do this by themselves. `generate()` does not tell a logits processor its model.

        Args:
            model: the model that generates.

        Raises:
            ValueError: the tokenizers differ, or the sizes of the vocabularies by more than padding explains.
        """
        self._vocabulary.check(model)
        for branch in self.branches:
            branch.limit_tokens(vocabulary_size(model))

    def reset(self) -> None:
        """Forget the last call, and free the branches' caches."""
        for branch in self.branches:
            branch.reset()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Contrastive scores `(B, V)` from the main model's `scores` `(B, V)` and the branches', for the rows `(B, T)`."""
        for branch in self.branches:
            branch.limit_tokens(scores.shape[-1])
        contrasts = [branch(input_ids) for branch in self.branches]
        length = input_ids.shape[1]
        return self.combine(
            scores, contrasts, self.step(input_ids), place=lambda row, *_: f"in row {row}, after {length} tokens"
        )

    def step(self, input_ids: Tensor) -> int:
        """How many tokens of the rows were generated, as far as the rule wants to know."""
        return 0

    def parameters(self, step: int | Tensor) -> dict[str, Any]:
        """What the rule is told besides the branches."""
        return {}

    def combine(
        self,
        scores: Tensor,
        contrasts: Sequence[Tensor],
        step: int | Tensor,
        *,
        place: Callable[..., str] | None = None,
        **changed: Any,
    ) -> Tensor:
        """Apply the rule to branches brought to the dtype, device and vocabulary of the main scores.

        Args:
            scores: `(..., V)` of the main model.
            contrasts: `(..., V)` of every branch.
            step: how many tokens were generated before, for rules that depend on it.
            place: returns where a row of the logits is, from its indices, for an error about them; by default its row
                and step.
            changed: parameters of the rule that are to differ this once.

        Returns:
            The rule's scores `(..., V)`.

        Raises:
            ValueError: NaN, `+inf` or a row of `-inf` alone in the logits of a branch or in the rule's scores.
        """
        fitted = [self._vocabulary.fit(c.to(scores), scores.shape[-1]) for c in contrasts]
        combined = self.rule(scores, *fitted, **self.parameters(step), **changed)
        check_logits(
            [scores, *fitted, combined],
            lambda: [*branch_names(self.rule, self.branches), "scores of the rule"],
            place or (lambda row=0, *_: f"in row {row}, at step {step + 1}"),
        )
        return combined

    def loop(self, *, streamer: Any = None) -> "ContrastiveLoop":
        """The same method as a `custom_generate` callable: branches of the same model share one forward. See `loop`."""
        from contralto.decoding.executors.loop import ContrastiveLoop

        return ContrastiveLoop(self, streamer=streamer)


def try_rule(rule: Rule, branches: int) -> Rule:
    """A rule whose parameters were checked, once, by trying it."""
    rule(*[torch.zeros(1)] * branches)
    return rule


def contrast_branch(model: Any, inputs: Mapping[str, Any]) -> Branch:
    """The model on other inputs: another prompt or image, or for an encoder-decoder another source text."""
    if getattr(model, "config", None) is not None and model.config.is_encoder_decoder:
        return ModelBranch(model, encoder_inputs=inputs)
    return InputBranch(model, inputs)
