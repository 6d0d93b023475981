"""Define the base class of contrastive logits processors: a rule and its branches.

`generate()` passes tokens and logits to a processor, and will pass nothing else
(https://github.com/huggingface/transformers/issues/34265), so a branch keeps inputs and cache of its own.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor

from contralto.decoding.branches.base import Branch
from contralto.decoding.branches.input import InputBranch
from contralto.decoding.branches.model import ModelBranch
from contralto.decoding.validity import branch_names, check_logits, check_shape
from contralto.decoding.vocabulary import Vocabulary, vocabulary_size

if TYPE_CHECKING:
    from contralto.decoding.executors.loop import ContrastiveLoop

__all__ = ["ContrastiveLogitsProcessor", "Rule", "contrast_branch", "try_rule"]

Rule = Callable[..., Tensor]


class ContrastiveLogitsProcessor(LogitsProcessor):
    """A rule and the branches whose distributions it contrasts with that of the model that generates.

    The methods of this package are its subclasses. A method of your own needs a function and a branch:

        ContrastiveLogitsProcessor(lambda main, other: rules.combine((main, other), (2, -1)), [ModelBranch(model)])

    Works with greedy search, sampling, beam search and several returned sequences, with batches of left-padded prompts,
    with encoder-decoders, and in assisted decoding. It runs after repetition penalty, minimum length and the like, and
    before temperature, top-k and top-p, see `order`. `loop()` is the same method as a faster `custom_generate`,
    `score.score` its likelihoods.

    Args:
        rule: returns scores `(B, V)` from the logits `(B, V)` of the main model and of each branch, all in one dtype on one device.
        branches: the sources of these logits, in the rule's order.
        threshold: the rule's keyword for its plausibility threshold, if it has one; likelihoods are computed without it.
        tokenizer: the tokenizer that all models share. It is compared with those found beside their weights, see
            `vocabulary`, and allows vocabulary sizes that differ by more than padding explains.

    Raises:
        TypeError: `branches` is not a list of branches, or the rule takes another number of logits.
        ValueError: two of the models have different tokenizers.
    """

    supports_continuous_batching = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the signature of `__call__`: `LogitsProcessorList` reads it at every step, to see what else a processor takes."""
        super().__init_subclass__(**kwargs)
        call: Any = cls.__call__
        call.__signature__ = inspect.signature(call)

    def __init__(
        self, rule: Rule, branches: Sequence[Branch], *, threshold: str | None = None, tokenizer: Any = None
    ) -> None:
        self.branches = _checked_branches(branches)
        self.rule = _checked_rule(rule, 1 + len(self.branches))
        self.threshold = threshold
        self._vocabulary = Vocabulary(
            [b.model for b in self.branches if b.model is not None and b.shares_tokenizer], tokenizer
        )

    def check_model(self, model: Any) -> None:
        """Compare the main model's tokenizer with those of the branches' models, where they can be found.

        The loop, `score` and `trace` call this. `generate()` does not pass its model to a logits processor.

        Args:
            model: the model that generates.

        Raises:
            ValueError: the tokenizers differ, or the sizes of the vocabularies by more than padding explains.
        """
        self._vocabulary.check(model)
        for branch in self.branches:
            branch.limit_tokens(vocabulary_size(model))

    def reset(self) -> None:
        """Discard the state of the last call, and free the caches of the branches."""
        for branch in self.branches:
            branch.reset()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return contrastive scores; `generate()` calls this.

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
        contrasts = [branch(input_ids) for branch in self.branches]
        length = input_ids.shape[1]
        return self.combine(
            scores, contrasts, self.step(input_ids), place=lambda row, *_: f"in row {row}, after {length} tokens"
        )

    def step(self, input_ids: Tensor) -> int:
        """Return the number of generated tokens, for rules that depend on it; 0 for others.

        Args:
            input_ids: `(B, T)` int64, the rows.
        """
        return 0

    def parameters(self, step: int | Tensor) -> dict[str, Any]:
        """Return further keyword arguments for the rule.

        Args:
            step: number of tokens generated before.
        """
        return {}

    def contrast(self, input_ids: Tensor, scores: Tensor, contrasts: Sequence[Tensor], step: int) -> Tensor:
        """Return contrastive scores in a decoding loop, which has run the branches; a method without branches overrides this.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: `(B, V)` of the main model.
            contrasts: `(B, V)` of each branch.
            step: number of tokens generated before.

        Returns:
            `(B, V)`.
        """
        return self.combine(scores, contrasts, step)

    def contrast_where_needed(
        self,
        input_ids: Tensor,
        scores: Tensor,
        run: Callable[[], Sequence[Tensor]],
        step: int,
        unfinished: Tensor | None = None,
    ) -> Tensor:
        """Return contrastive scores in a decoding loop, which has not run the branches yet; `GatedLogitsProcessor` overrides this.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: `(B, V)` of the main model.
            run: runs the branches, and returns the logits `(B, V)` of each.
            step: number of tokens generated before.
            unfinished: `(B,)` bool, the rows that have not ended; None for all.

        Returns:
            `(B, V)`.
        """
        return self.contrast(input_ids, scores, run(), step)

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
            contrasts: `(..., V)` of each branch.
            step: number of tokens generated before, for rules that depend on it.
            place: returns the place of a row of the logits from its indices, for error messages; by default its row and
                step.
            changed: keyword arguments of the rule that replace its own in this call.

        Returns:
            The rule's scores `(..., V)`.

        Raises:
            ValueError: NaN, `+inf` or a row of `-inf` alone in the logits of a branch or in the rule's scores; scores of
                another shape than the logits.
        """
        fitted = self.fit(scores, contrasts)
        combined = self.rule(scores, *fitted, **self.parameters(step), **changed)
        check_shape(combined, scores)
        check_logits(
            [scores, *fitted, combined],
            lambda: [*branch_names(self.rule, self.branches), "scores of the rule"],
            place or (lambda row=0, *_: f"in row {row}, at step {step + 1}"),
        )
        return combined

    def fit(self, scores: Tensor, contrasts: Sequence[Tensor]) -> list[Tensor]:
        """Bring the logits of the branches to the dtype, device and vocabulary of the main scores.

        Args:
            scores: `(..., V)` of the main model.
            contrasts: the logits of each branch.

        Returns:
            The logits `(..., V)` of each branch.

        Raises:
            ValueError: the sizes of the vocabularies differ by more than padding explains.
        """
        pairs = zip(self.branches, contrasts, strict=True)
        resolved = [branch.resolve(scores, contrast.to(scores)) for branch, contrast in pairs]
        return [self._vocabulary.fit(logits, scores.shape[-1]) for logits in resolved]

    def loop(self, *, streamer: Any = None) -> "ContrastiveLoop":
        """Return the method as a `custom_generate` callable, in which branches of the same model share one forward pass.

        Args:
            streamer: as for `generate()`, which does not pass its own to callables.
        """
        from contralto.decoding.executors.loop import ContrastiveLoop

        return ContrastiveLoop(self, streamer=streamer)


def _checked_branches(branches: Any) -> list[Branch]:
    """Return the branches as a list, or raise TypeError for anything else, such as a model without its branch."""
    given = list(branches) if isinstance(branches, Iterable) else []
    wrong = next((each for each in given if not isinstance(each, Branch)), None)
    wrong = wrong if isinstance(branches, Iterable) else branches
    if wrong is not None:
        raise TypeError(
            "branches must be a list of branches, such as [ModelBranch(amateur)] or [InputBranch(model, inputs)] of "
            f"contralto.decoding.branches, not {type(wrong).__name__}"
        )
    return given


def _checked_rule(rule: Any, count: int) -> Rule:
    """Return the rule, or raise TypeError if it cannot be called with the logits of `count` branches."""
    if not callable(rule):
        raise TypeError(f"rule must be a function of the logits of {count} branches, not {rule!r}")
    try:
        parameters = inspect.signature(rule).parameters.values()
    except ValueError:  # some functions of torch have no signature
        return cast(Rule, rule)
    logits = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    needed = [each for each in logits if each.default is each.empty]
    several = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    if len(needed) > count or (len(logits) < count and not several):
        raise TypeError(
            f"the rule takes the logits of {len(needed)} branches, and there are {count}: those of the main model and of "
            f"each of branches ({count - 1})"
        )
    return cast(Rule, rule)


def try_rule(rule: Rule, branches: int) -> Rule:
    """Return a rule after one call, which checks its parameters.

    Args:
        rule: with its parameters bound.
        branches: number of branches, the main branch included.
    """
    rule(*[torch.zeros(1)] * branches)
    return rule


def contrast_branch(model: Any, inputs: Mapping[str, Any]) -> Branch:
    """Return the branch of a model for other inputs: another prompt or image, or for an encoder-decoder another source text.

    Args:
        model: a transformers model.
        inputs: its inputs, as a tokenizer or processor returns them.
    """
    if getattr(model, "config", None) is not None and model.config.is_encoder_decoder:
        return ModelBranch(model, encoder_inputs=inputs)
    return InputBranch(model, inputs)
