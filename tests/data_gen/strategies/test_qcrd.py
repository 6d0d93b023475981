"""Positive and negative rationales: self-consistency, the student's samples, qualities."""

import math

import pytest

from contralto.data_gen import templates
from contralto.data_gen.strategies.qcrd import majority, parse_rationale, qcrd
from contralto.data_gen.types import Answer, Labelled, Pair, Rejected, drive

ROW = {
    "id": "r1",
    "prompt": [{"role": "user", "content": "Mia has 9 coins. She finds 4. How many?"}],
    "images": (),
    "answer": 13,
}


def taught(answer, why="9 + 4"):
    return f"{{rationale}}:\n{why} = {answer}\n{{answer}}:\n{answer}"


def run(strategy, *replies, scores=None):
    driven = drive(strategy)
    asks = next(driven)
    answers = [each if isinstance(each, Answer) else Answer(text=each) for each in replies]
    try:
        more = driven.send(answers)
        driven.send([Answer(text=str(score)) for score in scores])
    except StopIteration as end:
        return end.value, asks
    raise AssertionError(more)


def test_rationales_of_the_most_frequent_answer_are_positive():
    replies = [taught(13), taught(11), taught("13.", "four more"), "You were dull."]
    made, asks = run(qcrd(ROW, n=3), *replies)
    assert [(ask.role, ask.seed) for ask in asks] == [("teacher", 0), ("teacher", 1), ("teacher", 2), ("student", 0)]
    assert all(isinstance(each, Labelled) for each in made)
    rows = [(m.columns["task"], m.completion, m.label, m.columns["quality"], m.columns["source"]) for m in made]
    assert rows == [
        ("predict", "13", True, 1.0, "teacher"),
        ("explain", "9 + 4 = 13", True, 1.0, "teacher"),
        ("explain", "four more = 13.", True, 1.0, "teacher"),
        ("explain", "9 + 4 = 11", False, 0.0, "teacher"),
        ("explain", "You were dull.", False, 0.0, "student"),
    ]
    explain = templates.load("qcrd_explain", "task").render(task=ROW["prompt"][0]["content"])
    predict = templates.load("qcrd_predict", "task").render(task=ROW["prompt"][0]["content"])
    assert [m.prompt[0]["content"] for m in made] == [predict, *[explain] * 4]
    assert asks[3].messages[0]["content"] == explain
    assert ROW["prompt"][0]["content"] in asks[0].messages[0]["content"]


def test_a_discriminator_says_how_good_each_rationale_is():
    asked = []

    def logits(row, answers):
        asked.append((row["prompt"][0]["content"], list(answers)))
        return [2.0, -1.0, 800.0, -800.0]

    replies = [taught(13), taught(13, "again"), taught(11), "sample"]
    made, _ = run(qcrd(ROW, n=3, scorer=logits), *replies)
    sigmoid = [1 / (1 + math.exp(-logit)) for logit in (2.0, -1.0)]
    assert [m.columns["quality"] for m in made] == pytest.approx([1.0, *sigmoid, 1.0, 0.0])
    explain = templates.load("qcrd_explain", "task").render(task=ROW["prompt"][0]["content"])
    assert asked == [(explain, ["9 + 4 = 13", "again = 13", "9 + 4 = 11", "sample"])]
    made, _ = run(qcrd(ROW, n=3, scorer=logits, most=1), *replies)
    assert [m.completion for m in made if m.label] == ["13", "9 + 4 = 13"]
    made, _ = run(qcrd(ROW, n=3, scoring="critic"), *replies, scores=[0.0, 1.0, -1.0, 0.0])
    assert [m.completion for m in made[1:3]] == ["again = 13", "9 + 4 = 13"], "the better one first"
    assert made[2].columns["quality"] == 0.5


