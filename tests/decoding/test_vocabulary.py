"""Models with different tokenizers are rejected: by their tokenizers if both can be found, else by vocabulary size."""

import json

import pytest
import tokenizers
import torch
import zoo
from huggingface_hub import constants
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from contralto import decoding, testbed
from contralto.decoding import vocabulary
from contralto.decoding.branches import ModelBranch
from contralto.decoding.executors.score import score
from contralto.decoding.inputs import DecodingBatch
from contralto.decoding.methods import DecodingConfig, logits_processor
from contralto.decoding.tokenizer_files import read_vocabulary
from contralto.decoding.trace import trace
from contralto.decoding.vocabulary import check_same_tokenizer, check_sizes, find_tokenizer, share_tokenizer


def _saved(folder, *, size=None, add=(), pad=None, rename=None, seed=1):
    """A tiny model with the testbed's tokenizer beside it, changed, loaded from its folder."""
    tokenizer = testbed.tokenizer()
    tokenizer.add_tokens(list(add))
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    zoo.build("llama", seed=seed, vocab_size=size or len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if rename:
        file = folder / "tokenizer.json"
        file.write_text(file.read_text().replace(*rename))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (151936, 152064),  # Qwen2.5
        (50304, 50688),  # Pythia
        (50257, 50304),  # GPT-2, padded
        (50257, 51200),  # Phi-2
        (262144, 262208),  # Gemma 3
        (32001, 32000),  # Llama 2 with a pad token
        (128256, 128256),  # Llama 3
        (250100, 250112),  # mT5
    ],
)
def test_padding(one, other):
    check_sizes(one, other)
    check_sizes(other, one)


@pytest.mark.parametrize(
    ("one", "other"), [(1200, 900), (1088, 900), (32000, 32768 + 7), (32016, 32000), (1000, 1003), (50257, 50280)]
)
def test_more_than_padding(one, other):
    """Some as near as padding would be, but not to a multiple of a block."""
    for sizes in ((one, other), (other, one)):
        with pytest.raises(
            ValueError, match="a larger difference than padding explains: all branches must share one tokenizer"
        ):
            check_sizes(*sizes)
    check_sizes(one, other, share_tokenizer=True)


def test_no_tokenizer_explains_any_difference():
    with pytest.raises(ValueError, match=r"must share one tokenizer$"):
        check_sizes(50257, 52000, share_tokenizer=True)


def test_models_of_sizes_that_are_no_padding_are_refused_everywhere():
    big, small = zoo.build("llama", vocab_size=1200), zoo.build("llama", hidden=16, vocab_size=900)
    inputs, text = zoo.pad(zoo.prompts(2)), torch.tensor([[5, 6], [7, 8]])
    method = decoding.ContrastiveDecodingLogitsProcessor(small)
    runs = [
        lambda: big.generate(**inputs, logits_processor=[method], max_new_tokens=2),
        lambda: big.generate(**inputs, custom_generate=method.loop(), max_new_tokens=2),
        lambda: big.generate(
            **inputs, custom_generate=decoding.SpeculativeContrastiveDecoding(small), max_new_tokens=2
        ),
        lambda: score(method, big, inputs, text),
        lambda: trace(method, big, zoo.pad(zoo.prompts(1)), text[0]),
        lambda: logits_processor(DecodingConfig(models={"amateur": "x"}), DecodingBatch(big, (small,), inputs, ())),
        lambda: big.generate(**inputs, logits_processor=[_critic(900)], max_new_tokens=2),
        lambda: big.generate(
            **inputs, logits_processor=[decoding.ProxyTuningLogitsProcessor(big, small)], max_new_tokens=2
        ),
    ]
    for run in runs:
        with pytest.raises(ValueError, match="have 1200 and 900 tokens, a larger difference than padding explains"):
            run()


def _critic(size):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=size
    )
    config.num_labels = 1
    return decoding.CriticGuidedLogitsProcessor(AutoModelForTokenClassification.from_config(config).eval())


