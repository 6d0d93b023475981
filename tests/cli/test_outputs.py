"""Outputs that cannot be written are found before the work, in every command that writes at its end."""

import errno
import os
import sys

import pytest

from contralto import cli
from contralto.cli.outputs import check_output_file, check_output_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
EVAL = ["eval", "--tasks", "testbed_arithmetic", "--model_args", "pretrained=testbed:expert"]
COMPARE = ["compare", "--tasks", "testbed_arithmetic", "--model", "testbed:expert", "--methods", "dola"]
EXPLAIN = ["explain", "--model", "testbed:expert", "--amateur", "testbed:amateur", "Ben went"]


@pytest.fixture
def no_work(monkeypatch):
    """Fail if anything is evaluated or loaded."""
    from lm_eval._cli.harness import HarnessCLI

    from contralto.decoding import loading
    from contralto.eval.comparison import compare

    for place, name in ((HarnessCLI, "execute"), (loading, "load_models"), (compare, "compare")):
        monkeypatch.setattr(place, name, lambda *args, **kwargs: pytest.fail("the work had begun"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*EVAL, "--output_path", "{file}"], "--output_path: {file} is a file, and a folder is needed"),
        ([*EVAL, "--output_path", "{file}/deeper"], "--output_path: {file} is a file, and a folder is needed"),
        ([*EVAL, "--output_path", "{file}/results.json"], "--output_path: {file} is a file, and a folder is needed"),
        ([*EVAL, "--output_path", "/proc/contralto"], "--output_path: nothing can be written into /proc/contralto"),
        ([*EVAL, "--model", "hf", "--output_path", "{file}"], "--output_path: {file} is a file"),
        ([*EVAL, "--use_cache", "{file}/cache"], "--use_cache: {file} is a file, and a folder is needed"),
        ([*EVAL, "--config", "{config}"], "--output_path: {file} is a file, and a folder is needed"),
        ([*COMPARE, "--output", "{file}"], "--output: {file} is a file, and a folder is needed"),
        ([*COMPARE, "--output", "/proc/x"], "--output: nothing can be written into /proc/x"),
        (
            [*COMPARE, "--output", "{folder}/out", "--html", "{folder}"],
            "--html: {folder} is a folder, and a file is needed",
        ),
        ([*COMPARE, "--output", "{folder}/out", "--html", "{file}/page.html"], "--html: {file} is a file"),
        ([*EXPLAIN, "--html", "{folder}"], "--html: {folder} is a folder, and a file is needed"),
        ([*EXPLAIN, "--html", "/proc/page.html"], "--html: nothing can be written into /proc"),
        (["demo", "--html", "{file}/page.html"], "--html: {file} is a file, and a folder is needed"),
    ],
)
def test_a_sentence_before_the_work(argv, message, no_work, tmp_path, monkeypatch, capsys):
    file, config = tmp_path / "taken", tmp_path / "run.yaml"
    file.write_text("x", encoding="utf-8")
    config.write_text(f"output_path: {file}\ntasks: [testbed_arithmetic]\n", encoding="utf-8")
    places = {"file": file, "folder": tmp_path, "config": config}
    if "{config}" in argv:
        argv = [word for word in argv if word not in ("--tasks", "testbed_arithmetic")]
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert cli.main([word.format(**places) for word in argv]) == 2
    assert message.format(**places) in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "x"


def test_results_that_lm_eval_could_not_save_are_an_error(monkeypatch, tmp_path, capsys):
    """It warns and ends with status 0, for instance when the disk is full."""
    from lm_eval._cli.harness import HarnessCLI

    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, args: None)
    for name in ("out", "out.json"):
        assert cli.main([*EVAL, "--output_path", str(tmp_path / name)]) == 2
        assert "the results could not be written to" in capsys.readouterr().err

    def save(self, args):
        args.output_path.endswith(".json") or os.makedirs(args.output_path, exist_ok=True)
        place = args.output_path.removesuffix(".json")
        with open(f"{place}_now.json" if args.output_path.endswith(".json") else f"{place}/results_now.json", "w"):
            pass

    monkeypatch.setattr(HarnessCLI, "execute", save)
    for name in ("out", "out.json"):
        assert cli.main([*EVAL, "--output_path", str(tmp_path / name)]) == 0


def test_a_full_disk_is_noticed(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"--output: nothing can be written into .*: No space left on device"):
        check_output_folder(tmp_path / "new", "--output")
    assert not list((tmp_path / "new").iterdir())


def test_missing_parents_are_made(tmp_path):
    check_output_file(tmp_path / "a" / "b" / "page.html", "--html")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "page.html").touch()
    check_output_file(tmp_path / "page.html", "--html")


def test_a_file_that_may_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "page.html").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"page\.html cannot be written: permission denied"):
        check_output_file(tmp_path / "page.html", "--html")


def test_a_process_that_is_killed_while_it_checks_leaves_nothing(tmp_path, monkeypatch):
    """The file of the trial has no name."""
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(list(tmp_path.iterdir())))
    check_output_folder(tmp_path, "--output")
    assert seen == [[]]
