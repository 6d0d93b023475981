"""Controls of likelihoods against their definitions, in float64: the mask alone, and uniform distributions in place of all others."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from contralto import testbed
from contralto.decoding.executors.score import FLOOR
from contralto.decoding.methods import METHODS, DecodingConfig
from contralto.decoding.methods.controls import control_processor, has_effect
from contralto.eval.comparison.decoders import SHOWN_ANYWAY
from contralto.eval.models.decoder import Decoder
from contralto.eval.models.lm import ContraltoLM

AMATEUR = {"amateur": "no:such-model"}
CD = {"method": "cd", **AMATEUR, "beta": 1.5, "alpha": 0.2}


def _config(name, form, **parameters):
    method = METHODS[name]
    contrast = "x" if "prompt" in method.views else None
    models = dict.fromkeys(method.models, "x")
    return DecodingConfig(
        method=name, form=form or None, models=models, contrast_prompt=contrast, parameters=parameters
    )


def _logits(size=30):
    return 2 * torch.randn(4, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "form", "weight", "others"),
    [
        ("cd", "obrien", 1.5, -0.5),
        ("cd", "li", 1.0, -1.0),
        ("scd", "obrien", 1.5, -0.5),
        ("cad", "", 1.5, -0.5),
        ("vcd", "", 2.0, -1.0),
        ("dola", "kl", 1.0, -1.0),
        ("proxy", "", 1.0, 0.0),
        ("ritual", "", 1.0, 3.0),
    ],
)
def test_a_uniform_contrast_is_a_power_and_a_constant_per_token(name, form, weight, others):
    """scores(v) = weight log p(v) + others log 1 / V."""
    config = _config(name, form)
    processor, logits = control_processor(config, "uniform"), _logits()
    found = processor.combine(logits, [], 0, **({processor.threshold: 0.0} if processor.threshold else {}))
    assert torch.allclose(found, weight * logits.log_softmax(-1) - others * math.log(30))
    assert has_effect(config, renormalized=True) == (weight != 1)
    assert has_effect(config, renormalized=False) == (weight != 1 or others != 0)


def test_a_uniform_contrast_depends_on_the_step_where_the_formula_does():
    processor, logits = control_processor(_config("m3id", "", lam=0.02), "uniform"), _logits()[:3]
    found = processor.combine(logits, [], torch.tensor([[0], [10], [20]]), beta=0.0)
    gone = [1 - math.exp(-0.02 * step) for step in (0, 10, 20)]
    weight = torch.tensor([[share / (1 - share)] for share in gone], dtype=torch.float64)
    assert torch.allclose(found, (1 + weight) * logits.log_softmax(-1) + weight * math.log(30))


@pytest.mark.parametrize(
    ("name", "form"), [(m.name, form) for m in METHODS.values() for form, each in m.forms.items() if each.off]
)
def test_the_mask_alone_keeps_plausible_tokens_as_they_are(name, form):
    mask, logits = METHODS[name].forms[form].mask, _logits()
    found = control_processor(_config(name, form, **{mask: 0.3}), "mask").combine(logits, [], 5)
    p = logits.softmax(-1)
    kept = p >= 0.3 * p.amax(-1, keepdim=True)
    assert 4 < kept.sum() < kept.numel()
    assert torch.equal(found > -math.inf, kept)
    assert torch.allclose(found.softmax(-1), torch.where(kept, p, 0) / torch.where(kept, p, 0).sum(-1, keepdim=True))


@torch.no_grad()
def test_controls_are_scored_without_the_other_model():
    """Neither is the amateur loaded, which does not exist, nor does anything run but the model itself, once per batch."""
    model, exact, tokenizer = testbed.load("expert"), testbed.load("expert").double(), testbed.tokenizer()
    lm = ContraltoLM(model, tokenizer=tokenizer, device="cpu", batch_size=4, **CD, control="uniform", score="raw")
    assert lm.models == {"main": model}
    assert lm.configuration["control"] == "uniform"
    assert not {"amateur", "contrast_prompt"} & lm.configuration.keys()
    context, option = "Ben went out to the", " barn door. Ben saw."
    prompt, rest = tokenizer(context)["input_ids"], tokenizer(option, add_special_tokens=False)["input_ids"]
    log_p = exact(torch.tensor([prompt + rest])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    chosen, size = log_p.gather(-1, torch.tensor(rest)[:, None])[:, 0], log_p.shape[-1]
    request = SimpleNamespace(args=(context, option), doc={}, repeats=1)
    counted = []
    handle = model.register_forward_pre_hook(lambda *_: counted.append(1))
    ((found, _),) = lm.loglikelihood([request], disable_tqdm=True)
    handle.remove()
    assert len(counted) == 1
    assert found == pytest.approx(float((2.5 * chosen + 1.5 * math.log(size)).sum()), rel=1e-4)
    masked = lm.decoding_by(**CD, control="mask", masked=True, score="raw")
    ((found, _),) = masked.loglikelihood([request], disable_tqdm=True)
    assert 0 < (plausible := chosen >= log_p.amax(-1) + math.log(0.2)).sum() < len(chosen)
    assert found == pytest.approx(float(torch.where(plausible, chosen, FLOOR).sum()), rel=1e-4)
    with pytest.raises(ValueError, match="control='mask' is for likelihoods, and the task generates"):
        masked.check_options([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**CD, "control": "off"}, "control must be mask or uniform, of a method with a contrast, not 'off'"),
        ({"control": "uniform"}, "control must be mask or uniform, of a method with a contrast"),
        ({**CD, "form": "li", "beta": None, "control": "mask"}, "method='cd' has no control 'mask'"),
    ],
)
def test_a_control_that_there_is_not_is_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        Decoder.of(**options)


def test_comparisons_set_every_option_of_a_decoder_themselves():
    assert SHOWN_ANYWAY.keys() == inspect.signature(Decoder.of).parameters.keys() - {"options"}
