"""Compare an amateur with its expert on held-out texts: perplexity, agreement, divergence, and the contrast that it gives."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from contralto.align.amateur.texts import Text
from contralto.decoding.rules import contrastive_decoding

__all__ = ["AmateurFigures", "compare_models", "token_batches"]

ALPHA, BETA = 0.1, 0.5
"""Plausibility threshold and strength of contrastive decoding, as in its paper."""


class AmateurFigures(NamedTuple):
    """The figures of an amateur beside its expert, means over the tokens of texts."""

    tokens: int
    """Number of predicted tokens."""
    expert_perplexity: float
    amateur_perplexity: float
    agreement: float
    """Share of tokens at which both models have the same likeliest token."""
    divergence: float
    """KL(expert || amateur) per token, in nats."""
    contrast: float
    """Mean of |log p_expert - log p_amateur| over the plausible tokens, those of at least 0.1 of the largest probability, in nats."""
    plausible: float
    """Mean number of plausible tokens."""
    changed: float
    """Share of tokens at which contrastive decoding (beta 0.5, alpha 0.1) prefers another token than the expert."""


def token_batches(
    tokenizer: Any, texts: Sequence[Text], *, max_length: int, batch_size: int = 4
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids and masks `(B, T)` of texts, padded on the right, and the positions of completions `(B, T)`.

    Args:
        tokenizer: a transformers tokenizer.
        texts: the texts.
        max_length: longer texts are cut to this number of tokens.
        batch_size: number of texts per batch.
    """
    encoded = []
    for text in texts:
        start = len(tokenizer(text.prompt)["input_ids"])
        encoded.append((tokenizer(text.prompt + text.completion)["input_ids"][:max_length], start))
    encoded = sorted((each for each in encoded if len(each[0]) > max(1, each[1])), key=lambda each: -len(each[0]))
    for at in range(0, len(encoded), batch_size):
        rows = encoded[at : at + batch_size]
        width = len(rows[0][0])
        ids, mask, own = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
        for i, (tokens, start) in enumerate(rows):
            ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
            own[i, max(1, start) : len(tokens)] = 1
        yield ids, mask, own


@torch.no_grad()
def compare_models(
    expert: Any, amateur: Any, batches: Iterable[tuple[Tensor, Tensor, Tensor]], *, total: int | None = None
) -> AmateurFigures:
    """Return the figures of an amateur beside its expert.

    Args:
        expert: the model that the amateur is made of.
        amateur: the amateur.
        batches: see `token_batches`.
        total: number of batches, for the progress bar.

    Raises:
        ValueError: the texts have no tokens to predict.

    Examples:
        >>> from contralto import testbed
        >>> expert, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> batches = token_batches(tokenizer, [Text("Ben went", " out to the barn.")], max_length=64)
        >>> figures = compare_models(expert, expert, batches)
        >>> figures.agreement, figures.divergence, figures.changed
        (1.0, 0.0, 0.0)
    """
    sums, tokens = torch.zeros(7, dtype=torch.float64), 0
    for ids, mask, own in tqdm(batches, total=total, desc="held-out texts", unit="batch", disable=None):
        rows = own[:, 1:].bool()
        logits = [_logits(model, ids, mask)[rows] for model in (expert, amateur)]
        sums += _sums(logits[0], logits[1], ids[:, 1:][rows])
        tokens += int(rows.sum())
    if not tokens:
        raise ValueError("the held-out texts have no tokens to predict: write more or longer texts")
    own_nll, other_nll, agree, divergence, contrast, plausible, changed = sums.tolist()
    return AmateurFigures(
        tokens=tokens,
        expert_perplexity=math.exp(own_nll / tokens),
        amateur_perplexity=math.exp(other_nll / tokens),
        agreement=agree / tokens,
        divergence=divergence / tokens,
        contrast=contrast / plausible,
        plausible=plausible / tokens,
        changed=changed / tokens,
    )


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the float32 logits `(B, T - 1, V)` of all tokens but the first, on the CPU."""
    output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    logits: Tensor = output.logits[:, :-1].cpu().float()
    return logits


def _sums(expert: Tensor, amateur: Tensor, targets: Tensor) -> Tensor:
    """Return the sums `(7,)` of the figures over tokens, given logits `(N, V)` and target ids `(N,)`."""
    p, q = expert.log_softmax(-1), amateur.log_softmax(-1)
    kept = p >= p.amax(-1, keepdim=True) + math.log(ALPHA)
    best = expert.argmax(-1)
    chosen = contrastive_decoding(expert, amateur, beta=BETA, alpha=ALPHA).argmax(-1)
    return torch.stack(
        [
            -p.gather(-1, targets[:, None]).sum(),
            -q.gather(-1, targets[:, None]).sum(),
            (best == amateur.argmax(-1)).sum(),
            (p.exp() * (p - q)).sum(),
            (p - q).abs()[kept].sum(),
            kept.sum(),
            (chosen != best).sum(),
        ]
    ).double()
