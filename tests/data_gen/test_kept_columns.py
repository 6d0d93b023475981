"""The columns of a source in the pairs that are made of its rows."""

import datetime
import json
import math

import pytest

from contralto.data_gen.dataset import load_pairs, to_dataset
from contralto.data_gen.export import pair_rows
from contralto.data_gen.kept_columns import DEEPEST, PREFIX, READ, kept_columns
from contralto.data_gen.pipeline import Result
from contralto.data_gen.types import Pair

PROMPT = [{"role": "user", "content": "Why?"}]


def _pair(**columns):
    row = {"id": "7", "prompt": PROMPT, "images": (), **columns}
    pair = Pair(prompt=PROMPT, chosen="Because.", rejected="No.", columns={"length": 3})
    (made,) = pair_rows(Result(row=row, strategy="clair", outcomes=[pair], answered=[]))
    return made


def test_columns_keep_their_names_and_values(tmp_path):
    made = _pair(topic="haste", tags=["a", "b"], about={"page": 3}, score=0.5, seen=None, right=True)
    assert {name: made[name] for name in ("topic", "tags", "about", "score", "seen", "right")} == {
        "topic": "haste",
        "tags": ["a", "b"],
        "about": {"page": 3},
        "score": 0.5,
        "seen": None,
        "right": True,
    }
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(made) + "\n", encoding="utf-8")
    assert load_pairs(path)[0]["topic"] == "haste"


def test_names_that_the_data_set_or_training_has_are_prefixed(tmp_path):
    """With them, training would take the columns for its own: a `context` that is not in the prompt is rejected."""
    own = {"length": 9, "strategy": "mine", "chosen": "Perhaps.", **dict.fromkeys(READ, "text")}
    made = _pair(**own)
    assert (made["length"], made["strategy"], made["chosen"][0]["content"]) == (3, "clair", "Because.")
    assert {name: made[f"{PREFIX}{name}"] for name in own} == own
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(made) + "\n", encoding="utf-8")
    (row,) = load_pairs(path)
    assert row["chosen"][0]["content"] == "Because."


def test_two_columns_do_not_share_a_name():
    assert kept_columns({"source_seed": 1, "seed": 2}, ["seed"]) == {"source_seed": 1}
    assert kept_columns({"source_seed": 1}, ["source_seed", "source_source_seed"]) == {}


deep: list = []
for _ in range(200):
    deep = [deep]
HOSTILE = {
    "surrogate": "a\ud800",
    "infinite": math.inf,
    "nested": [math.nan, {"x": -math.inf, "\udc00": 2**70}],
    "large": 2**64,
    "day": datetime.date(2026, 11, 29),
    "deep": deep,
}


def test_no_value_costs_the_answers():
    """Whatever a source holds, the pairs are written."""
    made = _pair(**HOSTILE, bytes=b"x", image_of_a_map=object(), parts=[object()], more={"x": b"y"})
    assert not {"bytes", "image_of_a_map", "parts", "more"} & made.keys()
    assert made["day"] == "2026-11-29"
    assert made["large"] == str(2**64)
    assert made["infinite"] is None
    assert made["nested"] == [None, {"x": None, "\ufffd": str(2**70)}]
    level, depth = made["deep"], 0
    while isinstance(level, list):
        level, depth = level[0], depth + 1
    assert depth == DEEPEST
    assert to_dataset([made, _pair(large="small", nested="text", deep=None)]).num_rows == 2
    json.dumps(made, allow_nan=False).encode()


@pytest.mark.parametrize("name", ["id", "prompt", "images", "rejected_images"])
def test_what_the_pair_has_of_its_row_is_not_repeated(name):
    assert kept_columns({name: "x"}, []) == {}
