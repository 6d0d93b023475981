"""Names of kept runs and caches: literal values, so that runs which an earlier version kept are found again."""

import pytest
from PIL import Image

from contralto.cli.eval import own_name
from contralto.common.hashing import json_digest
from contralto.eval.comparison.samples import document_digest, value_digest
from contralto.eval.comparison.tasks import Conditions
from contralto.eval.models.decoder import Decoder, seed_of
from contralto.eval.models.lm import ContraltoLM

DECODERS = [
    ({}, "2b1ac365db6a"),
    ({"method": "cd", "amateur": "testbed:amateur", "beta": 1}, "5b81107ba294"),
    ({"method": "dola", "temperature": 0.7, "seed": 3}, "a74f34d0bcc2"),
    ({"method": "cad", "contrast_prompt": "{prompt}", "masked": True, "score": "raw"}, "49898f8d88c8"),
    ({"method": "vcd"}, "1672e6ccfddf"),
]


@pytest.mark.parametrize(("options", "expected"), DECODERS, ids=[digest for _, digest in DECODERS])
def test_decoders(options, expected):
    assert json_digest({"contralto": "1", **Decoder.of(**options).describe()}, 12) == expected


def test_conditions_and_documents():
    assert value_digest(Conditions().describe()) == "42fddca513d79a2a"
    conditions = Conditions(limit=5, chat=True, seeds=(1, 2), metadata={"n": 3})
    assert value_digest(conditions.describe()) == "9e47283c0a8e4fd3"
    assert document_digest({"a": 1, "image": Image.new("RGB", (4, 4), "red")}) == "c92bd2d5c8885d0e"


def test_models():
    lm = ContraltoLM("testbed:expert", device="cpu")
    assert {name: value for name, value in lm.configuration.items() if name != "contralto"} == {
        "pretrained": "testbed:expert",
        "weights": {"main": "e721d427c5c9"},
        "dtype": "torch.float32",
        "max_length": 512,
        "method": "none",
    }
    other = lm.decoding_by(method="cd", amateur="testbed:amateur")
    assert list(other.configuration["weights"]) == ["main", "amateur"]


def test_seeds_and_names():
    assert seed_of(0, "Why?", [], 0) == 120633162399903089
    assert seed_of(1, "é", "x") == 8704759398064216968
    assert own_name("pretrained=a,method=cd,amateur=b") == "cd-d4fa416d"
    assert own_name({"pretrained": "a"}) == "plain-dc6c0679"
