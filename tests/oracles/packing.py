"""Which tokens of a packed row a token attends to, from the paths of its sequences alone: plain Python.

Nothing here imports contralto or torch. A path is the list of positions in the row at which the tokens of a sequence stand.
"""

from collections.abc import Sequence


def attended(paths: Sequence[Sequence[int]], width: int, window: int | None = None) -> list[list[bool]]:
    """Whether each query attends to each key: to the tokens before it on its path, the last `window` of them; padding to itself."""
    mask = [[query == key for key in range(width)] for query in range(width)]
    for path in paths:
        for i, query in enumerate(path):
            for j, key in enumerate(path[: i + 1]):
                mask[query][key] = window is None or i - j < window
    return mask


def fewest_bins(lengths: Sequence[int], capacity: int) -> int:
    """The smallest number of bins that hold all items, by trying every assignment."""
    best = len(lengths)

    def place(item: int, free: list[int]) -> None:
        nonlocal best
        if len(free) >= best and item < len(lengths):
            return
        if item == len(lengths):
            best = min(best, len(free))
            return
        for i, space in enumerate(free):
            if lengths[item] <= space:
                place(item + 1, [*free[:i], space - lengths[item], *free[i + 1 :]])
        place(item + 1, [*free, capacity - lengths[item]])

    place(0, [])
    return best
