"""Answers, question sets, prompts and verdicts in the forms in which benchmarks publish them."""

import json

import pytest

from contralto.eval.judging.answers import EvalQuestion, SystemAnswer, read_answers, read_questions
from contralto.eval.judging.games import Game, pair_answers
from contralto.eval.judging.presets import PRESETS
from contralto.eval.judging.prompts import load_prompts
from contralto.eval.judging.verdicts import VERDICTS, Vote

FORMS = {
    "alpaca_eval": (
        {"dataset": "helpful_base", "instruction": "Why?", "output": "So.", "generator": "m"},
        SystemAnswer(None, ("Why?",), ("So.",), "m"),
    ),
    "mt_bench": (
        {
            "question_id": 81,
            "answer_id": "x",
            "model_id": "m",
            "choices": [{"index": 0, "turns": ["So.", "Sure."]}],
            "tstamp": 1.0,
        },
        SystemAnswer("81", (), ("So.", "Sure."), "m"),
    ),
    "arena_hard_v0.1": (
        {"question_id": "q", "model_id": "m", "choices": [{"index": 0, "turns": [{"content": "So.", "token_len": 2}]}]},
        SystemAnswer("q", (), ("So.",), "m"),
    ),
    "arena_hard_v2": (
        {
            "uid": "u",
            "model": "m",
            "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": {"answer": "So."}}],
        },
        SystemAnswer("u", ("Why?",), ("So.",), "m"),
    ),
    "generate": (
        {"index": 0, "prompt": "Why?", "text": "So.", "settings": {}},
        SystemAnswer(None, ("Why?",), ("So.",)),
    ),
    "plain": ({"id": 3, "prompt": "Why?", "response": ""}, SystemAnswer("3", ("Why?",), ("",))),
}


@pytest.mark.parametrize("name", FORMS)
def test_published_answers(name, tmp_path):
    row, expected = FORMS[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read_answers(tmp_path / "a.jsonl") == read_answers(tmp_path / "a.json") == [expected]


QUESTIONS = {
    "alpaca_eval": (
        {"instruction": "Why?", "output": "x", "generator": "text_davinci_003", "dataset": "koala"},
        EvalQuestion(None, ("Why?",), "koala"),
    ),
    "mt_bench": (
        {"question_id": 101, "category": "reasoning", "turns": ["Why?", "Sure?"], "reference": ["So.", "Yes."]},
        EvalQuestion("101", ("Why?", "Sure?"), "reasoning", ("So.", "Yes.")),
    ),
    "arena_hard_v0.1": (
        {"question_id": "q", "category": "arena-hard-v0.1", "cluster": "ABC", "turns": [{"content": "Why?"}]},
        EvalQuestion("q", ("Why?",), "arena-hard-v0.1"),
    ),
    "arena_hard_v2": (
        {"uid": "u", "category": "hard_prompt", "subcategory": "coding", "prompt": "Why?"},
        EvalQuestion("u", ("Why?",), "hard_prompt"),
    ),
    "evol": ({"idx": 1, "Skill": "Math", "Difficulty": 1, "Instruction": "Why?"}, EvalQuestion("1", ("Why?",), "Math")),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_published_questions(name, tmp_path):
    row, expected = QUESTIONS[name]
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    assert read_questions(tmp_path / "q.jsonl") == [expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Why?", "output": "a", "text": "b"}, "output and text could both be it"),
        ({"prompt": "Why?"}, "the row has prompt; name it with --columns answer=COLUMN"),
        ({"prompt": "Why?", "output": 3}, "the answer: must be a text or a list of turns"),
        ({"prompt": "Why?", "output": "a", "image": "x.png"}, "read no images"),
        ({"question_id": 1, "choices": [{"turns": ["a"]}, {"turns": ["b"]}]}, "a list of one object"),
        ([], "must be a JSON object, not a list"),
    ],
)
def test_answers_that_cannot_be_read(row, message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="row 1") as raised:
        read_answers(tmp_path / "a.json")
    assert message in str(raised.value)


def test_columns_under_other_names(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "Why?", "replies": ["So."], "output": "other"}) + "\n")
    columns = {"prompt": "q", "answer": "replies.0"}
    assert read_answers(tmp_path / "a.jsonl", columns=columns) == [SystemAnswer(None, ("Why?",), ("So.",))]


def test_turns_make_games_with_their_references():
    question = EvalQuestion("1", ("Why?", "Sure?"), "math", ("So.", "Yes."))
    one, other = SystemAnswer("1", (), ("a", "b")), SystemAnswer("1", (), ("c", "d"))
    first, second = pair_answers([one], [other], questions=[question])
    assert first == Game("1", "1", ("Why?",), ("a",), ("c",), "math", ("So.",))
    assert second == Game("1, turn 2", "1", ("Why?", "Sure?"), ("a", "b"), ("c", "d"), "math", ("So.", "Yes."))


def _answer(key, prompt="Why?", text="a"):
    return SystemAnswer(key, (prompt,), (text,))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([_answer(None), _answer(None, "What?")], [_answer(None)], "1 prompts of 2 are not answered by both"),
        ([_answer("1"), _answer("1")], [_answer("1")], "the id '1' occurs twice"),
        ([_answer(None), _answer(None)], [_answer(None)], "the prompt 'Why\\?' occurs twice"),
        ([_answer("1", "Why?")], [_answer("1", "What?")], "belong to different prompts"),
        ([SystemAnswer("1", (), ("a",))], [SystemAnswer("1", (), ("b",))], "give the questions with --questions"),
        ([SystemAnswer(None, (), ("a",))], [_answer("1")], "has no prompt"),
        ([SystemAnswer("1", ("x", "y"), ("a", "b"))], [_answer("1", "x")], "belong to different prompts"),
    ],
)
def test_answers_that_do_not_belong_together(first, second, message):
    with pytest.raises(ValueError, match=message):
        pair_answers(first, second)


