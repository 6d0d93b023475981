"""Rows for fine-tuning on texts, in every form; the commands of SimCTG and CAL."""

import json

import pytest
from datasets import Dataset
from PIL import Image

from contralto import cli
from contralto.align.text_data import load_texts
from contralto.testbed import scenes

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
MESSAGES = {"messages": TURNS}


def _file(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "options", "read"),
    [
        ({"text": "a b", "title": "x"}, {}, {"text": "a b"}),
        (MESSAGES, {}, MESSAGES),
        ({"prompt": "a", "completion": "b"}, {}, {"prompt": "a", "completion": "b"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, {"prompt": "a", "completion": "b"}),
        ({"article": {"body": "a"}}, {"columns": {"text": "article.body"}}, {"text": "a"}),
        (
            {"prompt": "a", "chosen": "b"},
            {"conversations": True},
            {"prompt": [TURNS[0]], "completion": [TURNS[1]]},
        ),
    ],
)
def test_every_form_is_read_as_trl_reads_it(tmp_path, row, options, read):
    assert load_texts(_file(tmp_path, [row, row]), **options).to_list() == [read, read]


def test_empty_texts_are_left_out():
    rows = Dataset.from_list([{"text": " \n"}, {"text": "a"}, {"text": ""}])
    assert load_texts(rows).to_list() == [{"text": "a"}]


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_are_stored_inside(tmp_path, column):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "red.png")
    value = "red.png" if column == "image" else ["red.png"]
    rows = load_texts(_file(tmp_path, [{**MESSAGES, column: value}, MESSAGES]))
    (image,) = rows[0]["images"]
    assert image.size == (4, 3)
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert rows[1]["images"] == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer": "a"}], r"row 1: a row needs the columns text, or messages, or .*; it has answer"),
        (
            [{"text": "a"}, {"prompt": "a", "completion": "b"}],
            "row 2: it has prompt and completion, and the rows before",
        ),
        ([{"text": 3}], "row 1, column text: it must be a text or a list of messages, not 3"),
        ([{"messages": "a"}], "column messages: it must be a list of messages, not 'a'"),
        ([{"prompt": "a", "completion": TURNS}], "prompt and completion must both be texts, or both be messages"),
        ([{"text": ""}], "has no row with text"),
        ([["a"]], "a row must be a JSON object, not a list"),
        ([{"text": "a", "images": ["x.png"]}], "a row with images needs messages"),
        ([{**MESSAGES, "images": ["missing.png"]}], "missing.png"),
    ],
)
def test_mistakes_in_the_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_texts(_file(tmp_path, rows))


OPTIONS = ("--max_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "2")


def _align(recipe, *words):
    few = ("--gradient_accumulation_steps", "1", "--output_dir", "out", "--save_strategy", "no")
    return cli.main(["align", recipe, *words, *OPTIONS, *few])


@pytest.mark.slow
def test_simctg_by_command(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    texts = ["Ben went out to the barn door. He saw a cow.", "Mia went to the barn. She saw a goat."]
    source = _file(tmp_path, [{"text": text} for text in texts])
    words = ("--model_name_or_path", "testbed:expert", "--dataset_name", source)
    assert _align("simctg", *words, "--eval_strategy", "steps", "--eval_steps", "1", "--eval_dataset_name", source) == 0
    printed = capfd.readouterr().out
    assert "batch: 2 texts per step" in printed
    assert "isotropy" in printed
    assert "eval_isotropy" in printed
    assert "2202.06417" in (tmp_path / "out/README.md").read_text()
    assert _align("simctg", *words, "--dataset_streaming", "true") == 2
    assert "texts are read whole: leave dataset_streaming out" in capfd.readouterr().err


@pytest.mark.slow
def test_cal_by_command(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rows = []
    for seed in range(2):
        scene = next(scenes.scenes(seed, "train"))
        scene.image().save(tmp_path / f"{seed}.png")
        turns = (("user", scenes.DESCRIBE), ("assistant", scenes.caption(scene.place, scene.objects)))
        rows.append({"images": [f"{seed}.png"], "messages": [{"role": r, "content": text} for r, text in turns]})
    source = _file(tmp_path, rows)
    assert _align("cal", "--model_name_or_path", "testbed:vision-0", "--dataset_name", source) == 0
    assert "cal_weight" in capfd.readouterr().out
    assert "2405.17871" in (tmp_path / "out/README.md").read_text()
