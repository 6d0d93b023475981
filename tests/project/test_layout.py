"""The package is what pyproject.toml says: every folder mapped, every link in place, light modules light."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARTS = ["align", "data_gen", "decoding", "eval", "recipes", "testbed"]
OWN = ["cli", "common"]
"""Packages in the import root itself."""


def test_every_package_folder_is_listed():
    folders = {path.parent.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("__init__.py")}
    own = {path.parent.relative_to(ROOT) for room in OWN for path in (ROOT / "contralto" / room).rglob("__init__.py")}
    listed = set(PROJECT["tool"]["setuptools"]["packages"]) - {"contralto"}
    assert listed == {"contralto." + ".".join(f.parts) for f in folders} | {".".join(f.parts) for f in own}
    for name in {"contralto." + ".".join(folder.parts) for folder in folders}:
        assert PROJECT["tool"]["setuptools"]["package-dir"][name] == name.removeprefix("contralto.").replace(".", "/")


@pytest.mark.parametrize("part", PARTS)
def test_links_show_the_parts(part):
    """`make links` restores them where an archive lost them."""
    assert (ROOT / "contralto" / part).resolve() == ROOT / part


def test_makefile_links_the_same_parts():
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("PARTS"))
    assert line.split(":=")[1].split() == PARTS


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        pytest.param(
            "contralto.align.losses.objective, contralto.align.losses.divergences, contralto.align.losses.masks, contralto.decoding.rules",
            {"transformers", "peft", "datasets"},
            marks=pytest.mark.slow,  # a process that imports torch
        ),
        (
            "contralto.eval.stats, contralto.testbed.worlds, contralto.decoding, contralto.align, contralto.cli",
            {"torch", "transformers"},
        ),
    ],
)
def test_light_modules_stay_light(modules, absent):
    """Importing the mathematics must not load the libraries around it, nor leave short names behind."""
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not absent & set(loaded)
    assert not set(PARTS) & set(loaded)


LAZY = sorted(
    path.parent.relative_to(ROOT).as_posix().replace("/", ".")
    for part in PARTS
    for path in (ROOT / part).rglob("__init__.py")
    if "contralto.common.lazy" in path.read_text()
)
"""Packages that import their public names on first access."""


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_the_lazy_exports(package):
    """The imports under `if TYPE_CHECKING` name the same objects, from the same modules, as those that run."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert all(isinstance(node, ast.ImportFrom) and node.level == 0 for node in block.body)
    seen = {(node.module, alias.name, alias.asname) for node in block.body for alias in node.names}
    (call,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)]
    modules = ast.literal_eval(call.args[1])
    assert seen == {(f"contralto.{package}.{m}", name, name) for m, names in modules.items() for name in names}
    assert importlib.import_module(f"contralto.{package}").__all__ == sorted(name for _, name, _ in seen)


def test_lazy_names_are_found():
    decoding = importlib.import_module("contralto.decoding")
    assert decoding.SeededSampling.__module__ == "contralto.decoding.sampling"
    assert {"SeededSampling", "__doc__"} <= set(dir(decoding))
    with pytest.raises(AttributeError, match=r"'contralto\.decoding' has no attribute 'Nothing'"):
        _ = decoding.Nothing


def _needs(extras):
    """Yield what the base package and extras need, but for contralto's own extras and vLLM, which has constraints of its own."""
    optional = PROJECT["project"]["optional-dependencies"]
    for line in [*PROJECT["project"]["dependencies"], *(need for extra in extras for need in optional[extra])]:
        need = Requirement(line)
        if canonicalize_name(need.name) not in ("contralto", "vllm"):
            yield need


def _pins(name):
    pairs = (line.split("==") for line in _lines(name))
    return {canonicalize_name(package): version for package, version in pairs}


def test_constraints_cover_the_dependencies():
    names = {canonicalize_name(need.name) for need in _needs(PROJECT["project"]["optional-dependencies"])}
    assert names <= set(_pins("constraints.txt"))


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("constraints.txt", PROJECT["project"]["optional-dependencies"]),
        ("constraints-vllm.txt", ("align", "data", "eval", "vision")),
    ],
)
def test_the_tested_versions_are_in_the_ranges(name, extras):
    pins, needs = _pins(name), list(_needs(extras))
    assert len(needs) > 10
    assert [str(need) for need in needs if not need.specifier.contains(pins[canonicalize_name(need.name)])] == []


def test_every_range_begins_somewhere():
    """Stubs of types follow what they describe."""
    needs = [need for need in _needs(PROJECT["project"]["optional-dependencies"]) if not need.name.startswith("types-")]
    assert [str(need) for need in needs if not any(each.operator == ">=" for each in need.specifier)] == []


def _lines(name):
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def test_tests_mirror_the_sources():
    """A folder of tests has the name of the folder whose modules it tests."""
    helpers = {"faults", "fixtures", "helpers", "install", "mutants", "oracles", "project", "real", "with_vllm", "zoo"}
    tests = ROOT / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    rooms = {folder for folder in folders if folder.parts[0] not in helpers}
    assert rooms
    for folder in rooms:
        assert (ROOT / "contralto" / folder).is_dir(), folder
