"""Provide critic-guided decoding, which weights candidate tokens by the values of a critic."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from contralto.common.placement import input_device
from contralto.decoding import rules
from contralto.decoding.branches.padding import KnownTokens, check_mask, fit_mask, padding_of, refuse_unknown_padding
from contralto.decoding.branches.prompts import takes_positions
from contralto.decoding.validity import check_logits
from contralto.decoding.vocabulary import Vocabulary

__all__ = ["CriticGuidedLogitsProcessor"]


class CriticGuidedLogitsProcessor(LogitsProcessor):
    """Critic-guided decoding: weight the likeliest tokens by the values of a critic (Kim et al. 2023, arXiv 2212.10938).

    Scores `log p(v) + log sigmoid(Q(v))` for the `k` likeliest tokens, `-inf` elsewhere, see
    `rules.critic_guided`. The critic reads `k` sequences per row and step.

    Args:
        critic: a model with one value per token (`AutoModelForTokenClassification` with `num_labels=1`), which is read at
            the last token of each sequence; or any function of `input_ids` `(N, T)` and `attention_mask` `(N, T)` that returns
            logits `(N,)`, higher for better sequences.
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
        if k < 1:
            raise ValueError(f"k must be at least 1 (candidate tokens), not {k}")
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
        self._critic, self._k, self._mask = critic, k, attention_mask
        self._vocabulary = Vocabulary([critic] if isinstance(critic, PreTrainedModel) else [], tokenizer)
        self._prompts: Tensor | None = None
        self._masks: Tensor | None = None

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
        count = candidates.shape[-1]
        sequences = torch.cat([input_ids.repeat_interleave(count, dim=0), candidates.reshape(-1, 1)], dim=1)
        mask = fit_mask(self._find_mask(input_ids).repeat_interleave(count, dim=0), sequences.shape[1])
        values = self._values(sequences, mask).view_as(candidates)
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

    def _values(self, sequences: Tensor, mask: Tensor) -> Tensor:
        """Return the critic's values `(B * k,)` of sequences `(B * k, T + 1)`."""
        if not isinstance(self._critic, torch.nn.Module):
            return torch.as_tensor(self._critic(sequences, mask))
        origin, device = sequences.device, input_device(self._critic)
        sequences, mask = sequences.to(device), mask.to(device)
        if hasattr(self._critic, "config"):
            sequences = KnownTokens.of(self._critic).replace(sequences, mask)
        inputs = {"input_ids": sequences, "attention_mask": mask}
        if takes_positions(self._critic):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = self._critic(**inputs).logits
        if logits.ndim != 3:
            raise TypeError(
                "the critic returns one value per sequence, and finds the end of a sequence by its padding, which a "
                "candidate token may equal: load it with AutoModelForTokenClassification and num_labels=1, or pass a "
                "function"
            )
        return logits[:, -1, 0].to(origin)
