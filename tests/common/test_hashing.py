"""Hashes are stable: keys of answers, references, runs and outputs on disk depend on them.

The literal values were computed by the version before these functions were gathered in one module.
"""

import importlib
import json
import sys
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from contralto.cli.eval import own_name
from contralto.common import hashing
from contralto.data_gen.types import digest
from contralto.decoding.sampling import row_seed
from contralto.eval.models.decoder import seed_of


def _model():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            weight.copy_(torch.arange(weight.numel(), dtype=torch.float64).view(weight.shape) / 7 + i)
    model[0].weight.requires_grad_(False)
    return model


def _image():
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    return image


def _folder(path):
    (path / "config.json").write_text("{}", encoding="utf-8")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (path / "other.txt").write_text("x", encoding="utf-8")
    return str(path)


KEPT = {
    "all weights": (
        lambda _: hashing.model_digest(_model(), frozen_only=False),
        "3963a56560b1c8aa9521de1f3af48fa4601af755becc7da239236807350ab107",
    ),
    "frozen weights": (
        lambda _: hashing.model_digest(_model(), frozen_only=True, extra=["fp32", 7]),
        "2cf44fca01f5fba8022fc07f4ca348417924f9a27172097e2d0904202a655400",
    ),
    "fingerprint": (lambda _: hashing.fingerprint(_model()), "74a049b2d6b6"),
    "image of a request": (
        lambda _: hashing.pixels_digest(_image(), separator=" "),
        "66976ec25c3076643054aecc6fbac2fcd7d1f31310bb10925159d808bbbd8fe4",
    ),
    "image of a seed": (
        lambda _: hashing.pixels_digest(_image()),
        "67ca6a6612945019875ff814a4d9af69f8781f32d3e00569f6829ee225ca6b85",
    ),
    "files of weights": (
        lambda path: hashing.weights_digest(_folder(path)),
        "86490dcea4d96b3e53c224b110e571070c38190c37ddadeca07a7471c6aa7cc9",
    ),
    "file": (lambda path: hashing.file_digest(f"{_folder(path)}/config.json"), "44136fa355b3678a"),
    "request": (
        lambda _: digest({"b": ["é", 1.5], "a": None}),
        "39d5ca7e689557f5f11ed99f27927d64ca555486e82d4b586c5a61d9ac681ba3",
    ),
    "configuration": (lambda _: hashing.json_digest({"b": 1, "a": "é"}, 12), "d73913efb309"),
    "name of a decoder": (lambda _: own_name({"pretrained": "a", "method": "cd", "amateur": "b"}), "cd-d4fa416d"),
    "seed of a row": (lambda _: row_seed(3, 4), 4587675401001544671),
    "seed of a document": (lambda _: seed_of(1, "é", [2]), 3337574436813055749),
}


@pytest.mark.parametrize("name", KEPT)
def test_keys_on_disk_stay_valid(tmp_path, name):
    compute, kept = KEPT[name]
    assert compute(tmp_path) == kept


def test_training_changes_the_digest_of_frozen_weights_only_where_they_change():
    model = _model()
    before = [hashing.model_digest(model, frozen_only=frozen_only) for frozen_only in (False, True)]
    with torch.no_grad():
        model[0].bias += 1
    after = [hashing.model_digest(model, frozen_only=frozen_only) for frozen_only in (False, True)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]


def test_weights_in_shards_have_the_digest_of_whole_ones(monkeypatch):
    """ZeRO 3 keeps them elsewhere, and leaves an empty tensor: two models in shards must not look alike."""
    whole, sharded = _model(), _model()
    kept = {}
    for number, weight in enumerate(sharded.parameters()):
        kept[number], weight.ds_id, weight.data = weight.data, number, torch.empty(0)

    @contextmanager
    def gathered(weights):
        for weight in weights:
            weight.data = kept[weight.ds_id]
        yield
        for weight in weights:
            weight.data = torch.empty(0)

    zero = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered))
    monkeypatch.setitem(sys.modules, "deepspeed", zero)
    for frozen_only in (False, True):
        digests = {hashing.model_digest(model, frozen_only=frozen_only) for model in (whole, sharded)}
        assert len(digests) == 1
    assert all(not weight.numel() for weight in sharded.parameters())


def test_other_extra_values_are_another_digest():
    digests = {hashing.model_digest(_model(), frozen_only=False, extra=extra) for extra in ([], [1], ["1"])}
    assert len(digests) == 3


