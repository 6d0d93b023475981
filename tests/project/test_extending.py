"""The pages about extensions are followed to the letter, in a temporary folder and another process."""

import json
import math
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(page, language):
    """Return the code blocks of a page in a language."""
    text = (ROOT / "docs" / "extending" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def install(folder, name, code, pyproject):
    """Write a module and the metadata that an installed package with these entry points has."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    groups = tomllib.loads(pyproject)["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(lines))


def contralto(folder, *argv):
    """Run a command in a process that has the folder on its path."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from contralto.cli import main; sys.exit(main({list(argv)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_decoding_method(tmp_path):
    (code,), (pyproject,), (console,) = (blocks("decoding-method.md", name) for name in ("python", "toml", "console"))
    install(tmp_path, "emphasis", code, pyproject)
    command = shlex.split(console)
    assert command.pop(0) == "contralto"
    done = contralto(tmp_path, *command, "--max-new-tokens", "4")
    assert (done.returncode, done.stderr) == (0, "emphasis: 2 rows per prompt in one forward\n")
    assert done.stdout.strip()
    shown = " ".join(contralto(tmp_path, "generate", "--help").stdout.split())
    assert "emphasis the prompt against another prompt --contrast-prompt --strength 1.0 --floor 0.1" in shown
    refused = contralto(tmp_path, *command, "--kappa", "1")
    assert "--method emphasis has no --kappa; its own are --contrast-prompt, --strength, --floor" in refused.stderr


@pytest.mark.slow
def test_a_preference_loss(tmp_path, monkeypatch):
    (code,), (pyproject,), (console,) = (blocks("preference-loss.md", name) for name in ("python", "toml", "console"))
    install(tmp_path, "capped", code, pyproject)
    row = {"prompt": [{"role": "user", "content": "2 + 3"}], "chosen": [{"role": "assistant", "content": "5."}]}
    row |= {"rejected": [{"role": "assistant", "content": "6."}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    command = shlex.split(console)
    assert command.pop(0) == "contralto"
    quiet = ["--max_steps", "1", "--report_to", "none", "--use_cpu", "true", "--logging_steps", "1"]
    done = contralto(tmp_path, *command, *quiet)
    assert done.returncode == 0, done.stderr
    (state,) = (tmp_path / "out").glob("checkpoint-1/trainer_state.json")
    log = json.loads(state.read_text())["log_history"]
    assert log[0]["loss/capped"] == pytest.approx(math.log(2), rel=1e-3)  # the policy is its reference
    wrong = contralto(tmp_path, *command, *quiet, "--f_divergence_type", "forward_kl")
    assert "f_divergence_type is set, and capped has no f-divergence: leave f_divergence_type out" in wrong.stderr


@pytest.mark.slow
def test_a_metric(tmp_path, monkeypatch):
    (code,), (pyproject,), (task,), (console,) = (
        blocks("metric.md", name) for name in ("python", "toml", "yaml", "console")
    )
    install(tmp_path, "digits", code, pyproject)
    (tmp_path / "counted.yaml").write_text(task)
    rows = [{"question": f"Mia has {i} nuts. She finds 2 nuts. How many?", "answer": str(i + 2)} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    command = shlex.split(console)
    assert command.pop(0) == "contralto"
    done = contralto(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    (compared,) = json.loads((tmp_path / "compare" / "compare.json").read_text())["tasks"]
    assert compared["metric"] == "digit_share"
    assert 0 < compared["rows"][0]["cells"]["expert"]["score"]["value"] < 1
