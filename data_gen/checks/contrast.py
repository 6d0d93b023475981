"""Checks of one pair by its texts: the difference of its answers, and whether they are complete."""

from collections.abc import Callable, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from contralto.data_gen.checks.base import Columns, PairRows, answer_text, writes

__all__ = ["contrast", "finish", "jaccard"]


@writes("length_ratio", "jaccard", "levenshtein", "no_op")
def contrast(rows: PairRows, *, tokenizer: str | None = None) -> Columns:
    """Measure the difference of the two answers (D'Oosterlinck et al. 2024, arXiv 2408.06266).

    Args:
        rows: the pairs.
        tokenizer: the tokenizer of the Jaccard similarity: a folder, a hub id, or testbed:NAME. None splits at white space.
            The paper does not name its own, and the value depends on it.

    Returns:
        `jaccard`, shared tokens over all tokens, as sets; `levenshtein`, the edit distance in characters; `length_ratio`,
        characters of chosen over characters of rejected, None if rejected is empty; `no_op`, True if the answers differ in
        nothing but white space at their ends.
    """
    split = str.split if tokenizer is None or not rows else _tokenize(tokenizer)
    both = [(answer_text(row, "chosen"), answer_text(row, "rejected")) for row in rows]
    return {
        "length_ratio": [len(chosen) / len(rejected) if rejected else None for chosen, rejected in both],
        "jaccard": [jaccard(split(chosen), split(rejected)) for chosen, rejected in both],
        "levenshtein": [Levenshtein.distance(chosen, rejected) for chosen, rejected in both],
        "no_op": [chosen.strip() == rejected.strip() for chosen, rejected in both],
    }


def jaccard(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Return |A and B| / |A or B| of the sets of tokens; 1 if both are empty.

    Args:
        first: the tokens of one text.
        second: the tokens of the other text.

    Examples:
        >>> jaccard("a b b c".split(), "b c d".split())
        0.5
    """
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one | other else 1.0


def _tokenize(name: str) -> Callable[[str], list[str]]:
    from transformers import AutoTokenizer

    from contralto.common.hub import from_pretrained

    return from_pretrained(AutoTokenizer, name).tokenize  # type: ignore[no-any-return]


@writes("finished", "empty")
def finish(rows: PairRows) -> Columns:
    """Check whether both answers were ended by their models, and whether one is empty.

    Args:
        rows: the pairs, with `chosen_finish_reason` and `rejected_finish_reason` if they are known.

    Returns:
        `finished`, True if both answers were ended by their models, None if that is not known; `empty`, True if an answer is
        empty.
    """
    reasons = [[row.get(f"{name}_finish_reason") for name in ("chosen", "rejected")] for row in rows]
    return {
        "finished": [None if None in both else both == ["stop", "stop"] for both in reasons],
        "empty": [not (answer_text(row, "chosen").strip() and answer_text(row, "rejected").strip()) for row in rows],
    }
