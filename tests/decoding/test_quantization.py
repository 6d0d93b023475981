"""Options that load models in 4 or 8 bits: what they mean, and what is rejected before anything is loaded."""

import pytest
from torch import nn

from contralto import cli
from contralto.common import errors
from contralto.decoding.quantization import check_quantized, quantization_options, take_bits


def test_every_model_of_every_method_has_its_options():
    from contralto.decoding.methods import METHODS

    models = {model for method in METHODS.values() for model in method.models}
    assert quantization_options().keys() == {
        f"{prefix}load_in_{bits}bit" for prefix in ("", *(f"{model}_" for model in models)) for bits in (4, 8)
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load-in-4bit", "--load_in_8bit"], "give either --load-in-4bit or --load-in-8bit, not both"),
        (["--amateur-load-in-4bit"], "--amateur-load-in-4bit quantises --amateur, which is not given"),
        (
            ["--amateur", "self:layers=1", "--amateur_load_in_8bit"],
            "--amateur-load-in-8bit quantises --amateur self:layers=1, which is the model itself: quantise that",
        ),
        (["--load-in-4bit"], "the package bitsandbytes is not installed: pip install "),
    ],
)
def test_rejected_before_loading(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    assert cli.main(["generate", "--model", "testbed:expert", *flags, "x"]) == 2
    assert capsys.readouterr().err.startswith(f"contralto generate: {message}")


def test_values_are_true_or_false():
    options = {"load_in_4bit": False, "amateur_load_in_8bit": True, "beta": 1}
    assert take_bits(options) == {"amateur": 8}
    assert options == {"beta": 1}
    with pytest.raises(TypeError, match="load_in_4bit must be true or false, not 'yes'"):
        take_bits({"load_in_4bit": "yes"})


def test_matrices_that_a_cpu_cannot_read_in_4_bits():
    class State:
        blocksize = 64

    layer = nn.Linear(32, 8)
    layer.weight.quant_state = State()
    with pytest.raises(ValueError, match=r"small cannot be loaded in 4 bits on a CPU: 0 has 32 inputs, and .* of 64"):
        check_quantized(nn.Sequential(layer), "small")
    State.blocksize = 32
    check_quantized(nn.Sequential(layer), "small")
