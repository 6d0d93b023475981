"""Write several different candidates of each prompt by diverse beams, one beam per group, in an unmodified greedy `generate()`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from contralto.decoding.rules.sequences import check_diversity_penalty, diverse_tokens

__all__ = ["ENDED", "DiverseBeamsLogitsProcessor", "diverse_beams", "until_end"]

ENDED = -100
"""The value of tokens beyond the end of a sequence."""
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "early_stopping": False, "length_penalty": 1.0}
"""Options of `generate()` that win over those in a model's generation configuration."""


class DiverseBeamsLogitsProcessor(LogitsProcessor):
    """Diverse beam search with one beam per group, in a greedy `generate()` (Vijayakumar et al. 2016, arXiv 1610.02424).

    The rows are the groups, `num_groups` for each prompt in succession. `-inf` everywhere but at the token that `diverse_tokens` chooses,
    so that `generate()` takes it. transformers 5 has no diverse beams of its own any more. CoNT and BRIO write their candidates so, with
    as many groups as beams; a group ends with its first end-of-sequence token, as under `early_stopping` there.

    Args:
        num_groups: the number of rows per prompt, at least 1.
        prompt_length: tokens of the rows before the first one that is generated.
        end_tokens: tokens after which a row has ended.
        diversity_penalty: see `diverse_tokens`.

    Raises:
        ValueError: a parameter out of range; when called, a number of rows that is no multiple of `num_groups`.
    """

    supports_continuous_batching = False

    def __init__(
        self, num_groups: int, *, prompt_length: int, end_tokens: list[int], diversity_penalty: float = 1.0
    ) -> None:
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, not {num_groups}")
        check_diversity_penalty(diversity_penalty)
        self._groups, self._start, self._ends = num_groups, prompt_length, end_tokens
        self._penalty = diversity_penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores of the chosen tokens alone.

        Args:
            input_ids: `(B * G, T)` int64.
            scores: `(B * G, V)` of the model.
        """
        if len(input_ids) % self._groups:
            raise ValueError(
                f"{len(input_ids)} rows are not {self._groups} per prompt: repeat each prompt so many times"
            )
        ended = torch.isin(input_ids[:, self._start :], torch.tensor(self._ends).to(input_ids)).any(-1)
        shape = (-1, self._groups)
        tokens = diverse_tokens(
            scores.view(*shape, scores.shape[-1]), ~ended.view(shape), diversity_penalty=self._penalty
        ).view(-1, 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, scores.gather(-1, tokens))


@torch.no_grad()
def diverse_beams(
    model: Any,
    inputs: Mapping[str, Tensor],
    *,
    num_candidates: int,
    diversity_penalty: float = 1.0,
    max_new_tokens: int = 128,
    **options: Any,
) -> Tensor:
    """Write candidates of each prompt by diverse beams.

    The first candidate is that of greedy search.

    Args:
        model: a decoder, or an encoder-decoder.
        inputs: `input_ids` and `attention_mask`, `(B, T)`; prompts of a decoder are padded on the left.
        num_candidates: number of groups, each with one beam.
        diversity_penalty: see `diverse_tokens`.
        max_new_tokens: largest number of tokens of a candidate.
        options: further options of `generate()`, such as `no_repeat_ngram_size`.

    Returns:
        `(B, num_candidates, T')` int64, the generated tokens with their end token; `ENDED` beyond.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> prompt = tokenizer("Ben went out to the", return_tensors="pt")
        >>> candidates = diverse_beams(model, prompt, num_candidates=3, max_new_tokens=4)
        >>> len({tuple(tokens) for tokens in candidates[0].tolist()})
        3
    """
    rows: dict[str, Any] = {name: value.repeat_interleave(num_candidates, 0) for name, value in inputs.items()}
    length = rows["input_ids"].shape[1]
    if model.config.is_encoder_decoder:
        encoded = model.get_encoder()(**inputs)
        states = encoded.last_hidden_state.repeat_interleave(num_candidates, 0)
        rows, length = {"encoder_outputs": BaseModelOutput(states), "attention_mask": rows["attention_mask"]}, 1
    ends = end_tokens(model)
    beams = DiverseBeamsLogitsProcessor(
        num_candidates, prompt_length=length, end_tokens=ends, diversity_penalty=diversity_penalty
    )
    written = model.generate(**rows, **GREEDY | {"max_new_tokens": max_new_tokens} | options, logits_processor=[beams])
    return until_end(written[:, length:], ends).view(-1, num_candidates, written.shape[1] - length)


def end_tokens(model: Any) -> list[int]:
    """Return the tokens with which a model ends a sequence.

    Args:
        model: a model that generates.
    """
    ends: Any = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def until_end(tokens: Tensor, ends: list[int]) -> Tensor:
    """Replace the tokens after the first end token of each sequence by `ENDED`.

    Args:
        tokens: `(..., T)` int64.
        ends: the end tokens.

    Examples:
        >>> until_end(torch.tensor([[5, 2, 0, 2], [5, 6, 7, 8]]), [2])
        tensor([[   5,    2, -100, -100],
                [   5,    6,    7,    8]])
    """
    is_end = torch.isin(tokens, torch.tensor(ends).to(tokens)).long()
    return tokens.masked_fill(is_end.cumsum(-1) - is_end > 0, ENDED)
