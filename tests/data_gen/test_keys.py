"""Keys of answers, written down: a store of an earlier version must still hold the answers that a resumed run asks for."""

import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from contralto.data_gen.engines import TransformersEngine
from contralto.data_gen.engines.openai import OpenAIEngine
from contralto.data_gen.engines.vllm import VLLMEngine
from contralto.data_gen.rows import RowSource, read_rows
from contralto.data_gen.types import Ask, Sampling, make_request


def test_the_key_of_a_conversation():
    ask = Ask(role="target", messages=[{"role": "user", "content": "2 + 2?"}], template="clair@0")
    request = make_request(ask, engine={"engine": "function", "model": "m:f"}, sampling=Sampling(), seed=7, row="r1")
    assert request.key == "fde4632fa900dc40a8857fd9678559a5096e4e7d664c1bab0e80304165c88e95"
    assert request.seed == 696996451916237881


def test_the_key_of_a_raw_prompt_with_an_image_and_a_sampling_of_its_own():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 0, 9))
    sampling = Sampling(max_new_tokens=5, temperature=0, stop=("\n",))
    ask = Ask(role="target", prompt="2 + 2 =", images=(image,), seed=3, sampling=sampling)
    request = make_request(ask, engine={"engine": "openai", "model": "m"}, sampling=Sampling(), seed=0, row="é")
    assert request.key == "ff8ae16329738fb9da0ea1948c1f0b44de8f727e0e129f480d2160ede3816054"
    assert request.seed == 3451333724839969407


def test_the_id_of_a_row_without_one(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 + 2?", "n": 3, "tags": ["a", 1.5, null]}\n')
    assert read_rows(RowSource(source="rows.jsonl"), folder=tmp_path)[0]["id"] == "893ab1991c422b3f"
    image = Image.new("RGB", (2, 1))
    drawn = SimpleNamespace(rows=lambda: [{"prompt": "x", "images": [image]}])
    monkeypatch.setitem(sys.modules, "drawn", drawn)
    assert read_rows(RowSource(source="drawn:rows"), folder=tmp_path)[0]["id"] == "579a02ae92080bab"


PLAIN = {"adapter": None, "dtype": "auto", "engine": "transformers", "model": "org/model", "raw": False}
ALONE = {"weights": ["org/model"]}
IDENTITIES = [
    (TransformersEngine, {}, {**PLAIN, **ALONE, "method": "none", "options": {}}),
    (
        TransformersEngine,
        {
            "method": "cd",
            "amateur": "org/amateur",
            "alpha": 0.2,
            "batch_size": 4,
            "dtype": "float32",
            "adapter": "org/adapter",
            "raw": True,
        },
        {
            **PLAIN,
            "dtype": "float32",
            "adapter": "org/adapter",
            "raw": True,
            "method": "cd",
            "weights": ["org/model", "org/amateur", "org/adapter"],
            "options": {
                "alpha": 0.2,
                "amateur": "org/amateur",
                "amateur_window": None,
                "beta": 0.5,
                "form": "obrien",
            },
        },
    ),
    (
        TransformersEngine,
        {"method": "cad", "contrast_prompt": "No. {prompt}"},
        {**PLAIN, **ALONE, "method": "cad", "options": {"alpha": 0.5, "contrast_prompt": "No. {prompt}"}},
    ),
    (
        TransformersEngine,
        {"method": "cd", "amateur": "o/a", "adapters_off": False},
        {
            **PLAIN,
            "method": "cd",
            "weights": ["org/model", "o/a"],
            "options": {
                "adapters_off": False,
                "alpha": 0.1,
                "amateur": "o/a",
                "amateur_window": None,
                "beta": 0.5,
                "form": "obrien",
            },
        },
    ),
    (
        TransformersEngine,
        {"method": "search", "k": 3},
        {**PLAIN, **ALONE, "method": "search", "options": {"alpha": 0.6, "k": 3}},
    ),
    (
        TransformersEngine,
        {"method": "dola"},
        {
            **PLAIN,
            **ALONE,
            "method": "dola",
            "options": {"final_norm": True, "form": "kl", "layers": "high", "relative_top": 0.1},
        },
    ),
    (
        TransformersEngine,
        {"method": "vcd"},
        {**PLAIN, **ALONE, "method": "vcd", "options": {"alpha": 1.0, "beta": 0.1, "noise_step": 500}},
    ),
    (
        TransformersEngine,
        {"method": "proxy", "expert": "o/e", "antiexpert": "o/a"},
        {
            **PLAIN,
            "method": "proxy",
            "weights": ["org/model", "o/e", "o/a"],
            "options": {"alpha": 1.0, "antiexpert": "o/a", "expert": "o/e"},
        },
    ),
    (
        VLLMEngine,
        {},
        {"adapter": None, "engine": "vllm", "model": "org/model", "options": {}, "weights": ["org/model"]},
    ),
    (
        VLLMEngine,
        {"method": "cad", "contrast_prompt": "No. {prompt}"},
        {
            "adapter": None,
            "engine": "vllm",
            "model": "org/model",
            "options": {},
            "weights": ["org/model"],
            "decoding": {"alpha": 0.5, "contrast_prompt": "No. {prompt}", "method": "cad"},
        },
    ),
    (
        OpenAIEngine,
        {"base_url": "http://x:1/v1/", "key_env": None, "extra_body": {"a": 1}},
        {"engine": "openai", "extra_body": {"a": 1}, "model": "org/model", "served_by": "http://x:1/v1"},
    ),
]


@pytest.mark.parametrize(("kind", "options", "identity"), IDENTITIES)
def test_the_identity_of_an_engine(kind, options, identity):
    """The identity is a part of every key, with every option that determines an answer and nothing else."""
    assert kind(model="org/model", **options).identity == identity


def test_the_identity_of_a_contrast_with_an_adapter_in_vllm(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type":"LORA","r":4}\n')
    engine = VLLMEngine(model="org/model", method="cd", adapters_off=True, adapter=str(tmp_path))
    expected = {"adapters_off": True, "alpha": 0.1, "amateur_window": None, "beta": 0.5, "form": "obrien"}
    assert engine.identity["decoding"] == {"method": "cd", **expected}
    digest = "15093867d08fcbd4a56d4a896f761f433f3e99af62ef605e08348775ac6464cf"
    assert engine.identity["weights"] == ["org/model", digest]
