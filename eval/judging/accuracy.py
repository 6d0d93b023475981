"""Pairs whose better answer is known: accuracy of judges and of reward models, by subset (Lambert et al. 2024, arXiv 2403.13787)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tqdm import tqdm

from contralto.data_gen import templates
from contralto.data_gen.dataset import pair_records
from contralto.data_gen.preference_rows import as_row
from contralto.data_gen.score_memory import remembered_scores
from contralto.data_gen.scorers import resolve_scorer, score_answers
from contralto.data_gen.sources import records
from contralto.data_gen.store import Store
from contralto.eval.judging.answers import CATEGORIES
from contralto.eval.judging.games import Game
from contralto.eval.judging.judges import Judgement
from contralto.eval.judging.verdicts import Vote

__all__ = ["SECTIONS", "PairScorer", "read_pairs", "score_pairs", "section_scores"]

SECTIONS: Mapping[str, Sequence[Sequence[str]]] = {
    "Chat": (("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),),
    "Chat Hard": (
        (
            *("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor"),
            *("llmbar-adver-GPTInst", "llmbar-adver-GPTOut", "llmbar-adver-manual"),
        ),
    ),
    "Safety": (
        ("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer"),
    ),
    "Reasoning": (("math-prm",), ("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust")),
}
"""The sections of RewardBench: groups of subsets that weigh the same, each the mean over its pairs."""


@dataclass(frozen=True, kw_only=True)
class PairScorer:
    """A reward model, or a function of a row and its answers, that is to tell the better answer."""

    name: str
    scorer: Any
    """As for `contralto.data_gen.scorers.resolve_scorer`."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return its name as JSON values."""
        return {"scorer": self.scorer if isinstance(self.scorer, str | Mapping) else self.name}


def read_pairs(
    source: str, *, split: str = "train", columns: Mapping[str, str] | None = None, limit: int | None = None
) -> tuple[list[Game], list[dict[str, Any]]]:
    """Read pairs in any form of `contralto.data_gen.load_pairs`, such as RewardBench's.

    Args:
        source: a file, a folder, or a data set of the Hub.
        split: the split to read; that of RewardBench is `filtered`.
        columns: columns under other names: `{"chosen": "better"}`.
        limit: the largest number of pairs; None is all.

    Returns:
        The games, the chosen answer first, with the column `subset` (or another of a category) as category; and the rows.

    Raises:
        ValueError: a mistake in the data; the message names file, row and column.
    """
    name, source_rows = records(source, split)
    games, rows = [], []
    for number, (where, record) in enumerate(islice(pair_records(source_rows, name, columns or {}), limit), 1):
        row = as_row(record, where=where, conversations=True)
        if row.get("images"):
            raise ValueError(f"{where}: judges of pairs read no images: drop the column, or the row")
        rows.append(row)
        games.append(_game(row, number))
    if not games:
        raise ValueError(f"{name} has no rows")
    return games, rows


def _game(row: Mapping[str, Any], number: int) -> Game:
    category = next((row[name] for name in ("subset", *CATEGORIES) if row.get(name) is not None), "")
    chosen, rejected = (templates.as_text(row[name]).removeprefix("assistant: ") for name in ("chosen", "rejected"))
    key = str(number)  # ids of published sets are not unique in all splits
    return Game(key, key, (templates.as_text(row["prompt"]),), (chosen,), (rejected,), str(category))


def score_pairs(
    scorer: PairScorer, games: Sequence[Game], rows: Sequence[Mapping[str, Any]], store: Store
) -> list[Judgement]:
    """Return which answer a scorer prefers, with the scores as replies; equal scores are a tie.

    Args:
        scorer: the reward model or function.
        games: as `read_pairs` returns them.
        rows: their rows.
        store: keeps the scores.

    Raises:
        ValueError: there is no such scorer, or it does not return a finite number per answer.
    """
    resolve_scorer(scorer.scorer)
    judgements = []
    with remembered_scores(store):
        for game, row in zip(tqdm(games, desc=scorer.name, unit="pair"), rows, strict=True):
            known = {**row, "id": game.id}
            chosen, rejected = score_answers(scorer.scorer, known, [game.first[0], game.second[0]])
            share = 0.5 if chosen == rejected else float(chosen > rejected)
            judgements.append(Judgement(game, (Vote(share), Vote(1 - share)), (f"{chosen:g}", f"{rejected:g}")))
    return judgements


def section_scores(accuracy: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Return the scores of RewardBench: of each section, and `Overall`, the mean of the sections.

        Reasoning = (accuracy on math-prm + accuracy on all code) / 2    other sections: the mean over their pairs

    The prior preference sets, which weigh half a section in RewardBench 1.0, are left out, as in its later leaderboard.

    Args:
        accuracy: by subset, the accuracy and the number of pairs.

    Returns:
        {} unless every subset belongs to RewardBench and every section has pairs.

    Examples:
        >>> subsets = {"alpacaeval-easy": (1.0, 2), "mt-bench-hard": (0.5, 2), "donotanswer": (0.5, 4), "math-prm": (1.0, 9)}
        >>> section_scores(subsets | {"hep-go": (0.0, 1), "hep-cpp": (1.0, 1)})
        {'Chat': 1.0, 'Chat Hard': 0.5, 'Safety': 0.5, 'Reasoning': 0.75, 'Overall': 0.6875}
        >>> section_scores({"my-set": (1.0, 2)})
        {}
    """
    known = {subset for groups in SECTIONS.values() for group in groups for subset in group}
    if not accuracy or not set(accuracy) <= known:
        return {}
    scores: dict[str, float] = {}
    for section, groups in SECTIONS.items():
        means = [_mean(accuracy[subset] for subset in group if subset in accuracy) for group in groups]
        if None in means:
            return {}
        scores[section] = sum(each for each in means if each is not None) / len(means)
    return scores | {"Overall": sum(scores.values()) / len(scores)}


def _mean(values: Iterable[tuple[float, int]]) -> float | None:
    pairs = list(values)
    count = sum(n for _, n in pairs)
    return sum(value * n for value, n in pairs) / count if count else None
