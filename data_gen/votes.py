"""The agreement of annotators who voted on the pairs of a data set."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from contralto.common.agreement import count_labels, fleiss_kappa
from contralto.data_gen.types import digest

__all__ = ["VoteSummary", "summarise_votes"]

SWAPPED = {"chosen": "rejected", "rejected": "chosen", "tie": "tie"}


class VoteSummary(NamedTuple):
    """The agreement of annotators on pairs."""

    pairs: int
    annotators: int
    """The largest number of votes on a pair."""
    unanimous: float
    """The share of pairs on which all votes are the same."""
    agreement: float
    """The mean of (votes for chosen - votes for rejected) / votes."""
    kappa: float | None
    """Fleiss' kappa of pairs with a vote of every annotator; None where it is not defined."""

    def __str__(self) -> str:
        kappa = "" if self.kappa is None else f", Fleiss' kappa {self.kappa:.2f}"
        return (
            f"votes of up to {self.annotators} annotators on {self.pairs} pairs: unanimous on {self.unanimous:.0%}, mean margin "
            f"{self.agreement:.2f}{kappa}"
        )


def summarise_votes(rows: Iterable[Mapping[str, Any]]) -> VoteSummary | None:
    """Summarise the column `votes` of pairs; None if no pair has it.

    The better answer of a pair is that with more votes, so its name says how most annotators voted, and kappa of the names would
    take their agreement for chance. For kappa, each pair's answers are therefore named anew, by a coin from its id.

    Args:
        rows: pairs with `votes`, as the strategy `vote` writes them.

    Examples:
        >>> print(summarise_votes([{"id": "a", "votes": ["chosen"] * 3}, {"id": "b", "votes": ["chosen", "chosen", "tie"]}]))
        votes of up to 3 annotators on 2 pairs: unanimous on 50%, mean margin 0.83, Fleiss' kappa -0.20
        >>> summarise_votes([{"id": "a"}]) is None
        True
    """
    voted = [row for row in rows if row.get("votes")]
    if not voted:
        return None
    most = max(len(row["votes"]) for row in voted)
    complete = [_renamed(row) for row in voted if len(row["votes"]) == most]
    kappa = fleiss_kappa(count_labels(complete, list(SWAPPED))) if most > 1 else math.nan
    return VoteSummary(
        len(voted),
        most,
        fmean(len(set(row["votes"])) == 1 for row in voted),
        fmean((row["votes"].count("chosen") - row["votes"].count("rejected")) / len(row["votes"]) for row in voted),
        None if math.isnan(kappa) else kappa,
    )


def _renamed(row: Mapping[str, Any]) -> Sequence[str]:
    is_kept = int(digest(["votes", row.get("id")])[:8], 16) % 2 == 0
    return row["votes"] if is_kept else [SWAPPED[vote] for vote in row["votes"]]
