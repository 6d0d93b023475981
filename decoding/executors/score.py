"""Score continuations under a contrastive method: teacher-forced, one forward pass per branch.

    renormalized:  sum_t log softmax(scores_t)(y_t)          a log-probability, at most 0
    raw:           sum_t scores_t(y_t)                       e.g. sum (1 + beta) log p_e - beta log p_a, any sign

The papers do not say which of them they use, and the two rank differently, so a result has to name it. Nor do they say how they
score implausible tokens: with the plausibility constraint, one such token would make an option impossible, and often all options
at once. So the constraint is left out by default; with `masked`, an excluded token has a finite score, and the result counts
these tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from contralto.common.placement import input_device
from contralto.decoding.branches import ModelBranch
from contralto.decoding.branches.padding import check_unpadded, padding_of, warn_of_start
from contralto.decoding.branches.prompts import check_inputs, is_multimodal
from contralto.decoding.branches.variants import check_loaded

if TYPE_CHECKING:
    from contralto.decoding.processors import ContrastiveLogitsProcessor

__all__ = ["Likelihood", "score"]

FLOOR = -1000.0
"""The score of an excluded token, as in DoLa's code: finite, so that two options with excluded tokens still differ."""


class Likelihood(NamedTuple):
    """The log-likelihood of one continuation per row."""

    total: Tensor
    """`(B,)` the sum over the tokens of the continuation, in nats."""
    tokens: Tensor
    """`(B, S)` the terms of the sum, 0 where the continuation is padded."""
    length: Tensor
    """`(B,)` int64, the number of tokens of the continuation."""
    ruled_out: Tensor
    """`(B,)` int64, the number of tokens that the constraint excludes; each has the floor as its score."""
    is_greedy: Tensor
    """`(B,)` bool, whether every token is the one of the largest score."""


@torch.no_grad()
def score(
    method: "ContrastiveLogitsProcessor",
    model: Any,
    inputs: Mapping[str, Any],
    continuations: Mapping[str, Any] | Tensor,
    *,
    continuation_mask: Tensor | None = None,
    renormalized: bool = True,
    masked: bool = False,
    floor: float = FLOOR,
    dtype: torch.dtype | None = None,
) -> Likelihood:
    """Return the log-likelihood of continuations under a contrastive method.

    Args:
        method: a processor of `processors`, made for these prompts.
        model: the main model.
        inputs: the prompts as the tokenizer or processor returns them, padded on the left, one per continuation; for an
            encoder-decoder the source texts.
        continuations: one per prompt, padded on the right, without special tokens: `input_ids` `(B, S)` and `attention_mask`
            as the tokenizer returns them, or the token ids `(B, S)` alone.
        continuation_mask: `(B, S)`, 0 for the padding of token ids; None if there is none, or if `continuations` hold a mask.
        renormalized: whether to score log-probabilities; otherwise the raw scores of the rule, as `contralto eval` does
            with `score=raw`.
        masked: whether to apply the method's plausibility constraint.
        floor: the score of a token that the constraint excludes.
        dtype: the precision of the renormalisation; default: float32.

    Returns:
        `Likelihood`, in that precision, on the model's device.

    Raises:
        TypeError: a method without likelihoods; prompts or continuations that are texts or lists.
        ValueError: shapes that do not match, an empty continuation, continuations that are padded on the left, or that end in
            pad tokens without a mask.

    Warns:
        UserWarning: every continuation begins with the beginning-of-text token.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
        >>> prompt = tokenizer(["Ben went out to the"] * 2, return_tensors="pt")
        >>> how = {"return_tensors": "pt", "padding": True, "padding_side": "right", "add_special_tokens": False}
        >>> options = tokenizer(["barn door.", "barn barn barn."], **how)
        >>> likelihood = score(ContrastiveDecodingLogitsProcessor(amateur), expert, prompt, options)
        >>> bool(likelihood.total[0] > likelihood.total[1])
        True
    """
    if isinstance(method, type) or not hasattr(method, "combine"):
        raise TypeError(
            f"score needs a logits processor such as ContrastiveDecodingLogitsProcessor(amateur), not {_named(method)}"
        )
    check_loaded(model)
    ids, mask = _read_continuations(model, continuations, continuation_mask)
    chosen = ids.masked_fill(mask.to(ids.device) == 0, 0)  # may be padded with any token
    scores = _scores(method, model, inputs, chosen, mask, masked=masked)
    return _likelihood(scores, chosen.to(scores.device), mask.to(scores.device).bool(), renormalized, floor, dtype)


