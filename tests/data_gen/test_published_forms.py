"""Every published form of preference data, from rows in its true columns, read at once and as a stream."""

import json

import pytest
from PIL import Image

from contralto import cli
from contralto.align.arguments import DataArguments
from contralto.data_gen.dataset import load_pairs, stream_pairs
from contralto.data_gen.published_forms import PREFERENCE_FORMS, form_of
from contralto.data_gen.rows import RowSource, read_rows
from contralto.data_gen.unpaired_rows import load_unpaired

Q, GOOD, BAD = "What is 2 + 2?", "It is 4.", "It is 5."
SUMMARIES = [{"text": " " + BAD, "policy": "sup1", "note": None}, {"text": " " + GOOD, "policy": "ref", "note": None}]
ALMA = {
    "language_pair": "de-en",
    "required_directions": "",
    "Delta": 0.0,
    "de": "Ja.",
    "gpt4_de": "Jo.",
    "alma_de": "Ja!",
    "en": "Yes.",
    "gpt4_en": "Yeah.",
    "alma_en": "Yup.",
    "ref_de_kiwi_xcomet": 0.9,
    "gpt4_de_kiwi_xcomet": 0.7,
    "alma_de_kiwi_xcomet": 0.8,
    "ref_en_kiwi_xcomet": 0.5,
    "gpt4_en_kiwi_xcomet": 0.6,
    "alma_en_kiwi_xcomet": 0.4,
}
PROMPTS = {
    "summarize_from_feedback": "SUBREDDIT: r/dogs\n\nTITLE: Help\n\nPOST: My dog.\n\nTL;DR:",
    "ALMA-R-Preference": "Translate this from German to English:\nGerman: Ja.\nEnglish:",
}
RECORDS = {
    "scored responses": [{"prompt": Q, "responses": [BAD, GOOD, "?"], "scores": [1, 4, 2.5]}],
    "two responses with an index": [{"prompt": Q, "responses": [BAD, GOOD], "choice": 1}],
    "labelled completions (KTO)": [
        {"prompt": Q, "completion": BAD, "label": False},
        {"prompt": "Else?", "completion": BAD, "label": False},
        {"prompt": Q, "completion": GOOD, "label": True},
    ],
    "one scored response a row": [
        {"prompt": Q, "response": BAD, "score": 0.1},
        {"prompt": Q, "response": GOOD, "score": 0.9},
    ],
    "a pair with question": [{"system": "", "question": Q, "chosen": GOOD, "rejected": BAD}],
    "a pair with instruction": [{"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD}],
    "a pair with query": [{"query": Q, "chosen": GOOD, "rejected": BAD}],
    "distilabel-intel-orca-dpo-pairs": [
        {
            "system": "",
            "input": Q,
            "chosen": GOOD,
            "rejected": BAD,
            "generations": [GOOD, BAD],
            "rating": [9, 7],
            "status": "tie",
        }
    ],
    "UltraFeedback": [
        {
            "source": "evol_instruct",
            "instruction": Q,
            "models": ["a", "b"],
            "completions": [
                {
                    "annotations": {},
                    "custom_system_prompt": "",
                    "model": "a",
                    "response": BAD,
                    "critique": "",
                    "overall_score": 3.0,
                },
                {
                    "annotations": {},
                    "custom_system_prompt": "",
                    "model": "b",
                    "response": GOOD,
                    "critique": "",
                    "overall_score": 8.5,
                },
            ],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
        }
    ],
    "ALMA-R-Preference": [{"translation": {**ALMA, "required_directions": "de-en"}}],
    "summarize_from_feedback": [
        {
            "info": {
                "id": "t3",
                "post": "My dog.",
                "title": "Help",
                "subreddit": "dogs",
                "site": None,
                "article": None,
            },
            "summaries": SUMMARIES,
            "choice": 1,
            "worker": "w",
            "batch": "b",
            "split": "train",
            "extra": {"confidence": 7},
        }
    ],
    "PKU-SafeRLHF": [
        {
            "prompt": Q,
            "response_0": BAD,
            "response_1": GOOD,
            "is_response_0_safe": False,
            "is_response_1_safe": True,
            "safer_response_id": 1,
        }
    ],
    "HelpSteer": [
        {
            "prompt": Q,
            "response": text,
            "helpfulness": score,
            "correctness": 4,
            "coherence": 4,
            "complexity": 1,
            "verbosity": 1,
        }
        for text, score in ((BAD, 1), (GOOD, 4))
    ],
    "HelpSteer2-Preference": [
        {
            "split": "train",
            "prompt": Q,
            "response_1": BAD,
            "response_2": GOOD,
            "preference_strength": 2,
            "preference_statement": "-",
        }
    ],
    "HelpSteer3-Preference": [
        {
            "domain": "general",
            "language": "english",
            "context": [{"role": "user", "content": Q}],
            "response1": GOOD,
            "response2": BAD,
            "overall_preference": -1,
        }
    ],
    "RLHF-V": [
        {
            "ds_name": "RLHF-V",
            "image": "a.png",
            "text": json.dumps({"question": Q, "chosen": GOOD, "rejected": BAD}),
            "origin_dataset": "VQA_v2",
            "idx": 0,
            "image_path": "x.jpg",
        }
    ],
    "MVC": [
        {
            "system_prompt": "",
            "instruction_prompt": Q,
            "chosen_response": GOOD,
            "rejected_response": BAD,
            "chosen_images": ["a.png"],
            "rejected_images": ["b.png"],
        }
    ],
    "ShareGPT": [
        {
            "conversations": [{"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        }
    ],
    "Nectar": [
        {
            "prompt": Q,
            "answers": [{"answer": BAD, "model": "a", "rank": 7.0}, {"answer": GOOD, "model": "b", "rank": 1.0}],
            "turns": 1,
        }
    ],
    "SHP": [
        {
            "post_id": "x",
            "domain": "askbaking_train",
            "history": Q,
            "human_ref_A": BAD,
            "human_ref_B": GOOD,
            "labels": 0,
            "score_A": 2,
            "score_B": 9,
        }
    ],
    "webgpt_comparisons": [
        {
            "question": {"dataset": "eli5", "id": "x", "full_text": Q},
            "quotes_0": {"title": []},
            "answer_0": GOOD,
            "tokens_0": {},
            "score_0": 0.5,
            "quotes_1": {"title": []},
            "answer_1": BAD,
            "tokens_1": {},
            "score_1": -0.5,
        }
    ],
    "chatbot_arena_conversations": [
        {
            "question_id": "x",
            "model_a": "m",
            "model_b": "n",
            "winner": "model_b",
            "judge": "arena_user_1",
            "conversation_a": [{"role": "user", "content": Q}, {"role": "assistant", "content": BAD}],
            "conversation_b": [{"role": "user", "content": Q}, {"role": "assistant", "content": GOOD}],
            "turn": 1,
        }
    ],
    "distilabel, generations": [
        {"instruction": Q, "generations": [BAD, GOOD], "ratings": [2.0, 5.0], "rationales": ["", ""]}
    ],
}


def _written(folder, records):
    for name in ("a", "b"):
        Image.new("RGB", (2, 2)).save(folder / f"{name}.png")
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_form_has_rows_here():
    assert set(PREFERENCE_FORMS) == set(RECORDS)
    assert all(form_of(records[0], "row").name == name for name, records in RECORDS.items())


def _expected(name):
    good, bad = ("Yeah.", "Yup.") if name == "ALMA-R-Preference" else (GOOD, BAD)
    return {
        "prompt": [{"role": "user", "content": PROMPTS.get(name, Q)}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }


@pytest.mark.parametrize("name", RECORDS)
def test_published_forms(name, tmp_path):
    _written(tmp_path, RECORDS[name])
    (row,) = read_rows(RowSource(source="data.jsonl", pairs=True), folder=tmp_path)
    assert {column: row[column] for column in _expected(name)} == _expected(name)
    assert len(row["images"]) == (name in ("MVC", "RLHF-V"))
    assert len(row.get("rejected_images") or []) == (name == "MVC")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in RECORDS])
def test_published_forms_as_data_sets_and_streams(name, tmp_path):
    path = _written(tmp_path, RECORDS[name])
    streams = [] if PREFERENCE_FORMS[name].is_grouped and not PREFERENCE_FORMS[name].is_adjacent else [stream_pairs]
    for load in (load_pairs, *streams):
        (row,) = list(load(str(path), conversations=True))
        assert {column: row[column] for column in _expected(name)} == _expected(name)


@pytest.mark.slow
def test_a_stream_cannot_bring_the_answers_of_a_prompt_together(tmp_path):
    path = _written(tmp_path, RECORDS["labelled completions (KTO)"])
    with pytest.raises(ValueError, match="read them without streaming"):
        list(stream_pairs(str(path)))


def test_translations_make_a_pair_in_each_direction_and_people_come_first(tmp_path):
    rows = load_pairs(str(_written(tmp_path, [{"translation": ALMA}, {"translation": {**ALMA, "Delta": -2.0}}])))
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        *(("Yeah.", "Yup."), ("Ja.", "Jo.")),
        *(("Yup.", "Yeah."), ("Ja!", "Jo.")),
    ]


def test_rows_without_a_preference_are_counted(tmp_path, caplog):
    tie = {"prompt": "x", "responses": ["a", "b"], "scores": [1, 1]}
    assert len(load_pairs(str(_written(tmp_path, [tie, *RECORDS["scored responses"]])))) == 1
    assert "1 of 2 prompts make no pair" in caplog.text
    arena = RECORDS["chatbot_arena_conversations"][0]
    assert len(load_pairs(str(_written(tmp_path, [arena, {**arena, "winner": "tie (bothbad)"}])))) == 1
    with pytest.raises(ValueError, match="no row makes a pair"):
        load_pairs(str(_written(tmp_path, [tie])))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**RECORDS["PKU-SafeRLHF"][0], "better_response_id": 0}, "choose one with choice=better_response_id"),
        (
            {"question": "a", "instruction": "b", "chosen": "c", "rejected": "d"},
            "fit a pair with question and a pair with instruction",
        ),
        ({"prompt": Q, "responses": ["a"], "scores": [1, 2]}, "lists of the same length"),
        ({"prompt": Q, "responses": ["a", "b"], "choice": 2}, "must be 0 or 1, not 2"),
        ({"prompt": Q, "responses": ["a", "b"], "scores": ["good", 1]}, "a score must be a number, not 'good'"),
        ({**RECORDS["RLHF-V"][0], "text": "{"}, "column text: not JSON"),
        ({**RECORDS["ShareGPT"][0], "chosen": {"value": "a"}}, "column chosen: a turn has from"),
        ({**RECORDS["chatbot_arena_conversations"][0], "winner": "a"}, "must be model_a, model_b or a tie, not 'a'"),
        ({**RECORDS["SHP"][0], "labels": 2}, "column labels: must be 0 or 1"),
        ({"prompt": Q, "completion": "a", "label": "yes"}, "column label: must be true or false"),
    ],
)
def test_rows_that_cannot_be_read(record, message, tmp_path):
    with pytest.raises(ValueError, match="row 1") as raised:
        load_pairs(str(_written(tmp_path, [record])))
    assert message in str(raised.value)


