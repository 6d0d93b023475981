"""Published schemas come out as rows that TRL's trainers take; errors name file, row and column."""

import json
import os
import struct
import subprocess
import sys
import zlib
from itertools import product
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_dataset
from helpers.preference_rows import (
    ASKED,
    BAD,
    CHOSEN,
    GOOD,
    PLAIN,
    RAGGED,
    REJECTED,
    SCHEMAS,
    TALK,
    TEXTS,
    Q,
    said,
    user,
)
from PIL import Image

from contralto.data_gen.dataset import load_pairs, stream_pairs, template_options, to_dataset
from contralto.data_gen.preference_rows import as_row


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ------------------------------------------------------------------------------------------------------------- published


FORMS = ("jsonl", "json", "parquet", "folder", "saved", "dataset", "splits")


def schemas():
    """Every schema as JSON lines and one in every form; the other pairs are slow."""
    for name, form in product(SCHEMAS, FORMS):
        fast = form == "jsonl" or name == next(iter(SCHEMAS))
        yield pytest.param(name, form, marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "form"), list(schemas()))
def test_published_schemas(tmp_path, name, form):
    records = [SCHEMAS[name]] * 2
    match form:
        case "jsonl":
            source = written(tmp_path / "pairs.jsonl", *records)
        case "json":
            source = tmp_path / "pairs.json"
            source.write_text(json.dumps(records))
        case "parquet":
            source = tmp_path / "pairs.parquet"
            Dataset.from_list(records).to_parquet(source)
        case "folder":
            source = tmp_path
            (tmp_path / "data").mkdir()
            written(tmp_path / "data" / "train-0.jsonl", records[0])
            written(tmp_path / "data" / "train-1.jsonl", records[1])
            written(tmp_path / "data" / "test.jsonl", {"broken": 1})
        case "saved":
            source = tmp_path / "saved"
            Dataset.from_list(records).save_to_disk(source)
        case "dataset":
            source = Dataset.from_list(records)
        case "splits":
            source = DatasetDict({"train": Dataset.from_list(records), "test": Dataset.from_list(records[:1])})
    found = load_pairs(source, conversations=True)
    assert found.num_rows == 2
    for row in found:
        assert (row["prompt"], row["chosen"], row["rejected"]) == (ASKED, CHOSEN, REJECTED)
    others = set(SCHEMAS[name]) - {"messages"} | {"prompt", "chosen", "rejected"}
    assert set(found.column_names) == others | ({"source_messages"} if "messages" in SCHEMAS[name] else set())


def test_other_columns_are_kept():
    row = as_row({**SCHEMAS["distilabel"], "completion": "x"})
    assert (row["chosen_rating"], row["prompt_id"], row["source_completion"]) == (4.5, "5f3c", "x")


def test_conversations_of_several_turns():
    before = [{"role": "system", "content": "Be brief."}, user("Hi"), said("Hello"), user(Q)]
    for prompt in (None, Q, before, [before[-1]]):
        row = as_row({"prompt": prompt, "chosen": before + CHOSEN, "rejected": before + REJECTED})
        assert (row["prompt"], row["chosen"], row["rejected"]) == (before, CHOSEN, REJECTED)
    row = as_row({"prompt": before, "chosen": [user(Q), *CHOSEN], "rejected": [user(Q), *REJECTED]})
    assert (row["prompt"], row["chosen"]) == (before, CHOSEN)
    longer = [said(GOOD), user("Sure?"), said("Yes.")]
    row = as_row({"chosen": ASKED + longer, "rejected": ASKED + REJECTED})
    assert (row["prompt"], row["chosen"], row["rejected"]) == (ASKED, longer, REJECTED)


