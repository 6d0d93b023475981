"""Figures of answers with passages, computed by hand."""

import pytest

from contralto.eval.judging.rag import rag_figures
from contralto.eval.stats import proportion

ROW = {"id": "1", "passages": ["a", "b", "c"], "answers": ["Lima"], "gold": [0, 2]}


def reply(answer, cites):
    return f"{{contrast}}:\n[1] relevant: x\n{{explanation}}:\nBy {cites}.\n{{answer}}:\n{answer}"


def test_figures():
    texts = [reply("Lima", "[1]"), reply("Quito", "[1], [2]"), reply("Lima", "none"), "It is Lima.", "Quito"]
    figures = rag_figures([{**ROW, "text": text} for text in texts])
    assert figures.accuracy == proportion([True, False, True, True, False])
    assert figures.support == pytest.approx((1.0 + 0.5) / 2)
    assert (figures.citing, figures.readable) == (0.4, 0.6)
    assert str(figures).endswith("of 5, support 0.750, citing 0.400, readable 0.600")


def test_the_answer_alone_counts_where_there_is_one():
    """An explanation that names the right answer does not make a wrong one right."""
    text = "{contrast}:\n[1] relevant: x\n{explanation}:\nLima, by [1].\n{answer}:\nQuito"
    assert rag_figures([{**ROW, "text": text}]).accuracy.value == 0


def test_without_gold_passages_there_is_no_support():
    row = {name: value for name, value in ROW.items() if name != "gold"} | {"reply": reply("Lima", "[1]")}
    figures = rag_figures([row], gold=None, completion="reply")
    assert figures.support is None
    assert "support" not in str(figures)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows to measure"),
        ([ROW], "row 1 has no reply in its column text"),
        ([{**ROW, "text": "x", "gold": ["a"]}], "column gold of row 1 must be a list of positions"),
        ([{**ROW, "text": "x", "answers": None}], "column answers of row 1 must hold the answer"),
    ],
)
def test_mistakes_are_said(rows, message):
    with pytest.raises(ValueError, match=message):
        rag_figures(rows)
