"""Tables of a judgement, its page, and its verdicts as rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from contralto.common.html import render_page
from contralto.eval.comparison.report.tabulate import Cell, Table
from contralto.eval.judging.figures import outcome
from contralto.eval.judging.judges import Judgement

__all__ = ["judgement_page", "judgement_tables", "sentence_of", "verdict_rows"]

LEVEL = 0.05
SHOWN = 6
"""Games of each outcome that the page shows."""


def sentence_of(figures: Mapping[str, Any]) -> str:
    """Return the result in words.

    Args:
        figures: as `summarise_judgements` returns them.
    """
    one, other = figures["systems"]
    line = next(each for each in reversed(figures["judges"]) if each["games"])
    rate, name = line["win_rate"], line["name"]
    if figures["is_accuracy"]:
        return f"{name} prefers {one} to {other} in {_interval(rate)} of {line['games']} pairs (a tie counts half)."
    verdict = "wins against" if rate["value"] > 0.5 else "loses against"
    if rate["p"] >= LEVEL:
        verdict = "is not told apart from"
    text = f"{one} {verdict} {other}: win rate {_interval(rate)}, p {rate['p']:.2g}, by {name} on {line['games']} games"
    controlled = line["length_controlled"]
    return f"{text}; with answers of equal length {_interval(controlled)}."


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def judgement_tables(figures: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a judgement.

    Args:
        figures: as `summarise_judgements` returns them.
    """
    tables = [_rates(figures), _trust(figures)]
    if figures["between"]:
        tables.append(_between(figures["between"]))
    if figures["categories"]:
        tables.append(_by_category(figures))
    if figures["sections"]:
        tables.append(_by_section(figures["sections"]))
    return tables


def _rates(figures: Mapping[str, Any]) -> Table:
    one, other = figures["systems"]
    if figures["is_accuracy"]:
        head = ["accuracy", "in both orders / undecided / wrong", "games"]
        note = "Accuracy: the share of verdicts for the chosen answer, a tie half; 95% intervals of the bootstrap over pairs."
        rows = [(line["name"], "", _accuracy_cells(line)) for line in figures["judges"]]
        return Table("Accuracy", note, head, rows)
    head = [f"win rate of {one}", "length-controlled", "wins / ties / losses", "games"]
    note = (
        f"Win rate: the share of verdicts for {one} against {other} in both orders, a tie half; 95% intervals of the bootstrap over "
        "questions; p: exact test that verdicts are as often for one as for the other, in brackets after Holm's adjustment over judges. "
        "Wins and losses: games with the same verdict in both orders; of several judges, with a majority. "
        f"Length-controlled: the win rate with answers of equal length; mean lengths {figures['lengths'][0]:.0f} and "
        f"{figures['lengths'][1]:.0f} characters."
    )
    rows = [(line["name"], "", _rate_cells(line)) for line in figures["judges"]]
    return Table("Win rates", note, head, rows)


def _accuracy_cells(line: Mapping[str, Any]) -> list[Cell]:
    if not line["games"]:
        return [Cell("")] * 2 + [Cell("0")]
    return [_rate_cell(line["win_rate"]), Cell(_outcomes(line)), Cell(str(line["games"]))]


def _rate_cells(line: Mapping[str, Any]) -> list[Cell]:
    if not line["games"]:
        return [Cell("")] * 3 + [Cell("0")]
    rate, controlled = line["win_rate"], line["length_controlled"]
    adjusted = f" ({rate['holm']:.2g})" if rate["holm"] != rate["p"] else ""
    p = f", p {rate['p']:.2g}{adjusted}"
    cell = _rate_cell(rate)
    is_found = rate["holm"] < LEVEL and rate["value"] > 0.5
    return [
        Cell(cell.main, cell.small + p, is_found),
        _rate_cell(controlled),
        Cell(_outcomes(line)),
        Cell(str(line["games"])),
    ]


def _outcomes(line: Mapping[str, Any]) -> str:
    return " / ".join(str(line["outcomes"][name]) for name in ("win", "tie", "loss"))


def _rate_cell(figure: Mapping[str, float]) -> Cell:
    return Cell(f"{figure['value']:.3f}", f"[{figure['low']:.3f}, {figure['high']:.3f}]")