def test_pairs_train_a_discriminator():
    made, _ = run(qcrd(ROW, n=3, negatives=2, keep="pairs"), taught(13), taught(13, "again"), taught(11), "one", "two")
    assert [(pair.chosen, pair.rejected) for pair in made] == [
        ("9 + 4 = 13", "9 + 4 = 11"),
        ("again = 13", "one"),
    ]
    assert all(isinstance(pair, Pair) for pair in made)
    assert made[0].columns["chosen_quality"] == 1.0
    assert made[1].columns["source"] == "student"
    (made,), _ = run(qcrd(ROW, n=2, student=None, keep="pairs"), taught(13), taught(13))
    assert made == Rejected("there is no negative rationale: all samples of the teacher have one answer")


def test_the_right_answer_of_the_row_is_predicted():
    made, _ = run(qcrd({**ROW, "answer": 12}, n=2, student=None, label="answer"), taught(13), taught(13))
    assert [m.completion for m in made] == ["12", "9 + 4 = 13", "9 + 4 = 13"]
    made, _ = run(qcrd({**ROW, "answer": "twelve"}, n=2, student=None, label="answer"), taught(13), taught(13))
    assert made[0].completion == "twelve"


def test_a_sample_of_the_student_that_is_a_positive_rationale_is_not_negative():
    made, _ = run(
        qcrd(ROW, n=2, negatives=3),
        taught(13),
        taught(13),
        "9 + 4 = 13 ",
        Answer(text="cut", finish_reason="length"),
        "no",
    )
    assert [m.completion for m in made if not m.label] == ["no"]


def test_a_pattern_reads_answers_without_headings():
    replies = ["9 + 4 = 13. #### 13", "9 + 4 = 11. #### 11", "so #### 12 no #### 13", "dull"]
    made, _ = run(qcrd(ROW, n=3, pattern=r"####\s*(\S+)"), *replies)
    assert [m.completion for m in made] == ["13", replies[0], replies[2], replies[1], "dull"]


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ([taught(13), taught(11)], "no answer of the teacher is the most frequent one"),
        ([taught(13), "dull"], "no answer of the teacher is the most frequent one"),
        (["dull", "13"], "no reply of the teacher has a rationale and an answer, and ends by itself"),
        ([Answer(text=taught(13), finish_reason="length")] * 2, "no reply of the teacher has"),
    ],
)
def test_a_teacher_without_a_most_frequent_answer_makes_nothing(replies, reason):
    (made,), _ = run(qcrd(ROW, n=2, student=None), *replies)
    assert isinstance(made, Rejected)
    assert made.reason.startswith(reason)
    made, _ = run(qcrd(ROW, n=1, student=None), taught(13))
    assert len(made) == 2, "one sample is its own majority"


def test_majority_and_rationales():
    assert majority([]) is None
    assert majority(["a", "b", "b"]) == "b"
    assert majority(["b.", "B", "c", "d"]) == "b."
    assert majority(["a", "a", "b", "b", "c"]) is None
    assert parse_rationale(Answer(text="Why.\n{rationale}: Because.\n{answer}: 4")).text == "Because."
    assert parse_rationale(Answer(text="{rationale}: Because.")) is None
    assert parse_rationale(Answer(text="{answer}: 4")) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "qcrd: n must be at least 1"),
        ({"negatives": -1}, "qcrd: negatives must be at least 0"),
        ({"most": 0}, "qcrd: most must be at least 1"),
        ({"keep": "all"}, "keep must be one of labelled, pairs, not 'all'"),
        ({"scorer": "m:f", "scoring": "critic"}, "scorer and scoring both name the discriminator"),
        ({"pattern": "("}, "pattern '\\(' is no regular expression"),
        ({"pattern": "x"}, "pattern 'x' must have one group, the answer, not 0"),
        ({"label": "none"}, "row r1 has no answer in its column none"),
        ({"explain": "judge"}, "template judge must fill in"),
    ],
)
def test_mistakes_cost_no_request(settings, message):
    with pytest.raises(ValueError, match=message):
        next(drive(qcrd(ROW, **settings)))