def test_equal_answers_load():
    """Ties in distilabel's sets; the check no_op finds them."""
    row = as_row({"prompt": Q, "chosen": ASKED + CHOSEN, "rejected": ASKED + CHOSEN})
    assert (row["prompt"], row["chosen"], row["rejected"]) == (ASKED, CHOSEN, CHOSEN)
    row = as_row({"prompt": Q, "chosen": CHOSEN, "rejected": CHOSEN})
    assert (row["prompt"], row["chosen"]) == (ASKED, CHOSEN)
    row = as_row({"prompt": Q, "chosen": [said("a"), *CHOSEN], "rejected": [said("a"), *REJECTED]})
    assert (row["prompt"], row["chosen"]) == (ASKED, [said("a"), *CHOSEN])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        ("The sky is blue.", "The sky is brown.", "The sky is", ("blue.", "brown.")),
        ("The sky is blue.", "The sky is", "The sky", ("is blue.", "is")),
        ("The sky is", "The sky is green", "The sky", ("is", "is green")),
        ("a b c", "a b d", "a b", ("c", "d")),
    ],
)
def test_an_implicit_prompt_of_texts_ends_with_a_whole_word(chosen, rejected, prompt, answers):
    row = as_row({"chosen": chosen, "rejected": rejected}, conversations=True)
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([user(prompt)], *([said(a)] for a in answers))


def test_transcripts_of_several_turns():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    row = as_row({"chosen": f"{start} Bye bye", "rejected": f"{start} No"}, conversations=True)
    assert row["prompt"] == [user("Hi"), said("Hello"), user("Bye")]
    assert (row["chosen"], row["rejected"]) == ([said("Bye bye")], [said("No")])


# ---------------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    return tmp_path


def test_images_are_stored_inside(pictures):
    (pictures / "sub").mkdir()
    one = {**SCHEMAS["plain strings"], "images": ["../red.png"], "rejected_images": ["../blue.png"]}
    two = {**SCHEMAS["plain strings"], "image": "../blue.png"}
    path = written(pictures / "sub" / "pairs.jsonl", one, two, SCHEMAS["plain strings"])
    found = load_pairs(path, conversations=True)
    for name in ("red.png", "blue.png"):
        (pictures / name).unlink()
    colours = [[image.getpixel((0, 0)) for image in images] for images in found["images"]]
    assert colours == [[(255, 0, 0)], [(0, 0, 255)], []]
    assert [len(images) for images in found["rejected_images"]] == [1, 0, 0]
    found.to_parquet(pictures / "again.parquet")
    again = load_pairs(pictures / "again.parquet")
    assert again[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)


def test_images_as_objects_and_in_parts():
    content = [{"type": "image"}, {"type": "text", "text": Q}]
    parts = {"prompt": [{"role": "user", "content": content}], "chosen": CHOSEN, "rejected": REJECTED}
    rows = [
        {**as_row({**parts, "images": [Image.new("RGB", (2, 2), "red")]})},
        as_row(SCHEMAS["plain strings"], conversations=True),
    ]
    found = to_dataset(rows)
    assert found[0]["images"][0].size == (2, 2)
    assert found[0]["prompt"][0]["content"] == [{"type": "image"}, {"type": "text", "text": Q}]
    assert found[1]["chosen"][0]["content"] == [{"type": "text", "text": GOOD}]
    again = load_pairs(found)
    assert again[0]["images"][0].size == (2, 2)
    assert again[:]["prompt"] == found[:]["prompt"]


# ----------------------------------------------------------------------------------------------- texts, and other columns

FRUIT = {"chosen": "The fruit is apple.", "rejected": "The fruit is banana."}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_stay_texts(tmp_path, name):
    (row,) = load_pairs(written(tmp_path / "pairs.jsonl", TEXTS[name]))
    if "prompt" in TEXTS[name]:
        assert row == TEXTS[name]
    assert {column: row["prompt"] + row[column] for column in ("chosen", "rejected")} == {
        column: TEXTS[name].get("prompt", "") + TEXTS[name][column] for column in ("chosen", "rejected")
    }


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("The sky is blue.", "The sky is brown."), ("a b c", "a b d"), ("It is 4", "It is 5"), ("x  y", "x  z")],
)
def test_an_implicit_prompt_of_texts_is_that_of_trl(chosen, rejected):
    from trl import extract_prompt

    assert as_row({"chosen": chosen, "rejected": rejected}) == extract_prompt({"chosen": chosen, "rejected": rejected})


