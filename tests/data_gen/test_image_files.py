"""Images named by rows: only image files, only below the recipe's folder, no URLs."""

import base64
import io
import json
import os

import pyarrow.parquet
import pytest
import yaml
from datasets import Dataset, Features, Image, List, Value
from helpers.serving import Server
from PIL import Image as Pillow

from contralto import cli
from contralto.align.text_data import load_texts
from contralto.data_gen.dataset import load_pairs
from contralto.data_gen.rows import RowSource, read_rows
from contralto.data_gen.types import Ask, Sampling, make_request

SECRET = "the password is swordfish"


def png(colour="red"):
    content = io.BytesIO()
    Pillow.new("RGB", (4, 4), colour).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A recipe's folder with files inside and outside."""
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "outside.png").write_bytes(png())
    folder = tmp_path / "recipe"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures/in.png").write_bytes(png())
    (folder / "notes.txt").write_text(SECRET)
    (folder / "notes.png").write_text(SECRET)
    (folder / "page.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "leak.png").symlink_to(tmp_path / "secret.txt")
    (folder / "away").symlink_to(tmp_path)
    (folder / "circle.png").symlink_to("circle.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def write(folder, *rows, **of_rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": "What is it?", **row}) + "\n" for row in rows))
    made = {"rows": {"source": "rows.jsonl", **of_rows}, "strategies": ["best_of_n"], "roles": {}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made))
    return folder / "recipe.yaml"


def read(folder, *rows, **of_rows):
    write(folder, *rows, **of_rows)
    return read_rows(RowSource(source="rows.jsonl", **of_rows), folder=folder)


STRANGE = {
    "../secret.txt": "is outside of",
    "../outside.png": "is outside of",
    "pictures/../../outside.png": "is outside of",
    "/etc/passwd": "is outside of",
    "/dev/zero": "is outside of",
    "link.png": "is outside of",
    "leak.png": "is outside of",
    "away/outside.png": "is outside of",
    "circle.png": "circle.png",
    "pictures": "there is no such file",
    "": "there is no such file",
    "pipe.png": "there is no such file",
    "gone.png": "there is no such file",
    "notes.txt": "is not an image",
    "notes.png": "is not an image",
    "page.png": "is not an image",
    "http://localhost/a.png": "is a URL",
    "file:///etc/passwd": "is a URL",
    "zip://a.png::http://localhost/a.zip": "is a URL",
    "file:../secret.txt": "there is no such file",
    "a\0b.png": "is not a path",
    "data:image/png;base64,AAAA": "is not an image",
    "data:text/plain;base64,%%%": "not valid base64",
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_a_row_may_not_name(folder, name):
    part = {"type": "image_url", "image_url": {"url": name}}
    rows = [
        {"images": [name]},
        {"image": name},
        {"images": ["pictures/in.png"], "rejected_images": [name]},
        {"images": [{"path": name}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "?"}, part]}]},
        {"prompt": [{"role": "user", "content": [{"type": "image", "path": name}]}]},
    ]
    for row in rows:
        with pytest.raises(ValueError, match=rf"rows\.jsonl, row 1, column .*{STRANGE[name]}"):
            read(folder, row)


def test_images_inside_are_read(folder):
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    parts = [{"type": "image", "image": "pictures/in.png"}, {"type": "image_url", "image_url": {"url": url}}]
    rows = [
        {"images": ["pictures/in.png", url], "rejected_images": ["pictures/in.png"]},
        {"image": str(folder / "pictures/in.png")},
        {"prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}], "images": None},
        {"images": ["pictures/in.png"], "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        {"prompt": [{"role": "user", "content": [{"type": "image", "base64": url.split(",")[1]}]}]},
    ]
    found = read(folder, *rows)
    inside = str((folder / "pictures/in.png").resolve())
    assert [len(row["images"]) for row in found] == [2, 1, 2, 1, 1]
    assert {row["images"][0] for row in found[:4]} == {inside}
    assert found[0]["images"][1].size == found[4]["images"][0].size == (4, 4)
    assert found[0]["rejected_images"] == (inside,)
    assert found[2]["prompt"][0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]


def test_the_recipe_names_another_folder(folder):
    [row] = read(folder, {"images": ["outside.png"]}, image_folder="..")
    assert row["images"] == (str((folder / "../outside.png").resolve()),)
    with pytest.raises(ValueError, match="is not an image"):
        read(folder, {"images": ["secret.txt"]}, image_folder="..")
    with pytest.raises(ValueError, match=r"is outside of .*pictures: .*rows: \{image_folder: FOLDER\}"):
        read(folder, {"images": ["../link.png"]}, image_folder="pictures")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
            "must be an object of type text or image",
        ),
        ([{"type": "file", "file": {"path": "/etc/passwd"}}], "must be an object of type text or image"),
        (["text"], "must be an object of type text or image"),
        ([{"type": "text", "text": {"path": "/etc/passwd"}}], "must be an object of type text or image"),
        ([{"type": "image", "path": "pictures/in.png", "url": "pictures/in.png"}], "has path, url"),
        ([{"type": "image", "path": "pictures/in.png"}, {"type": "image"}], "contain an image and 1 do not"),
    ],
)
def test_parts_that_are_not_understood(folder, content, message):
    with pytest.raises(ValueError, match=message):
        read(folder, {"prompt": [{"role": "user", "content": content}]})
    both = {"prompt": [{"role": "user", "content": [{"type": "image", "path": "pictures/in.png"}]}]}
    with pytest.raises(ValueError, match="in its messages and in column 'image'"):
        read(folder, {**both, "image": "pictures/in.png"})


