"""Mistakes end in a sentence, faults of the program in a traceback, Ctrl-C in 130: one place decides."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from contralto import cli, testbed
from contralto.common import errors
from contralto.common.options import Option, OptionError


def _raise(error):
    raise error


def _fault():
    return len(3)


def _assert():
    assert not sys.argv


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda: _raise(ValueError("--k must be\nat least 1")), "--k must be at least 1"),
        (lambda: errors.during("x").__enter__() or _raise(TypeError("name is a text")), None),
        (lambda: open("nowhere.txt"), "nowhere.txt: No such file or directory"),  # noqa: SIM115
        (lambda: b"\xff".decode(), "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (lambda: json.loads("{"), "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (lambda: json.loads("[" * 10**5), "maximum recursion depth exceeded while decoding a JSON array"),
        (lambda: json.loads("9" * 5000), "Exceeds the limit (4300 digits) for integer string conversion"),
        (lambda: json.loads(None), None),
        (lambda: _raise(MemoryError()), "there is not enough memory: use a smaller model, batch or file"),
        (lambda: _raise(NotImplementedError()), "NotImplementedError"),
        (lambda: __import__("nowhere_to_be_found"), "the package nowhere-to-be-found is not installed: pip install"),
        (lambda: _raise(ImportError("images are read with Pillow")), "images are read with Pillow"),
        (lambda: torch.save(torch.zeros(10**5), "/dev/full"), "torch could not write or read a file ("),
        (lambda: Tokenizer(WordLevel({"a": 0})).save("/dev/full"), "the tokenizer could not write or read a file ("),
        (lambda: _raise(Exception("of somebody")), None),
        (_fault, None),
        (lambda: {}["key"], None),
        (lambda: None.name, None),
        (lambda: int("x"), None),
        (lambda: 1 / 0, None),
        (_assert, None),
        (lambda: _raise(KeyError("key")), None),
        (lambda: __import__("contralto.nowhere"), None),
    ],
)
def test_mistakes_and_faults(run, said, capsys):
    if said is None:
        with pytest.raises(Exception):  # noqa: B017, PT011 (whatever it is, it comes through)
            errors.guarded("test", run)
        return
    assert errors.guarded("test", run) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"contralto test: {said}")
    with pytest.raises(Exception):  # noqa: B017, PT011
        errors.guarded("test", run, debug=True)


def test_type_errors_are_mistakes_where_contralto_raises_them(capsys):
    code = compile("def refuse():\n    raise TypeError('beta must be a number')\n", "a.py", "exec")
    for module, status in (("contralto.a", 2), ("other.a", None)):
        scope = {"__name__": module}
        exec(code, scope)  # noqa: S102
        if status:
            assert errors.guarded("test", scope["refuse"]) == status
        else:
            with pytest.raises(TypeError):
                errors.guarded("test", scope["refuse"])


def test_interruptions(capsys):
    def interrupted_import():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy could not be initialised") from None

    for run in (lambda: _raise(KeyboardInterrupt()), interrupted_import):
        assert errors.guarded("test", run, resumes="it goes on") == 130
        assert capsys.readouterr().err == "\ncontralto test: interrupted; it goes on\n"
    assert errors.guarded("test", interrupted_import, quiet=True) == errors.guarded("test", interrupted_import) == 130
    assert capsys.readouterr().err == "\ncontralto test: interrupted\n"
    with pytest.raises(ImportError, match=r"^numpy could not"), errors.during("where"):
        interrupted_import()


def test_a_reader_that_has_gone():
    code = "import sys; from contralto.common.errors import guarded; sys.exit(guarded('x', lambda: print('y' * 10**6)))"
    run = subprocess.run(
        f'{sys.executable} -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}',
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (141, "y", "")


class _Closed(io.StringIO):
    """A standard output whose descriptor is a file."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def fileno(self):
        return self.file.fileno()


def test_the_status_of_every_end(tmp_path, monkeypatch):
    assert errors.guarded("test", lambda: None) == 0
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", _Closed(file))
        assert errors.guarded("test", lambda: _raise(BrokenPipeError())) == 141
        os.write(file.fileno(), b"lost")  # into nothing, so that Python can end without another error
    assert (tmp_path / "out").read_bytes() == b""


def test_memory_that_torch_does_not_get(capsys):
    """torch raises a plain RuntimeError on CPUs, in compiled code."""
    assert "accelerate.utils.memory" in sys.modules or __import__("accelerate")
    assert errors.guarded("test", lambda: torch.empty(2**59)) == 2
    assert "allocate" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="size"):
        errors.guarded("test", lambda: torch.ones(2) + torch.ones(3))


@pytest.mark.parametrize(
    "error", [TypeError("a"), AttributeError("a"), ImportError("a"), MemoryError("a"), OSError("a")]
)
def test_a_block_prefixes_mistakes_alone(error):
    mistake = errors.is_mistake(error)
    with pytest.raises(type(error), match=r"^where: a$" if mistake else r"^a$"), errors.during("where"):
        raise error
    with pytest.raises(OptionError, match=r"^where: k must be 1$"), errors.during("where"):
        raise OptionError("{name} must be 1", name=Option("k"))


@pytest.mark.parametrize(("command", "extra"), [("data", ""), ("generate", "data")])
def test_the_extra_of_a_command_is_named(command, extra, capsys):
    assert errors.guarded(command, lambda: _raise(ModuleNotFoundError(name="yaml")), extra=extra) == 2
    assert "pip install 'contralto[data]'" in capsys.readouterr().err