def test_tokenizers_are_found_beside_the_weights_and_compared(tmp_path):
    """Sizes are equal, so nothing but the tokenizers tells."""
    one = _saved(tmp_path / "one")
    other = _saved(tmp_path / "other", rename=('"▁barn"', '"▁born"'), seed=2)
    message = r"one and .*other have different tokenizers \(2 tokens differ, such as '▁barn'\)"
    inputs, text = zoo.pad(zoo.prompts(1)), torch.tensor([[5, 6]])
    method = decoding.ContrastiveDecodingLogitsProcessor(other)
    for run in (
        lambda: one.generate(**inputs, custom_generate=method.loop(), max_new_tokens=2),
        lambda: one.generate(
            **inputs, custom_generate=decoding.SpeculativeContrastiveDecoding(other), max_new_tokens=2
        ),
        lambda: score(method, one, inputs, text),
        lambda: trace(method, one, inputs, text[0]),
        lambda: decoding.ProxyTuningLogitsProcessor(one, other),
        lambda: decoding.ContrastiveLogitsProcessor(torch.add, [ModelBranch(other)]).check_model(one),
        lambda: logits_processor(DecodingConfig(models={"amateur": "x"}), DecodingBatch(one, (other,), inputs, ())),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_a_given_tokenizer_is_compared_with_those_that_are_found(tmp_path):
    named, nameless = _saved(tmp_path), zoo.build("llama", hidden=16, vocab_size=testbed.tokenizer().vocab_size)
    with pytest.raises(ValueError, match=r"the given tokenizer and .* have different tokenizers"):
        decoding.ContrastiveDecodingLogitsProcessor(named, tokenizer=_with("<other>"))
    method = decoding.ContrastiveDecodingLogitsProcessor(nameless, tokenizer=_with("<other>"))
    with pytest.raises(ValueError, match=r"the given tokenizer and .* have different tokenizers"):
        named.generate(**zoo.pad(zoo.prompts(1)), custom_generate=method.loop(), max_new_tokens=2)


def _with(token):
    tokenizer = testbed.tokenizer()
    tokenizer.add_tokens([token])
    return tokenizer


def test_a_given_tokenizer_explains_a_difference_in_size():
    big, small = zoo.build("llama", vocab_size=1200), zoo.build("llama", hidden=16, vocab_size=900)
    inputs = zoo.pad(zoo.prompts(2))
    how = {"tokenizer": testbed.tokenizer(), "attention_mask": inputs["attention_mask"]}
    method = decoding.ContrastiveDecodingLogitsProcessor(small, **how)
    slow = big.generate(**inputs, logits_processor=[method], max_new_tokens=4, do_sample=False)
    assert torch.equal(slow, big.generate(**inputs, custom_generate=method.loop(), max_new_tokens=4, do_sample=False))


def test_shared_tokenizers_explain_a_difference_in_size(tmp_path):
    one, other = _saved(tmp_path / "one", size=700), _saved(tmp_path / "other", size=900)
    method = decoding.ContrastiveDecodingLogitsProcessor(other)
    one.generate(**zoo.pad(zoo.prompts(1)), custom_generate=method.loop(), max_new_tokens=2)


def test_an_added_pad_token_is_no_other_tokenizer(tmp_path):
    one, other = _saved(tmp_path / "one", pad="[PAD]"), _saved(tmp_path / "other")
    assert share_tokenizer(one, other)
    assert share_tokenizer(other, one)
    added = _saved(tmp_path / "added", add=["<think>"])
    with pytest.raises(ValueError, match="1 tokens differ, such as '<think>'"):
        share_tokenizer(added, other)


def test_models_without_a_name_or_a_tokenizer_are_not_compared(tmp_path):
    nameless, other = zoo.build("llama"), zoo.build("llama", seed=2)
    assert not share_tokenizer(nameless, other)
    nameless.save_pretrained(tmp_path)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert find_tokenizer(str(tmp_path)) is None
    assert not share_tokenizer(bare, testbed.load("expert"))
    method = decoding.ContrastiveDecodingLogitsProcessor(other)
    nameless.generate(**zoo.pad(zoo.prompts(2)), custom_generate=method.loop(), max_new_tokens=2)


def test_nothing_is_asked_of_the_hub(monkeypatch):
    """A name that is no folder is looked up in the local cache alone."""

    def connect(*args, **how):
        raise AssertionError("a request")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    one, other = zoo.build("llama"), zoo.build("llama", seed=2)
    one.name_or_path, other.name_or_path = "someone/a-model", "someone/another-model"
    assert not share_tokenizer(one, other)


def test_a_pair_is_compared_once(monkeypatch, tmp_path):
    one, other = _saved(tmp_path / "one"), _saved(tmp_path / "other", pad="[PAD]")
    found = []
    find = vocabulary.find_tokenizer
    monkeypatch.setattr(vocabulary, "find_tokenizer", lambda name: found.append(name) or find(name))
    for _ in range(3):
        assert share_tokenizer(one, other)
    assert len(found) == 2


def test_the_same_file_is_not_read_as_a_tokenizer(monkeypatch):
    monkeypatch.setattr(vocabulary, "find_tokenizer", lambda name: pytest.fail("read"))
    assert share_tokenizer(testbed.load("expert"), testbed.load("amateur"))


@pytest.mark.parametrize("add", [False, True])
def test_other_tokenizers_are_told_by_their_files(monkeypatch, tmp_path, add):
    """A token with two ids is proof; so are equal vocabularies in files that differ elsewhere."""
    monkeypatch.setattr(vocabulary, "find_tokenizer", lambda name: pytest.fail("read"))
    one, equal = _saved(tmp_path / "one"), _saved(tmp_path / "equal", rename=('"version": ', '"version":  '))
    other = _saved(tmp_path / "other", rename=('"▁barn"', '"▁born"'), add=["<think>"] * add)
    assert (tmp_path / "one" / "tokenizer.json").read_text() != (tmp_path / "equal" / "tokenizer.json").read_text()
    assert share_tokenizer(one, equal)
    with pytest.raises(ValueError, match=rf"different tokenizers \({2 + add} tokens differ, such as"):
        share_tokenizer(one, other)


def test_a_token_that_only_the_settings_name_is_found_by_loading(tmp_path):
    """`tokenizer.json` is the same but for a space; the tokenizer adds the token when it is loaded."""
    one, other = _saved(tmp_path / "one"), _saved(tmp_path / "other", rename=('"version": ', '"version":  '))
    file = tmp_path / "other" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"extra_special_tokens": ["<think>"]}))
    with pytest.raises(ValueError, match="1 tokens differ, such as '<think>'"):
        share_tokenizer(one, other)