def test_columns_under_other_names(tmp_path):
    record = {"q": Q, "answers": {"good": GOOD, "bad": BAD}, "picture": "a.png", "prompt": "other"}
    columns = {"prompt": "q", "chosen": "answers.good", "rejected": "answers.bad", "images": "picture"}
    path = _written(tmp_path, [record])
    row = load_pairs(str(path), columns=columns)[0]
    assert row["chosen"][0]["content"] in (GOOD, [{"type": "text", "text": GOOD}])
    assert len(row["images"]) == 1
    assert row["source_prompt"] == "other"
    safe = {**RECORDS["PKU-SafeRLHF"][0], "better_response_id": 0}
    row = load_pairs(str(_written(tmp_path, [safe])), columns={"choice": "better_response_id"})[0]
    assert (row["chosen"], row["rejected"]) == (BAD, GOOD)
    with pytest.raises(ValueError, match=r"row 1, column chosen: there is no column 'chossen'"):
        load_pairs(str(path), columns={"chosen": "chossen"})
    assert DataArguments(dataset_name="x", columns=["prompt=q"]).columns == ["prompt=q"]


def test_rows_of_a_recipe_take_columns_and_pairs(tmp_path):
    _written(tmp_path, [{"q": Q, "good": GOOD}])
    (row,) = read_rows(RowSource(source="data.jsonl", columns={"prompt": "q", "chosen": "good"}), folder=tmp_path)
    assert row["prompt"] == [{"role": "user", "content": Q}]
    assert row["chosen"] == GOOD
    _written(tmp_path, RECORDS["UltraFeedback"])
    (row,) = read_rows(RowSource(source="data.jsonl", pairs=True), folder=tmp_path)
    assert row["chosen"] == [{"role": "assistant", "content": GOOD}]
    assert row["prompt"] == [{"role": "user", "content": Q}]


