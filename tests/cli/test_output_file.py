"""The output of `contralto generate`: what is gone on with, what is left alone, and what a full disk or another process leaves."""

import json
import resource
import subprocess
import sys

import pytest
from PIL import Image
from transformers import AutoProcessor

from contralto import cli, testbed
from contralto.cli import output_file
from contralto.common import files, hashing

PROMPTS = ["Ben went\u2028out", "Mia\x85was", "Tom\x0csaw", "Zoe \U0001f600 ran"]
SETTINGS = {"method": "cd", "beta": 0.5, "layers": (1, 2)}
ROWS = [{"index": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]


def _write(path, count=4, rows=ROWS, settings=SETTINGS, resume=True):
    """Write up to so many rows; return how many there were."""
    with output_file.opened(path, rows, settings, resume=resume) as output:
        before = output.done
        while output.done < count:
            output.write({"text": f"text\u2028{output.done}"})
        return before


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "out.jsonl"
    assert _write(path, resume=False) == 0
    return path


def test_cut_at_every_byte(path):
    """A row that was cut short anywhere, within a character too, is written again; whole rows are counted."""
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 5), len(whole)):
        path.write_bytes(whole[:size])
        assert _write(path) == whole[:size].count(b"\n")
        assert path.read_bytes() == whole


def test_columns_of_the_prompts_keep_their_names(tmp_path, capsys):
    """But for those that the output has itself, which are in `row`; a file of an early version has all of them there."""
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    row = {"id": 7, "topic": "haste", "prompt": "Ben went", "text": "x", "index": 3}
    prompts.write_text(json.dumps(row) + "\n", encoding="utf-8")
    argv = [
        "generate",
        "--model",
        "testbed:expert",
        "--file",
        str(prompts),
        "--max-new-tokens",
        "2",
        "--output",
        str(path),
    ]
    assert cli.main(argv) == 0
    (made,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert list(made)[:5] == ["index", "id", "topic", "prompt", "row"]
    assert (made["index"], made["id"], made["topic"], made["row"]) == (0, 7, "haste", {"text": "x", "index": 3})
    assert isinstance(made["text"], str)
    early = {name: value for name, value in made.items() if name not in ("id", "topic")} | {
        "row": {name: row[name] for name in ("id", "topic", "text", "index")}
    }
    for changed, status in ((early, 0), (early | {"row": {**early["row"], "id": 8}}, 2), (made | {"topic": "rest"}, 2)):
        path.write_text(json.dumps(changed) + "\n", encoding="utf-8")
        capsys.readouterr()
        assert cli.main([*argv, "--resume"]) == status
    assert "its topic is not that of prompt 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("buy milk", "out.jsonl:1: not a row of contralto generate"),
        ("buy milk\ncall Ben", "out.jsonl:2: not a row of contralto generate"),
        ('{"index": 0}\n', "out.jsonl:1: not a row of contralto generate"),
        ("[]\n\n", "out.jsonl:1: not a row of contralto generate"),
        ('{"index": 0, "prompt": "Ben went elsewhere', "out.jsonl:1: not a row of contralto generate"),
        ("{ROW}my notes", "out.jsonl:2: not a row of contralto generate"),
        (b"\xff\xfe\n", "out.jsonl:1: not UTF-8 text"),
    ],
)
def test_files_of_others_are_left_alone(path, content, message):
    first = path.read_text(encoding="utf-8").split("\n")[0] + "\n"
    content = content if isinstance(content, bytes) else content.replace("{ROW}", first).encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _write(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {**SETTINGS, "beta": 1.0}}, "out.jsonl:1: made with another beta"),
        ({"settings": {**SETTINGS, "seed": 1}}, "out.jsonl:1: made with another seed"),
        (
            {"rows": [ROWS[0], {**ROWS[1], "prompt": "Sue"}, *ROWS[2:]]},
            "out.jsonl:2: its prompt is not that of prompt 1",
        ),
        ({"rows": [ROWS[0], {**ROWS[1], "image": ["a.png"]}, *ROWS[2:]]}, "out.jsonl:2: its image is not that of"),
        ({"rows": ROWS[:3], "count": 3}, "out.jsonl:4: there are only 3 prompts"),
        ({"resume": False}, "exists: add --resume to go on with it"),
    ],
)
def test_another_run_is_not_gone_on_with(path, change, message):
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        _write(path, **change)
    assert path.read_bytes() == whole


def test_more_prompts_are_gone_on_with(path):
    assert _write(path, 5, [*ROWS, {"index": 4, "prompt": "Sue"}]) == 4


