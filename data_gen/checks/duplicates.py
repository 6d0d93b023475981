"""The check for pairs that repeat an earlier one."""

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from contralto.data_gen.checks.base import Columns, PairRows, answer_text, writes
from contralto.data_gen.checks.contrast import jaccard
from contralto.data_gen.ranges import check_number
from contralto.data_gen.templates import as_text

__all__ = ["duplicates"]


@writes("duplicate_of", "near_duplicate_of")
def duplicates(
    rows: PairRows, *, threshold: float = 0.8, of: str = "pair", shingle: int = 5, permutations: int = 128
) -> Columns:
    """Find pairs that are the same, or nearly the same, as an earlier one.

    Candidates for near duplicates come from MinHash with locality-sensitive hashing (datasketch), and are then compared by the
    exact Jaccard similarity of their shingles: there are no false positives, and few are missed.

    Args:
        rows: the pairs, with `id`.
        threshold: the similarity from which pairs are nearly the same, in (0, 1).
        of: `pair` compares prompt and both answers; `prompt` the prompt alone, of which pooled strategies have several pairs.
        shingle: consecutive words of a shingle.
        permutations: of MinHash; more miss less.

    Returns:
        `duplicate_of`, the id of the first pair that differs in nothing but case and white space, or None;
        `near_duplicate_of`, the id of an earlier pair whose shingles are nearly the same, or None.

    Raises:
        ValueError: a setting is outside its range.
    """
    _check_duplicates(threshold, of, shingle, permutations)
    if not rows:
        return {"duplicate_of": [], "near_duplicate_of": []}
    index, first = _NearDuplicates(threshold, permutations), dict[str, Any]()
    exact: list[Any] = []
    near: list[Any] = []
    for row in tqdm(rows, desc="duplicates", unit="row"):
        words = _compared_text(row, of).casefold().split()
        text = " ".join(words)
        exact.append(first.get(text))
        near.append(None if text in first else index.add(row["id"], _shingles(words, shingle)))
        first.setdefault(text, row["id"])
    return {"duplicate_of": exact, "near_duplicate_of": near}


def _check_duplicates(threshold: float, of: str, shingle: int, permutations: int) -> None:
    check_number("duplicates: shingle", shingle, least=1, most=10_000, whole=True)
    check_number("duplicates: permutations", permutations, least=2, most=65_536, whole=True)
    if isinstance(threshold, bool | str) or not 0 < threshold < 1:
        raise ValueError(f"duplicates: threshold must lie between 0 and 1, not {threshold}")
    if of not in ("pair", "prompt"):
        raise ValueError(f"duplicates: of must be pair or prompt, not {of!r}")


class _NearDuplicates:
    """An index of sets of shingles, none of which is nearly the same as another one."""

    def __init__(self, threshold: float, permutations: int) -> None:
        from datasketch import MinHash, MinHashLSH
        from xxhash import xxh32_intdigest

        self._threshold = threshold
        # these weights favour recall; precision does not matter, since candidates are compared exactly
        self._index = MinHashLSH(threshold=threshold, num_perm=permutations, weights=(0.05, 0.95))
        self._blank = MinHash(num_perm=permutations, hashfunc=xxh32_intdigest)  # drawing the permutations takes a while
        self._kept: list[tuple[Any, set[str]]] = []

    def add(self, name: Any, shingles: set[str]) -> Any:
        """Return the name of the first set that is nearly the same; None if there is none, and the set is added."""
        sketch = self._blank.copy()
        sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
        for at in sorted(self._index.query(sketch)):
            other, kept = self._kept[at]
            if jaccard(list(shingles), list(kept)) >= self._threshold:
                return other
        self._index.insert(len(self._kept), sketch)
        self._kept.append((name, shingles))
        return None


def _shingles(words: list[str], size: int) -> set[str]:
    """Return all runs of `size` words; a shorter text is one shingle."""
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def _compared_text(row: Mapping[str, Any], of: str) -> str:
    prompt = as_text(row["prompt"])
    return prompt if of == "prompt" else "\n\n".join([prompt, answer_text(row, "chosen"), answer_text(row, "rejected")])
