"""Completions with labels: TRL's unpaired form, pairs, and mistakes in them."""

import json

import pytest
from datasets import Dataset

from contralto.data_gen import load_unpaired, stream_unpaired
from contralto.data_gen.unpaired_rows import unpaired_rows

TEXTS = [
    {"prompt": "2 + 2 =", "completion": " 4", "label": True, "id": 7},
    {"prompt": "a", "completion": "b", "label": 0, "id": 8},
]
PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "id": 3}


def _file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_texts_stay_texts(tmp_path):
    rows = load_unpaired(_file(tmp_path / "a.jsonl", TEXTS))
    assert rows.to_list() == [TEXTS[0], TEXTS[1] | {"label": False}]
    assert list(stream_unpaired(tmp_path / "a.jsonl")) == rows.to_list()


def test_texts_become_conversations_if_that_is_wanted():
    (row,) = unpaired_rows(TEXTS[0], conversations=True)
    assert row["prompt"] == [{"role": "user", "content": "2 + 2 ="}]
    assert row["completion"] == [{"role": "assistant", "content": " 4"}]


def test_a_completion_of_text_answers_a_prompt_of_messages():
    (row,) = unpaired_rows({"prompt": [{"role": "user", "content": "x"}], "completion": "y", "label": True})
    assert row["completion"] == [{"role": "assistant", "content": "y"}]


def test_pairs_become_two_rows():
    rows = load_unpaired(Dataset.from_list([PAIR, PAIR]))
    assert [row["label"] for row in rows] == [True, False, True, False]
    assert rows[1] == {"prompt": "2 + 2?", "completion": "5", "label": False, "id": 3}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([3], "row 1: a row must be a JSON object, not a int"),
        (
            [{"prompt": "x", "label": True}],
            "row 1, column completion: it is missing; a row needs prompt, completion and label",
        ),
        ([{**TEXTS[0], "label": None}], "row 1, column label: it is missing"),
        ([{**TEXTS[0], "label": 0.5}], "row 1, column label: it must be true"),
        ([{**TEXTS[0], "completion": ""}], "row 1, column completion: it is empty"),
        ([{**TEXTS[0], "completion": [{"role": "assistant", "content": "x"}]}], "row 1, column prompt: it is a string"),
        (
            [{"prompt": [{"role": "assistant", "content": "x"}], "completion": "y", "label": True}],
            "row 1, column prompt: its last message has role assistant, not user",
        ),
        (
            [
                {
                    "prompt": [{"role": "user", "content": "x"}],
                    "completion": [{"role": "user", "content": "y"}],
                    "label": True,
                }
            ],
            "row 1, column completion: it begins with role user",
        ),
        ([{**TEXTS[0], "images": ["a.png"]}], "row 1, column images: completions with labels are read without images"),
        ([TEXTS[0], PAIR], "row 2: the rows from here are pairs of texts, those before single completions of texts"),
    ],
)
def test_mistakes_name_row_and_column(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message) as error:
        load_unpaired(_file(tmp_path / "rows.jsonl", rows))
    assert "\n" not in str(error.value)
