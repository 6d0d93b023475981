"""Demonstrations of contrastive explanations: their prompt, how replies are read, which are kept."""

import pytest

from contralto.data_gen import templates
from contralto.data_gen.scorers import answer_matches, normalize_answer
from contralto.data_gen.strategies.c_rag import c_rag, c_rag_messages, gold_passages, parse_demonstration
from contralto.data_gen.types import Answer, Labelled, Pair, Rejected, drive

PASSAGES = [
    {"title": "Lima", "text": "Lima is the capital of Peru."},
    "Quito lies high.",
    {"text": "Peru has {rivers}."},
]
ROW = {
    "id": "r1",
    "prompt": [{"role": "user", "content": "What is the capital of Peru?"}],
    "images": (),
    "passages": PASSAGES,
    "answers": ["Lima", "the city of Lima"],
    "gold": [0],
}


def reply(answer="Lima", cites="[1]"):
    return (
        "{evidence}:\n[1] Lima is the capital of Peru.\n\n"
        "{contrast}:\n[1] relevant: it names the capital.\n[2] irrelevant: Quito is elsewhere.\n- [3]: not relevant, of rivers.\n\n"
        f"{{explanation}}:\nPassage {cites} says it.\n\n{{answer}}:\n{answer}"
    )


def run(strategy, *texts):
    driven = drive(strategy)
    asks = next(driven)
    with pytest.raises(StopIteration) as end:
        driven.send([text if isinstance(text, Answer) else Answer(text=text) for text in texts])
    return end.value.value, asks


def test_a_right_demonstration_is_a_completion_of_the_teachers_prompt():
    (made,), (ask,) = run(c_rag(ROW, gold="gold"), reply())
    assert isinstance(made, Labelled)
    assert (made.completion, made.label, made.prompt) == (reply(), True, ask.messages)
    label = templates.load("c_rag", "task", "passages").label
    assert made.columns == {
        "strategy": "c_rag",
        "answer": "Lima",
        "relevant": [0],
        "cited": [0],
        "support": 1.0,
        "template": label,
    }
    assert (ask.role, ask.seed, ask.template) == ("teacher", 0, label)
    text = ask.messages[0]["content"]
    assert (
        "{question}:\nWhat is the capital of Peru?\n\n{passages}:\n[1] Lima\nLima is the capital of Peru.\n\n" in text
    )
    assert "\n\n[2] Quito lies high.\n\n[3] Peru has {rivers}.\n\n-----" in text
    assert ask.messages == c_rag_messages(ROW)


def test_wrong_demonstrations_are_left_out_labelled_or_rejected():
    texts = [reply("Quito"), reply(), reply("It is Lima."), reply("Cusco")]
    made, asks = run(c_rag(ROW, n=4), *texts)
    assert [each.completion for each in made] == [texts[1], texts[2]]
    assert [ask.seed for ask in asks] == [0, 1, 2, 3]
    made, _ = run(c_rag(ROW, n=4, keep="all"), *texts)
    assert [(each.completion, each.label) for each in made] == list(zip(texts, [False, True, True, False], strict=True))
    made, asks = run(c_rag(ROW, n=4, keep="pairs"), *texts)
    assert [(pair.chosen, pair.rejected) for pair in made] == [(texts[1], texts[0]), (texts[2], texts[3])]
    assert all(isinstance(pair, Pair) and pair.prompt == asks[0].messages for pair in made)
    assert (made[0].columns["answer"], made[0].columns["rejected_answer"]) == ("Lima", "Quito")


@pytest.mark.parametrize(
    ("settings", "texts", "reason"),
    [
        ({}, [reply("Quito")], "no demonstration has a right answer"),
        (
            {"n": 2, "keep": "pairs"},
            [reply(), reply()],
            "2 demonstrations have a right answer, and 0 a wrong one: no pair",
        ),
        ({}, ["Lima."], "no reply has a text under {contrast}, {explanation} and {answer}, and ends by itself"),
        ({}, [Answer(text=reply(), finish_reason="length")], "no reply has a text under {contrast}"),
    ],
)
def test_rows_without_a_demonstration_say_why(settings, texts, reason):
    (made,), _ = run(c_rag(ROW, **settings), *texts)
    assert isinstance(made, Rejected)
    assert made.reason.startswith(reason)