def test_a_full_disk_loses_nothing(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with output_file.opened(path, ROWS, SETTINGS, resume=True) as output:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 20, hard))
        try:
            output.write({"text": "text\u20281"})
            output.write({"text": "text\u20282"})
            with pytest.raises(OSError, match=r"it holds 3 whole rows: make room, and go on with --resume.*out.jsonl"):
                output.write({"text": "text\u20283"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole[: whole[:-1].rindex(b"\n") + 1]
    assert _write(path) == 3
    assert path.read_bytes() == whole


def test_two_runs_do_not_share_a_file(path):
    whole = path.read_bytes()
    code = f"from contralto.cli import output_file as o\nwith o.opened(__import__('pathlib').Path({str(path)!r}), [], {{}}, resume=True): pass"
    with output_file.opened(path, ROWS, SETTINGS, resume=True):
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process is writing" in ran.stderr
    assert path.read_bytes() == whole


def test_only_files_are_written(tmp_path):
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match=r"--output: .*, and a file is needed"):
            _write(type(tmp_path)(path))


def _generate(tmp_path, name, *argv, prompts=PROMPTS):
    file, out = tmp_path / f"{name}.prompts.jsonl", tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts), encoding="utf-8")
    how = ["--model", "testbed:expert", "--raw", "--sample", "--temperature", "2", "--max-new-tokens", "8", "--output"]
    status = cli.main([str(word) for word in ("generate", *how, out, "--file", file, *argv)])
    return status, [row for _, row in files.read_json_lines(out)]


def test_sampled_texts_do_not_depend_on_the_batch_or_on_cuts(tmp_path, capsys):
    prompts = ["Ben went out", *PROMPTS, "Ben went out"]
    status, whole = _generate(tmp_path, "a", "--batch-size", 4, prompts=prompts)
    assert (status, len(whole)) == (0, 6)
    assert whole[0]["text"] != whole[-1]["text"]  # a stream per row
    assert _generate(tmp_path, "b", "--batch-size", 1, prompts=prompts)[1] == whole
    out = tmp_path / "a.jsonl"
    lines = out.read_bytes().split(b"\n")
    out.write_bytes(b"\n".join(lines[:2]) + b"\n" + lines[2][:25])
    assert _generate(tmp_path, "a", "--batch-size", 3, "--resume", prompts=prompts) == (0, whole)
    assert _generate(tmp_path, "a", "--resume", prompts=prompts) == (0, whole)
    assert "is complete: it holds all 6 rows" in capsys.readouterr().err
    status, now = _generate(tmp_path, "a", "--resume", prompts=["Sue", *prompts[1:]])
    assert (status, now) == (2, whole)
    assert "a.jsonl:1: its prompt is not that of prompt 0" in capsys.readouterr().err


def test_changed_files_are_not_gone_on_with(tmp_path):
    """Weights and images; rows of versions that wrote no digests go on, cut ones too."""
    path, digests = tmp_path / "out.jsonl", {"model": "1a", "a.png": "2b"}

    def write(digests, count=4, resume=True):
        with output_file.opened(path, ROWS, SETTINGS, resume=resume, digests=digests) as output:
            before = output.done
            while output.done < count:
                output.write({"text": "x"})
            return before

    write(lambda i: digests, count=2, resume=False)
    assert json.loads(path.read_text().split("\n")[0])["digests"] == digests
    assert write(lambda i: digests, count=3) == 2
    for changed, shown in (({"model": "3c"}, "model"), ({"a.png": "3c"}, "a.png"), ({"amateur": "4d"}, "amateur")):
        with pytest.raises(ValueError, match=f"out.jsonl:1: made with other files of {shown}, changed since"):
            write(lambda i, changed=changed: digests | changed)
    with pytest.raises(ValueError, match=r"out\.jsonl:3: made with other files of model"):
        write(lambda i: digests if i < 2 else {**digests, "model": "3c"})

    path.unlink()
    write(None, count=3, resume=False)
    path.write_bytes(path.read_bytes()[:-9])
    assert write(lambda i: digests) == 2
    assert [set(json.loads(line)) & {"digests"} for line in path.read_text(encoding="utf-8").split("\n")[:4]] == [
        set(),
        set(),
        {"digests"},
        {"digests"},
    ]


def test_weights_and_images_are_compared(tmp_path, capsys):
    """With the command: a model trained on in its folder, another picture at the same path."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    model = testbed.load("vision-0")
    processor = AutoProcessor.from_pretrained(testbed.path("vision-0"))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    target = tmp_path / "out.jsonl"
    how = ["generate", "What is it?", "--model", str(tmp_path / "model"), "--image", str(tmp_path / "a.png")]
    how += ["--max-new-tokens", "2", "--output", str(target)]
    assert cli.main(how) == 0
    assert cli.main([*how, "--resume"]) == 0
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "a.png")
    hashing.file_digest.cache_clear()
    assert cli.main([*how, "--resume"]) == 2
    assert f"made with other files of {tmp_path / 'a.png'}" in capsys.readouterr().err
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path / "model")
    hashing.file_digest.cache_clear()
    hashing.weights_digest.cache_clear()
    assert cli.main([*how, "--resume"]) == 2
    assert "made with other files of model, changed since" in capsys.readouterr().err
