"""Files: lines end at a line feed alone, text is UTF-8, files are replaced whole, and every reader of the tree does it so."""

import ast
import errno
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from contralto.common import files

ROOT = Path(__file__).parents[2]
PARTS = ("align", "contralto", "data_gen", "decoding", "eval", "recipes", "testbed", "examples")
STRANGE = "one\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\rstill one"
"""All that `str.splitlines` splits at, but the line feed."""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_alone(tmp_path, end):
    path = tmp_path / "a.txt"
    path.write_bytes(("\ufeff" + STRANGE + end + end + "two").encode())
    assert files.read_lines(path) == [STRANGE, "", "two"]
    assert files.lines_of("") == []


def test_json_lines_name_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": "{STRANGE[:6]}"}}\n\n[1\n', encoding="utf-8")
    rows = files.read_json_lines(path)
    assert next(rows) == (1, {"a": STRANGE[:6]})
    with pytest.raises(ValueError, match=r"a.jsonl:3: not JSON: Expecting ',' delimiter, column 3"):
        next(rows)
    path.write_text("[" * 100_000 + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.jsonl:1: not JSON"):
        list(files.read_json_lines(path))
    path.write_bytes('{"a": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.jsonl:1: not UTF-8 text: byte 0xe9"):
        list(files.read_json_lines(path))


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    files.replace_text(path, "before\u2028\r\n")
    with path.open(encoding="utf-8", newline="") as reader:  # goes on reading the old file
        files.replace_text(path, "after")
        assert reader.read() == "before\u2028\r\n"
    files.replace_text(path, "before\u2028\r\n")
    assert path.read_bytes() == "before\u2028\r\n".encode()
    with pytest.raises(UnicodeEncodeError):
        files.replace_text(path, "x" * 10_000 + "\ud800")
    assert path.read_bytes() == "before\u2028\r\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_a_library_writes_is_replaced_whole(tmp_path):
    """The new file has the mode that `open` gives, and processes that write at once use paths of their own."""
    path = tmp_path / "new" / "a.bin"
    with files.replace_file(path) as unfinished:
        unfinished.write_bytes(b"one")
        assert not path.exists()
        assert unfinished.parent == path.parent
        assert str(os.getpid()) in unfinished.name
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(FileNotFoundError, match="none"), files.replace_file(path) as unfinished:
        unfinished.write_bytes((tmp_path / "none").read_bytes())
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


def test_errors_of_the_system_name_the_file(tmp_path, monkeypatch):
    """Those of `fsync`, and of libraries that write the file, name none."""

    def failing(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "a.txt"
    files.replace_text(path, "before")
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.txt'"):
        files.replace_text(path, "after")
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"), files.replace_file(path):
        raise OSError(errno.ENOSPC, "Error writing bytes to file")
    with pytest.raises(FileNotFoundError, match="other"), files.replace_file(path):
        raise FileNotFoundError(errno.ENOENT, "No such file", "other")
    assert path.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="error: '/proc/self/mem'"):  # its first page is not mapped
        files.read_text("/proc/self/mem")


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "deep" / "folder"
    with files.new_folder(path) as unfinished:
        (unfinished / "within").mkdir()
        (unfinished / "within" / "a.txt").write_text("é", encoding="utf-8")
        assert not path.exists()
        assert unfinished.parent == path.parent
    assert [each.name for each in path.parent.iterdir()] == ["folder"]
    assert (path / "within" / "a.txt").read_text(encoding="utf-8") == "é"
    with pytest.raises(OSError, match="not empty"), files.new_folder(path):
        pass
    empty = tmp_path / "empty"
    empty.mkdir()
    with files.new_folder(empty) as unfinished:
        (unfinished / "b").touch()
    assert [each.name for each in empty.iterdir()] == ["b"]
    with pytest.raises(KeyError), files.new_folder(tmp_path / "failed") as unfinished:
        raise KeyError
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "new"]


def test_a_file_in_a_new_folder_keeps_its_line_ends(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    for text in ("é\r\n\n\r", "é"):
        files.replace_text(path, text)
        assert path.read_bytes() == text.encode()
    files.set_aside(path)
    files.replace_text(path, "later")
    files.set_aside(path)
    assert [(each.name, each.read_text()) for each in path.parent.iterdir()] == [("c.txt.earlier", "later")]


def test_what_killed_processes_left_unfinished_is_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        names = (
            f"a.jsonl.{ended.pid}.part",
            f"data/b.png.{os.getpid()}.part",
            f"c.{living.pid}.part",
            "d.part",
            "e.x.part",
        )
        (tmp_path / "data").mkdir()
        (tmp_path / f"folder.{ended.pid}.part").mkdir()
        for name in (*names, "a.jsonl"):
            (tmp_path / name).touch()
        files.remove_unfinished(tmp_path)
        left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
        living.communicate(b"\n")
    assert left == sorted(["a.jsonl", *names[2:]])


def test_the_line_of_a_wrong_byte_is_named():
    assert files.decode(b"\xef\xbb\xbfone", "a.txt") == "one"
    for content, line in ((b"\xff", 1), (b"\n\xff", 2), (b"a\nb\n\xff\n", 3)):
        with pytest.raises(ValueError, match=rf"^a.txt:{line}: not UTF-8 text: byte 0xff; save the file as UTF-8$"):
            files.decode(content, "a.txt")


def test_a_folder_is_locked_by_the_process_it_names(tmp_path):
    with files.locked_folder(tmp_path / "new", "busy") as file:
        assert not os.get_inheritable(file.fileno())  # `pass_fds` of subprocess passes the lock on
        with (
            pytest.raises(OSError, match=f"^{os.getpid()} has it$"),
            files.locked_folder(tmp_path / "new", "{pid} has it"),
        ):
            pass
    with files.locked_folder(tmp_path / "deep" / "er", "busy"):
        assert (tmp_path / "deep" / "er" / ".lock").is_file()
    with files.locked_folder(tmp_path / "new", "busy"):
        assert (tmp_path / "new" / ".lock").read_text(encoding="utf-8") == str(os.getpid())


def test_links_that_others_put_there_are_not_written_through(tmp_path):
    """In a folder that others can write into, such as a cache that a group shares."""
    precious, folder = tmp_path / "precious", tmp_path / "shared"
    precious.write_text("precious")
    folder.mkdir()
    (folder / f"a.json.{os.getpid()}.part").symlink_to(precious)
    files.replace_text(folder / "a.json", "new")
    assert not (folder / "a.json").is_symlink()
    (folder / ".lock").symlink_to(precious)
    with (
        pytest.raises(OSError, match=r"\.lock is a symbolic link, and the file behind it would be emptied: remove"),
        files.locked_folder(folder, "busy"),
    ):
        pass
    assert (precious.read_text(), (folder / "a.json").read_text()) == ("precious", "new")


def test_a_lock_is_for_one_process(tmp_path):
    path = tmp_path / "lock"
    code = f"""
from pathlib import Path
from contralto.common.files import locked
with Path({str(path)!r}).open("a+") as file, locked(file, "{{pid}} has it"):
    pass
"""
    with path.open("a+", encoding="utf-8") as file, files.locked(file, "busy"):
        file.write("77")
        file.flush()
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "OSError: 77 has it" in ran.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@cache
def _calls():
    """Every call in the sources: its file, and the node."""
    found = []
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            inside = path.relative_to(ROOT).parts
            if inside[0] == "contralto" and inside[1] in PARTS:  # a link to another part
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    found.append(("/".join(inside), node))
    return found


def _wrong(node):
    """What is wrong with a call that reads or writes text, if anything."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    named = {keyword.arg for keyword in node.keywords}
    texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    if name in ("splitlines", "readlines"):
        return f"{name} splits at more than line feeds, or at the locale's: use contralto.common.files"
    if name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute) and "encoding" not in named:
        return f"{name} without encoding is the locale's"
    if name == "open" and texts and set(texts[-1]) <= set("rwxabt+U") and "b" not in texts[-1]:
        return None if "encoding" in named else "open without encoding is the locale's"
    return None


@pytest.mark.parametrize(
    ("code", "is_wrong"),
    [
        ("text.splitlines()", True),
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.open('a+')", True),
        ("open(name, 'w')", True),
        ("path.open('rb')", False),
        ("read_text(path)", False),
    ],
)
def test_the_check_of_the_sources_sees(code, is_wrong):
    (node,) = [each for each in ast.walk(ast.parse(code)) if isinstance(each, ast.Call)]
    assert bool(_wrong(node)) is is_wrong


def test_no_source_reads_text_in_another_way():
    found = [f"{path}:{node.lineno}: {_wrong(node)}" for path, node in _calls() if _wrong(node)]
    assert not found


def test_files_are_replaced_and_locked_in_one_place():
    """`os.replace`, `Path.replace`, `fsync` and `flock` belong to `contralto.common.files`."""
    found = {f"{path}:{node.lineno}" for path, node in _calls() if _is_writer(node)}
    assert {where.split(":")[0] for where in found} == {"contralto/common/files.py", "contralto/cli/outputs.py"}, found


def _is_writer(node):
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    plain = len(node.args) == 1 and not isinstance(node.args[0], ast.Starred)
    moves = name == "replace" and plain and not node.keywords  # `str.replace` takes two arguments
    return moves or name in ("fsync", "flock", "lockf", "rename", "mkstemp")