def test_an_implicit_prompt_where_one_text_begins_the_other():
    """TRL would take all but the last character of the shorter one for the prompt."""
    row = as_row({"chosen": "The sky is", "rejected": "The sky is green"})
    assert row == {"prompt": "The sky", "chosen": "is", "rejected": "is green"}


@pytest.mark.parametrize("conversations", [False, True])
@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"question": "Name a fruit that is red."},
            "question holds text: rename the column with the prompt to prompt",
        ),
        (
            {"instruction": "Name", "input": "red"},
            "instruction, input hold text: .*, and drop those that are not part of it",
        ),
        ({"word": "apple"}, "word holds text"),
        ({"conversations": [{"from": "human", "value": "Name a fruit."}]}, "conversations holds text"),
        ({"history": [["Hi", "Hello"]], "score_chosen": 4.0}, "history holds text"),
        ({"meta": {"context": ["A list of fruit."]}}, "meta holds text"),
    ],
)
def test_no_prompt_is_invented_where_another_column_holds_text(others, message, conversations):
    answers = {name: [said(text)] for name, text in FRUIT.items()}
    for row in (FRUIT, answers):
        with pytest.raises(ValueError, match=f"the row, column prompt: it is missing, and {message}"):
            as_row({**others, **row}, conversations=conversations)
    nothing = {"id": "a7", "score_chosen": 4.0, "input": "", "history": [], "images": None, "tools": None}
    assert as_row({**FRUIT, **nothing})["prompt"] == "The fruit is"
    talk = {name: [user("Name a fruit."), said(text)] for name, text in FRUIT.items()}
    assert as_row({**talk, "source": "a list"})["prompt"] == [user("Name a fruit.")]


def test_the_system_column_is_the_systems_turn():
    brief = {"role": "system", "content": "Be brief."}
    for row in (TALK, {**PLAIN, "prompt": ASKED}, {**TALK, "prompt": Q}):
        assert as_row({**row, "system": "Be brief."})["prompt"] == [brief, *ASKED]
        assert as_row({**row, "system_prompt": ""})["prompt"] == ASKED
    assert as_row({**PLAIN, "system": "Be brief."}, conversations=True)["prompt"] == [brief, *ASKED]
    again = as_row({**TALK, "system": "Be brief."})
    assert as_row(again) == again
    with pytest.raises(
        ValueError, match=r"column system: it contains a part of the prompt .* or convert strings to conversations"
    ):
        as_row({**PLAIN, "system": "Be brief."})
    with pytest.raises(ValueError, match=r"column system: .* keep one of the two system messages"):
        as_row({**PLAIN, "prompt": [brief, *ASKED], "system": "Be long."})


@pytest.mark.parametrize("name", ["context", "input", "history", "documents", "instruction"])
def test_a_part_of_the_prompt_is_in_it_or_refused(name):
    for value in ("2 + 2", ["What is"], [{"question": "2?"}], None, ""):
        assert as_row({**PLAIN, name: value})["prompt"] == Q
        assert as_row({**TALK, name: value})["prompt"] == ASKED
    for row in (PLAIN, TALK, SCHEMAS["transcripts"]):
        for value in ("Use words.", [["Hi", "Hello"]], {"text": "Use words."}):
            with pytest.raises(
                ValueError, match=f"column {name}: it contains a part of the prompt that is not in the column prompt"
            ):
                as_row({**row, name: value})


@pytest.mark.parametrize("name", ["prefix", "initial_reason_steps"])
def test_the_beginning_of_the_answers_is_in_them_or_rejected(name):
    step = "Step 1: add."
    for row in (PLAIN, {**PLAIN, "prompt": ASKED}):
        with pytest.raises(ValueError, match=f"column {name}: it contains the beginning of the answers"):
            as_row({**row, name: step})
        with pytest.raises(ValueError, match="put it before both answers"):
            as_row({**row, "chosen": f"{step} {row['chosen']}", name: step})
        both = {side: f"{step} {row[side]}" for side in ("chosen", "rejected")}
        assert step in str(as_row({**row, **both, name: step})["rejected"])
        assert as_row({**row, name: ""})[name] == ""
    assert as_row({**PLAIN, "prompt": f"{Q} {step}", name: step})["prompt"] == f"{Q} {step}"


