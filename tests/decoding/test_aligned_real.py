"""Contrast across the vocabularies of two real models: a byte-level one (SmolLM2) and one with byte fallback (Gemma 3).

The folders are those of the environment variables CONTRALTO_SMOLLM2 and CONTRALTO_GEMMA, or `.cache/real/smollm2` and `gemma`.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.decoding.branches.aligned import AlignedBranch
from contralto.decoding.byte_tokens import ByteTokens

CACHE = Path(__file__).parents[2] / ".cache" / "real"
FOLDERS = {name: Path(os.environ.get(f"CONTRALTO_{name.upper()}", CACHE / name)) for name in ("smollm2", "gemma")}
TEXT = "Über naïve  cafés:\n\n\tdef f(x):  # 東京 😀\r\n 12,345 <unk> <|im_end|> don't"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((folder / "config.json").is_file() for folder in FOLDERS.values()),
        reason="the real models are not there",
    ),
]


@pytest.fixture(scope="module")
def tokenizers():
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(folder).float().eval() for name, folder in FOLDERS.items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_spell_text_as_the_tokenizer_does(tokenizers, name):
    own = ByteTokens(tokenizers[name], name)
    for end in range(len(TEXT.encode()) + 1):
        part = TEXT.encode()[:end]
        assert b"".join(own.texts[token] for token in own.encode(part)) == part
    plain = TEXT.replace("<unk>", "").replace("<|im_end|>", "")
    assert own.begin + own.encode(plain.encode()) == tokenizers[name](plain)["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize(("expert", "amateur"), [("smollm2", "gemma"), ("gemma", "smollm2")])
def test_map_of_real_vocabularies(tokenizers, models, expert, amateur):
    names = {"tokenizer": tokenizers[expert], "amateur_tokenizer": tokenizers[amateur]}
    branch = AlignedBranch(models[amateur], **names)
    ids = tokenizers[expert](TEXT, return_tensors="pt")["input_ids"]
    assert tokenizers[amateur].decode(branch.encode(ids[0].tolist()), skip_special_tokens=True) == TEXT
    inputs = tokenizers[expert]("The capital of France is Paris, and that of Germany is", return_tensors="pt")
    logits = models[expert](**inputs).logits[:, -1].float()
    branch.limit_tokens(logits.shape[-1])
    mapped = branch.resolve(logits, branch(inputs["input_ids"]))
    assert float(mapped.double().exp().sum()) == pytest.approx(1, abs=1e-4)
    (berlin,) = tokenizers[expert](" Berlin", add_special_tokens=False)["input_ids"]
    (own,) = tokenizers[amateur](" Berlin", add_special_tokens=False)["input_ids"]
    alone = (
        models[amateur](torch.tensor([branch.encode(inputs["input_ids"][0].tolist())])).logits[0, -1].log_softmax(-1)
    )
    assert float(mapped[0, berlin]) == pytest.approx(float(alone[own]), abs=0.05)
    method = ContrastiveDecodingLogitsProcessor(models[amateur], vocabulary="aligned", **names)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    kept = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    text = models[expert].generate(**kept, logits_processor=[method], **options)
    assert torch.equal(text, models[expert].generate(**kept, custom_generate=method.loop(), **options))
