"""The loop supports the features of `generate()`: sampling, streaming, stopping, caches, outputs; or raises an error."""

import pytest
import torch
import zoo
from transformers import CompileConfig, StaticCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from contralto import decoding
from contralto.decoding.branches import CachedReader

STEPS = 8


@pytest.fixture
def model():
    return zoo.build("llama", seed=1)


def _inputs(batch=3):
    return zoo.pad(zoo.prompts(batch, seed=3)), zoo.pad(zoo.prompts(batch + 1, seed=4)[:0:-1])


def _method(model, contrast, **how):
    return decoding.VisualContrastiveDecodingLogitsProcessor(model, contrast, beta=0.02, **how)


def _run(model, inputs, method, *, fast, **how):
    executor = {"custom_generate": method.loop()} if fast else {"logits_processor": [method]}
    return model.generate(**inputs, **executor, max_new_tokens=STEPS, **how)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 5},
        {"do_sample": True, "top_p": 0.8, "num_return_sequences": 3},
        {"do_sample": False, "suppress_tokens": [5, 6, 7]},
    ],
)
def test_a_seed_gives_the_texts_of_the_processor(model, how):
    inputs, contrast = _inputs()
    found = []
    for fast in (True, False):
        torch.manual_seed(5)
        found.append(_run(model, inputs, _method(model, contrast), fast=fast, **how))
    assert torch.equal(*found)


def test_one_forward_per_token(model, monkeypatch):
    rows = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: rows.append(len(k["input_ids"])) or forward(*a, **k))
    inputs, contrast = _inputs(2)
    _run(model, inputs, _method(model, contrast), fast=True, do_sample=False, min_new_tokens=STEPS)
    assert rows == [4] * STEPS
    rows.clear()
    both = decoding.RitualVCDLogitsProcessor(model, contrast, contrast)
    _run(model, inputs, both, fast=True, do_sample=False, min_new_tokens=STEPS)
    assert rows == [6] * STEPS
    layers = decoding.DoLaLogitsProcessor(model, layers=[0, 1])
    rows.clear()
    _run(model, inputs, layers, fast=True, do_sample=False, min_new_tokens=STEPS)
    assert rows == [2] * STEPS


def test_other_models_follow_in_turn(model):
    amateur = zoo.build("gpt2", hidden=16, seed=2)
    inputs, _ = _inputs()
    found = [
        _run(model, inputs, decoding.ContrastiveDecodingLogitsProcessor(amateur), fast=fast, do_sample=False)
        for fast in (True, False)
    ]
    assert torch.equal(*found)


def test_static_cache(model, monkeypatch):
    inputs, contrast = _inputs()
    contrast = zoo.pad([torch.cat([row, row, row]) for row in zoo.prompts(3, seed=9)])  # longer than the main prompts
    expected = _run(model, inputs, _method(model, contrast), fast=True, do_sample=False)
    caches = []
    read = CachedReader.read
    monkeypatch.setattr(CachedReader, "read", lambda self, ids: caches.append(self.cache) or read(self, ids))
    found = _run(model, inputs, _method(model, contrast), fast=True, do_sample=False, cache_implementation="static")
    assert torch.equal(found, expected)
    assert isinstance(caches[0], StaticCache)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3"])
def test_static_cache_of_another_model(model, family, monkeypatch):
    """The amateur's cache is static too, for this call alone: a longer text of the same processor has one of its own."""
    amateur, (inputs, _) = zoo.build(family, seed=2), _inputs()
    contrast = decoding.ContrastiveDecodingLogitsProcessor(amateur)
    expected = _run(model, inputs, decoding.ContrastiveDecodingLogitsProcessor(amateur), fast=True, do_sample=False)
    caches = {}
    read = CachedReader._run

    def note(self, *args, **kwargs):
        caches.setdefault(self.model, set()).add(type(self.cache))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(CachedReader, "_run", note)
    found = _run(model, inputs, contrast, fast=True, do_sample=False, cache_implementation="static")
    assert torch.equal(found, expected)
    assert caches == {model: {StaticCache}, amateur: {StaticCache}}
    how = {"do_sample": False, "max_new_tokens": 4 * STEPS}
    slow = model.generate(**inputs, logits_processor=[contrast], **how)
    other = decoding.ContrastiveDecodingLogitsProcessor(amateur)
    assert torch.equal(slow, model.generate(**inputs, custom_generate=other.loop(), **how))


def test_a_static_cache_grows_where_a_model_runs_in_a_context(model, monkeypatch):
    """Under dropout a model is neither compiled nor given a static cache; its first layers alone are read by the main model."""
    inputs, _ = _inputs()
    thinned, caches, read = zoo.build("llama", seed=3), [], CachedReader._run

    def note(self, *args, **kwargs):
        caches.extend([self.cache] if self.model is thinned else [])
        return read(self, *args, **kwargs)

    monkeypatch.setattr(CachedReader, "_run", note)
    for amateur in (decoding.EarlyExit(model, layers=1), decoding.Dropout(thinned, rate=0.3)):
        expected, found = (
            _run(model, inputs, decoding.ContrastiveDecodingLogitsProcessor(amateur), fast=True, do_sample=False, **how)
            for how in ({}, {"cache_implementation": "static"})
        )
        assert torch.equal(found, expected)
    assert any(cache is not None for cache in caches)
    assert not any(isinstance(cache, StaticCache) for cache in caches)