def test_completions_with_labels_are_read_under_other_names_and_from_every_form(tmp_path):
    labelled = [{"ask": Q, "reply": GOOD, "good": True}, {"ask": Q, "reply": BAD, "good": False}]
    columns = {"prompt": "ask", "completion": "reply", "label": "good"}
    named = load_unpaired(str(_written(tmp_path, labelled)), columns=columns)
    scored = load_unpaired(str(_written(tmp_path, RECORDS["UltraFeedback"])))
    for rows in (named, scored):
        assert [(row["prompt"], row["completion"], row["label"]) for row in rows] == [(Q, GOOD, True), (Q, BAD, False)]


@pytest.mark.slow
def test_the_command_takes_columns_and_its_card_says_so(tmp_path, capsys):
    rows = [{"q": Q, "good": GOOD, "bad": BAD}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    roles = {"judge": {"engine": "function", "use": "reprlib:repr"}}
    recipe = {"rows": "rows.jsonl", "strategies": ["verify_direction"], "roles": roles}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    argv = ["data", "run", str(tmp_path / "recipe.yaml"), "--columns"]
    assert cli.main([*argv, "prompt=q", "chosen=good", "rejected=bad"]) == 0, capsys.readouterr().err
    (row,) = load_pairs(str(tmp_path / "recipe" / "dataset"))
    assert row["chosen"] == [{"role": "assistant", "content": GOOD}]
    assert "chosen: good" in (tmp_path / "recipe" / "dataset" / "README.md").read_text()
    assert cli.main([*argv, "prompt=question"]) != 0
    assert "there is no column 'question'" in capsys.readouterr().err
