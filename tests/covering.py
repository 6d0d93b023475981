"""Choose a subset of a test's parameter product that covers every pair of values."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations


def covering(rows: Sequence[Mapping[str, Hashable]], *, strength: int = 2, chosen: Iterable[int] = ()) -> list[int]:
    """Choose rows so that every combination of `strength` values that is in some row is in a chosen one.

    Products of model families, methods and executors are too many to be run each time; faults mostly come of two of their
    values together (Kuhn, Wallace and Gallo 2004, "Software fault interactions and implications for software testing").

    Args:
        rows: values by their parameters' names.
        strength: how many values must meet; 1 is every value once.
        chosen: numbers of rows that are run in any case.

    Returns:
        The numbers of the chosen rows, greedily, in order; always the same ones.

    Examples:
        >>> rows = [{"family": f, "method": m, "beams": b} for f in "xyz" for m in "pqr" for b in (1, 2)]
        >>> len(covering(rows)), len(covering(rows, strength=1))
        (9, 3)
    """
    parts = [set(combinations(sorted(row.items(), key=str), min(strength, len(row)))) for row in rows]
    taken = set(chosen)
    missing = set().union(*parts) - set().union(*(parts[i] for i in taken))
    while missing:
        best = max(range(len(rows)), key=lambda i: (len(parts[i] & missing), -i))
        taken.add(best)
        missing -= parts[best]
    return sorted(taken)
