"""Help is fast: no command imports torch to print help, and every command is declared once."""

import resource
import subprocess
import sys

import pytest

from contralto.cli import COMMANDS, main

OTHERS = {"align"}
"""Commands whose help is made by a library that imports torch, and then kept."""
HEAVY = {"torch", "transformers", "trl", "datasets", "lm_eval.evaluator", "vllm"}


QUICK = {"generate", "compare"}
"""Commands that the fast tests look at."""


def commands():
    yield []
    for name in sorted(set(COMMANDS) - OTHERS):
        yield pytest.param([name], marks=[] if name in QUICK else pytest.mark.slow)


@pytest.mark.slow
def test_the_second_help_of_align_imports_nothing_heavy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subprocess.run([sys.executable, "-m", "contralto", "align", "--help"], capture_output=True, check=True)
    test_help_imports_nothing_heavy(["align"])


@pytest.mark.parametrize("argv", list(commands()), ids=str)
def test_help_imports_nothing_heavy(argv):
    code = (
        "import sys\nfrom contralto.cli import main\n"
        "try:\n    main([*sys.argv[1:], '--help'])\nexcept SystemExit as error:\n    assert error.code in (0, None)\n"
        "print('loaded:', *sys.modules)"
    )
    for _ in range(3):  # a busy machine makes a process slow, but not three times
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        ran = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        if seconds < 1:
            break
    shown, _, loaded = ran.stdout.rpartition("loaded:")
    assert "usage: " in shown
    assert not HEAVY & set(loaded.split())
    assert seconds < 1


def test_importing_the_parts_imports_nothing_heavy():
    code = "import sys, contralto.align, contralto.data_gen, contralto.decoding, contralto.eval; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not (HEAVY | {"numpy", "scipy", "lm_eval"}) & set(ran.stdout.split())


def test_every_command_is_listed_with_its_purpose(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{command.name} {command.purpose}" in shown for command in COMMANDS.values())


def test_an_unknown_command_is_rejected(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["decode"])
    assert ended.value.code == 2
    assert "invalid choice: 'decode'" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["foo", "1,x", ""])
def test_a_value_that_cannot_be_converted_is_rejected_in_the_words_of_the_method(value, capsys):
    """And not by the name of the function that converts it, as argparse does by itself."""
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", "testbed:expert", "--method", "dola", "--layers", value, "x"])
    assert ended.value.code == 2
    expected = f"argument --layers: layers must be low, high or numbers such as 2,4,6, not {value!r}\n"
    assert capsys.readouterr().err.endswith(expected)
