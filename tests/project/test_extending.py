"""The pages of `docs/extending` are followed to the letter: their files are written, the package installed, their commands run.

The errors of a page are those of the same commands after the change that its table names.
"""

import json
import math
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.task_index import one_index  # noqa: F401  for every test here

from contralto import cli
from contralto.align.losses.registry import LOSSES
from contralto.data_gen.checks import CHECKS
from contralto.data_gen.engines import ENGINES
from contralto.data_gen.strategies import STRATEGIES
from contralto.decoding.methods import METHODS
from contralto.eval.metrics import METRICS

PAGES = {path.stem: path for path in (Path(__file__).parents[2] / "docs" / "extending").glob("*.md")}
REGISTRIES = {
    "decoding-method": METHODS,
    "loss": LOSSES,
    "metric": METRICS,
    "strategy": STRATEGIES,
    "engine": ENGINES,
    "check": CHECKS,
}
SECTIONS = ["The code", "The package", "Its use", "What comes with it", "What is rejected", "In contralto itself"]
FILE = re.compile(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", re.DOTALL)
"""A block of code after a line that ends with the name of a file."""
ERROR = re.compile(
    r"^\| (?:without `(?P<left_out>[^`]+)`|`(?P<old>[^`]+)` → `(?P<new>[^`]+)`) \| `(?P<error>[^`]+)` \|$", re.MULTILINE
)


def read(page, old="", new=""):
    """Return the files of a page by name and its commands, after a change of the code."""
    text = PAGES[page].read_text(encoding="utf-8")
    files = {name: code.replace(old, new, 1) if old else code for name, code in FILE.findall(text)}
    (console,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line) for line in (console.replace(old, new, 1) if old else console).splitlines()]
    assert {command.pop(0) for command in commands} == {"contralto"}
    return files, commands


def errors(page):
    """Return the changes of a page's last table, and the errors that they cause."""
    for row in ERROR.finditer(PAGES[page].read_text(encoding="utf-8")):
        yield row["left_out"] or row["old"], row["new"] or "", row["error"]


def install(folder, files):
    """Write the files, and the metadata that an installed package with the entry points of its pyproject.toml has."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (module,) = (name.removesuffix(".py") for name in files if name.endswith(".py"))
    groups = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(lines))
    return module


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a function that installs the package of a page and returns the commands of the page."""
    modules = []

    def install_page(page, old="", new=""):
        files, commands = read(page, old, new)
        modules.append(install(tmp_path, files))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.chdir(tmp_path)
        registry = REGISTRIES[page]  # names and entries as in a process that begins
        monkeypatch.setattr(registry, "_points", None)
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        return commands

    yield install_page
    for module in modules:
        sys.modules.pop(module, None)


def test_there_is_a_page_for_every_extension_and_all_have_one_shape():
    assert set(PAGES) == set(REGISTRIES)
    contributing = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for page, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
        assert f'[project.entry-points."{REGISTRIES[page].group}"]' in text
        row = rf"\(docs/extending/{page}\.md\).* \| `{re.escape(REGISTRIES[page].group)}`"
        assert re.search(row, contributing)
        assert len(list(errors(page))) >= 3


@pytest.mark.parametrize(
    ("page", "old", "new", "error"),
    [
        pytest.param(page, *row, id=f"{page}: {row[2][:40]}", marks=[pytest.mark.slow] if page == "metric" else [])
        for page in PAGES
        for row in errors(page)
    ],
)
def test_what_a_page_says_is_rejected(installed, capsys, page, old, new, error):
    assert read(page, old, new) != read(page)
    command, *_ = installed(page, old, new)
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert error in said.strip().splitlines()[-1]
    lines = said.strip().splitlines()  # a line per role
    assert all(error in line for line in lines) or page == "metric"  # below the progress bars of lm-eval


def test_the_short_way_to_a_decoding_method(tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGES["decoding-method"].read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "short.py").write_text(code[1])
    names = runpy.run_path(str(tmp_path / "short.py"))
    inputs, model, method = names["inputs"], names["model"], names["method"]
    slow = model.generate(**inputs, logits_processor=[method], max_new_tokens=8)
    assert slow.tolist() == names["output"].tolist() != model.generate(**inputs, max_new_tokens=8).tolist()


def test_a_decoding_method(installed, capsys):
    generate, _ = installed("decoding-method")
    assert cli.main([*generate, "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == "emphasis: 2 rows per prompt in one forward pass\n"
    assert out.strip()
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "emphasis the prompt against another prompt --contrast-prompt --strength 1.0 --floor 0.1" in shown


@pytest.mark.slow
@pytest.mark.usefixtures("one_metered")
def test_a_decoding_method_is_compared_with_its_controls(installed, tmp_path):
    _, compare = installed("decoding-method")
    assert cli.main(compare) == 0
    (compared,) = json.loads((tmp_path / "compare" / "compare.json").read_text())["tasks"]
    names = [row["name"] for row in compared["rows"]]
    assert {"greedy", "greedy, mask 0.1", "sampling, mask 0.1", "sampling, mask, T 0.5"} <= set(names)


@pytest.mark.slow
def test_a_loss(installed, tmp_path):
    (align,) = installed("loss")
    assert cli.main(align) == 0
    (state,) = (tmp_path / "out").glob("checkpoint-1/trainer_state.json")
    log = json.loads(state.read_text())["log_history"]
    assert log[0]["loss/capped"] == pytest.approx(math.log(2), rel=1e-3)  # the policy is its reference


@pytest.mark.slow
def test_a_metric(installed, tmp_path):
    compare, evaluate = installed("metric")
    assert cli.main(compare) == 0
    (compared,) = json.loads((tmp_path / "compare" / "compare.json").read_text())["tasks"]
    assert compared["metric"] == "digit_share"
    cells = {row["name"]: row["cells"]["expert"] for row in compared["rows"]}
    share = cells["greedy"]["score"]["value"]
    assert 0 < share < 1
    assert cells["dola"]["tests"][0]["test"] == "swap"
    assert cli.main(evaluate) == 0
    (found,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(found.read_text())["results"]["counted"]["digit_share,none"] == pytest.approx(share)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["strategy", "engine", "check"])
def test_an_extension_of_data_generation(installed, capsys, tmp_path, page):
    (run,) = installed(page)
    assert cli.main(run) == 0
    written = (tmp_path / "out" / "dataset" / "data" / "train.jsonl").read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in written.splitlines()]
    chosen, rejected = ([pair[side][-1]["content"] for pair in pairs] for side in ("chosen", "rejected"))
    if page == "strategy":
        assert rejected == [text.upper() + "?" for text in chosen]
    elif page == "engine":
        assert [text.split(maxsplit=1) for text in chosen] == [
            ["certainly", pair["prompt"][0]["content"]] for pair in pairs
        ]
    else:
        assert [pair["vowels"] for pair in pairs] == [sum(text.count(letter) for letter in "aeiouy") for text in chosen]
    assert pairs


@pytest.mark.parametrize("page", ["strategy", "engine", "check"])
def test_the_help_lists_extensions_without_importing_them(installed, capsys, page):
    installed(page)
    with pytest.raises(SystemExit):
        cli.main(["data", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    files, _ = read(page)
    (module,) = (name.removesuffix(".py") for name in files if name.endswith(".py"))
    assert set(re.findall(r"^(\w+) = ", files["pyproject.toml"], re.MULTILINE)) <= set(words)
    assert module not in sys.modules
