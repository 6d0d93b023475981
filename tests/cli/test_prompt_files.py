"""Prompts from files: every column is read, carried or rejected; images in every form; what another branch reads."""

import base64
import json

import pytest
from PIL import Image

from contralto import testbed
from contralto.cli.prompts_file import prompt_of, read_prompts
from contralto.common.messages import contrasted, text_of
from contralto.decoding.inputs import Prompt, check_rendered, encode, render
from contralto.decoding.loading import Models

STRANGE = "one\u2028two\x85three\x0cfour\rfive"


def _read(tmp_path, *rows, given=Prompt("")):  # noqa: B008 (it is immutable)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return read_prompts(file, given, ["seed", "max_new_tokens"])


def test_strange_characters_end_no_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"\ufeff{STRANGE}\r\n\nsix\n".encode())
    assert [each.content for each in read_prompts(file, Prompt(""))] == [STRANGE, "six"]
    assert [each.content for each in _read(tmp_path, {"prompt": STRANGE})] == [STRANGE]
    array = tmp_path / "prompts.json"
    array.write_text(json.dumps([{"prompt": STRANGE}, {"prompt": "six"}]), encoding="utf-8")
    assert [each.content for each in read_prompts(array, Prompt(""))] == [STRANGE, "six"]


IMAGE = b"the bytes of an image"
CODE = base64.b64encode(IMAGE).decode()
TEXT = {"type": "text", "text": "?"}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "url": "a.png"}, "a.png"),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "image": f"data:image/png;base64,{CODE}"}, IMAGE),
        ({"type": "image", "base64": CODE}, IMAGE),
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{CODE}"}}, IMAGE),
        ({"type": "image_url", "image_url": {"url": "file:///data/a%20b.png"}}, "/data/a b.png"),
    ],
)
def test_images_of_messages_are_read(tmp_path, part, expected):
    (prompt,) = _read(tmp_path, {"messages": [{"role": "user", "content": [TEXT, part]}]})
    assert prompt.content == [{"role": "user", "content": [TEXT, {"type": "image"}]}]
    (image,) = prompt.images
    assert image == (expected if isinstance(expected, bytes) or expected[0] == "/" else str(tmp_path / expected))


@pytest.mark.parametrize(
    "columns", [{"image": "a.png"}, {"images": ["a.png"]}, {"images": [{"path": "a.png"}]}, {"image": ["a.png"]}]
)
def test_columns_of_images_are_read(tmp_path, columns):
    assert _read(tmp_path, {"prompt": "?", **columns})[0].images == (str(tmp_path / "a.png"),)


def test_a_row_of_its_own(tmp_path):
    given = Prompt("", ("b.png",), "No {topic}: {prompt}", {})
    row = {"prompt": "Why?", "system": "Be brief.", "tools": [{"name": "f"}], "id": 7, "topic": "haste", "image_id": 3}
    one, two = _read(tmp_path, row, {"prompt": "Why?", "contrast_prompt": "{topic}", "topic": None}, given=given)
    assert one.content == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert one.template == {"tools": [{"name": "f"}]}
    assert one.row == {"id": 7, "topic": "haste", "image_id": 3}
    assert contrasted(one.content, one.contrast, one.fields)[1]["content"] == "No haste: Why?"
    assert contrasted(two.content, two.contrast, two.fields) == "{topic}"  # a text of the row is no template
    assert two.images == ("b.png",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], "a row is a JSON object with prompt or messages, not a list"),
        ({"question": "y"}, "a row needs a prompt or messages, and has only question"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "y"}]}, "and this one has both"),
        ({"prompt": 7}, "column prompt must be a string or a list of messages, not a int"),
        ({"prompt": "x", "image_path": "a.png"}, "column image_path is not read: rename it to image"),
        (
            {"prompt": "x", "negative_prompt": "y"},
            "column negative_prompt is not read: rename it to prompt, or drop it",
        ),
        ({"prompt": "x", "contrast": "y"}, "column contrast is not read: there are prompt,"),
        ({"prompt": "x", "videos": ["a.mp4"]}, "column videos is not read"),
        ({"prompt": "x", "system_prompt": "y"}, "column system_prompt is not read: rename it to"),
        ({"prompt": "x", "seed": 3}, "column seed is not supported here: set --seed for all rows"),
        ({"prompt": "x", "image": "a", "images": ["b"]}, "a row has the column image or images, and this one has both"),
        ({"prompt": "x", "images": [{"bytes": "?"}]}, "an image has one of path, url, base64, image, not none"),
        ({"prompt": "x", "image": "https://a.example/b.png"}, "images are read from files, not from https"),
        ({"prompt": "x", "image": "data:image/png;base64,???"}, "not an image in base64"),
        ({"prompt": "x", "contrast_prompt": ["y"]}, "column contrast_prompt must be a string, not a list"),
        ({"prompt": "x", "chat_template_kwargs": {"tokenize": True}}, "an object without tokenize"),
        ({"prompt": "x", "tools": "{}"}, "column tools must be a list, not a dict"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": ["x"]}, "message 1: a message has a role and a content, not 'x'"),
        (
            {"messages": [{"role": "user", "content": 7}]},
            "content must be a string or a list of parts such as {'type': 'text', 'text': '...'}, not 7",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}]},
            "a part of type 'audio' cannot be read: text and image can",
        ),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "a part of the content has a type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part of type text needs a text, not None"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "0 images for 1 places in the messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "a"}]}], "images": ["b"]},
            "messages bring their images, and there is a column of images as well",
        ),
        ({"prompt": "x", "row": ["\ud800"]}, "a string holds half of a surrogate pair"),
        ({"prompt": "x", "system": "y", "messages": None, "prompt_id": 1, "image_url": "z"}, "column image_url is not"),
    ],
)
def test_what_is_not_read_is_rejected(row, message, tmp_path):
    with pytest.raises(ValueError, match=f"^p.jsonl:1.*{message}"):
        prompt_of(row, Prompt(""), "p.jsonl:1", tmp_path, ["seed"])


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".yaml", ".gz"])
def test_other_files_are_rejected(tmp_path, suffix):
    with pytest.raises(ValueError, match=f"from .txt, .jsonl and .json files, not from {suffix}"):
        read_prompts(tmp_path / f"a{suffix}", Prompt(""))


