"""The wheel and the source distribution, built and installed in clean environments, one per extra: `make test-install`.

Every command is run where only the base package is installed. It either works, or ends in one sentence that names the extra to install;
in an environment with that extra it works.
"""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UV = os.environ.get("UV", str(Path(sys.executable).with_name("uv")))
LEFT_OUT = {
    "dev": "every other test",
    "docs": "make docs",
    "vllm": "make test-vllm",
    "real": "make real",
    "ray": "make real",
}
"""Extras that other commands install."""
PAIRS = '{"prompt": "Ben went", "chosen": " to the barn.", "rejected": " to to the."}\n'
EXPERT = ("--model", "testbed:expert", "--amateur", "testbed:amateur")
EVALUATED = "pretrained=testbed:expert,amateur=testbed:amateur,method=cd"
TRAINING = "--dataset_name pairs.jsonl --max_steps 1 --per_device_train_batch_size 1 --output_dir trained --use_cpu --report_to none"
COMMANDS = {
    "generate": ("", ["generate", *EXPERT, "Ben went", "--max-new-tokens", "3"]),
    "generate with an image": (
        "vision",
        [
            "generate",
            "--model",
            "testbed:vision-0",
            "--method",
            "vcd",
            "--image",
            "scene.png",
            "Hi",
            "--max-new-tokens",
            "3",
        ],
    ),
    "generate in 8 bits": ("quantized", ["generate", *EXPERT, "--load-in-8bit", "Ben went", "--max-new-tokens", "3"]),
    "explain": ("", ["explain", *EXPERT, "Ben went", "--max-new-tokens", "3"]),
    "completion": ("completion", ["completion", "bash"]),
    "hub": ("", ["hub", "list"]),
    "eval": (
        "eval",
        ["eval", "--model", "contralto", "--tasks", "testbed_arithmetic", "--limit", "1", "--model_args", EVALUATED],
    ),
    "compare": (
        "eval",
        [
            "compare",
            "--tasks",
            "testbed_arithmetic",
            *EXPERT,
            "--methods",
            "cd",
            "--limit",
            "2",
            "--output",
            "compared",
        ],
    ),
    "judge": ("demo", ["judge", "--pairs", "pairs.jsonl", "--scorer", "contralto.testbed.questions:score", "--help"]),
    "data": ("data", ["data", "preview", str(ROOT / "examples" / "clair_testbed.yaml"), "-n", "1"]),
    "align": ("align", ["align", "simpo", "--model_name_or_path", "testbed:expert", *TRAINING.split()]),
    "convert": ("convert", ["convert", "model.gguf", "--output", "converted"]),
    "amateur": ("align", ["amateur", "testbed:expert", "--layers", "2", "--output", "made", "--help"]),
    "critic": ("align", ["critic", "testbed:expert", "--output", "made", "--help"]),
    "reproduce": ("", ["reproduce", "--help"]),
    "serve": ("vllm", ["serve", "testbed:expert"]),
    "demo": ("demo", ["demo", "--help"]),
}
"""Commands with the extra that each needs."""
MODULES = {"mauve": "mauve", "easy-vqa": "easy_vqa"}
"""Extras that no command here needs, with the module that each brings."""


def _run(*command, cwd=None, **environment):
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Build the source distribution, and the wheel from it, as an index serves them."""
    folder = tmp_path_factory.mktemp("dist")
    ran = _run(UV, "build", "--python", sys.executable, "--out-dir", folder, ROOT)
    assert ran.returncode == 0, ran.stderr
    assert not re.search(r"Package would be ignored|Deprecat|SetuptoolsWarning|_Warning", ran.stderr), ran.stderr
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="session")
def environment(built, tmp_path_factory):
    """Return a function that makes an environment with the wheel and an extra, and returns its folder of programs."""

    @cache
    def make(extra):
        folder = tmp_path_factory.mktemp("env") / "venv"
        assert _run(UV, "venv", "--python", sys.executable, folder).returncode == 0
        wheel = f"contralto{f'[{extra}]' if extra else ''} @ {built[1].as_uri()}"
        find = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or ""
        python = folder / "bin" / "python"
        ran = _run(UV, "pip", "install", "--python", python, "-c", ROOT / "constraints.txt", wheel, UV_FIND_LINKS=find)
        assert ran.returncode == 0, ran.stderr
        return python.parent

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return a folder with the files that the commands read."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import gguf_files
    from PIL import Image

    made = tmp_path_factory.mktemp("files")
    (made / "pairs.jsonl").write_text(PAIRS * 4)
    Image.new("RGB", (32, 32), "red").save(made / "scene.png")
    gguf_files.write(made / "model.gguf", gguf_files.tiny())
    return made


def test_every_extra_is_installed_somewhere():
    named = {extra for extra, _ in COMMANDS.values()} | set(MODULES) | set(LEFT_OUT)
    assert set(PROJECT["optional-dependencies"]) <= named


def test_every_command_is_tried():
    from contralto.cli import COMMANDS as all_commands

    assert {argv[0] for _, argv in COMMANDS.values()} >= set(all_commands)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_base_package_works_or_names_the_extra(name, environment, folder):
    extra, argv = COMMANDS[name]
    ran = _run(environment("") / "contralto", *argv, cwd=folder)
    if not extra or argv[-1] == "--help":
        assert ran.returncode == 0, ran.stderr
        return
    assert ran.returncode == 2, ran.stderr
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith(f"contralto {argv[0]}: ")
    assert re.search(r"pip install 'contralto\[([\w-]+)\]'$", last)[1] == extra, last


@pytest.mark.parametrize("name", [name for name, (extra, _) in COMMANDS.items() if extra and extra not in LEFT_OUT])
def test_with_its_extra_the_command_works(name, environment, folder):
    extra, argv = COMMANDS[name]
    ran = _run(environment(extra) / "contralto", *argv, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize("extra", list(MODULES))
def test_an_extra_brings_its_module(extra, environment):
    ran = _run(environment(extra) / "python", "-c", f"import {MODULES[extra]}, contralto.decoding")
    assert ran.returncode == 0, ran.stderr


def test_the_source_distribution_holds_the_repository(built):
    """Every file under version control is in it, but for the links, and the wheel has no tests."""
    with tarfile.open(built[0]) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    tracked = _run("git", "ls-files", cwd=ROOT).stdout.split("\n")[:-1]
    if not tracked:
        pytest.skip("not a checkout")
    assert {path for path in tracked if not (ROOT / path).is_symlink()} <= held
    assert not any(path.startswith("contralto/decoding/") for path in held)  # the link was not followed
    assert not any("__pycache__" in path for path in held)
    assert all(name.startswith("contralto") for name in zipfile.ZipFile(built[1]).namelist())


def test_tests_of_the_source_distribution_pass(built, tmp_path):
    """Its own tests run in it, with the environment of these tests."""
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert _run("make", "links", cwd=folder).returncode == 0
    tests = ["tests/decoding/test_rules.py", "tests/project/test_layout.py", "tests/decoding/hub"]
    ran = _run(sys.executable, "-m", "pytest", "-q", "-m", "not slow", *tests, cwd=folder, PYTHONPATH=str(folder))
    assert ran.returncode == 0, ran.stdout[-3000:]
