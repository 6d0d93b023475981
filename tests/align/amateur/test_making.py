"""`contralto amateur`, from layers to card: resumable, of other settings rejected, and better after training."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from contralto import cli
from contralto.align.amateur import AmateurConfig, make_amateur, making
from contralto.common.options import OptionError

SMALL = {"model": "testbed:expert", "layers": 2, "texts": 24, "max_new_tokens": 16, "batch_size": 4, "bf16": False}


def test_an_untrained_amateur_without_texts(tmp_path, capsys):
    out = tmp_path / "pruned"
    argv = ["amateur", "testbed:expert", "--layers", "2", "--texts", "0", "--output", str(out)]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{out}: layers 0, 2, ")
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2
    card = (out / "README.md").read_text()
    assert "It was not trained." in card
    assert "--layers 2 --keep spread --texts 0" in card
    assert cli.main(argv) == 0  # nothing is left to do
    assert cli.main([*argv, "--keep", "first"]) == 2
    assert "was begun with another keep: use the same options" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_rejected(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        make_amateur(AmateurConfig(**SMALL, output=str(tmp_path)))
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layers": None}, "layers is missing"),
        ({"texts": -1}, "texts must be at least 0"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0"),
        ({"held_out": 1}, "held_out must lie in"),
    ],
)
def test_invalid_settings(more, message):
    with pytest.raises(OptionError, match=message):
        AmateurConfig(**SMALL | more, output="out")


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["spread", "influence"])
def test_training_heals_and_an_interrupted_run_resumes(tmp_path, monkeypatch, keep):
    config = AmateurConfig(**SMALL, keep=keep, epochs=4, output=str(tmp_path / "amateur"))
    compare = making.compare_models
    calls = []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare(*args, **kwargs)

    monkeypatch.setattr(making, "compare_models", stopped)
    with pytest.raises(KeyboardInterrupt):  # after the training
        make_amateur(config)
    monkeypatch.setattr(making, "train_amateur", lambda *_: pytest.fail("trained again"))
    made = make_amateur(config)
    assert len(calls) == 3  # the untrained figures were kept
    assert made.figures.divergence < made.untrained.divergence
    assert made.figures.agreement > made.untrained.agreement
    loaded = AutoModelForCausalLM.from_pretrained(config.output)
    trained = AutoModelForCausalLM.from_pretrained(config.work / "training")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))
    assert json.loads((config.work / "trained.json").read_text())["tokens"] == made.figures.tokens
    assert not list(config.work.glob("training/checkpoint-*"))
