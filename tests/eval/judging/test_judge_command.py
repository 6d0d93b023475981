"""`contralto judge` from files to pages: resumable, estimated, in every format, and on pairs."""

import csv
import io
import json
import sys
from contextlib import suppress

import pytest

from contralto import cli

MODULE = """
from contralto.data_gen.types import Failure

calls = []

def longer(request):
    calls.append(request)
    text = request.messages[-1]["content"]
    sizes = [len(text.split(f"[Answer of {x}]")[1].split(f"[End of the answer of {x}]")[0]) for x in "AB"]
    return "Verdict: " + ("tie" if sizes[0] == sizes[1] else "A" if sizes[0] > sizes[1] else "B")

def first(request):
    return "[[A>B]]"

def failing(request):
    return Failure("down") if "q2" in request.messages[-1]["content"] else longer(request)

def broken(request):
    return Failure("status 503: overloaded")

def wordless(request):
    return "Hm."

def half(request):
    from contralto.data_gen.types import Answer

    long = "q1" in request.messages[-1]["content"] or "q2" in request.messages[-1]["content"]
    return Answer(text="I think that A is", finish_reason="length") if long else "Verdict: A"

def better(request):
    text = request.messages[-1]["content"]
    return '{"reason": "-", "better": %d}' % (1 if "good" in text.split("Answer 1:")[1].split("Answer 2:")[0] else 2)

def size(row, answers):
    calls.append(row)
    return [len(answer) for answer in answers]
"""


@pytest.fixture
def judges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges_of_tests.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "judges_of_tests", raising=False)
    import judges_of_tests

    for name, size in (("tuned", 30), ("base", 20)):
        rows = [
            {"instruction": f"q{i}", "output": "x" * (size + i % 3 * (name == "base") * 10), "generator": name}
            for i in range(9)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return judges_of_tests


RUN = ["judge", "tuned.json", "base.json", "--judge", "function", "use=judges_of_tests:longer"]


def test_a_judgement_and_its_repetition(judges, tmp_path, capsys):
    assert cli.main([*RUN, "--judge", "function", "use=judges_of_tests:first", "template=judge_arena_hard"]) == 0
    shown = capsys.readouterr().out
    assert "tuned wins against base" in " ".join(shown.split()) or "tuned is not told apart" in " ".join(shown.split())
    figures = json.loads((tmp_path / "judge" / "judge.json").read_text())
    longer, first, _ = figures["judges"]
    # of 9 answers of base 3 are shorter, 3 as long but of the same letter (equal texts need no judge), 3 longer
    assert longer["outcomes"] == {"win": 3, "tie": 3, "loss": 3}
    assert figures["same"] == 3
    assert first["position"]["first"] == 1
    assert first["position"]["p"] == pytest.approx(2 / 2**6)
    assert first["orders"]["same"] == 0
    assert longer["orders"] == {"same": 1.0, "kappa": 1.0}
    assert len(judges.calls) == 12
    rows = [json.loads(line) for line in (tmp_path / "judge" / "verdicts.jsonl").read_text().splitlines()]
    assert len(rows) == 18
    assert rows[0]["outcome"] == "win"
    assert "Verdict: A" in rows[0]["replies"]
    page = (tmp_path / "judge" / "judge.html").read_text()
    assert "tuned against base" in page
    assert "What the judges are worth" in page

    assert cli.main([*RUN, "--format", "csv"]) == 0
    assert len(judges.calls) == 12, "recorded replies are not asked for again"
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    rate = next(row for row in table if row["column"] == "win rate of tuned")
    assert float(rate["value"]) == 0.5
    assert (tmp_path / "judge" / "judge.csv").is_file()


def test_an_estimate_sends_nothing(judges, tmp_path, capsys):
    assert cli.main([*RUN, "max_new_tokens=100", "price={input: 0, output: 5}", "--estimate"]) == 0
    shown = capsys.readouterr().out
    assert "total for 9 games in both orders: 0.0060 USD" in " ".join(shown.split())
    assert not judges.calls
    assert not (tmp_path / "judge").exists()


def test_failed_games_are_asked_for_again(judges, tmp_path, capsys, monkeypatch):
    argv = [*RUN[:-1], "use=judges_of_tests:failing"]
    assert cli.main(argv) == 0
    assert "1 games have no reply; the same command asks for them again" in capsys.readouterr().err
    monkeypatch.setattr(judges, "Failure", lambda reason: "Verdict: A")
    assert cli.main(argv) == 0
    assert "no reply" not in capsys.readouterr().err
    assert json.loads((tmp_path / "judge" / "judge.json").read_text())["judges"][0]["failed"] == 0


def test_replies_that_are_cut_or_have_no_verdict_are_left_out_and_counted(judges, tmp_path, capsys):
    assert cli.main([*RUN[:-1], "use=judges_of_tests:half"]) == 0
    said = capsys.readouterr().err
    assert (
        "judges_of_tests:half: 1 games without a readable verdict in both orders: it must reply with a last line"
        in said
    )
    assert "2 replies were cut off at max_new_tokens" in said
    (line,) = json.loads((tmp_path / "judge" / "judge.json").read_text())["judges"]
    assert (line["games"], line["unread"]) == (8, 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["judge", "tuned.json"], "needs the answers of two systems"),
        (["judge", "tuned.json", "base.json"], "needs --judge ENGINE"),
        ([*RUN, "base.json"], "options are NAME=VALUE, not 'base.json'"),
        ([*RUN[:4], "functoin", "use=x:y"], "did you mean 'function'?"),
        ([*RUN, "verdict=letter"], "did you mean 'letters'?"),
        ([*RUN, "template=judge_mtbench"], "did you mean 'judge_mt_bench'?"),
        ([*RUN, "template=mine.txt"], "there is no template file mine.txt"),
        ([*RUN, *RUN[3:]], "two judges are the same"),
        ([*RUN, "--preset", "alpaca"], "there is no preset 'alpaca'"),
        ([*RUN, "--scorer", "judges_of_tests:size"], "need --pairs"),
        ([*RUN, "--columns", "promt=x"], "did you mean 'prompt'?"),
        (
            [*RUN[:-1], "use=judges_of_tests:wordless"],
            "wordless has no readable verdict in both orders of any game: it must reply with a last line",
        ),
        (
            [*RUN[:-1], "use=judges_of_tests:broken"],
            "broken has no replies: status 503: overloaded (6 times); the same command asks again",
        ),
    ],
)
def test_mistakes_are_one_sentence(judges, capsys, argv, message):
    with suppress(SystemExit):
        assert cli.main(argv) != 0
    assert message in capsys.readouterr().err
    assert len(judges.calls) == 0


