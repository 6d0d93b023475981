"""Suggest the name that a user probably meant, for errors about unknown names."""

import difflib
from collections.abc import Iterable

__all__ = ["closest", "did_you_mean"]

SIMILAR = 0.65
"""The smallest similarity of a suggestion, by `difflib`: "vdc" is 0.67 of "vcd"."""


def closest(name: object, names: Iterable[object], *, similar: float = SIMILAR) -> str | None:
    """Return the most similar of some names; case, dashes and underscores do not count.

    Args:
        name: an unknown name.
        names: the known names.
        similar: the smallest similarity, in [0, 1].

    Returns:
        One of `names`; None if no name is similar.

    Examples:
        >>> closest("apo-zeor", ["apo_zero", "apo_down", "dpo"]), closest("nothing", ["apo_zero", "dpo"])
        ('apo_zero', None)
    """
    known = dict[str, str]()
    for each in names:
        known.setdefault(_normal(each), str(each))
    found = difflib.get_close_matches(_normal(name), known, n=1, cutoff=similar)
    return known[found[0]] if found else None


def did_you_mean(name: object, names: Iterable[object]) -> str:
    """Return a remark that follows an unknown name in an error.

    Args:
        name: the unknown name.
        names: the known names.

    Returns:
        ` (did you mean 'NAME'?)`, with a space before it; an empty string if no name is similar.

    Examples:
        >>> did_you_mean("vdc", ["cd", "vcd"]), did_you_mean("x", ["cd"])
        (" (did you mean 'vcd'?)", '')
    """
    found = closest(name, names)
    return "" if found is None else f" (did you mean {found!r}?)"


def _normal(name: object) -> str:
    return str(name).lower().replace("-", "_")