def test_a_begun_answer_goes_on_in_both_branches():
    models = Models(None, (), testbed.tokenizer())
    before = [{"role": "user", "content": "Hm."}, {"role": "assistant", "content": "Hm?"}]
    asked = {"role": "user", "content": [TEXT | {"text": "Why"}, TEXT]}
    chat = [*before, asked, {"role": "assistant", "content": "Because"}]
    assert text_of(chat) == "Why?"
    other = contrasted(chat, "Not. {prompt}")
    assert other == [*before, {"role": "user", "content": "Not. Why?"}, chat[-1]]
    texts = [render(Prompt(each), models, raw=False) for each in (chat, other)]
    assert all(text.endswith("Because") for text in texts)
    assert texts[1] == texts[0].replace("Why?", "Not. Why?")


def test_a_bos_that_is_spelled_out_stands_once():
    tokenizer = testbed.tokenizer()
    models = Models(testbed.load("amateur"), (), tokenizer)
    bos = tokenizer.bos_token
    ids = encode([Prompt("Ben went"), Prompt(f"{bos}Ben went")], models, raw=True)["input_ids"]
    assert ids[0].tolist() == ids[1].tolist()
    assert ids[0].tolist().count(tokenizer.bos_token_id) == 1


def test_tools_that_the_template_does_not_show_are_rejected():
    models = Models(None, (), testbed.tokenizer())
    with pytest.raises(ValueError, match="prompt 3: the chat template of the model ignores the column tools"):
        check_rendered(3, Prompt("Why?", template={"tools": [{"name": "f"}]}), models, raw=False)
    models.tokenizer.chat_template = "{{ tools[0].name }}{{ messages[0].content }}"
    check_rendered(3, Prompt("Why?", template={"tools": [{"name": "f"}]}), models, raw=False)


def test_images_keep_their_places_before_a_contrast_prompt():
    chat = [{"role": "user", "content": [TEXT, {"type": "image"}, TEXT]}]
    assert contrasted(chat, "No: {prompt}")[0]["content"] == [{"type": "image"}, {"type": "text", "text": "No: ? ?"}]


def test_images_of_messages_reach_the_model(tmp_path, capsys):
    """The same text as with the image as a flag, and another one with another image."""
    from contralto import cli

    for name, colour in (("a", "white"), ("b", "red")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    row = {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, TEXT | {"text": "What?"}]}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row), encoding="utf-8")
    said = {}
    for name, how in {
        "row": ["--file", tmp_path / "p.jsonl"],
        "flag": ["--image", tmp_path / "a.png", "What?"],
    }.items():
        argv = ["generate", "--model", "testbed:vision-0", "--max-new-tokens", "12", *map(str, how)]
        assert cli.main(argv) == 0
        said[name] = capsys.readouterr().out
    assert said["row"] == said["flag"]