def test_sentences():
    assert errors.sentence(KeyError("no such key")) == "no such key"
    assert errors.sentence(KeyError()) == "KeyError"
    assert errors.sentence(ValueError("two\n  lines")) == "two lines"
    assert errors.sentence(MemoryError("of 3 GB")) == "of 3 GB"
    missing = {name: ModuleNotFoundError(name=name) for name in ("trl.trainer", "yaml", "no_such_thing")}
    said = "the package trl is not installed: pip install 'contralto[{}]'"
    assert errors.sentence(missing["trl.trainer"], "align") == said.format("align")
    assert errors.sentence(missing["trl.trainer"], "no extra") == said.format("align")  # the first that installs it
    assert (
        errors.sentence(missing["yaml"], "data") == "the package pyyaml is not installed: pip install 'contralto[data]'"
    )
    assert errors.sentence(missing["trl.trainer"], "demo") == said.format("demo")  # by contralto[align]
    assert errors.sentence(missing["no_such_thing"]) == (
        "the package no-such-thing is not installed: pip install no-such-thing"
    )
    assert errors.sentence(ModuleNotFoundError("a word: one's own", name="no name")) == "a word: one's own"
    failed = DatasetGenerationError("An error occurred")
    failed.__cause__ = ValueError("row 3")
    assert errors.sentence(failed) == "An error occurred: row 3"
    assert errors.sentence(DatasetGenerationError("An error occurred")) == "An error occurred"
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        errors.require("os", "nowhere_at_all")


SLOW = pytest.mark.slow
FULL = (pytest.mark.slow, pytest.mark.full)
BLOCK = """
import sys
class Finder:
    # Python's own, which does not see one package
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == {missing!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Finder, sys.meta_path)
from contralto import cli
sys.exit(cli.main({argv!r}))
"""


@pytest.mark.parametrize(
    ("command", "missing", "said"),
    [
        ("data run r.yaml", "yaml", "the package pyyaml is not installed: pip install 'contralto[data]'"),
        ("data run r.yaml --runner ray", "ray", "the package ray is not installed: pip install"),
        pytest.param("align dpo", "trl", "contralto[align]", marks=SLOW),
        ("eval --tasks a", "lm_eval", "contralto[eval]"),
        ("generate --model testbed:expert x", "psutil", "the package psutil is not installed: pip install"),
        pytest.param("compare --tasks a --model b --methods dola", "matplotlib", "contralto[eval]", marks=SLOW),
        pytest.param("demo", "trl", "contralto[demo]", marks=FULL),
        pytest.param("generate --model testbed:vision-0 --image a.png x", "PIL", "contralto[vision]", marks=FULL),
        pytest.param("generate --model adapter --adapters-off x", "peft", "contralto[align]", marks=SLOW),
    ],
)
def test_missing_extras_are_named(command, missing, said, tmp_path):
    """Found before any work is done."""
    (tmp_path / "a.png").write_bytes(b"an image")
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "testbed:expert"}')
    code = BLOCK.format(missing=missing, argv=command.split())
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=where, capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 2, ran.stderr
    assert said in ran.stderr.strip().split("\n")[-1]
    assert "Traceback" not in ran.stderr


RECIPE = """
rows: {source: "contralto.testbed.questions:problems", arguments: {count: 1}}
strategies: [clair]
roles:
  target: {engine: openai, base_url: "http://localhost:1/v1", model: m}
  reviser: {engine: function, use: "math:sqrt"}
"""


def _copy(folder, change):
    shutil.copytree(testbed.path("expert"), folder)
    change(folder)
    return str(folder)


def _cut(folder):
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])


def _headed(folder):
    """A header of 2^62 bytes."""
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes((2**62).to_bytes(8, "little") + weights.read_bytes()[8:])


def _template(text):
    def change(folder):
        for file in folder.glob("chat_template*"):
            file.unlink()
        path = folder / "tokenizer_config.json"
        path.write_text(
            json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"chat_template": text}), encoding="utf-8"
        )

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_cut, "cannot load {model}: model.safetensors is damaged: Error while deserializing header"),
        (
            _headed,
            "cannot load {model}: model.safetensors is damaged: Error while deserializing header: header too large",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load {model}: It looks like the config file"),
        (lambda folder: (folder / "config.json").unlink(), "cannot load {model}: Unrecognized model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot load {model}: "),
        (
            _template("{% for m in messages %}"),
            "prompt 0, 'Why?', does not fit the chat template: Unexpected end of template",
        ),
        (_template("{{ 1 + messages[0].content }}"), "does not fit the chat template: unsupported operand type"),
        (_template("{{ raise_exception('no') }}"), "does not fit the chat template: no\n"),
        (_template("{% for i in range(10 ** 9) %}{% endfor %}"), "does not fit the chat template: Range too big"),
        (
            _template("{{ messages.__class__.__mro__ }}"),
            "does not fit the chat template: access to attribute '__class__'",
        ),
    ],
)
def test_broken_models_and_templates_are_named(tmp_path, capfd, change, said):
    model = _copy(tmp_path / "model", change)
    assert cli.main(["generate", "--model", model, "Why?"]) == 2
    assert said.format(model=model) in capfd.readouterr().err


def test_images_for_a_model_of_texts(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert cli.main(["generate", "--model", "testbed:expert", "--image", str(tmp_path / "a.png"), "x"]) == 2
    assert "testbed:expert does not accept images: leave them out" in capsys.readouterr().err