def test_sizes_that_are_no_padding_are_told_before_any_file_is_read(monkeypatch):
    monkeypatch.setattr(vocabulary, "same_tokenizer", lambda *names: pytest.fail("read"))
    one, other = zoo.build("llama", vocab_size=4000), zoo.build("llama", vocab_size=900)
    one.name_or_path = other.name_or_path = str(testbed.path("expert"))
    with pytest.raises(ValueError, match="have 4000 and 900 tokens, a larger difference than padding explains"):
        share_tokenizer(one, other)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("BPE", {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [("a", "b")]}),
        ("WordPiece", {"vocab": {"[UNK]": 0, "a": 1, "##b": 2}}),
        ("WordLevel", {"vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"}),
        ("Unigram", {"vocab": [("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], "unk_id": 0}),
    ],
)
def test_declared_vocabularies_are_those_of_the_loaded_tokenizers(tmp_path, kind, options):
    backend = Tokenizer(getattr(tokenizers.models, kind)(**options))
    backend.add_special_tokens(["<s>", "a"])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path)
    declared = read_vocabulary(str(tmp_path))
    assert declared.is_complete
    assert declared.ids == PreTrainedTokenizerFast.from_pretrained(tmp_path).get_vocab()
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>", "lstrip": false}}')
    assert not read_vocabulary(str(tmp_path)).is_complete


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": ["a"]}}', "\0"])
def test_a_vocabulary_of_another_form_is_left_to_loading(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    assert read_vocabulary(str(tmp_path)) is None


def test_differences_are_named():
    check_same_tokenizer("one", testbed.tokenizer(), "other", testbed.tokenizer())
    with pytest.raises(ValueError, match=r"one and other have different tokenizers \(1 tokens differ, such as '<x>'\)"):
        check_same_tokenizer("one", testbed.tokenizer(), "other", _with("<x>"))