def test_support_is_the_share_of_cited_passages_that_are_gold():
    for cites, gold, support in (
        ("[1], [2]", [0], 0.5),
        ("[2, 3]", [0], 0.0),
        ("[1][3]", [0, 2], 1.0),
        ("none", [0], None),
    ):
        (made,), _ = run(c_rag({**ROW, "gold": gold}, gold="gold"), reply(cites=cites))
        assert made.columns["support"] == support, cites
    (made,), _ = run(c_rag(ROW), reply())
    assert made.columns["support"] is None


def test_a_scorer_or_nobody_decides_what_is_right():
    by_length = lambda row, answers: [float(len(answer) > 4) for answer in answers]
    (made,), _ = run(c_rag(ROW, n=2, scorer=by_length), reply(), reply("Quito"))
    assert made.columns["answer"] == "Quito"
    made, _ = run(c_rag({**ROW, "answers": None}, n=2, answers=None), reply(), reply("Quito"))
    assert len(made) == 2
    (made,), _ = run(c_rag({**ROW, "answers": 13}), reply("13"))
    assert made.columns["answer"] == "13"


@pytest.mark.parametrize(
    ("contrast", "relevant"),
    [
        ("[1] relevant: yes\n[2] irrelevant: no", (0,)),
        ("1. Relevant, since\n2) Irrelevant", (0,)),
        ("- **[2]** is relevant", (1,)),
        ("Passage 2: relevant\nPassage 1: not relevant", (1,)),
        ("[7] relevant: there is none", ()),
        ("[1] may be relevant", ()),
    ],
)
def test_judgements_of_passages(contrast, relevant):
    text = f"{{contrast}}:\n{contrast}\n{{explanation}}:\nSo.\n{{answer}}:\nx"
    assert parse_demonstration(text, 2).relevant == relevant


def test_headings_in_other_forms():
    text = "**Evidence:** x\n**Contrast:**\n[1] relevant: y\n### Explanation\nBy [1].\n### Answer\nLima"
    assert parse_demonstration(text, 1)[:4] == ("x", "[1] relevant: y", "By [1].", "Lima")
    assert parse_demonstration("{explanation}: By [1].\n{answer}: Lima", 1) is None


def test_positions_of_gold_passages():
    row = {"id": "r1", "passages": ["a", "b", "c"]}
    assert gold_passages(row | {"g": [True, False, True]}, "g") == (0, 2)
    assert gold_passages(row | {"g": [2, 0, 2]}, "g") == (0, 2)
    assert gold_passages(row | {"g": []}, "g") == ()
    for wrong in ([True], [3], [-1], ["a"], None, 1):
        with pytest.raises(
            ValueError, match="column g of row r1 must be a list of positions of its 3 passages, from 0"
        ):
            gold_passages(row | {"g": wrong}, "g")


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({"passages": []}, {}, "column passages of row r1 is not a list of passages"),
        ({"passages": "one"}, {}, "column passages of row r1 is not a list of passages"),
        (
            {"passages": ["a", {"title": "b"}]},
            {},
            "passage 1 in column passages of row r1 must be a text, or an object with",
        ),
        (
            {"answers": []},
            {},
            "column answers of row r1 must hold the answer, a text or a list of texts, not .*answers: null",
        ),
        ({"answers": None}, {}, "must hold the answer"),
        ({}, {"n": 0}, "c_rag: n must be at least 1"),
        ({}, {"keep": "wrong"}, "keep must be one of right, all, pairs, not 'wrong'"),
        ({}, {"answers": None, "keep": "pairs"}, "without answers or a scorer no answer is wrong"),
        ({}, {"scorer": "nowhere"}, "nowhere"),
        ({}, {"template": "judge"}, "template judge must fill in"),
    ],
)
def test_mistakes_cost_no_request(changed, settings, message):
    with pytest.raises(ValueError, match=message):
        next(drive(c_rag({**ROW, **changed}, **settings)))


@pytest.mark.parametrize(
    ("text", "forms", "matches"),
    [
        ("The answer is: Lima!", ["lima"], True),
        ("Lima", ["the Lima"], True),
        ("Limassol", ["Lima"], False),
        ("1,300", ["1300"], True),
        ("13", ["3"], False),
        ("anything", ["the", "..."], False),
    ],
)
def test_answers_match_by_whole_words(text, forms, matches):
    assert answer_matches(text, forms) is matches


def test_normalised_answers():
    assert normalize_answer(" An  apple, the U.S.: a Tie ") == "apple us tie"
