"""Measures of open-ended text against slow references; MAUVE only up to the call of its package."""

import math
import random
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import zoo
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from contralto import testbed
from contralto.eval.metrics import model_based, openended


def _texts(seed, count=30):
    rng = random.Random(seed)
    return [" ".join(rng.choice("abc") for _ in range(rng.randint(0, 25))) for _ in range(count)]


def _slow_repetition(texts, n):
    unique = total = 0
    for text in texts:
        words, seen, start = text.split(), [], 0
        while start + n <= len(words):
            gram = words[start : start + n]
            total += 1
            if gram not in seen:
                seen.append(gram)
                unique += 1
            start += 1
    return 1 - unique / total if total else 0


@pytest.mark.parametrize("seed", range(5))
def test_repetition_and_diversity(seed):
    texts = _texts(seed)
    counts = [[openended.ngram_counts(text, n=n) for n in (2, 3, 4)] for text in texts]
    expected = [_slow_repetition(texts, n) for n in (2, 3, 4)]
    for column, value in zip(zip(*counts, strict=True), expected, strict=True):
        assert openended.repetition(column) == pytest.approx(value, abs=1e-12)
    assert openended.diversity(counts) == pytest.approx(math.prod(1 - value for value in expected), abs=1e-12)


def test_the_last_ngram_counts():
    """SimCTG's loop stops before it, and would see no repetition here."""
    assert openended.repetition([openended.ngram_counts("x y x y", n=2)]) == pytest.approx(1 / 3)
    assert openended.ngram_counts("x y", n=2) == (1, 1)
    assert openended.ngram_counts("x", n=2) == (0, 0)
    assert openended.repetition([(0, 0)]) == 0


PROMPTS = ["Ben went", "Mia walked over to the school yard. She", "Tom"]
TOLD = [" out to the barn door.", " took the old lamp. It was cold there.", " ran."]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_coherence_is_the_mean_log_probability(batch_size):
    judge, tokenizer = testbed.load("expert"), testbed.tokenizer()
    double = testbed.load("expert").double()
    expected = []
    for prompt, told in zip(PROMPTS, TOLD, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        after = tokenizer(told, add_special_tokens=False)["input_ids"]
        total = 0.0
        for token in after:
            with torch.no_grad():
                logits = double(torch.tensor([ids])).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
            ids = [*ids, token]
        expected.append(total / len(after))
    shapes = []
    judge.lm_head.register_forward_hook(lambda _module, _args, logits: shapes.append(logits.shape))
    found = model_based.coherence(judge, tokenizer, PROMPTS, TOLD, batch_size=batch_size)
    assert found == pytest.approx(expected, abs=2e-5)
    if batch_size == 1:  # no logits for the prompt, but those of its last position
        assert [length for _, length, _ in shapes] == [
            len(tokenizer(told, add_special_tokens=False)["input_ids"]) + 1 for told in TOLD
        ]


def test_coherence_of_absolute_positions():
    """Padding must not move them."""
    judge, tokenizer = zoo.build("gpt2", seed=1), testbed.tokenizer()

    def small(text, **how):
        return {"input_ids": [i % zoo.VOCAB for i in tokenizer(text, **how)["input_ids"]]}

    together = model_based.coherence(judge, small, PROMPTS, TOLD, batch_size=3)
    alone = model_based.coherence(judge, small, PROMPTS, TOLD, batch_size=1)
    assert together == pytest.approx(alone, abs=1e-5)


def test_coherence_refusals():
    judge, tokenizer = testbed.load("amateur"), testbed.tokenizer()
    for prompts, told, message in (
        (["Ben"], [], "1 prompts but 0 continuations"),
        (["Ben"], [""], "text 0 has no continuation"),
        (["Ben", "Ben"], [" ran.", " ran" * 2000], "text 1 has 2002 tokens, more than the"),
    ):
        with pytest.raises(ValueError, match=message):
            model_based.coherence(judge, tokenizer, prompts, told)


def test_mauve_asks_for_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ImportError, match="pip install mauve-text"):
        model_based.mauve(["a"], ["b"])
    with pytest.raises(ValueError, match="there are 0 and 1"):
        model_based.mauve([], ["b"])


def test_mauve_passes_on_what_it_is_asked(monkeypatch):
    asked = {}

    def compute_mauve(**how):
        asked.update(how)
        return SimpleNamespace(mauve=0.25)

    package = ModuleType("mauve")
    package.compute_mauve = compute_mauve
    monkeypatch.setitem(sys.modules, "mauve", package)
    assert model_based.mauve(["a"], ["b"], model="gpt2", max_length=128, num_buckets=5) == 0.25
    assert asked == {
        "p_text": ["a"],
        "q_text": ["b"],
        "featurize_model_name": "gpt2",
        "max_text_length": 128,
        "seed": 25,
        "verbose": False,
        "device_id": 0 if torch.cuda.is_available() else -1,
        "num_buckets": 5,
    }


@pytest.mark.slow
def test_mauve_of_the_package(tmp_path, monkeypatch):
    """Where mauve-text is installed: like texts are closer than unlike ones."""
    pytest.importorskip("mauve")
    monkeypatch.setenv("DISABLE_TQDM", "1")
    folder = tmp_path / "gpt2-tiny"
    zoo.build("gpt2", seed=1).save_pretrained(folder)
    backend = Tokenizer(
        WordLevel({"<eos>": zoo.EOS, **{word: zoo.BOS + 1 + i for i, word in enumerate("abcdef")}}, "<eos>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    rng = random.Random(0)
    told, like, unlike = (
        [" ".join(rng.choice(words) for _ in range(12)) for _ in range(120)] for words in ("abc", "abc", "def")
    )
    found = [model_based.mauve(told, other, model=str(folder), num_buckets=12) for other in (like, unlike)]
    assert 0 < found[1] < found[0] <= 1
    assert model_based.mauve(told, like, model=str(folder), num_buckets=12) == found[0]
