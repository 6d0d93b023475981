"""Ranked candidates as the papers and their released codes write them: plain Python floats, one row at a time.

Nothing here imports contralto or torch.
"""

import math
from collections.abc import Sequence


def log_softmax(logits: Sequence[float]) -> list[float]:
    """log p_v = z_v - log sum_w exp z_w."""
    top = max(logits)
    log_sum = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - log_sum for z in logits]


def ranking(rows: Sequence[Sequence[tuple[float, float]]], margin: float, tolerance: float) -> float:
    """Sum over distances of ranks of the mean hinge of pairs at that distance; rows hold (score, quality) of each candidate."""
    lost: dict[int, list[float]] = {}
    for row in rows:
        ranked = sorted(row, key=lambda each: -each[1])  # stable: equal ones stay in order
        for i, (better, high) in enumerate(ranked):
            for j, (worse, low) in enumerate(ranked):
                if j > i and high - low > tolerance:
                    lost.setdefault(j - i, []).append(max(0.0, worse - better + (j - i) * margin))
    return math.fsum(math.fsum(each) / len(each) for each in lost.values())


def likelihood(token_logps: Sequence[float], alpha: float) -> float:
    """f(S) = sum_t log p(s_t) / |S|^alpha."""
    return math.fsum(token_logps) / len(token_logps) ** alpha


def overlap(reference: Sequence[int], candidate: Sequence[int], n: int) -> float:
    """The share of the candidate's n-grams that occur in the reference, times the brevity penalty."""
    n = min(n, len(reference), len(candidate))
    grams = [list(candidate[t : t + n]) for t in range(len(candidate) - n + 1)]
    right = sum(any(gram == list(reference[s : s + n]) for s in range(len(reference) - n + 1)) for gram in grams)
    short = len(candidate) <= len(reference)
    return right / len(grams) * (math.exp(1 - len(reference) / len(candidate)) if short else 1.0)


def represent(
    states: Sequence[Sequence[float]], weight: Sequence[Sequence[float]], bias: Sequence[float]
) -> list[float]:
    """z = mean over tokens of relu(W h_t + b)."""
    projected = [
        [
            max(0.0, math.fsum(w * h for w, h in zip(row, state, strict=True)) + b)
            for row, b in zip(weight, bias, strict=True)
        ]
        for state in states
    ]
    return [math.fsum(column) / len(states) for column in zip(*projected, strict=True)]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """a . b / |a| |b|."""
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def candidate_scores(log_probs: Sequence[float], similarity: Sequence[float], alpha: float) -> list[float]:
    """alpha s_i + (1 - alpha) l_i / sum_j -l_j."""
    total = -math.fsum(log_probs)
    return [alpha * s + (1 - alpha) * l / total for s, l in zip(similarity, log_probs, strict=True)]


def diverse(logits: Sequence[Sequence[float]], penalty: float, ended: Sequence[bool] = ()) -> list[int]:
    """The token of each group in turn: log p minus the penalty for each group before it that goes on and has taken the token."""
    tokens: list[int] = []
    for group in logits:
        taken = [token for g, token in enumerate(tokens) if not (ended and ended[g])]
        scores = [p - penalty * taken.count(v) for v, p in enumerate(log_softmax(group))]
        tokens.append(scores.index(max(scores)))
    return tokens