def test_pairs_by_a_scorer_and_a_judge_of_con_j(judges, tmp_path, capsys):
    subsets = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", "math-prm", "hep-go"]
    rows = [
        {
            "prompt": "Why?",
            "chosen": f"good {'x' * i}",
            "rejected": "bad, and long",
            "chosen_model": "a",
            "rejected_model": "b",
            "subset": subset,
            "id": i,
        }
        for i, subset in enumerate(subsets * 3)
    ]
    (tmp_path / "rb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["judge", "--pairs", "rb.jsonl", "--scorer", "judges_of_tests:size", "--judge", "function"]
    argv += ["use=judges_of_tests:better", "template=con_j"]
    assert cli.main(argv) == 0
    figures = json.loads((tmp_path / "judge" / "judge.json").read_text())
    better, size, _ = figures["judges"]
    assert better["win_rate"]["value"] == 1
    sizes = [1.0 if 5 + i > 13 else 0.5 if 5 + i == 13 else 0.0 for i in range(15)]
    assert size["win_rate"]["value"] == pytest.approx(sum(sizes) / 15)
    assert figures["sections"]["judges_of_tests:better"]["Overall"] == 1
    chat, hard, safety, maths, code = (sum(sizes[i::5]) / 3 for i in range(5))
    overall = (chat + hard + safety + (maths + code) / 2) / 4
    assert figures["sections"]["judges_of_tests:size"]["Overall"] == pytest.approx(overall)
    assert "prefers chosen to rejected" in " ".join(capsys.readouterr().out.split())
    count = len(judges.calls)
    assert cli.main(argv) == 0
    assert len(judges.calls) == count, "recorded scores are not computed again"