def test_stored_data_sets_do_not_open_what_they_name(folder):
    features = Features({"prompt": Value("string"), "images": List(Image()), "more": {"shown": Image()}})
    inside, outside = str(folder / "pictures/in.png"), str(folder / "../outside.png")

    def stored(name, first, second):
        rows = {"prompt": ["?"], "images": [[first, {"bytes": png(), "path": None}]], "more": [{"shown": second}]}
        table = Dataset.from_dict(rows, features=features).data.table  # to_parquet would put the files' contents in
        pyarrow.parquet.write_table(table, folder / name)
        return read_rows(RowSource(source=name), folder=folder)

    [row] = stored("good.parquet", inside, inside)
    assert [image.size for image in (*row["images"], row["more"]["shown"])] == [(4, 4)] * 3
    for number, (first, second) in enumerate(
        [(outside, inside), (inside, outside), (inside, "http://localhost:1/a.png")]
    ):
        with pytest.raises(ValueError, match=r"parquet, row 1, column .*(is outside|is a URL)"):
            stored(f"{number}.parquet", first, second)
    Dataset.from_dict({"prompt": ["?"], "images": [[outside]]}).to_parquet(folder / "texts.parquet")
    with pytest.raises(ValueError, match="is outside"):
        read_rows(RowSource(source="texts.parquet"), folder=folder)


def test_a_strategy_cannot_ask_about_a_file_that_is_no_image(folder):
    with pytest.raises(ValueError, match=r"notes\.txt is not an image"):
        make_request(
            Ask(role="r", prompt="?", images=[folder / "notes.txt"]), engine={}, sampling=Sampling(), seed=0, row="a"
        )


def test_nothing_is_sent_and_nothing_is_written(folder, capsys):
    """The whole command, with an endpoint that would keep what it is sent."""
    with Server() as server:
        path = write(folder, {"images": ["../secret.txt"]})
        said = yaml.safe_load(path.read_text())
        role = {"engine": "openai", "base_url": server.url, "model": "m"}
        path.write_text(
            yaml.safe_dump(
                {**said, "output": "out", "strategies": ["on_policy_judge"], "roles": {"target": role, "judge": role}}
            )
        )
        assert cli.main(["data", "run", str(path)]) == 2
        assert "../secret.txt is outside of" in capsys.readouterr().err
        assert server.seen == []
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["URL/a.png", "pipe.png", "page.png", "leak.png", "notes.png"])
def test_rows_to_train_on_download_and_run_nothing(folder, name):
    """They may name any image of the machine, but neither an address nor another file."""
    with Server() as server:
        name = name.replace("URL", server.url)
        row = {"messages": [{"role": role, "content": "What is it?"} for role in ("user", "assistant")]}
        (folder / "texts.jsonl").write_text(json.dumps(row | {"images": [name]}))
        message = {"role": Value("string"), "content": Value("string")}
        features = Features(
            {**{key: List(message) for key in ("prompt", "chosen", "rejected")}, "images": List(Image())}
        )
        pair = {"prompt": [row["messages"][:1]], "chosen": [row["messages"][1:]], "rejected": [row["messages"][1:]]}
        place = name if "://" in name else str(folder / name)
        table = Dataset.from_dict(pair | {"images": [[place]]}, features).data.table
        pyarrow.parquet.write_table(table, folder / "pairs.parquet")
        for load, file in ((load_texts, "texts.jsonl"), (load_pairs, "pairs.parquet")):
            with pytest.raises(ValueError, match=r"there is no such file|is not an image that Pillow can read"):
                load(str(folder / file))
        assert not server.seen
