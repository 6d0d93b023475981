"""Provide critic-guided decoding, which weights candidate tokens by the values of a critic."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from contralto.decoding import rules
from contralto.decoding.branches.padding import check_mask, fit_mask, padding_of, refuse_unknown_padding
from contralto.decoding.branches.variants import inner_model
from contralto.decoding.executors.candidate_values import CandidateValues
from contralto.decoding.processors.base import ContrastiveLogitsProcessor
from contralto.decoding.rules.candidates import check_candidates
from contralto.decoding.validity import check_logits
from contralto.decoding.vocabulary import Vocabulary

__all__ = ["CriticGuidedLogitsProcessor"]


class CriticGuidedLogitsProcessor(ContrastiveLogitsProcessor):
    """Critic-guided decoding: weight the likeliest tokens by the values of a critic (Kim et al. 2023, arXiv 2212.10938).

    Scores `log p(v) + log sigmoid(Q(v))` for the `k` likeliest tokens, `-inf` elsewhere, see
    `rules.critic_guided`. A critic that takes a cache reads `k` tokens per row and step, on the cached prefix; another one
    reads `k` whole sequences, see `CandidateValues`. `contralto critic` trains critics.

    Args:
        critic: a model with one value per token (`AutoModelForTokenClassification` with `num_labels=1`), or a PEFT model of one, which is
            read at the last token of each sequence; or any function of `input_ids` `(N, T)` and `attention_mask` `(N, T)` that
            returns logits `(N,)`, higher for better sequences.
        k: number of candidate tokens, at least 1. Default 10.
        attention_mask: `(prompts, T)` of the prompts. Without it, padding is found by the critic's pad token; a critic without
            one, such as a function, needs it for several prompts.
        tokenizer: the tokenizer that both models share, see `ContrastiveLogitsProcessor`.

    Raises:
        TypeError: the critic is a model with another head.
        ValueError: `k` below 1, right padding, a critic of another tokenizer; when called, padding that cannot be told from
            text, values that are NaN, or `-inf` for all candidates.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> short = CriticGuidedLogitsProcessor(lambda ids, mask: 9.0 * (ids[:, -1] == tokenizer.eos_token_id), k=50)
        >>> prompt = tokenizer("Ben went to the barn.", return_tensors="pt")
        >>> output = model.generate(**prompt, logits_processor=[short], max_new_tokens=20)
    """

    supports_continuous_batching = False

    def __init__(
        self, critic: Any, *, k: int = 10, attention_mask: Tensor | None = None, tokenizer: Any = None
    ) -> None:
        check_candidates(k=k)
        if not callable(critic):
            raise TypeError(f"the critic must be a model or a function of tokens and mask, not {critic!r}")
        labels = getattr(getattr(critic, "config", None), "num_labels", 1)
        if labels != 1:
            raise TypeError(
                f"the critic must have one value per token, not {labels} labels: load it with "
                "AutoModelForTokenClassification and num_labels=1"
            )
        if attention_mask is not None:
            check_mask(attention_mask)
        super().__init__(_plain, [])
        self._critic, self._k, self._mask = inner_model(critic), k, attention_mask
        self._vocabulary = Vocabulary([self._critic] if isinstance(self._critic, PreTrainedModel) else [], tokenizer)
        self._values = CandidateValues(self._critic) if isinstance(self._critic, torch.nn.Module) else None
        self._prompts: Tensor | None = None
        self._masks: Tensor | None = None

    def reset(self) -> None:
        """Discard the rows of the last call, and free the critic's cache."""
        self._prompts = self._masks = None
        if self._values is not None:
            self._values.reset()

    def contrast(self, input_ids: Tensor, scores: Tensor, contrasts: Sequence[Tensor], step: int) -> Tensor:
        """Return the scores of the candidates in a decoding loop.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: `(B, V)` of the main model.
            contrasts: none.
            step: not read.

        Returns:
            `(B, V)`, `-inf` except for the `k` likeliest tokens.
        """
        return self(input_ids, scores)

    def combine(
        self,
        scores: Tensor,
        contrasts: Sequence[Tensor],
        step: int | Tensor,
        *,
        place: Callable[..., str] | None = None,
        **changed: Any,
    ) -> NoReturn:
        """Reject scores of logits alone, without the rows that the critic reads.

        Args:
            scores: `(..., V)` of the main model.
            contrasts: none.
            step: not read.
            place: not read.
            changed: not read.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "critic-guided decoding has no likelihoods: it scores only the candidates that its critic reads"
        )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores of the candidates; `generate()` calls this.

        Args:
            input_ids: `(B, T)` int64, the rows.
            scores: `(B, V)` of the main model.

        Returns:
            `(B, V)`, `-inf` except for the `k` likeliest tokens.

        Raises:
            ValueError: NaN among the scores or values, or `-inf` for all candidates.
        """
        self._vocabulary.check_size(scores.shape[-1])
        candidates = scores.topk(min(self._k, scores.shape[-1])).indices
        values = self._candidate_values(input_ids, self._find_mask(input_ids), candidates)
        weighted = rules.critic_guided(scores, values, candidates)
        # a value of `-inf` is valid: the candidate is never chosen; the other values are checked
        check_logits(
            [scores, values.to(scores).nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0), weighted],
            lambda: ["logits of the main branch", "values of the critic", "scores of the candidates"],
            lambda row, *_: f"in row {row}, after {input_ids.shape[1]} tokens",
        )
        return weighted

    def _find_mask(self, ids: Tensor) -> Tensor:
        """Return the mask of the prompts `(B, T)`, as given or as found in the rows of the first step."""
        if self._mask is not None:
            repeats, rest = divmod(len(ids), len(self._mask))
            if rest or self._mask.shape[1] > ids.shape[1]:
                raise ValueError(
                    f"attention_mask has shape {tuple(self._mask.shape)}, but the rows have shape {tuple(ids.shape)}: a "
                    "mask belongs to one batch of prompts"
                )
            return self._mask.to(ids).repeat_interleave(repeats, dim=0)
        if self._prompts is not None and self._masks is not None:
            starts = (ids[:, None, : self._prompts.shape[1]], self._prompts[None])
            if starts[0].shape[-1] == starts[1].shape[-1]:
                same = (starts[0] == starts[1]).all(-1)
                if same.any(-1).all():
                    return self._masks[same.int().argmax(-1)]
        self._prompts, self._masks = ids.clone(), self._infer_mask(ids)
        return self._masks

    def _infer_mask(self, ids: Tensor) -> Tensor:
        """Return the mask `(B, T)` of prompts whose padding is not given."""
        if hasattr(self._critic, "config"):
            return padding_of(self._critic, ids)
        refuse_unknown_padding(ids, "a critic without a configuration")
        return torch.ones_like(ids)

    def _candidate_values(self, ids: Tensor, mask: Tensor, candidates: Tensor) -> Tensor:
        """Return the critic's values `(B, k)` of rows `(B, T)` with each candidate `(B, k)` appended."""
        mask = fit_mask(mask, ids.shape[1])
        if self._values is not None:
            return self._values(ids, mask, candidates)
        count = candidates.shape[-1]
        rows = torch.cat([ids.repeat_interleave(count, dim=0), candidates.reshape(-1, 1)], dim=1)
        visible = fit_mask(mask.repeat_interleave(count, dim=0), rows.shape[1])
        return torch.as_tensor(self._critic(rows, visible)).view_as(candidates)


def _plain(main: Tensor) -> Tensor:
    """Return the scores of the main model: the place of a rule, which reads the rows."""
    return main
