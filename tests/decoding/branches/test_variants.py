"""Variants of a model as amateurs: its first layers, dropout, few bits. Reference: the same in float64, without a cache."""

import copy
import threading

import pytest
import torch
import zoo
from oracles import decoding as reference

from contralto.common.head import find_layers, find_path, running_layers
from contralto.decoding import (
    ContrastiveDecodingLogitsProcessor,
    DecodingConfig,
    Dropout,
    EarlyExit,
    ProxyTuningLogitsProcessor,
    SpeculativeContrastiveDecoding,
    quantized_copy,
    score,
)
from contralto.decoding.branches.layer import EarlyExitBranch

STEPS, RULE = 8, {"beta": 0.7, "alpha": 0.05}
FAMILIES = [family for family in zoo.FAMILIES if family not in zoo.ENCODER_DECODERS]
FAST = ("llama",)
MADE = {
    "layers": lambda model: EarlyExit(model, 1),
    "dropout": lambda model: Dropout(model, 0.3, seed=4),
    "bits": lambda model: quantized_copy(model, 3),
}


def _layers(model):
    return model.get_submodule(find_layers(model).name)


def _first_layers(model):
    """A float64 copy without its last layer."""
    model = copy.deepcopy(model).double()
    place, _, name = find_layers(model).name.rpartition(".")
    setattr(model.get_submodule(place), name, _layers(model)[:1])
    model.config.num_hidden_layers = 1
    return model


def _thinned(model):
    """A float64 copy whose layers add masked features: h + m (f(h) - h)."""
    variant, model = Dropout(model, 0.3, seed=4), copy.deepcopy(model).double()

    def hook(index):
        def thin(_module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            rows = before + torch.einsum("bth,h->bth", after - before, variant.mask(index, after.shape[-1]))
            return (rows, *output[1:]) if isinstance(output, tuple) else rows

        return thin

    for index, layer in enumerate(_layers(model)):
        layer.register_forward_hook(hook(index), with_kwargs=True)
    return model


REFERENCE = {
    "layers": _first_layers,
    "dropout": _thinned,
    "bits": lambda model: quantized_copy(model, 3).double(),
}


def _case(family, kind):
    """A model, its variant, and the reference's scorer."""
    model = zoo.build(family, seed=3)
    expert, amateur = copy.deepcopy(model).double(), REFERENCE[kind](model)
    return model, MADE[kind](model), lambda **rule: reference.scorer(expert, amateur, **RULE | rule)


def _tokens(model, inputs, **how):
    output = model.generate(**inputs, max_new_tokens=STEPS, **how)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(zoo.EOS) + 1] if zoo.EOS in row else row for row in rows]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_greedy_tokens_of_a_padded_batch_are_those_of_the_reference(family, kind):
    model, variant, scorer = _case(family, kind)
    rows = zoo.prompts(3, seed=1)
    inputs = zoo.pad(rows)
    contrast = ContrastiveDecodingLogitsProcessor(variant, **RULE, attention_mask=inputs["attention_mask"])
    expected = [reference.greedy(scorer(), row, STEPS, zoo.EOS) for row in rows]
    assert _tokens(model, inputs, logits_processor=[contrast], do_sample=False) == expected
    assert _tokens(model, inputs, custom_generate=contrast.loop(), do_sample=False) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_beams(family, kind):
    model, variant, scorer = _case(family, kind)
    (row,) = zoo.prompts(1, seed=2)
    contrast = ContrastiveDecodingLogitsProcessor(variant, **RULE)
    expected = reference.beam(scorer(), row, STEPS, zoo.EOS, num_beams=3)
    found = _tokens(model, zoo.pad([row]), logits_processor=[contrast], do_sample=False, num_beams=3)
    assert found == [expected]


@pytest.mark.parametrize("kind", MADE)
def test_likelihoods_windows_and_drafts(kind):
    model, variant, scorer = _case("llama", kind)
    row = zoo.prompts(3, seed=2)[2]
    contrast = ContrastiveDecodingLogitsProcessor(variant, **RULE)
    options = torch.tensor([[7, 9, 11]])
    found = score(contrast, model, zoo.pad([row]), options).tokens[0]
    scores = [scorer(alpha=0.0)(torch.cat([row, options[0, :count]])) for count in range(3)]
    expected = torch.stack([each.log_softmax(-1)[token] for each, token in zip(scores, options[0], strict=True)])
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    windowed = ContrastiveDecodingLogitsProcessor(variant, amateur_window=2, **RULE)
    expected = [reference.greedy(scorer(window=2), row, STEPS, zoo.EOS)]
    for how in ({"logits_processor": [windowed]}, {"custom_generate": windowed.loop()}):
        assert _tokens(model, zoo.pad([row]), do_sample=False, **how) == expected
    expected = [reference.greedy(scorer(), row, STEPS, zoo.EOS)]
    drafted = SpeculativeContrastiveDecoding(variant, **RULE)
    assert _tokens(model, zoo.pad([row]), custom_generate=drafted, do_sample=False) == expected


