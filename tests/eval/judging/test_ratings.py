"""Ratings of single answers, as in MMHal-Bench: replies read as by the release, forms of answers, figures, and the command."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from contralto import cli
from contralto.eval.judging.rating_figures import summarise_ratings
from contralto.eval.judging.ratings import (
    RATINGS,
    RatedAnswer,
    Rating,
    make_rating_judge,
    parse_rating,
    read_rated,
)

MODULE = """
from contralto.data_gen.types import Failure

calls = []

def rate(request):
    calls.append(request)
    text = request.messages[-1]["content"].rsplit("[Answer of the model]", 1)[1]
    return "It is so. Rating: " + ("5" if "one cat" in text else "1" if "two" in text else "none")

def broken(request):
    return Failure("status 503")

def wordless(request):
    return "Hm."

def flaky(request):
    return Failure("down") if "two" in request.messages[-1]["content"].rsplit("[Answer", 1)[1] else rate(request)
"""
TYPES = ("counting", "attribute", "counting", "attribute")


def rows(*answers):
    base = {"image_src": "https://x.example/1.jpg", "image_content": ["Cat", "Bed"], "gt_answer": "There is one cat."}
    return [
        {**base, "question_type": kind, "question": f"Q{i}?", "model_answer": text}
        for i, (kind, text) in enumerate(zip(TYPES, answers, strict=True))
    ]


@pytest.fixture
def judges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges_of_ratings.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "judges_of_ratings", raising=False)
    import judges_of_ratings

    (tmp_path / "base.json").write_text(json.dumps(rows("two cats", "two", "one cat", "who knows")))
    (tmp_path / "tuned.json").write_text(json.dumps(rows("one cat", "one cat", "one cat", "two")))
    return judges_of_ratings


RUN = ["judge", "base.json", "tuned.json", "--rating", "mmhal", "--judge", "function", "use=judges_of_ratings:rate"]


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: 6, very informative", 6),
        ("**RATING: 0**", 0),
        ("rating: 3 or Rating: 4", None),
        ("Rating: 7", None),
        ("Rating:3", None),
        ("", None),
    ],
)
def test_replies_are_read_as_by_the_release(text, rating):
    """Exactly one of "rating: 0" to "rating: 6", in any case."""
    assert parse_rating(text) == rating


def test_a_run_and_its_repetition(judges, tmp_path, capsys):
    assert cli.main(RUN) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "base: score 1.75, hallucination rate 0.750; tuned: score 4.00, hallucination rate 0.250" in shown
    figures = json.loads((tmp_path / "judge" / "ratings.json").read_text())
    base, tuned = figures["judges"][0]["systems"]
    assert (base["score"]["value"], base["unread"]) == (1.75, 1)  # 1, 1, 5, and 0 for a reply without a rating
    assert base["hallucination"]["value"] == 0.75
    assert base["categories"] == {"counting": 3.0, "attribute": 0.5}
    assert (tuned["against"]["difference"], tuned["against"]["fewer"], tuned["against"]["more"]) == (2.25, 2, 0)
    assert tuned["against"]["hallucination_p"] == 0.5
    assert tuned["against"]["p"] == pytest.approx(0.25)  # of 8 signs of 4, 4 and 1, two are as far from 0
    assert len(judges.calls) == 8
    prompt = judges.calls[0].messages[-1]["content"]
    assert all(text in prompt for text in ("Cat, Bed", "Q0?", "There is one cat.", "two cats"))
    lines = [json.loads(line) for line in (tmp_path / "judge" / "ratings.jsonl").read_text().splitlines()]
    assert [line["rating"] for line in lines] == [1, 1, 5, None, 5, 5, 5, 1]

    assert cli.main([*RUN, "--format", "csv"]) == 0
    assert len(judges.calls) == 8, "recorded replies are not asked for again"
    assert (tmp_path / "judge" / "ratings.csv").is_file()
    assert "base,,hallucination rate,0.750" in capsys.readouterr().out


def test_an_estimate_sends_nothing(judges, tmp_path, capsys):
    assert cli.main([*RUN, "max_new_tokens=100", "price={input: 0, output: 5}", "--estimate"]) == 0
    assert "total for 8 answers: 0.0040 USD" in " ".join(capsys.readouterr().out.split())
    assert not judges.calls
    assert not (tmp_path / "judge").exists()


def test_failed_answers_are_asked_for_again(judges, tmp_path, capsys, monkeypatch):
    argv = [*RUN[:-1], "use=judges_of_ratings:flaky"]
    assert cli.main(argv) == 0
    assert "3 answers have no reply; the same command asks for them again" in capsys.readouterr().err
    monkeypatch.setattr(judges, "Failure", lambda reason: "Rating: 2")
    assert cli.main(argv) == 0
    assert "no reply" not in capsys.readouterr().err
    (base, _) = json.loads((tmp_path / "judge" / "ratings.json").read_text())["judges"][0]["systems"]
    assert base["failed"] == 0


def test_the_published_prompt_is_used_to_the_letter(tmp_path):
    file = tmp_path / "published.txt"
    file.write_text("Judge {{it}}.\n### Image Contents\n{}\n### Question\n{}\n### Answer\n{}\n### Response\n{}\n")
    options = {"engine": "function", "use": "reprlib:repr"}
    judge = make_rating_judge({**options, "template": str(file)}, scale=RATINGS["mmhal"])
    answer = RatedAnswer("0", "How {}?", "So {x}.", "One.", "Cat")
    (message,) = judge.prompt.messages(answer)
    expected = (
        "Judge {{it}}.\n### Image Contents\nCat\n### Question\nHow {}?\n### Answer\nOne.\n### Response\nSo {x}.\n"
    )
    assert message["content"] == expected
    assert judge.prompt.label.startswith("published@")
    other = make_rating_judge(options, scale=RATINGS["mmhal"])
    assert judge.identity != other.identity
    assert "Rating: 0" in other.prompt.messages(answer)[0]["content"]


def test_answers_with_ids_are_matched_to_questions(tmp_path):
    (tmp_path / "questions.json").write_text(json.dumps(rows("", "", "", "")))
    (tmp_path / "a.jsonl").write_text('{"id": 2, "answer": "Two."}\n{"id": "0", "answer": "One."}\n')
    answers = read_rated(tmp_path / "a.jsonl", tmp_path / "questions.json")
    assert [(each.id, each.question, each.answer) for each in answers] == [("2", "Q2?", "Two."), ("0", "Q0?", "One.")]
    assert len(read_rated(tmp_path / "a.jsonl", tmp_path / "questions.json", limit=1)) == 1
    for text, message in (
        ('{"id": 9, "answer": "x"}', "id must be the number of a question, from 0 to 3, not 9"),
        ('{"answer": "x"}', "has id and answer, with --questions"),
        ('{"id": 0, "answer": 3}', "the answer must be a text, not 3"),
        ("[]", "a row must be a JSON object, not a list"),
    ):
        (tmp_path / "a.jsonl").write_text(text + "\n")
        with pytest.raises(ValueError, match=message):
            read_rated(tmp_path / "a.jsonl", tmp_path / "questions.json")


def test_samples_of_lm_eval_are_read(tmp_path):
    doc = {**rows("", "", "", "")[0], "id": 7, "image": "images/1.jpg"}
    del doc["image_src"], doc["model_answer"]
    (tmp_path / "s.jsonl").write_text(json.dumps({"doc": doc, "filtered_resps": ["One cat."]}) + "\n")
    (answer,) = read_rated(tmp_path / "s.jsonl")
    assert answer == RatedAnswer("7", "Q0?", "One cat.", "There is one cat.", "Cat, Bed", "counting")


def test_answers_without_a_reply_are_left_out():
    judge = make_rating_judge({"engine": "function", "use": "reprlib:repr"}, scale=RATINGS["mmhal"])
    answers = [RatedAnswer(str(i), "Q", "A", "R", "C") for i in range(4)]
    column = [Rating(answers[0], 6, "Rating: 6"), Rating(answers[1], None, failed="down"), Rating(answers[2], 2, "r")]
    column.append(Rating(answers[3], 3, "Rating: 3"))  # not informative, but no hallucination
    figures = summarise_ratings({judge.name: {"one": column}}, [judge], RATINGS["mmhal"], resamples=100)
    ((line,),) = (each["systems"] for each in figures["judges"])
    assert (line["answers"], line["failed"], line["score"]["value"]) == (3, 1, pytest.approx(11 / 3))
    assert line["hallucination"]["value"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["judge", "--rating", "mmhal", "--judge", "function", "use=x:y"], "needs the answers of at least one system"),
        (RUN[:5], "--rating needs --judge ENGINE"),
        ([*RUN[:4], "mmhall", *RUN[5:]], "did you mean 'mmhal'?"),
        ([*RUN, "--limit", "0"], "--limit must be at least 1"),
        ([*RUN, "--pairs", "x.jsonl"], "has no --pairs: leave it out"),
        ([*RUN, "--names", "a"], "systems need different names, one for each of 2 files, not a"),
        ([*RUN, "seed=-1"], "seed must be a whole number of at least 0"),
        ([*RUN, "template=mine.txt"], "there is no template file mine.txt"),
        ([*RUN[:-1], "use=judges_of_ratings:wordless"], "it must reply with one line such as Rating: 4, not Hm."),
        ([*RUN[:-1], "use=judges_of_ratings:broken"], "broken has no replies: status 503; the same command asks again"),
    ],
)
def test_mistakes_are_one_sentence(judges, capsys, argv, message):
    with suppress(SystemExit):
        assert cli.main(argv) != 0
    assert message in capsys.readouterr().err


def test_the_packaged_prompt_names_every_rating():
    text = (Path(cli.__file__).parents[2] / "eval" / "judging" / "templates" / "rating_mmhal.txt").read_text()
    assert [text.count(f"Rating: {number}") for number in range(7)] == [1] * 7
