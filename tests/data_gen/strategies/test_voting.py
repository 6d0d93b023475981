"""Several judges that vote: their columns, their agreement, and what reward models and losses read."""

import random

import pytest

from contralto.align.trainers.reward import agreement
from contralto.data_gen.strategies.voting import vote
from contralto.data_gen.types import Answer, Pair, Rejected, drive
from contralto.data_gen.votes import summarise_votes

ROW = {"id": "a", "prompt": [{"role": "user", "content": "Why?"}], "images": ()}
PAIRED = {**ROW, "chosen": "So.", "rejected": "No."}


def _run(strategy, reply):
    """Drive a strategy; `reply(ask, first_shown)` returns the text of a judge, or of an answer."""
    driven, asks = drive(strategy), []
    try:
        waiting = next(driven)
        while True:
            asks += waiting
            waiting = driven.send([Answer(text=reply(ask)) for ask in waiting])
    except StopIteration as end:
        return end.value, asks


def _shown_first(ask):
    return ask.messages[-1]["content"].split("[Answer of A]\n")[1].split("\n[End")[0]


def _preferring(**preferred):
    """Judges by role, each preferring a text; `first` and `none` are words of their own."""

    def reply(ask):
        if ask.tag == "answer":
            return ("So.", "No.")[ask.seed]
        wish = preferred[ask.role]
        if wish == "none":
            return "Hm."
        return "Verdict: A" if wish in ("first", _shown_first(ask)) else "Verdict: B"

    return reply


def test_annotators_vote_by_both_orders():
    judges = ("one", "two", "three", "four")
    (pair,), asks = _run(vote(ROW, judges=judges), _preferring(one="No.", two="No.", three="So.", four="first"))
    assert len(asks) == 2 + 2 * 4
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected) == ("No.", "So.")
    assert pair.columns["votes"] == ["chosen", "chosen", "rejected", "tie"]
    assert pair.columns["annotators"] == [f"{name} judge" for name in judges]
    assert pair.columns["margin"] == agreement(pair.columns["votes"]) == 0.25


def test_labelled_pairs_stay_as_they_are():
    (pair,), _ = _run(vote(PAIRED, judges=["one", "two"], labelled=True), _preferring(one="No.", two="No."))
    assert (pair.chosen, pair.columns["votes"], pair.columns["margin"]) == ("So.", ["rejected"] * 2, -1)


def test_divided_votes_make_no_pair_unless_ties_are_kept():
    reply = _preferring(one="No.", two="So.")
    (result,), _ = _run(vote(PAIRED, judges=["one", "two"]), reply)
    assert result == Rejected("the votes are divided equally")
    row = {**ROW, "answers": ["So.", "No."]}
    (pair,), _ = _run(vote(row, judges=["one", "two"], responses="answers", ties=True), reply)
    assert pair.columns["margin"] == 0


def test_replies_without_a_verdict_are_no_votes():
    (pair,), _ = _run(vote(ROW, judges=["one", "two"]), _preferring(one="none", two="So."))
    assert (pair.columns["votes"], pair.columns["annotators"]) == (["chosen"], ["two judge"])
    (result,), _ = _run(vote(ROW, judges=["one"]), _preferring(one="none"))
    assert result == Rejected("no judge has a readable verdict in both orders")


def test_samples_of_a_judge_have_seeds_of_their_own():
    _, asks = _run(vote(PAIRED, judges=["one", "two"], n=2, labelled=True), _preferring(one="So.", two="So."))
    assert [ask.seed for ask in asks] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judges": []}, "judges must be a list of names"),
        ({"judge_templates": "judge"}, "judge_templates must be a list of names, not 'judge'"),
        ({"n": 0}, "n"),
        ({"responses": "x", "labelled": True}, "leave one of them out"),
        ({"responses": "x"}, "column x of row a is not a list"),
        ({"labelled": True}, "no answer in its column chosen"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        _run(vote(ROW, **settings), _preferring(judge="So."))


def test_agreement_by_chance_has_no_kappa():
    """Coins of three annotators agree with their own majority more often than with chance, and yet kappa is about 0."""
    coins, rows = random.Random(0), []
    for number in range(3000):
        votes = [coins.choice("AB") for _ in range(3)]
        most = max("AB", key=votes.count)
        rows.append({"id": str(number), "votes": ["chosen" if each == most else "rejected" for each in votes]})
    summary = summarise_votes(rows)
    assert abs(summary.kappa) < 0.04
    assert summary.unanimous == pytest.approx(0.25, abs=0.03)
    assert summary.agreement == pytest.approx(0.5, abs=0.03)
    assert "3000 pairs" in str(summary)
    assert summarise_votes([{"id": "a", "votes": []}]) is None