def test_first_layers_are_read_in_the_forward_of_the_main_rows(monkeypatch):
    model = zoo.build("llama", seed=1)
    contrast = ContrastiveDecodingLogitsProcessor(EarlyExit(model, 1), **RULE)
    find_path(model)  # measured once
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(len(k["input_ids"])) or forward(*a, **k))
    how = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    model.generate(**zoo.pad(zoo.prompts(2)), custom_generate=contrast.loop(), **how)
    assert calls == [2] * STEPS


def test_skipped_layers_compute_nothing_and_other_threads_compute_everything():
    model, ids = zoo.build("llama", seed=1), zoo.prompts(1)[0][None]
    ran, results = [], []
    whole = model(ids).logits
    for index, layer in enumerate(_layers(model)):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad(), running_layers(model, [0]):
        model(ids)
        assert ran == [0]
        other = threading.Thread(target=lambda: results.append(model(ids).logits))
        other.start()
        other.join()
    assert torch.equal(results[0], whole)
    assert torch.equal(model(ids).logits, whole)
    assert "forward" not in _layers(model)[1].__dict__


def test_masks_are_a_function_of_the_seed_and_keep_the_mean():
    model = zoo.build("llama", seed=1)
    one, same, other = (Dropout(model, 0.3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.mask(0, 64), same.mask(0, 64))
    assert not torch.equal(one.mask(0, 64), other.mask(0, 64))
    assert not torch.equal(one.mask(0, 64), one.mask(1, 64))
    wide = one.mask(0, 100_000)
    assert set(wide.tolist()) == {0.0, 1 / 0.7}
    assert wide.mean() == pytest.approx(1, abs=0.01)


def test_weights_are_rounded_by_rows_and_the_rest_stays():
    model = zoo.build("gpt2", seed=1)
    coarse = quantized_copy(model, 4)
    matrix = model.transformer.h[0].mlp.c_fc.weight.detach().double()
    rounded = coarse.transformer.h[0].mlp.c_fc.weight.detach()
    for column in range(matrix.shape[1]):  # Conv1D: a column for each output
        step = matrix[:, column].abs().max() / 7
        expected = torch.tensor([round(float(w / step)) * float(step) for w in matrix[:, column]])
        torch.testing.assert_close(rounded[:, column], expected, atol=1e-6, rtol=0)
    assert torch.equal(coarse.transformer.wte.weight, model.transformer.wte.weight)
    assert torch.equal(coarse.transformer.h[0].ln_1.weight, model.transformer.h[0].ln_1.weight)


def test_proxy_tuning_takes_variants():
    model = zoo.build("llama", seed=1)
    method = ProxyTuningLogitsProcessor(model, EarlyExit(model, 1))
    inputs = zoo.pad(zoo.prompts(2))
    slow = _tokens(model, inputs, logits_processor=[method], do_sample=False)
    assert _tokens(model, inputs, custom_generate=method.loop(), do_sample=False) == slow


def test_a_variant_alone_is_a_model():
    model, ids = zoo.build("llama", seed=1), zoo.prompts(1)[0][None]
    early = EarlyExit(model, 1)
    alone = early.alone()
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits[:, -1], EarlyExitBranch(early)(ids))
        assert not torch.equal(alone(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: EarlyExit(model, 2), "from 1 to 1, of the model's 2 layers, not 2"),
        (lambda model: EarlyExit(zoo.build("t5"), 1), "is an encoder-decoder"),
        (lambda model: Dropout(model, 1.0), r"must lie in \(0, 1\), not 1.0"),
        (lambda model: quantized_copy(model, 1), "from 2 to 8, not 1"),
    ],
)
def test_invalid_variants(make, message):
    with pytest.raises(ValueError, match=message):
        make(zoo.build("llama"))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("self:layers", {}, "is spelled self:layers=8"),
        ("self:int8=1", {}, "is spelled"),
        ("self:int", {}, "is spelled"),
        ("self:dropout=0.3,sed=1", {}, "is spelled"),
        ("self:layers=1.5", {}, "is spelled"),
        ("self:layers=1", {"adapters_off": True}, "are both given|give either"),
    ],
)
def test_invalid_spellings(name, more, message):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(models={"amateur": name}, **more)