def test_a_hub_id_stands_for_itself():
    assert hashing.weights_digest("org/model") == "org/model"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Write three modules, of which each uses the next, and return a function that imports the first again."""
    folder = tmp_path / "beside"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def written(
        first="def score(x):\n    return helper(x)\n",
        second="def helper(x):\n    return digest_c.SIZE\n",
        third="SIZE = 1",
    ):
        codes = {
            "digest_a": f"from digest_b import helper\n{first}",
            "digest_b": f"import digest_c\n{second}",
            "digest_c": third,
        }
        for name, code in codes.items():
            (folder / f"{name}.py").write_text(code)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module("digest_a").score

    yield written
    for name in ("digest_a", "digest_b", "digest_c"):
        sys.modules.pop(name, None)


def test_a_changed_function_or_helper_is_another_source(modules):
    before = hashing.source_digest(modules())
    assert hashing.source_digest(modules(first="# a comment\ndef score( x ):\n    return helper(x)\n")) == before
    assert hashing.source_digest(modules(first="def score(x):\n    return -helper(x)\n")) != before
    assert hashing.source_digest(modules(second="def helper(x):\n    return 2 * x\n")) != before
    assert hashing.source_digest(modules(third="SIZE = 2")) != before
    whole = hashing.source_digest(partial(modules(), 1))
    assert (
        hashing.source_digest(partial(modules(first="# a comment\ndef score(x):\n    return helper(x)\n"), 1)) == whole
    )
    assert hashing.source_digest(partial(modules(third="SIZE = 2"), 1)) != whole


class _Backend:
    def __init__(self, **steps):
        self.steps = steps

    def to_str(self):
        return json.dumps(self.steps)


def _tokenizer(chat_template=None, **others):
    own = {"get_vocab": lambda: {"a": 0}, "special_tokens_map": {"eos_token": Path("x")}}
    return SimpleNamespace(**own, chat_template=chat_template, **others)


def test_a_tokenizer_is_its_tokens_steps_and_template():
    model = {"model": {"type": "BPE"}, "truncation": None}
    with_steps = [
        hashing.tokenizer_digest(_tokenizer(backend_tokenizer=_Backend(**model, padding=padding)))
        for padding in (None, {"length": 8})
    ]
    assert with_steps[0] == with_steps[1] == "38cf4a9813c1a0ae"
    assert hashing.tokenizer_digest(_tokenizer()) == "2bf18a9b979cf31d"
    assert hashing.tokenizer_digest(_tokenizer("{{ x }}")) != hashing.tokenizer_digest(_tokenizer())
    assert hashing.tokenizer_digest(_tokenizer(backend_tokenizer=_Backend(model=1))) != with_steps[0]


class _Scorer:
    def __call__(self, row):
        return 0


def test_code_without_a_source_is_its_name(monkeypatch, tmp_path):
    assert hashing.source_digest(len) == hashing.content_digest("builtins:len", 16)
    assert hashing.source_digest(_Scorer()) == hashing.source_digest(partial(_Scorer)) != hashing.source_digest(_Scorer)
    lost = ModuleType("lost_module")
    exec("def score(row):\n    return 0\n", vars(lost))  # noqa: S102
    for file in (None, str(tmp_path / "gone.py")):
        if file:
            lost.__file__ = file
        monkeypatch.setitem(sys.modules, "lost_module", lost)
        assert hashing.source_digest(lost.score) == hashing.content_digest("lost_module:score", 16)
    monkeypatch.delitem(sys.modules, "lost_module")
    assert hashing.source_digest(lost.score) == hashing.content_digest("lost_module:score", 16)


def test_odd_values_in_a_module_are_no_modules_that_it_uses(modules):
    function = modules()
    before = hashing.source_digest(function)
    vars(sys.modules[function.__module__])["odd"] = SimpleNamespace(__module__=["not", "a", "name"])
    assert hashing.source_digest(function) == before


def test_a_fingerprint_reads_64_elements_of_each_tensor_by_its_name():
    layer = nn.Linear(65, 2, bias=False)
    sample = layer.weight.detach().reshape(-1)[::2][:64].double().numpy().tobytes()
    assert hashing.fingerprint(layer) == sha256(b"weight (2, 65)" + sample).hexdigest()[:12]
    other = nn.Linear(65, 2, bias=False)
    other.load_state_dict(layer.state_dict())
    tied, copied = nn.Sequential(layer, layer), nn.Sequential(layer, other)
    assert hashing.fingerprint(tied) == hashing.fingerprint(copied) != hashing.fingerprint(nn.Sequential(layer))
    twice, apart = nn.Module(), nn.Module()
    twice.a = twice.b = layer.weight
    apart.a, apart.b = layer.weight, other.weight
    assert hashing.fingerprint(twice) == hashing.fingerprint(apart)


def test_a_fingerprint_of_what_has_no_values():
    names = sha256(b"weight (3, 2)bias (3,)").hexdigest()[:12]
    assert hashing.fingerprint(nn.Linear(2, 3, device="meta")) == names
    empty = nn.Module()
    empty.nothing = nn.Parameter(torch.empty(0, 4))
    assert hashing.fingerprint(empty) == sha256(b"nothing (0, 4)").hexdigest()[:12]
