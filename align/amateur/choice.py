"""Choose the layers that an amateur keeps: the heuristics of published work on pruning depth.

| name | layers that are kept | source |
|---|---|---|
| `spread` | evenly spaced, the first and the last among them | DistilBERT (Sanh et al. 2019, arXiv 1910.01108) keeps one of two, Sajjad et al. 2020 (2004.03844) compare |
| `first` | the first ones | early exit, as LayerSkip (Elhoushi et al. 2024, 2404.16710) drafts |
| `influence` | those that change their input most, on texts | ShortGPT (Men et al. 2024, 2403.03853) |
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from contralto.common.registry import Registry

__all__ = ["CHOICES", "LayerChoice", "check_keep", "choose_layers"]


class LayerChoice(NamedTuple):
    """A heuristic that chooses layers."""

    name: str
    description: str
    """A noun phrase for help texts."""
    choose: Callable[[int, int, Sequence[float]], list[int]]
    """Returns the numbers of the layers, given the depth, the number of layers to keep, and the influence of each layer."""
    reads_texts: bool
    """Whether it needs the influences, which are measured on texts."""


def _spread(depth: int, count: int, _: Sequence[float]) -> list[int]:
    return [round(i * (depth - 1) / max(1, count - 1)) for i in range(count)]


def _first(depth: int, count: int, _: Sequence[float]) -> list[int]:
    return list(range(count))


def _influence(depth: int, count: int, influences: Sequence[float]) -> list[int]:
    return sorted(sorted(range(depth), key=lambda layer: -influences[layer])[:count])


CHOICES: Registry[LayerChoice] = Registry("choice of layers", group="contralto.layer_choices")
"""The heuristics by name. Packages add theirs by entry points of the group `contralto.layer_choices`."""
for _choice in (
    LayerChoice("spread", "evenly spaced, the first and the last among them", _spread, reads_texts=False),
    LayerChoice("first", "the first ones", _first, reads_texts=False),
    LayerChoice("influence", "those that change their input most", _influence, reads_texts=True),
):
    CHOICES.register(_choice)


def check_keep(keep: str) -> None:
    """Raise ValueError unless `keep` is a name in `CHOICES` or a list of numbers.

    Args:
        keep: such as spread, or 0,4,9.

    Raises:
        ValueError: anything else.

    Examples:
        >>> check_keep("0,x")
        Traceback (most recent call last):
            ...
        ValueError: keep must be one of spread, first, influence, or numbers of layers such as 0,4,9, not '0,x'
    """
    if keep not in CHOICES and not all(part.strip().isdigit() for part in keep.split(",")):
        raise ValueError(f"keep must be one of {', '.join(CHOICES)}, or numbers of layers such as 0,4,9, not {keep!r}")


def choose_layers(keep: str, depth: int, count: int | None, influences: Sequence[float] = ()) -> list[int]:
    """Return the numbers of the layers to keep, from 0.

    Args:
        keep: a name in `CHOICES`, or numbers of layers, `i,j,k`.
        depth: number of layers of the whole model.
        count: number of layers to keep; None with numbers of layers, else required.
        influences: the influence of each layer, for a choice that reads texts.

    Raises:
        ValueError: a number out of range, or a count that contradicts the numbers.

    Examples:
        >>> choose_layers("spread", 30, 4), choose_layers("2,0", 4, None)
        ([0, 10, 19, 29], [0, 2])
    """
    check_keep(keep)
    if keep not in CHOICES:
        kept = sorted({int(part) for part in keep.split(",")})
        if kept[-1] >= depth:
            raise ValueError(f"the model has layers 0 to {depth - 1}, and keep names {kept[-1]}")
        if count not in (None, len(kept)):
            raise ValueError(f"keep names {len(kept)} layers, and layers is {count}: leave layers out")
        return kept
    if count is None or not 1 <= count < depth:
        raise ValueError(f"layers must be a number from 1 to {depth - 1}, of the model's {depth} layers, not {count}")
    return CHOICES[keep].choose(depth, count, influences)