def test_common_prompts_alone():
    games = pair_answers(
        [_answer("1"), _answer("2", "What?")], [_answer("2", "What?"), _answer("3", "x")], is_common=True
    )
    assert [game.id for game in games] == ["2"]


GAME = Game("1", "1", ("What is {output_2}?",), ("one {answer_b}",), ("two {{ task }}",))


def test_a_prompt_file_of_fastchat_is_used_to_the_letter(tmp_path):
    rows = [
        {
            "name": "pair-v2",
            "type": "pairwise",
            "system_prompt": "Judge.",
            "prompt_template": "Q {question}\nA {answer_a}\nB {answer_b}",
        },
        {
            "name": "pair-math-v1-multi-turn",
            "type": "pairwise",
            "system_prompt": "Judge.",
            "prompt_template": "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}|{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}",
        },
        {"name": "single-v1", "type": "single", "system_prompt": "", "prompt_template": "{question} {answer}"},
    ]
    rows = [{**row, "output_format": "[[rating]]" if row["type"] == "single" else "[[A]]"} for row in rows]
    path = tmp_path / "judge_prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(str(path))
    assert prompts.verdict.name == "letters"
    system, user = prompts.of(GAME).messages(GAME, is_swapped=False)
    assert system == {"role": "system", "content": "Judge."}
    assert user["content"] == "Q What is {output_2}?\nA one {answer_b}\nB two {{ task }}"
    swapped = prompts.of(GAME).messages(GAME, is_swapped=True)[-1]["content"]
    assert swapped == "Q What is {output_2}?\nA two {{ task }}\nB one {answer_b}"
    turns = Game("1", "1", ("q1", "q2"), ("a1", "a2"), ("b1", "b2"), "", ("r1", "r2"))
    assert prompts.of(turns).messages(turns, is_swapped=True)[-1]["content"] == "q1|r1|q2|r2|b1|b2|a1|a2"


def test_prompts_of_arena_hard_and_alpaca_eval(tmp_path):
    arena = tmp_path / "judge_config.yaml"
    template = '["<|User Prompt|>\\n{question_1}\\n\\n<|A|>\\n{answer_1}\\n<|B|>\\n{answer_2}"]'
    arena.write_text(f'regex_pattern: \\[\\[([AB<>=]+)\\]\\]\nsystem_prompt: "Judge."\nprompt_template: {template}\n')
    prompts = load_prompts(str(arena))
    assert prompts.verdict.name == "five"
    expected = "<|User Prompt|>\nWhat is {output_2}?\n\n<|A|>\ntwo {{ task }}\n<|B|>\none {answer_b}"
    assert prompts.of(GAME).messages(GAME, is_swapped=True)[-1]["content"] == expected
    alpaca = tmp_path / "alpaca_eval_clf.txt"
    alpaca.write_text(
        '<|im_start|>system\nSelect.\n<|im_end|>\n<|im_start|>user\n{\n "i": """{instruction}""",\n}\n"m" {output_1} "M" {output_2}\n<|im_end|>'
    )
    prompts = load_prompts(str(alpaca))
    assert prompts.verdict.name == "identifier"
    messages = prompts.of(GAME).messages(GAME, is_swapped=False)
    assert messages[0] == {"role": "system", "content": "Select."}
    assert messages[1]["content"] == '{\n "i": """What is {output_2}?""",\n}\n"m" one {answer_b} "M" two {{ task }}'
    arena.write_text("prompt_template: '{QUESTION} {ANSWER_A} {ANSWER_B}'\n")
    with pytest.raises(ValueError, match="no system_prompt"):
        load_prompts(str(arena))


@pytest.mark.parametrize("name", PRESETS.names())
def test_prompts_of_presets_show_both_answers_and_request_readable_verdicts(name):
    prompts = load_prompts(PRESETS[name].template)
    game = Game("1", "1", ("TASK",), ("FIRST",), ("SECOND",), "", ("REFERENCE",))
    text = prompts.of(game).messages(game, is_swapped=True)[-1]["content"]
    assert text.index("TASK") < text.index("SECOND") < text.index("FIRST")
    assert ("REFERENCE" in text) == (PRESETS[name].template == "judge_mt_bench")
    assert prompts.verdict.read(prompts.verdict.example) == Vote(1.0, is_clear=prompts.verdict.name == "five")


@pytest.mark.parametrize(
    ("form", "text", "vote"),
    [
        ("letters", "Both are fine. [[C]]", Vote(0.5)),
        ("letters", "Verdict: B", Vote(0.0)),
        ("letters", "I cannot say.", None),
        ("five", "My final verdict is: [[B>>A]]", Vote(0.0, is_clear=True)),
        ("five", "[[A=B]] ... [[A=B]]", Vote(0.5)),
        ("five", "[[A>B]] or [[B>A]]", None),
        ("five", "[[A>>>B]]", None),
        ("identifier", "M", Vote(0.0)),
        ("identifier", "### Which is best, m or M?\nm", Vote(1.0)),
        ("identifier", "The better one is from him", None),
        ("identifier", "The answer of m is better.", Vote(1.0)),
        ("identifier", "M is clearly the best, so: M", Vote(0.0)),
        ("identifier", "m is better than M", None),
        ("better", '{"reason": "x", "better": 2}', Vote(0.0)),
    ],
)
def test_verdicts(form, text, vote):
    assert VERDICTS[form].read(text) == vote
