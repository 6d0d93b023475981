"""What SID, AVISC, PAI and ONLY do to attention, in plain Python floats: one query at a time, as the papers and their code say.

Nothing here imports contralto or torch. `image` and `text` say of every token whether it is one.
"""

import math
import statistics
from collections.abc import Sequence

Row = Sequence[float]
Marks = Sequence[bool]


def sid_hidden(attention: Row, image: Marks, keep: int) -> set[int]:
    """SID (2408.02032): of the image tokens, all but the `keep` least attended ones are hidden."""
    places = [j for j, is_image in enumerate(image) if is_image]
    least = sorted(places, key=lambda j: attention[j])[:keep]
    return set(places) - set(least)


def avisc_zeroed(layers: Sequence[Row], image: Marks, gamma: float, lam: float) -> set[int]:
    """AVISC (2405.17820): layers by their share of attention to the image until gamma; tokens below mean + lam std are zeroed."""
    places = [j for j, is_image in enumerate(image) if is_image]
    sums = [math.fsum(row[j] for j in places) for row in layers]
    order = sorted(range(len(layers)), key=lambda layer: -sums[layer])
    chosen, share = [], 0.0
    for layer in order:
        chosen.append(layer)
        share += sums[layer] / math.fsum(sums)
        if share >= gamma:
            break
    means = {j: math.fsum(layers[layer][j] for layer in chosen) / len(chosen) for j in places}
    bound = statistics.fmean(means.values()) + lam * statistics.stdev(means.values())
    return {j for j in places if means[j] < bound}


def pai_scores(scores: Row, image: Marks, alpha: float) -> list[float]:
    """PAI (2407.21771): w + alpha |w| for image tokens."""
    seen = [is_image and w > -math.inf for w, is_image in zip(scores, image, strict=True)]
    return [w + alpha * abs(w) if is_seen else w for w, is_seen in zip(scores, seen, strict=True)]


def only_weights(heads: Sequence[Row], text: Marks, image: Marks) -> list[list[float]]:
    """ONLY (2507.00898): peaks are removed, then heads whose text-to-visual entropy ratio is below the mean of the heads."""
    kept, ratios = [], []
    for head in heads:
        row = list(head)
        for part in (text, image):
            values = [head[j] for j, inside in enumerate(part) if inside]
            bound = statistics.fmean(values) + statistics.stdev(values)
            row = [0.0 if inside and w > bound else w for w, inside in zip(row, part, strict=True)]
        kept.append(row)
        ratios.append(_entropy(row, text, 0.0) / _entropy(row, image, math.inf))
    return [[0.0] * len(row) if r < statistics.fmean(ratios) else row for row, r in zip(kept, ratios, strict=True)]


def _entropy(row: Row, part: Marks, empty: float) -> float:
    values = [w for w, inside in zip(row, part, strict=True) if inside]
    total = math.fsum(values)
    return -math.fsum(w / total * math.log(w / total + 1e-6) for w in values) if total else empty


def mdi(text: Row, other: Row) -> float:
    """The modality dominance index (2508.10552): (A_T / |T|) / (A_O / |O|), of the attention to every token."""
    return (math.fsum(text) / len(text)) / (math.fsum(other) / len(other))


def aei(text: Row, other: Row) -> tuple[float, float]:
    """The attention efficiency index of the text and of the rest: share of attention by share of tokens."""
    total, count = math.fsum(text) + math.fsum(other), len(text) + len(other)
    return tuple((math.fsum(part) / total) / (len(part) / count) for part in (text, other))
