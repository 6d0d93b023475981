"""Shell completion: what a shell offers after a few words."""

import shutil
import subprocess
import sys

import pytest

from contralto import cli
from contralto.cli import completion

shtab = pytest.importorskip("shtab")
SCRIPT = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={last} COMP_LINE="{line}" COMP_POINT={point}
_shtab_contralto
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script without the options of other libraries, whose import takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion, "OTHERS", dict.fromkeys(completion.OTHERS, tuple))
        path = tmp_path_factory.mktemp("completion") / "contralto.bash"
        path.write_text(shtab.complete(completion.complete_parser(), shell="bash"), encoding="utf-8")
        return path


def _offered(script, line):
    words = line.split(" ")
    code = SCRIPT.format(
        script=script, words=" ".join(f'"{word}"' for word in words), last=len(words) - 1, line=line, point=len(line)
    )
    ran = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert not ran.stderr
    return ran.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("contralto gen", ["generate"]),
        ("contralto generate --max-n", ["--max-new-tokens"]),
        ("contralto generate --method rit", ["ritual", "ritual-vcd"]),
        ("contralto data ru", ["run"]),
        ("contralto compare --format m", ["markdown"]),
        ("contralto completion z", ["zsh"]),
    ],
)
def test_bash_completes(script, line, expected):
    assert _offered(script, line) == expected


def test_commands_whose_packages_are_missing_are_left_out(monkeypatch, capsys):
    def absent(parser):
        raise ModuleNotFoundError("No module named 'rapidfuzz'", name="rapidfuzz")

    def untrained():
        raise ImportError("no TRL")
        yield

    monkeypatch.setattr("contralto.cli.data.add_arguments", absent)
    monkeypatch.setattr(completion, "OTHERS", dict.fromkeys(completion.OTHERS, untrained))
    script = shtab.complete(completion.complete_parser(), shell="bash")
    notes = capsys.readouterr().err.splitlines()
    start = "contralto completion: without the options of"
    assert f"{start} data: the package rapidfuzz is not installed: pip install 'contralto[data]'" in notes
    assert f"{start} align: no TRL" in notes
    assert "--max-new-tokens" in script


@pytest.mark.slow
@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts_hold_the_options_of_other_libraries(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    for word in ("num_fewshot", "data_dir", "learning_rate", "teacher_dtype", "apo_zero", "contrast-timeout"):
        assert word in shown
    assert "lora-alpha" not in shown


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "the package shtab is not installed: pip install " in capsys.readouterr().err