def _trust(figures: Mapping[str, Any]) -> Table:
    head = ["same in both orders", "kappa", "first shown preferred", "longer preferred", "unread / failed"]
    note = (
        "Same in both orders: the share of games with one verdict in both, and Cohen's kappa. First shown preferred: its share of the "
        "verdicts that are no ties, 0.5 without a bias, with the exact test. Longer preferred: the coefficient of length, 0 without. "
        "Unread: games with a reply without a verdict, failed: games without a reply; both are left out of the win rates. "
        f"{figures['same']} games with equal answers count as ties, and no judge read them."
    )
    rows = []
    for line in figures["judges"]:
        orders, position = line.get("orders") or {}, line.get("position") or {}
        shown = _share(position.get("first"))
        if position.get("p") is not None:
            shown = Cell(shown.main, f"p {position['p']:.2g}")
        phi = f"{line['length_controlled']['coefficient']:+.2f}" if line["games"] else ""
        counts = Cell(f"{line['unread']} / {line['failed']}")
        cells = [_share(orders.get("same")), _share(orders.get("kappa")), shown, Cell(phi), counts]
        rows.append((line["name"], "", cells))
    return Table("What the judges are worth", note, head, rows)


def _share(value: float | None) -> Cell:
    return Cell("" if value is None else f"{value:.3f}")


def _between(between: Mapping[str, Any]) -> Table:
    rows = [
        (" and ".join(pair["judges"]), "", [_share(pair["same"]), _share(pair["kappa"])]) for pair in between["pairs"]
    ]
    rows.append(("all judges", "", [_share(between["unanimous"]), _share(between["fleiss"])]))
    note = (
        f"Outcomes (win, tie, loss) of the {between['games']} games that all judges could judge: the share of equal ones, and Cohen's kappa; "
        "of all judges: the share of unanimous ones, and Fleiss' kappa."
    )
    return Table("Agreement of the judges", note, ["same outcome", "kappa"], rows)


def _by_category(figures: Mapping[str, Any]) -> Table:
    names = [line["name"] for line in figures["judges"]]
    rows = []
    for part in figures["categories"]:
        cells = [_rate_cell(line["win_rate"]) if line["games"] else Cell("") for line in part["judges"]]
        rows.append((part["name"], "", [*cells, Cell(str(max(line["games"] for line in part["judges"])))]))
    title = "Accuracy by subset" if figures["is_accuracy"] else f"Win rate of {figures['systems'][0]} by category"
    return Table(title, "95% intervals of the bootstrap; no adjustment for their number.", [*names, "games"], rows)


def _by_section(sections: Mapping[str, Mapping[str, float]]) -> Table:
    head = list(next(iter(sections.values())))
    rows = [(name, "", [Cell(f"{scores[section]:.3f}") for section in head]) for name, scores in sections.items()]
    note = (
        "The sections of RewardBench: means over their pairs, in Reasoning over math and code with equal weight; overall: the mean of the "
        "sections, without prior sets."
    )
    return Table("RewardBench", note, head, rows)


def verdict_rows(judgements: Mapping[str, Sequence[Judgement]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each judge and game: its verdicts as shares of the first system, and its replies.

    Args:
        judgements: by the name of the judge.
    """
    for name, column in judgements.items():
        for each in column:
            yield {
                "id": each.game.id,
                "judge": name,
                "outcome": None if each.shares is None else outcome(each.shares),
                "shares": None if each.shares is None else list(each.shares),
                "replies": list(each.replies),
                "failed": each.failed or None,
                "category": each.game.category,
            }


def judgement_page(figures: Mapping[str, Any], judgements: Mapping[str, Sequence[Judgement]], *, made_by: str) -> str:
    """Render a judgement as one self-contained page.

    Args:
        figures: as `summarise_judgements` returns them.
        judgements: by the name of the judge.
        made_by: the command that made the page.
    """
    return render_page(
        "contralto.eval.judging",
        "judging.html.j2",
        figures=figures,
        sentence=sentence_of(figures),
        tables=judgement_tables(figures),
        examples=_examples(judgements),
        made_by=made_by,
    )


def _examples(judgements: Mapping[str, Sequence[Judgement]]) -> dict[str, list[dict[str, Any]]]:
    """Return a few games of each outcome by the first judge, with its reply in the first order."""
    examples: dict[str, list[dict[str, Any]]] = {"win": [], "tie": [], "loss": []}
    for each in next(iter(judgements.values())):
        if each.shares is not None and not each.game.is_same:
            listed = examples[outcome(each.shares)]
            if len(listed) < SHOWN:
                game = each.game
                listed.append(
                    {
                        "id": game.id,
                        "prompt": game.turns[-1],
                        "first": game.first[-1],
                        "second": game.second[-1],
                        "reply": each.replies[0],
                    }
                )
    return {name: games for name, games in examples.items() if games}
