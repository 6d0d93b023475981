"""The oracle: contrastive decoding written as the papers write it, in float64, one row at a time, without a cache.

Nothing here imports contralto or uses tricks: formulas in plain Python floats, forwards on the whole unpadded row. The
fast code must give the same tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Scorer = Callable[[Tensor], Tensor]
"""The scores `(V,)` of the next token after one unpadded row of ids `(T,)`."""


def log_softmax(logits: Sequence[float]) -> list[float]:
    """log p_v = z_v - log sum_w exp z_w."""
    top = max(logits)
    if top == -math.inf:
        return [-math.inf] * len(logits)
    log_sum = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - log_sum for z in logits]


def plausible(logits: Sequence[float], alpha: float, min_tokens_to_keep: int = 1) -> list[bool]:
    """p_v >= alpha max_w p_w, or one of the likeliest tokens, and possible; on probabilities, not on logits."""
    top = max(logits)
    p = [math.exp(z - top) for z in logits]
    kept = sorted(p, reverse=True)[min(min_tokens_to_keep, len(p)) - 1]
    return [x > 0 and (x >= alpha * max(p) * (1 - 1e-12) or x >= kept) for x in p]


def contrastive_decoding(
    expert: Sequence[float],
    amateur: Sequence[float],
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    min_tokens_to_keep: int = 1,
) -> list[float]:
    """(1 + beta) log p_e - beta log p_a on the plausible tokens (O'Brien & Lewis)."""
    keep = plausible(expert, alpha, min_tokens_to_keep)
    e, a = log_softmax(expert), log_softmax(amateur)
    return [(1 + beta) * x - (beta * y if beta else 0) if k else -math.inf for x, y, k in zip(e, a, keep, strict=True)]


def contrastive_decoding_li(
    expert: Sequence[float],
    amateur: Sequence[float],
    *,
    alpha: float = 0.1,
    amateur_temperature: float = 1.0,
    min_tokens_to_keep: int = 1,
) -> list[float]:
    """log p_e - log p_a(tau) on the plausible tokens (Li et al.)."""
    keep = plausible(expert, alpha, min_tokens_to_keep)
    e, a = log_softmax(expert), log_softmax([z / amateur_temperature for z in amateur])
    return [x - y if k else -math.inf for x, y, k in zip(e, a, keep, strict=True)]


@torch.no_grad()
def next_logits(model: Any, ids: Tensor, encoder_ids: Tensor | None = None) -> list[float]:
    """Next-token logits of a float64 model after one whole row, without a cache or a mask."""
    if encoder_ids is not None:
        output = model(input_ids=encoder_ids[None], decoder_input_ids=ids[None], use_cache=False)
    else:
        output = model(input_ids=ids[None], use_cache=False)
    return list(output.logits[0, -1].double().tolist())


def scorer(
    expert: Any, amateur: Any, *, encoder_ids: Tensor | None = None, window: int | None = None, **rule: Any
) -> Any:
    """The reference scorer of a pair. With `window`, the amateur misses all but the prompt's last tokens.

    The prompt is the shortest row that the scorer has seen.
    """
    form = contrastive_decoding_li if rule.pop("form", "obrien") == "li" else contrastive_decoding
    prompt = [math.inf]

    def score(ids: Tensor) -> Tensor:
        prompt[0] = min(prompt[0], len(ids))
        hidden = 0 if window is None else max(0, int(prompt[0]) - window)
        e, a = next_logits(expert, ids, encoder_ids), next_logits(amateur, ids[hidden:], encoder_ids)
        return torch.tensor(form(e, a, **rule), dtype=torch.float64)

    return score


def greedy(score: Scorer, prompt: Tensor, steps: int, eos: int) -> list[int]:
    """The likeliest token at every step, until the end token."""
    ids = prompt
    for _ in range(steps):
        ids = torch.cat([ids, score(ids).argmax()[None]])
        if ids[-1] == eos:
            break
    return list(ids[len(prompt) :].tolist())


def sample(scores: Sequence[Scorer], prompts: Sequence[Tensor], steps: int, eos: int, seed: int) -> list[list[int]]:
    """One draw per step for all rows together, as `generate()` draws, so that a seed gives the same tokens."""
    torch.manual_seed(seed)
    rows, done = list(prompts), [False] * len(prompts)
    for _ in range(steps):
        p = torch.stack([score(row) for score, row in zip(scores, rows, strict=True)]).float().softmax(-1)
        drawn = torch.multinomial(p, 1)
        rows = [row if end else torch.cat([row, new]) for row, new, end in zip(rows, drawn, done, strict=True)]
        done = [end or int(row[-1]) == eos for row, end in zip(rows, done, strict=True)]
        if all(done):
            break
    return [row[len(prompt) :].tolist() for row, prompt in zip(rows, prompts, strict=True)]


def beam(score: Scorer, prompt: Tensor, steps: int, eos: int, num_beams: int) -> list[int]:
    """Beam search over summed scores, ranked by the mean per generated token (`length_penalty=1`).

    Hypotheses that end are kept; the search stops when the best of `num_beams` kept ones cannot be beaten by a running
    one of the current length (`early_stopping=False`).
    """
    running, finished = [(0.0, prompt)], []
    for step in range(1, steps + 1):
        grown = []
        for total, ids in running:
            for token, s in enumerate(score(ids).tolist()):
                grown.append((total + s, torch.cat([ids, torch.tensor([token])])))
        grown.sort(key=lambda hypothesis: -hypothesis[0])
        finished += [(t / step, ids) for t, ids in grown[:num_beams] if ids[-1] == eos or step == steps]
        finished = sorted(finished, key=lambda hypothesis: -hypothesis[0])[:num_beams]
        running = [(t, ids) for t, ids in grown[: 2 * num_beams] if ids[-1] != eos][:num_beams]
        if len(finished) == num_beams and running[0][0] / step <= finished[-1][0]:
            break
    return list(finished[0][1][len(prompt) :].tolist())


def beam_released(
    expert: Scorer,
    amateur: Scorer,
    prompt: Tensor,
    steps: int,
    num_beams: int,
    *,
    tau: float,
    st_coef: float,
    alpha: float,
) -> list[int]:
    """The beam search of the code of Li et al. 2022 (`beam_search` in its transformers fork), without an end token.

    Each step: log-probabilities of the expert, masked (at least two tokens stay); from those of all beams that are not masked (in the
    first step from the masked ones of the first beam, whose copies have the sum -1e9) the 2 * num_beams highest are taken, and
    ranked by the beam's sum + the masked log-probability - st_coef * log p_amateur / tau. The best num_beams go on.
    """
    beams = [(0.0 if i == 0 else -1e9, prompt) for i in range(num_beams)]
    for step in range(steps):
        pool = []
        for total, ids in beams:
            e, a = log_softmax(expert(ids).tolist()), log_softmax(amateur(ids).tolist())
            keep = plausible(e, alpha, 2)
            for token, (x, y, k) in enumerate(zip(e, a, keep, strict=True)):
                masked = x if k else -math.inf
                rank = masked + total if step == 0 else x
                pool.append((rank, total + masked - st_coef * y / tau, torch.cat([ids, torch.tensor([token])])))
        pool = sorted(pool, key=lambda each: -each[0])[: 2 * num_beams]
        beams = [(score, ids) for _, score, ids in sorted(pool, key=lambda each: -each[1])[:num_beams]]
    return list(beams[0][1][len(prompt) :].tolist())