def _named(value: Any) -> str:
    """Return the name of a class, or of an object's class."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _read_continuations(
    model: Any, continuations: Mapping[str, Any] | Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the token ids `(B, S)` of continuations and their mask."""
    ids: Any = continuations
    if isinstance(continuations, Mapping):
        own, ids = continuations.get("attention_mask"), continuations.get("input_ids")
        if own is not None and mask is not None:
            raise ValueError("the continuations hold an attention_mask of their own: leave continuation_mask out")
        mask = own if mask is None else mask
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"continuations must be token ids (rows, length), not {type(ids).__name__}: pass tokenizer(texts, "
            "return_tensors='pt', padding=True, padding_side='right', add_special_tokens=False)"
        )
    if ids.is_floating_point():
        raise TypeError(f"continuations must be token ids, not {str(ids.dtype).removeprefix('torch.')}")
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(f"continuations must be of shape (rows, length) with tokens, not {tuple(ids.shape)}")
    if mask is None:
        check_unpadded(model, ids)
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(
            f"the mask of the continuations has shape {tuple(mask.shape)}, not {tuple(ids.shape)} as they have"
        )
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("the continuations are padded on the left: pass padding_side='right' to the tokenizer")
    if not (rows := mask.sum(-1)).all():
        raise ValueError(f"continuation {int((rows == 0).nonzero()[0])} is empty")
    warn_of_start(model, ids)
    return ids, mask


def _scores(
    method: "ContrastiveLogitsProcessor",
    model: Any,
    inputs: Mapping[str, Any],
    continuations: Tensor,
    continuation_mask: Tensor,
    *,
    masked: bool,
) -> Tensor:
    """Return the scores `(B, S, V)` of the method for every token of the continuations."""
    method.check_model(model)
    prompts = main_prompts(model, inputs, len(continuations))
    if len(prompts.ids) != len(continuations):
        raise ValueError(
            f"score needs one continuation per prompt, not {len(continuations)} for {len(prompts.ids)} prompts"
        )
    device, count = input_device(model), continuations.shape[1]
    rows = torch.cat([prompts.ids.to(device), continuations.to(device)], dim=1)
    mask = torch.cat([prompts.mask.to(device), continuation_mask.to(prompts.mask.dtype).to(device)], dim=1)
    main = prompts.branch.score(rows, count, mask).float()
    contrasts = [branch.score(rows, count, mask) for branch in method.branches]
    steps = torch.arange(count, device=device)[:, None]
    changed = {} if masked or method.threshold is None else {method.threshold: 0.0}
    return method.combine(
        main,
        contrasts,
        steps,
        place=lambda row, at, *_: f"in row {row}, for token {at + 1} of the continuation",
        **changed,
    )


class MainPrompts(NamedTuple):
    """Prompts of the main model and the branch that reads them."""

    ids: Tensor
    mask: Tensor
    branch: ModelBranch


def main_prompts(model: Any, inputs: Mapping[str, Any], rows: int) -> MainPrompts:
    """Return the main rows up to the continuation, and a branch that reads them without a limit of length.

    Args:
        model: the main model.
        inputs: the prompts as its tokenizer or processor returns them; for an encoder-decoder the source texts.
        rows: number of continuations.
    """
    if model.config.is_encoder_decoder:
        start = torch.full((rows, 1), model.generation_config.decoder_start_token_id)
        return MainPrompts(start, torch.ones_like(start), ModelBranch(model, encoder_inputs=inputs, is_main=True))
    check_inputs("the prompts", inputs)
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = padding_of(model, ids) if mask is None else mask
    vision = (
        {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")} if is_multimodal(model) else {}
    )
    branch = ModelBranch(model, attention_mask=mask, vision_inputs=vision or None, is_main=True)
    return MainPrompts(ids, mask, branch)


def _likelihood(
    scores: Tensor, chosen: Tensor, kept: Tensor, renormalized: bool, floor: float, dtype: torch.dtype | None
) -> Likelihood:
    is_greedy = ((scores.argmax(-1) == chosen) | ~kept).all(-1)
    values = scores.log_softmax(-1, dtype=dtype) if renormalized else scores
    tokens = values.gather(-1, chosen[..., None]).squeeze(-1)
    ruled_out = (tokens == -torch.inf) & kept
    tokens = torch.where(ruled_out, floor, torch.where(kept, tokens, 0.0))
    return Likelihood(tokens.sum(-1), tokens, kept.sum(-1), ruled_out.sum(-1), is_greedy)