@pytest.mark.slow
def test_both_models_are_compiled_where_generate_would(model):
    """`eager` compiles to the same operations, so that tokens are equal and graphs cheap; each model has its own."""
    amateur, (inputs, _) = zoo.build("llama", hidden=16, seed=2), _inputs()
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    contrast = decoding.ContrastiveDecodingLogitsProcessor(amateur)
    expected = _run(model, inputs, contrast, fast=True, do_sample=False)
    torch._dynamo.utils.counters.clear()
    found = _run(
        model, inputs, contrast, fast=True, do_sample=False, cache_implementation="static", compile_config=config
    )
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert {each._compiled_call is not None for each in (model, amateur)} == {True}


@pytest.mark.gpu
def test_compiled_static_cache_on_a_gpu():
    model = zoo.build("llama", seed=1).cuda()
    inputs, contrast = ({n: v.cuda() for n, v in part.items()} for part in _inputs())
    found = [
        _run(model, inputs, _method(model, contrast), fast=True, do_sample=False, cache_implementation=kind)
        for kind in (None, "static")
    ]
    assert torch.equal(*found)


def test_scores_and_logits(model):
    inputs, contrast = _inputs(1)
    how = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    fast = _run(model, inputs, _method(model, contrast), fast=True, **how)
    slow = _run(model, inputs, _method(model, contrast), fast=False, **how)
    assert torch.equal(fast.sequences, slow.sequences)
    for name in ("scores", "logits"):
        assert len(fast[name]) == len(slow[name])
        for one, other in zip(fast[name], slow[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


class Recorder(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.ended = True


def test_streaming(model):
    inputs, contrast = _inputs(1)
    recorder = Recorder()
    output = model.generate(
        **inputs,
        custom_generate=_method(model, contrast).loop(streamer=recorder),
        max_new_tokens=STEPS,
        do_sample=False,
    )
    prompt, *tokens = recorder.seen
    assert prompt == inputs["input_ids"].tolist()
    assert [token for (token,) in tokens] == output[0, inputs["input_ids"].shape[1] :].tolist()
    assert recorder.ended


def test_stopping_and_padding(model):
    """A row that has ended is padded while the others go on, and the caller's criteria stop all of them."""
    inputs, contrast = _inputs()
    plain = _run(model, inputs, _method(model, contrast), fast=True, do_sample=False)
    width = inputs["input_ids"].shape[1]
    eos = plain[0, width + 2].item()
    for fast in (True, False):
        output = _run(model, inputs, _method(model, contrast), fast=fast, do_sample=False, eos_token_id=eos)
        assert (output[0, width + 3 :] == zoo.PAD).all()

    class AtTwelve(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= width + 4)

    output = _run(model, inputs, _method(model, contrast), fast=True, do_sample=False, stopping_criteria=[AtTwelve()])
    assert output.shape[1] == width + 4


def test_logits_are_the_models_though_a_processor_writes_into_them(model):
    inputs, contrast = _inputs(1)

    def overwrite(ids, scores):
        scores[:, 5] = -torch.inf
        return scores

    how = {"return_dict_in_generate": True, "output_logits": True, "logits_processor": [overwrite]}
    found = _run(model, inputs, _method(model, contrast), fast=True, do_sample=False, **how)
    torch.testing.assert_close(found.logits[0], model(**inputs).logits[:, -1])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 2}, "does not support beam search"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "not attentions or hidden states"),
        ({"cache_implementation": "offloaded"}, "static and dynamic caches, not cache_implementation='offloaded'"),
    ],
)
def test_refusals(model, how, message):
    inputs, contrast = _inputs()
    with pytest.raises(ValueError, match=message):
        _run(model, inputs, _method(model, contrast), fast=True, do_sample=False, **how)


def test_no_earlier_cache(model):
    inputs, contrast = _inputs(1)
    cache = model(input_ids=inputs["input_ids"][:, :2], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot continue from a cache"):
        _run(model, inputs, _method(model, contrast), fast=True, do_sample=False, past_key_values=cache)


def test_no_static_cache_for_encoder_decoders():
    model = zoo.build("t5", seed=1)
    inputs, contrast = (zoo.pad(zoo.prompts(2, seed=s), side="right") for s in (1, 2))
    with pytest.raises(ValueError, match="does not support a static cache for encoder-decoders"):
        _run(model, inputs, _method(model, contrast), fast=True, do_sample=False, cache_implementation="static")


def test_adapters():
    """A PEFT model's other prompts run with its adapters on and share its forward; `AdaptersOff` has one of its own."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = peft.get_peft_model(zoo.build("llama", seed=1), config).eval()
    inputs, contrast = _inputs()
    for method in (
        decoding.ContextAwareDecodingLogitsProcessor(tuned, contrast),
        decoding.ContrastiveDecodingLogitsProcessor(decoding.AdaptersOff(tuned), beta=2, alpha=0.01),
    ):
        fast, slow = (_run(tuned, inputs, method, fast=fast, do_sample=False) for fast in (True, False))
        assert torch.equal(fast, slow)
        assert not torch.equal(fast, tuned.generate(**inputs, max_new_tokens=STEPS, do_sample=False))
