"""Every command of docs/models.md runs, in the order of the page."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import gguf_files

from contralto import cli

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
ROWS = [
    {
        "prompt": [{"role": "user", "content": "Ben went out to the"}],
        "chosen": [{"role": "assistant", "content": f"pond and saw {n} ducks."}],
        "rejected": [{"role": "assistant", "content": f"pond {n}."}],
    }
    for n in range(4)
]


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_their_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    gguf_files.write(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), gguf_files.tiny())
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    commands = re.findall(r"^    contralto (.*)$", PAGE, flags=re.MULTILINE)
    assert len(commands) == 12
    texts = {}
    for command in commands:
        if "load-in" in command and find_spec("bitsandbytes") is None:  # `make real` installs it
            continue
        assert cli.main(shlex.split(command)) == 0, (command, capsys.readouterr().err)
        texts[command] = capsys.readouterr().out
    first, second, off, *_ = (
        text for command, text in texts.items() if command.startswith("generate") and "tuned" in command
    )
    assert first == second
    assert off
