"""The figures of ratings, as plain data, and their tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from contralto import __version__
from contralto.common.errors import raise_mistakes
from contralto.eval import stats
from contralto.eval.comparison.report.tabulate import Cell, Table
from contralto.eval.judging.ratings import Rating, RatingJudge, RatingScale

__all__ = ["rating_sentence", "rating_tables", "summarise_ratings", "value_rows"]

Ratings = Mapping[str, Mapping[str, Sequence[Rating]]]
"""By the name of the judge, and that of the system."""


def summarise_ratings(
    ratings: Ratings, judges: Sequence[RatingJudge], scale: RatingScale, *, resamples: int = 10_000
) -> dict[str, Any]:
    """Return the figures of ratings as JSON values.

        score = mean of the ratings,    hallucination rate = share of ratings below `scale.hallucinated_below`

    A reply without a rating counts as 0, as in MMHal-Bench's code, and is counted; an answer without a reply is left out.

    Args:
        ratings: by judge and system.
        judges: the judges.
        scale: the benchmark.
        resamples: the number of bootstrap draws.

    Raises:
        ValueError: a judge has no reply, or none with a rating.
    """
    raise_mistakes([problem for judge in judges if (problem := _problem(judge, ratings[judge.name]))])
    return {
        "rating": scale.name,
        "highest": scale.highest,
        "contralto": __version__,
        "source": scale.source,
        "differences": list(scale.differences),
        "judges": [
            {"name": judge.name, "systems": _systems(ratings[judge.name], scale, resamples), "made_of": judge.identity}
            for judge in judges
        ],
    }


def _problem(judge: RatingJudge, systems: Mapping[str, Sequence[Rating]]) -> str:
    """Return why a judge has no figures; empty if it has."""
    everything = [each for column in systems.values() for each in column]
    replies = [each.reply for each in everything if not each.failed]
    if not replies:
        return f"{judge.name} has no replies: {everything[0].failed}; the same command asks again"
    if all(each.value is None for each in everything):
        return (
            f"{judge.name} has no readable rating: it must reply with one line such as Rating: 4, not {replies[0]:.60}"
        )
    return ""


def _systems(systems: Mapping[str, Sequence[Rating]], scale: RatingScale, resamples: int) -> list[dict[str, Any]]:
    lines = []
    for name, column in systems.items():
        rated = [each for each in column if not each.failed]
        line: dict[str, Any] = {
            "name": name,
            "answers": len(rated),
            "unread": sum(each.value is None for each in rated),
            "failed": len(column) - len(rated),
        }
        lines.append(line)
        if not rated:
            continue
        scores = [float(each.value or 0) for each in rated]
        table = stats.score_table(scores)
        interval = stats.Bootstrap({name: table}, resamples=resamples).interval(name, stats.mean)
        line["score"] = dict(zip(("value", "low", "high"), interval, strict=True))
        share = stats.proportion([score < scale.hallucinated_below for score in scores])
        line["hallucination"] = {"value": share.value, "low": share.low, "high": share.high}
        line["categories"] = _categories(rated)
        if len(lines) > 1:
            line["against"] = _against(next(iter(systems.values())), column, next(iter(systems)), scale)
    return lines


def _categories(rated: Sequence[Rating]) -> dict[str, float]:
    groups: dict[str, list[int]] = {}
    for each in rated:
        groups.setdefault(each.answer.category, []).append(each.value or 0)
    return {name: sum(values) / len(values) for name, values in groups.items()}


def _against(first: Sequence[Rating], second: Sequence[Rating], name: str, scale: RatingScale) -> dict[str, Any]:
    """Return the paired tests of a system against the first one, on the answers that both have ratings of."""
    known = {each.answer.id: each for each in first if not each.failed}
    pairs = [(known[each.answer.id], each) for each in second if not each.failed and each.answer.id in known]
    if not pairs:
        return {"system": name, "answers": 0}
    scores = [[float(each.value or 0) for each in side] for side in zip(*pairs, strict=True)]
    differences = [later - earlier for earlier, later in zip(*scores, strict=True)]
    test = stats.sign_flip(differences)
    sound = [[score >= scale.hallucinated_below for score in side] for side in scores]
    mcnemar = stats.mcnemar_exact(*sound)
    return {
        "system": name,
        "answers": len(pairs),
        "difference": sum(differences) / len(pairs),
        "p": test.p,
        "exact": test.exact,
        "fewer": mcnemar.won,
        "more": mcnemar.lost,
        "hallucination_p": mcnemar.p,
    }


def rating_sentence(figures: Mapping[str, Any]) -> str:
    """Return the result of the first judge in words.

    Args:
        figures: as `summarise_ratings` returns them.
    """
    judge = figures["judges"][0]
    parts = [
        f"{line['name']}: score {line['score']['value']:.2f}, hallucination rate {line['hallucination']['value']:.3f}"
        for line in judge["systems"]
        if line["answers"]
    ]
    return f"{'; '.join(parts)}, by {judge['name']}."


def rating_tables(figures: Mapping[str, Any]) -> list[Table]:
    """Return the tables of ratings.

    Args:
        figures: as `summarise_ratings` returns them.
    """
    head = [
        f"score (0 to {figures['highest']})",
        "hallucination rate",
        "answers",
        "unread / failed",
        "against the first",
    ]
    note = (
        "Score: the mean rating, 95% interval of the bootstrap over answers; hallucination rate: the share of low ratings, Wilson's interval. "
        "Unread: replies without a rating, which count as 0; failed: answers without a reply, left out. Against the first system: the mean "
        "difference with its sign-flip test, and the exact test of the answers that only one of them hallucinates in."
    )
    tables = []
    for judge in figures["judges"]:
        rows = [(line["name"], "", _cells(line)) for line in judge["systems"]]
        tables.append(Table(f"Ratings by {judge['name']}", note, head, rows))
        names = list(dict.fromkeys(name for line in judge["systems"] for name in line.get("categories", {})))
        if len(names) > 1:
            parts = [
                (line["name"], "", [_mean(line.get("categories", {}).get(name)) for name in names])
                for line in judge["systems"]
            ]
            tables.append(Table(f"Score by type of question, {judge['name']}", "Mean ratings.", names, parts))
    return tables


def _cells(line: Mapping[str, Any]) -> list[Cell]:
    counts = [Cell(str(line["answers"])), Cell(f"{line['unread']} / {line['failed']}")]
    if not line["answers"]:
        return [Cell(""), Cell(""), *counts, Cell("")]
    against = line.get("against") or {}
    test = Cell("")
    if against.get("answers"):
        small = f"p {against['p']:.2g}; hallucinations -{against['fewer']} +{against['more']}, p {against['hallucination_p']:.2g}"
        test = Cell(f"{against['difference']:+.2f}", small)
    return [_figure(line["score"], 2), _figure(line["hallucination"], 3), *counts, test]


def _figure(figure: Mapping[str, float], digits: int) -> Cell:
    return Cell(f"{figure['value']:.{digits}f}", f"[{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]")


def _mean(value: float | None) -> Cell:
    return Cell("" if value is None else f"{value:.2f}")


def value_rows(ratings: Ratings) -> Iterator[dict[str, Any]]:
    """Yield a row for each judge, system and answer: the rating and the reply.

    Args:
        ratings: by judge and system.
    """
    for judge, systems in ratings.items():
        for system, column in systems.items():
            for each in column:
                yield {
                    "id": each.answer.id,
                    "judge": judge,
                    "system": system,
                    "rating": each.value,
                    "reply": each.reply,
                    "failed": each.failed or None,
                    "category": each.answer.category,
                }
