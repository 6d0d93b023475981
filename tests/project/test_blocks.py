"""Every command of the documentation is run by a test, or parsed where it needs a GPU, the hub or hours.

The pages of `RUN` are run here, from top to bottom: their files are written, their commands run, and their outputs compared. Those of
`RUN_BY` are run by a test of their own. All others are in `NOT_RUN`, with the reason; their commands are parsed.
"""

import importlib.util
import io
import runpy
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from helpers.task_index import one_index  # noqa: F401  for every test here
from project.blocks import ROOT, blocks, command_blocks
from project.test_site import DOCUMENTS

from contralto import cli
from contralto.cli.parsed import check_command

RUN_BY = {
    "docs/amateurs.md": "tests/cli/test_amateurs.py",
    "docs/models.md": "tests/cli/test_models_page.py",
    "docs/vocabularies.md": "tests/cli/test_vocabularies.py",
    **{
        f"docs/extending/{path.name}": "tests/project/test_extending.py"
        for path in (ROOT / "docs/extending").glob("*.md")
    },
}
"""Pages whose commands another test runs."""
NOT_RUN = {
    "README.md": "tests/project/test_docs.py runs the Python; the commands are those of the pages of docs/start",
    "CONTRIBUTING.md": "whole suites of tests",
    "docs/evaluation.md": "models of 7B and more",
    "docs/real_models.md": "hours",
    "docs/vllm.md": "vLLM, see tests/with_vllm",
    "docs/hub.md": "uploads to the hub; tests/decoding runs the repositories",
    "docs/guides/data_recipes.md": "usage",
    "docs/guides/training_options.md": "usage",
    "eval/tasks/README.md": "usage",
    "testbed/README.md": "the trainings of the embedded models",
    "testbed/ALIGNMENT.md": "the trainings of the embedded models",
    "testbed/DISTILL.md": "the trainings of the embedded models",
    "testbed/VISION.md": "the trainings of the embedded models",
    "tests/mutants/README.md": "hours",
    **{f"benchmarks/results/{path.name}": "measurements" for path in (ROOT / "benchmarks/results").glob("*.md")},
}
"""Pages whose commands are parsed, with the reason why they are not run."""
WITH_COMMANDS = [page for page in DOCUMENTS if command_blocks(page)]
RUN = [
    page
    for page in WITH_COMMANDS
    if page not in RUN_BY and page not in NOT_RUN and any(not block.reason for block in command_blocks(page))
]
PAPERS = [page for page in RUN if page.startswith("docs/reproduce/")]
"""Pages of papers, whose commands have much code in common: a tenth is run by the slow tests, all by test-all."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_pages_of_tests_of_their_own_are_run_there():
    for page, test in RUN_BY.items():
        folder, name = page.rsplit("/", 1)
        text = (ROOT / test).read_text()
        assert name in text or folder.rpartition("/")[2] in text, (page, test)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.full] if page in {*PAPERS} - {*PAPERS[::10]} else []) for page in RUN],
)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    printed = ""
    for block in blocks(page):
        if block.title == "output":
            missing = [line for line in block.text.splitlines() if line != "..." and line.strip() not in printed]
            assert not missing, (page, block.line, missing, printed)
        elif block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text)
        elif block in command_blocks(page):
            commands = [] if block.reason else block.commands
            printed = "".join(run(command, where=(page, block.line)) for command in commands)


def run(command, *, where):
    """Run a command in this process, and return what it prints."""
    if command[0] == "pip":
        parse(command, where)
        return ""
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        if command[0] == "contralto":
            status = cli.main(command[1:])
        else:
            assert command[0] == "python", (where, command)
            argv, sys.argv = sys.argv, command[1:]
            try:
                status = runpy.run_path(command[1], run_name="__main__") and 0
            finally:
                sys.argv = argv
    assert status == 0, (where, command, text.getvalue())
    return text.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if page not in RUN_BY])
def test_commands_are_accepted_by_their_parsers(page, tmp_path, monkeypatch):
    files = {block.title for block in blocks(page) if block.title}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("contralto.align.parsing._check_processes", lambda args: None)  # pages are about GPUs too
    for name in files | {"my_recipe.yaml"}:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("trainer: preference\n" if name.endswith("yaml") else "")
    for block in command_blocks(page):
        for command in block.commands:
            try:
                parse(command, (page, block.line))
            except (SystemExit, ValueError) as error:
                raise AssertionError((page, block.line, command)) from error


def parse(command, where):
    """Let the parser of a command read it."""
    program, *words = command
    if program == "contralto":
        check_command(words)
    elif program in ("accelerate", "torchrun"):
        parse_launched(program, words, where)
    elif program == "make":
        targets = (ROOT / "Makefile").read_text()
        assert all(f"\n{word}" in targets for word in words), (where, command)
    elif program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1].partition(".__")[0]), (where, command)
    elif program == "python" and words[0] == "-c":
        compile(words[1], str(where), "exec")
    elif program == "python":
        assert (ROOT / words[0]).exists() or Path(words[0]).exists(), (where, command)
    elif program == "pip":
        asked = [word.strip('"').partition("[")[2].rstrip("]") for word in words if "[" in word and "://" not in word]
        extras = {extra for names in asked for extra in names.split(",")}
        assert extras <= set(PROJECT["optional-dependencies"]), (where, command)


def parse_launched(program, words, where):
    """Parse the flags of accelerate, and the command that it starts."""
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        if words[0] != "launch":
            return
        args = launch_command_parser().parse_args(words[1:])
        program, words = args.training_script, args.training_script_args
    else:
        place = words.index("-m")
        program, words = words[place + 1], words[place + 2 :]
    if program.startswith("contralto"):
        check_command(words if program == "contralto" else [program.split(".")[1], *words])


def test_blocks_are_read_as_they_are_written():
    page = "docs/models.md"
    first = command_blocks(page)[0]
    assert first.commands[0][:2] == ["contralto", "convert"]
    assert len([command for block in command_blocks(page) for command in block.commands]) == 12