def test_texts_and_messages_do_not_mix(tmp_path):
    path = written(tmp_path / "pairs.jsonl", PLAIN, TALK)
    with pytest.raises(
        ValueError, match=r"pairs.jsonl, row 2: it is made of messages, and the rows before it of texts"
    ):
        load_pairs(path)
    assert load_pairs(path, conversations=True)["prompt"][:] == [ASKED, ASKED]


@pytest.mark.parametrize("content", ["lines", "a list", "a mark first"])
def test_json_files_of_lines_and_of_a_list(tmp_path, content):
    lines = "".join(json.dumps({**PLAIN, "prompt": text}, ensure_ascii=False) + "\n" for text in (Q, "a\u2028b\x85c"))
    path = tmp_path / "pairs.json"
    text = {"lines": lines, "a list": f"[{lines.strip().replace(chr(10), ',')}]", "a mark first": "\ufeff" + lines}[
        content
    ]
    path.write_text(text, encoding="utf-8")
    assert load_pairs(path)["prompt"][:] == [Q, "a\u2028b\x85c"]


def test_splits_of_a_folder_are_those_of_load_dataset(tmp_path):
    for name in ("training_pairs.jsonl", "evaluation.jsonl"):
        written(tmp_path / name, {**PLAIN, "prompt": name})
    assert load_pairs(tmp_path)["prompt"][:] == ["training_pairs.jsonl"]
    assert load_pairs(tmp_path, split="test")["prompt"][:] == ["evaluation.jsonl"]
    with pytest.raises(ValueError, match="there is no split 'dev'; it has train, test"):
        load_pairs(tmp_path, split="dev")
    (tmp_path / "evaluation.jsonl").unlink()
    with pytest.raises(ValueError, match="there is no split 'test'; it has train"):
        load_pairs(tmp_path, split="test")


@pytest.mark.parametrize("name", [*RAGGED, "images"])
def test_a_stream_has_the_same_rows(pictures, name):
    rows = RAGGED.get(name, [{**PLAIN, "images": ["red.png"]}])
    path = written(pictures / "pairs.jsonl", *rows)
    for row, whole in zip(stream_pairs(path), load_pairs(path), strict=True):
        assert row == {column: value for column, value in whole.items() if column in row}


def test_a_stream_names_a_row_when_it_is_read(tmp_path):
    stream = iter(stream_pairs(written(tmp_path / "pairs.jsonl", PLAIN, {**PLAIN, "chosen": 1})))
    assert next(stream)["prompt"] == Q
    with pytest.raises(ValueError, match=r"pairs.jsonl, row 2, column chosen"):
        next(stream)
    with pytest.raises(ValueError, match=r"gone.jsonl: there is no such file"):
        stream_pairs(tmp_path / "gone.jsonl")


