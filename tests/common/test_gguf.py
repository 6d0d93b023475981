"""GGUF files: what is converted computes what the file says, and what cannot be converted is rejected in a sentence."""

import json
import os

import pytest
import torch
from helpers import gguf_files
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from contralto import cli
from contralto.common import hub
from contralto.common.gguf import convert, find_gguf

gguf = pytest.importorskip("gguf")
QUANTISED = ("blk.0.ffn_down.weight", "blk.1.attn_q.weight")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A model, its GGUF file with two quantised tensors, and the folder made of it."""
    folder = tmp_path_factory.mktemp("gguf")
    model = gguf_files.tiny()
    gguf_files.write(folder / "tiny.gguf", model, quantised=QUANTISED, tokenizer__ggml__eot_token_id=5)
    return model, folder / "tiny.gguf", folder / "out", convert(folder, folder / "out")


@torch.no_grad()
def test_the_converted_model_computes_what_the_file_says(converted):
    model, _, folder, made = converted
    state = model.state_dict()
    for name in QUANTISED:  # the same model with the weights that the file keeps of two of its matrices
        block, part = int(name[4]), gguf_files.LAYER[name.split(".")[2]]
        key = f"model.layers.{block}.{part}.weight"
        kind = gguf.GGMLQuantizationType.Q8_0
        kept = gguf.quants.dequantize(gguf.quants.quantize(state[key].numpy(), kind), kind)
        assert not torch.equal(state[key], torch.from_numpy(kept))
        state[key] = torch.from_numpy(kept)
    model.load_state_dict(state)
    own = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert own.dtype == torch.float32
    ids = torch.tensor([[2, 40, 41, 7, 100, 3]])
    assert torch.equal(own.double()(ids).logits, model.double()(ids).logits)
    assert made.parameters == model.num_parameters()
    assert (made.architecture, made.kinds, made.has_chat_template) == ("llama", ("F32", "Q8_0"), True)


def test_tokenizer_template_ends_and_card(converted):
    _, file, folder, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ab c", add_special_tokens=False)["input_ids"]) == "ab c"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<user>x"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 5]  # the end of a turn, too
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "tiny.gguf" in card
    assert sorted(path.name for path in file.parent.iterdir()) == ["out", "tiny.gguf"]  # nothing unfinished is left


def test_command_and_dtype(converted, tmp_path, capsys):
    status = cli.main(["convert", str(converted[1]), "--output", str(tmp_path / "half"), "--dtype", "bfloat16"])
    assert status == 0
    assert "0.0M parameters of tiny.gguf (llama, F32, Q8_0) in bfloat16, " in capsys.readouterr().out
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_commands_say_how_to_convert(converted, tmp_path):
    _, file, _, _ = converted
    os.symlink(file, tmp_path / "tiny.gguf")
    for name, what in ((str(tmp_path), "has its weights in a GGUF file"), (str(file), "is a GGUF file")):
        with pytest.raises(ValueError, match=rf"{what}, .* run contralto convert {name} --output DIR, and use DIR"):
            hub.locate(name)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert hub.locate(str(tmp_path)) == str(tmp_path)  # the GGUF file lies beside the weights


def test_what_is_no_gguf_file(converted, tmp_path):
    _, file, _, _ = converted
    with pytest.raises(ValueError, match="there is no file or folder nothing"):
        find_gguf("nothing")
    with pytest.raises(ValueError, match="holds no GGUF file"):
        find_gguf(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files: name one of a\.gguf, b\.gguf"):
        find_gguf(tmp_path)
    with pytest.raises(ValueError, match="is no GGUF file: it may be a broken download, or a pointer of Git LFS"):
        find_gguf(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        convert(file, tmp_path)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, not 'int8'"):
        convert(file, tmp_path / "new", dtype="int8")


@pytest.mark.parametrize("damage", ["cut", "keys", "tensors", "name", "text"])
def test_a_damaged_file_is_named(damage, tmp_path):
    """A download that broke off, and sizes that would take 2^60 entries or bytes."""
    file = tmp_path / "tiny.gguf"
    gguf_files.write(file, gguf_files.tiny())
    content, huge = file.read_bytes(), (2**60).to_bytes(8, "little")
    places = {"tensors": 8, "keys": 16, "name": 24}
    if damage == "cut":
        content = content[: len(content) * 9 // 10]
    elif damage == "text":
        content = content.replace(b"general.architecture", b"general.architectur\xff", 1)
    else:
        content = content[: places[damage]] + huge + content[places[damage] + 8 :]
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"cannot convert .*tiny.gguf: it is damaged or cut short \(.*\): fetch it again"
    ):
        convert(file, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("values", "architecture", "message"),
    [
        ({"split__count": 3}, "llama", "it is one of several parts: join them"),
        ({}, "unheard", "transformers does not read GGUF files of the architecture unheard; it reads .*llama"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(values, architecture, message, tmp_path):
    gguf_files.write(tmp_path / "tiny.gguf", gguf_files.tiny(), architecture=architecture, **values)
    with pytest.raises(ValueError, match=f"cannot convert .*tiny.gguf: {message}"):
        convert(tmp_path / "tiny.gguf", tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_an_interrupted_conversion_leaves_nothing(converted, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("contralto.common.gguf._card", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(converted[1], tmp_path / "out")
    assert not list(tmp_path.iterdir())
