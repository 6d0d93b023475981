"""What a contrast did to a text, token by token: both branches' candidates, and where the choice changed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto.decoding.branches import fit_vocabulary

__all__ = ["Candidate", "Step", "trace"]


class Candidate(NamedTuple):
    token: int
    probability: float


class Step(NamedTuple):
    """One generated token, and what each distribution thought of its place, likeliest candidates first."""

    token: int
    main: tuple[Candidate, ...]
    contrast: tuple[Candidate, ...]
    combined: tuple[Candidate, ...]

    @property
    def changed(self) -> bool:
        """Whether the token is another than the main model's likeliest."""
        return self.token != self.main[0].token


@torch.no_grad()
def trace(
    main: Any,
    contrast: Any,
    rule: Callable[[Tensor, Tensor], Tensor],
    tokens: Tensor,
    prompt_length: int,
    *,
    top: int = 4,
) -> list[Step]:
    """Look back at a finished text, with one forward of each model.

    Args:
        main, contrast: causal language models of one tokenizer.
        rule: scores `(N, V)` from the logits `(N, V)` of both, such as `rules.contrastive_decoding`.
        tokens: `(T,)` the prompt and what was generated after it, without padding.
        prompt_length: where the generated tokens begin, at least 1.
        top: how many candidates each step keeps.

    Example:
        >>> from contralto import testbed
        >>> from contralto.decoding.rules import contrastive_decoding
        >>> tokenizer = testbed.tokenizer()
        >>> tokens = tokenizer("Ben went to the barn.", return_tensors="pt")["input_ids"][0]
        >>> steps = trace(testbed.load("expert"), testbed.load("amateur"), contrastive_decoding, tokens, prompt_length=4)
        >>> [tokenizer.decode([step.token]) for step in steps]
        ['the', 'barn', '.']
    """
    if not 1 <= prompt_length <= len(tokens):
        raise ValueError(f"prompt_length must lie in [1, {len(tokens)}], the length of the text, not {prompt_length}")
    places = slice(prompt_length - 1, -1)
    main_logits = main(input_ids=tokens[None]).logits[0, places].float()
    contrast_logits = contrast(input_ids=tokens[None]).logits[0, places].float()
    contrast_logits = fit_vocabulary(contrast_logits, main_logits.shape[-1])
    tops = [_top(logits, top) for logits in (main_logits, contrast_logits, rule(main_logits, contrast_logits))]
    return [Step(token, *at) for token, *at in zip(tokens[prompt_length:].tolist(), *tops, strict=True)]


def _top(scores: Tensor, count: int) -> list[tuple[Candidate, ...]]:
    best = scores.softmax(-1).topk(min(count, scores.shape[-1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple(map(Candidate, tokens, probabilities)) for tokens, probabilities in rows]