def test_a_stream_reads_no_row_before_it_is_needed(tmp_path):
    path = written(tmp_path / "pairs.jsonl", PLAIN)
    path.write_text(path.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    stream = iter(stream_pairs(path))
    assert next(stream)["prompt"] == Q
    with pytest.raises(ValueError, match=r"pairs.jsonl, row 2: not JSON"):
        next(stream)


def test_rows_without_a_rejected_answer(tmp_path):
    path = written(tmp_path / "pairs.jsonl", {"prompt": Q, "chosen": GOOD})
    for read in (load_pairs, stream_pairs):
        (row,) = read(path, needs_rejected=False)
        assert (row["chosen"], row["rejected"]) == (GOOD, GOOD)
        with pytest.raises(ValueError, match="row 1, column rejected: it is missing"):
            list(read(path))


def test_a_row_without_a_rejected_answer_says_where_its_prompt_ends():
    def read(**row):
        found = as_row(row, needs_rejected=False)
        assert found["rejected"] == found["chosen"]
        return found["prompt"], found["chosen"]

    assert read(prompt=Q, chosen=GOOD, rejected=None) == (Q, GOOD)
    assert read(prompt=ASKED, chosen=GOOD) == (ASKED, CHOSEN)
    assert read(chosen=ASKED + CHOSEN) == (ASKED, CHOSEN)
    assert read(chosen="\n\nHuman: Hi\n\nAssistant: Hello") == ("\n\nHuman: Hi\n\nAssistant:", "Hello")
    both = as_row({"prompt": Q, "chosen": GOOD, "rejected": BAD}, needs_rejected=False)
    assert (both["chosen"], both["rejected"]) == (GOOD, BAD)
    for chosen in (GOOD, CHOSEN):
        with pytest.raises(ValueError, match=r"^the row, column prompt: it is missing; a row without rejected needs a"):
            as_row({"chosen": chosen}, needs_rejected=False)
    for row in ({"prompt": Q, "chosen": None}, {"prompt": Q}):
        with pytest.raises(ValueError, match=r"^the row, column chosen: it is (empty|missing)"):
            as_row(row, needs_rejected=False)


@pytest.mark.parametrize("name", ["image", "images", "rejected_images"])
def test_texts_about_an_image_are_conversations(pictures, name):
    image = str(pictures / "red.png")
    row = as_row({**PLAIN, name: image if name == "image" else [image]})
    assert (row["prompt"], row["chosen"], row["rejected"]) == (ASKED, CHOSEN, REJECTED)


def test_arguments_of_the_chat_template():
    assert template_options({"prompt": Q}) == {"tools": None}
    row = {"tools": '[{"name": "f"}]', "chat_template_kwargs": {"enable_thinking": False}}
    assert template_options(row) == {"tools": [{"name": "f"}], "enable_thinking": False}
    assert template_options({"tools": [1], "chat_template_kwargs": None}) == {"tools": [1]}


# ------------------------------------------------------------------------------------------------------------- malformed

WRONG_ROWS = {
    "not an object": ([1], "row 2: a row must be a JSON object with chosen and rejected, not a list"),
    "no chosen": ({"prompt": Q, "rejected": BAD}, "row 2, column chosen: it is missing"),
    "no rejected": ({"prompt": Q, "chosen": GOOD}, "row 2, column rejected: it is missing"),
    "null chosen": ({**PLAIN, "chosen": None}, r"row 2, column chosen: it is empty \(null\): drop such rows first"),
    "number": ({**PLAIN, "rejected": 5}, "row 2, column rejected: must be a string or a list of messages, not a int"),
    "object": ({**PLAIN, "chosen": {"content": "x"}}, "row 2, column chosen: must be a string or a list of messages"),
    "number as prompt": ({**PLAIN, "prompt": 1}, "row 2, column prompt: must be a string or a list"),
    "empty prompt": ({**PLAIN, "prompt": ""}, "row 2, column prompt: it is empty"),
    "no messages": ({**TALK, "chosen": []}, "row 2, column chosen: the list of messages is empty"),
    "no prompt messages": ({**TALK, "prompt": []}, "row 2, column prompt: the list of messages is empty"),
    "texts as messages": ({**TALK, "chosen": ["hi"]}, "row 2, column chosen, message 1: a message is an object"),
    "ShareGPT": (
        {**TALK, "chosen": [{"from": "human", "value": "x"}]},
        r"column chosen, message 1: it has from and value \(ShareGPT\); rename",
    ),
    "no role": (
        {**TALK, "chosen": [{"content": "x"}]},
        "column chosen, message 1: its role is None, not one of system",
    ),
    "unknown role": ({**TALK, "rejected": [*ASKED, {"role": "bot", "content": "x"}]}, "message 2: its role is 'bot'"),
    "no content": ({**TALK, "chosen": [*ASKED, {"role": "assistant"}]}, "message 2: it has no content"),
    "content a number": ({**TALK, "chosen": [*ASKED, said(4)]}, "message 2: its content is a int, not a string"),
    "unknown part": ({**TALK, "chosen": [*ASKED, said([{"type": "audio"}])]}, "must have type text or image"),
    "part without text": (
        {**TALK, "chosen": [*ASKED, said([{"type": "text"}])]},
        "a text part of its content has no text",
    ),
    "mixed answers": (
        {**PLAIN, "chosen": CHOSEN},
        "one of chosen and rejected is a string, the other a list of messages",
    ),
    "ends with the user": (
        {"chosen": ASKED + CHOSEN + ASKED, "rejected": ASKED + REJECTED},
        "column chosen: its last message has role user, not assistant",
    ),
    "no prompt at all": ({"chosen": CHOSEN, "rejected": REJECTED}, "column prompt: it is missing"),
    "different questions": (
        {"prompt": Q, "chosen": [user("a"), *CHOSEN], "rejected": [user("b"), *REJECTED]},
        "column rejected: its first message differs from that of chosen",
    ),
    "one with, one without": (
        {"prompt": Q, "chosen": ASKED + CHOSEN, "rejected": REJECTED},
        "column rejected: its first message differs from that of chosen",
    ),
    "parting at a question": (
        {
            "chosen": [user("a"), said("b"), user("c"), said("d")],
            "rejected": [user("a"), said("b"), user("e"), said("f")],
        },
        "column chosen: it first differs from the other answer at a message with role user",
    ),
    "another prompt": (
        {**TALK, "prompt": "Who?"},
        "column prompt: chosen and rejected do not start with it",
    ),
    "prompt ends answering": (
        {"prompt": ASKED + CHOSEN, "chosen": GOOD, "rejected": BAD},
        "column prompt: its last message has role assistant",
    ),
    "nothing in common": ({"chosen": "Yes.", "rejected": "No."}, "column prompt: it is missing"),
    "other transcript": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        "column rejected: its transcript differs",
    ),
    "images no list": ({**PLAIN, "images": "a.png"}, "column images: it is a str, not a list of images"),
    "no such image": ({**PLAIN, "images": ["no.png"]}, "column images, image 1: .*no.png: there is no such file"),
    "not an image": ({**PLAIN, "images": ["pairs.jsonl"]}, "column images, image 1: .*pairs.jsonl is not an image"),
    "image a number": ({**PLAIN, "images": [3]}, "column images, image 1: must be a path or an image, not a int"),
    "places without images": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": GOOD, "rejected": BAD},
        "column images: 0 images for 1 image placeholders in prompt and chosen",
    ),
    "places in an answer": (
        {"prompt": ASKED, "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": REJECTED},
        "column images: 0 images for 1 image placeholders in prompt and chosen",
    ),
    "a folder": ({**PLAIN, "images": ["."]}, "column images, image 1: .*: there is no such file"),
    "no name": ({**PLAIN, "images": [""]}, "column images, image 1: .*: there is no such file"),
    "a pipe": ({**PLAIN, "images": ["pipe.png"]}, "column images, image 1: .*pipe.png: there is no such file"),
    "links in a circle": ({**PLAIN, "images": ["circle.png"]}, "column images, image 1: .*circle.png: there is no"),
    "a null byte": ({**PLAIN, "images": ["a\0b.png"]}, "column images, image 1: .*: there is no such file"),
    "a long name": ({**PLAIN, "images": ["x" * 300]}, "column images, image 1: .*: not a path"),
    "PostScript": ({**PLAIN, "images": ["page.png"]}, "column images, image 1: .*page.png is not an image"),
    "a bomb": (
        {**PLAIN, "images": ["bomb.png"]},
        "column images, image 1: .*bomb.png is not an image that Pillow can read",
    ),
}


