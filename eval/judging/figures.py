"""The figures of a judgement, as plain data."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from contralto import __version__
from contralto.common.agreement import cohen_kappa, count_labels, fleiss_kappa
from contralto.eval.judging.accuracy import PairScorer, section_scores
from contralto.eval.judging.judges import Judge, Judgement
from contralto.eval.judging.length import length_controlled
from contralto.eval.judging.presets import Preset
from contralto.eval.judging.verdicts import Vote
from contralto.eval.stats.bootstrap import Bootstrap
from contralto.eval.stats.counts import mean
from contralto.eval.stats.permutation import sign_flip
from contralto.eval.stats.proportions import holm

__all__ = ["OUTCOMES", "outcome", "summarise_judgements"]

OUTCOMES = ("win", "tie", "loss")
"""Outcomes of a game for the first system."""
ALL = "all judges"
Rater = Judge | PairScorer


def summarise_judgements(
    judgements: Mapping[str, Sequence[Judgement]],
    judges: Sequence[Rater],
    *,
    systems: tuple[str, str],
    preset: Preset,
    is_accuracy: bool = False,
    resamples: int = 10_000,
) -> dict[str, Any]:
    """Return the figures of a judgement as JSON values.

    Args:
        judgements: by the name of the judge, the same games in the same order.
        judges: the judges.
        systems: the names of both systems.
        preset: the benchmark.
        is_accuracy: the first system is known to be better, so that win rates are accuracies.
        resamples: the number of bootstrap draws.

    Raises:
        ValueError: a judge could decide no game, since its replies are missing or have no verdict.
    """
    for judge in judges:
        _check_readable(judge, judgements[judge.name])
    lines = _lines(judgements, judges, preset, resamples)
    adjusted = holm([line["win_rate"]["p"] for line in lines[: len(judges)] if line["games"]])
    for line, p in zip((each for each in lines[: len(judges)] if each["games"]), adjusted, strict=True):
        line["win_rate"]["holm"] = float(p)
    games = [each.game for each in next(iter(judgements.values()))]
    return {
        "systems": list(systems),
        "is_accuracy": is_accuracy,
        "contralto": __version__,
        "preset": preset.name,
        "differences": list(preset.differences),
        "source": preset.source,
        "games": len(games),
        "questions": len({game.question for game in games}),
        "same": sum(game.is_same for game in games),
        "lengths": [float(np.mean([len(texts[-1]) for texts in side])) for side in _answers(games)],
        "judges": lines,
        "is_length_controlled": preset.is_length_controlled,
        "between": _between(judgements, judges),
        "categories": (categories := _categories(judgements, judges, preset, resamples)),
        "sections": _sections(categories, judges),
        "made_of": {judge.name: judge.identity for judge in judges},
    }


def _check_readable(judge: Rater, column: Sequence[Judgement]) -> None:
    """Raise ValueError for a judge without a single game that it could decide, with the reason."""
    needed = [each for each in column if not each.game.is_same]
    if not needed or any(each.shares is not None for each in needed):
        return
    failures = Counter(each.failed for each in needed if each.failed)
    replies = [reply for each in needed for reply in each.replies if reply]
    if not replies:
        reason, count = failures.most_common(1)[0]
        raise ValueError(f"{judge.name} has no replies: {reason} ({count} times); the same command asks again")
    form = f" it must reply with {judge.prompts.verdict.shape}, not" if isinstance(judge, Judge) else ""
    raise ValueError(f"{judge.name} has no readable verdict in both orders of any game:{form} {replies[0]:.60}")


def outcome(shares: tuple[float, float]) -> str:
    """Return the outcome of a game for the first system: a win or a loss in both orders, else a tie (the rule of MT-Bench).

    Args:
        shares: of the first system, in both orders.

    Examples:
        >>> outcome((1.0, 1.0)), outcome((1.0, 0.0)), outcome((0.5, 1.0)), outcome((0.0, 0.0))
        ('win', 'tie', 'tie', 'loss')
    """
    return {(1.0, 1.0): "win", (0.0, 0.0): "loss"}.get(shares, "tie")


def _answers(games: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return [game.first for game in games], [game.second for game in games]


def _lines(
    judgements: Mapping[str, Sequence[Judgement]],
    judges: Sequence[Rater],
    preset: Preset,
    resamples: int,
    *,
    is_part: bool = False,
) -> list[dict[str, Any]]:
    """Return the figures of each judge, and, of several, those of all together."""
    columns = [judgements[judge.name] for judge in judges]
    of_one = [(judge, [column]) for judge, column in zip(judges, columns, strict=True)]
    of_all = [(None, columns)] if len(judges) > 1 else []
    return [_line(judge, own, preset, resamples, is_part=is_part) for judge, own in [*of_one, *of_all]]


def _line(
    judge: Rater | None,
    columns: Sequence[Sequence[Judgement]],
    preset: Preset,
    resamples: int,
    *,
    is_part: bool = False,
) -> dict[str, Any]:
    """Return the figures of a judge, or, for None, of several together on the games that all of them could judge.

    Those of a category are the win rate and the outcomes alone.
    """
    games = [row for row in zip(*columns, strict=True) if all(each.shares is not None for each in row)]
    line: dict[str, Any] = {
        "name": ALL if judge is None else judge.name,
        "games": len(games),
        "unread": sum(each.is_unread for column in columns for each in column),
        "failed": sum(bool(each.failed) for column in columns for each in column),
    }
    if not games:
        return line
    table = np.array([_weighted(row, preset) for row in games])
    clusters = [row[0].game.question for row in games]
    line["win_rate"] = _win_rate(table, clusters, resamples)
    outcomes = [_majority(row) for row in games]
    line["outcomes"] = {each: outcomes.count(each) for each in OUTCOMES}
    if is_part:
        return line
    line["length_controlled"] = _length_controlled(table[:, 0] / table[:, 1], [row[0].game for row in games])
    if isinstance(judge, Judge):
        read = [each for (each,) in games if not each.game.is_same]
        line["orders"], line["position"] = _orders(read), _position(read)
    return line


def _weighted(row: Sequence[Judgement], preset: Preset) -> tuple[float, float]:
    """Return the weighted sum of the shares of the first system in all verdicts of a game, and the sum of the weights."""
    votes = [(vote, share) for each in row for vote, share in zip(each.votes, each.shares or (), strict=True)]
    weights = [_weight(vote, preset) for vote, _ in votes]
    return sum(w * share for w, (_, share) in zip(weights, votes, strict=True)), float(sum(weights))


def _weight(vote: Vote | None, preset: Preset) -> int:
    return preset.clear_weight if vote is not None and vote.is_clear else 1


def _win_rate(table: Any, clusters: Sequence[str], resamples: int) -> dict[str, Any]:
    """Return the share of verdicts for the first system, its interval, and the test against a half."""
    value, low, high = Bootstrap({"first": table}, clusters=clusters, resamples=resamples).interval("first", mean)
    test = sign_flip(2 * table[:, 0] - table[:, 1], clusters=clusters, resamples=resamples)
    return {"value": value, "low": low, "high": high, "p": test.p, "exact": test.exact, "holm": test.p}


def _majority(row: Sequence[Judgement]) -> str:
    """Return the outcome for which more judges are than for the opposite one; a tie if there are as many."""
    outcomes = [outcome(each.shares) for each in row if each.shares is not None]
    wins, losses = outcomes.count("win"), outcomes.count("loss")
    if len(outcomes) > 1:
        ties = outcomes.count("tie")
        return "win" if wins > max(losses, ties) else "loss" if losses > max(wins, ties) else "tie"
    return outcomes[0]


def _length_controlled(shares: Any, games: Sequence[Any]) -> dict[str, float]:
    lengths = [[len(texts[-1]) for texts in side] for side in _answers(games)]
    result = length_controlled(shares, *lengths)
    return dict(zip(("value", "low", "high", "coefficient"), result, strict=True))


def _orders(read: Sequence[Judgement]) -> dict[str, Any]:
    """Return how often a judge gives the same verdict in both orders, and kappa."""
    if not read:
        return {"same": None, "kappa": None}
    labels = [[_label(each.shares[order]) for each in read if each.shares] for order in (0, 1)]
    same = float(np.mean([one == other for one, other in zip(*labels, strict=True)]))
    return {"same": same, "kappa": _finite(cohen_kappa(*labels))}


def _label(share: float) -> str:
    return {1.0: "win", 0.5: "tie", 0.0: "loss"}[share]


def _position(read: Sequence[Judgement]) -> dict[str, Any]:
    """Return the share of the answer shown first among verdicts that are no ties, and the test against a half."""
    votes = [[vote.share for vote in each.votes if vote is not None] for each in read]
    decided = [share for each in votes for share in each if share != 0.5]
    if not decided:
        return {"first": None, "p": None}
    leaning = [sum(2 * share - 1 for share in each) for each in votes]
    clusters = [each.game.question for each in read]
    return {"first": float(np.mean(decided)), "p": sign_flip(leaning, clusters=clusters).p}


def _between(judgements: Mapping[str, Sequence[Judgement]], judges: Sequence[Rater]) -> dict[str, Any] | None:
    """Return the agreement of judges on the outcomes of the games that all of them could judge; None for one judge."""
    if len(judges) < 2:
        return None
    rows = [
        [outcome(each.shares) for each in row if each.shares is not None]
        for row in zip(*(judgements[judge.name] for judge in judges), strict=True)
        if not row[0].game.is_same
    ]
    rows = [row for row in rows if len(row) == len(judges)]
    if not rows:
        return {"games": 0, "fleiss": None, "unanimous": None, "pairs": []}
    pairs = [
        {
            "judges": [judges[i].name, judges[j].name],
            "same": float(np.mean([row[i] == row[j] for row in rows])),
            "kappa": _finite(cohen_kappa([row[i] for row in rows], [row[j] for row in rows])),
        }
        for i, j in combinations(range(len(judges)), 2)
    ]
    return {
        "games": len(rows),
        "fleiss": _finite(fleiss_kappa(count_labels(rows, OUTCOMES))),
        "unanimous": float(np.mean([len(set(row)) == 1 for row in rows])),
        "pairs": pairs,
    }


def _categories(
    judgements: Mapping[str, Sequence[Judgement]], judges: Sequence[Rater], preset: Preset, resamples: int
) -> list[dict[str, Any]]:
    """Return the figures by category, each with a line per judge; [] without categories."""
    games = [each.game for each in next(iter(judgements.values()))]
    names = list(dict.fromkeys(game.category for game in games))
    if len(names) < 2:
        return []
    parts = []
    for name in names:
        own = {judge: [j for j in column if j.game.category == name] for judge, column in judgements.items()}
        parts.append({"name": name or "(none)", "judges": _lines(own, judges, preset, resamples, is_part=True)})
    return parts


def _sections(categories: Sequence[Mapping[str, Any]], judges: Sequence[Rater]) -> dict[str, dict[str, float]]:
    """Return the scores of RewardBench by judge; {} for other categories."""
    sections = {}
    for number, judge in enumerate(judges):
        lines = {part["name"]: part["judges"][number] for part in categories}
        accuracy = {name: (line["win_rate"]["value"], line["games"]) for name, line in lines.items() if line["games"]}
        if scores := section_scores(accuracy):
            sections[judge.name] = scores
    return sections


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