def with_strange_files(folder):
    """Write files that are no images, or not to be read."""
    os.mkfifo(folder / "pipe.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    header = struct.pack(">4sIIBBBBB", b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4s", 0, b"IDAT"))


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_malformed_rows_are_named(tmp_path, name):
    record, message = WRONG_ROWS[name]
    with_strange_files(tmp_path)
    path = written(tmp_path / "pairs.jsonl", PLAIN, record)
    with pytest.raises(ValueError, match=rf"pairs.jsonl, row 2.*{message.removeprefix('row 2')}") as error:
        load_pairs(path, conversations=True)
    assert "\n" not in str(error.value)
    assert "row 2, column" in str(error.value) or name == "not an object"


WRONG_FILES = {
    "bad JSON": ("pairs.jsonl", '{"prompt": "a"\n', r"pairs.jsonl, row 1: not JSON, column 15: Expecting"),
    "empty line": ("pairs.jsonl", json.dumps(PLAIN) + "\n\n", "pairs.jsonl, row 2: an empty line"),
    "empty file": ("pairs.jsonl", "", "pairs.jsonl has no rows"),
    "empty list": ("pairs.json", "[]", "pairs.json has no rows"),
    "not UTF-8": ("pairs.jsonl", b"\xff\xfe\x00", "pairs.jsonl: not UTF-8 text"),
    "broken JSON": ("pairs.json", "[{]", "pairs.json: not JSON"),
    "deep JSON": ("pairs.json", "[" * 10**5, "pairs.json: not JSON: maximum recursion depth exceeded"),
    "a deep line": ("pairs.jsonl", "[" * 10**5, r"pairs.jsonl, row 1: not JSON: maximum recursion depth exceeded"),
    "a long number": ("pairs.jsonl", "9" * 5000, r"pairs.jsonl, row 1: not JSON: Exceeds the limit \(4300 digits\)"),
    "JSON object": ("pairs.json", "{}", "pairs.json: contains a JSON dict, not a list of rows"),
    "broken parquet": ("pairs.parquet", "PAR?", "pairs.parquet: not a parquet file"),
    "no such file": ("gone.jsonl", None, "gone.jsonl: there is no such file"),
    "another suffix": ("pairs.csv", "a,b", "read from .jsonl, .json and .parquet files, not from .csv"),
    "no suffix": ("pairs", "a", "and this name has no suffix"),
    "folder with a script": (
        "sub/sub.py",
        "x = 1",
        "the folder contains no .parquet, .jsonl or .json file: Dataset scripts",
    ),
    "empty folder": ("sub/notes.md", "a", "the folder contains no .parquet, .jsonl or .json file"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_malformed_files_are_named(tmp_path, name):
    file, content, message = WRONG_FILES[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_pairs(path.parent if path.parent != tmp_path else path)
    assert str(tmp_path) in str(error.value)


def test_splits_that_are_not_there(tmp_path):
    splits = DatasetDict({"test": Dataset.from_list([PLAIN])})
    with pytest.raises(ValueError, match="the data set: there is no split 'train'; it has test"):
        load_pairs(splits)
    splits.save_to_disk(tmp_path)
    assert load_pairs(tmp_path, split="test").num_rows == 1
    with pytest.raises(ValueError, match="there is no split 'train'; it has test"):
        load_pairs(tmp_path)


def test_a_value_that_no_type_holds_is_named(tmp_path):
    path = written(tmp_path / "pairs.jsonl", PLAIN, {**PLAIN, "score": {"of": 10**30}})
    with pytest.raises(ValueError, match=r"pairs.jsonl, column score: a value that JSON does not hold"):
        load_pairs(path)
    with pytest.raises(ValueError, match=r"column score: a value that JSON does not hold"):
        to_dataset(
            [{**as_row(PLAIN), "score": 1.5}, {**as_row(PLAIN), "score": float("inf")}, {**as_row(PLAIN), "score": "x"}]
        )
    with pytest.raises(ValueError, match="at least one row"):
        to_dataset([])


def test_data_sets_of_the_hub(monkeypatch):
    def load_dataset(name, config, *, split, streaming):
        if name != "somebody/pairs":
            raise FileNotFoundError(f"no {name}")
        return {"train": Dataset.from_list([PLAIN])}[split]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_pairs("somebody/pairs", conversations=True)[0]["prompt"] == ASKED
    with pytest.raises(
        ValueError, match="nobody/pairs: neither a local file or folder nor a data set on the Hub: no nobody"
    ):
        load_pairs("nobody/pairs")


@pytest.mark.parametrize("name", RAGGED)
def test_rows_of_different_keys_read_as_they_are(tmp_path, name):
    """Nothing is filled in: as `load_dataset("json")` reads them, but for columns that TRL unpacks; and so from parquet."""
    path = written(tmp_path / "pairs.jsonl", *RAGGED[name])
    found = load_pairs(path)
    for row, record in zip(found, RAGGED[name], strict=True):
        assert row == {
            **dict.fromkeys(found.column_names),
            **({"chat_template_kwargs": {}} if "template" in name else {}),
            **record,
        }
    json_reader = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    for row, theirs in zip(found, json_reader, strict=True):
        if name != "arguments as a text of JSON":  # whose text their reader takes for JSON once more
            assert row == {
                **theirs,
                **({"chat_template_kwargs": row["chat_template_kwargs"]} if "template" in name else {}),
            }
    found.to_parquet(tmp_path / "pairs.parquet")
    assert load_pairs(tmp_path / "pairs.parquet")[:] == found[:]
    found.save_to_disk(tmp_path / "saved")
    assert load_pairs(tmp_path / "saved")[:] == found[:]
    assert found.map(lambda row: {"length": len(row["prompt"])}).remove_columns("length")[0] == found[0]


def test_columns_that_only_some_rows_have():
    found = to_dataset([{**as_row(PLAIN), "a": 1}, {**as_row(PLAIN), "b": "x"}])
    assert found["a"][:] == [1, None]
    assert found["b"][:] == [None, "x"]


# ------------------------------------------------------------------------------------------------------------------- TRL

TRAIN = """
import json, sys, warnings
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from contralto import testbed
from contralto.data_gen.dataset import load_pairs
warnings.simplefilter("ignore")
tokenizer = AutoTokenizer.from_pretrained(testbed.path("student"))
losses = {}
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(testbed.path("student"), dtype="float32")
    args = DPOConfig(output_dir=sys.argv[1], max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                     save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, bf16=False, logging_steps=1)
    trainer = DPOTrainer(model, args=args, train_dataset=load_pairs(path, conversations=True), processing_class=tokenizer)
    trainer.train()
    losses[path] = [trainer.state.log_history[0]["loss"], trainer.train_dataset[0]["chosen_ids"]]
print("LOSSES " + json.dumps(losses))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", pytest.param("3", marks=pytest.mark.full)])
def test_trl_trains_on_every_schema_whatever_the_hash_seed(tmp_path, seed):
    """Seeds 0 and 3 give the two verdicts of `is_conversational` on a mixed row, and both kill a training on it."""
    from contralto import testbed

    paths = [written(tmp_path / f"{name.replace(' ', '-')}.jsonl", record, record) for name, record in SCHEMAS.items()]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path / "out"), *map(str, paths)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(testbed.__file__).parents[1],
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    losses = json.loads(ended.stdout.partition("LOSSES ")[2])
    expected = testbed.tokenizer()(GOOD + "<eos>", add_special_tokens=False)["input_ids"]
    for loss, ids in losses.values():
        assert loss == pytest.approx(0.6931, abs=1e-3)
        assert ids == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_trains_on_rows_with_images(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    from contralto import testbed
    from contralto.testbed import questions as world

    rows = []
    for one in world.scene_pairs(count=4):
        chosen, rejected = said(one["caption"]), said(one["contrast_caption"])
        images = {"images": one["images"][:1], "rejected_images": one["images"][1:]}
        rows.append({"prompt": [user(one["prompt"])], "chosen": [chosen], "rejected": [rejected], **images})
    to_dataset(rows).to_parquet(tmp_path / "pairs.parquet")
    model = AutoModelForImageTextToText.from_pretrained(testbed.path("vision-0"), dtype="float32")
    settings = {
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
    }
    trainer = DPOTrainer(
        model,
        args=DPOConfig(output_dir=str(tmp_path), gradient_checkpointing=False, **settings),
        train_dataset=load_pairs(tmp_path / "pairs.parquet"),
        processing_class=AutoProcessor.from_pretrained(testbed.path("vision-0")),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
