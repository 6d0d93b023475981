"""Models whose weights accelerate keeps in memory or on disk: as experts, amateurs, critics and judges, and in lm-eval."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from lm_eval.api.instance import Instance

from contralto import testbed
from contralto.common.hashing import fingerprint
from contralto.common.placement import input_device
from contralto.decoding import (
    ContextAwareDecodingLogitsProcessor,
    ContrastiveDecodingLogitsProcessor,
    ContrastiveSearch,
    CriticGuidedLogitsProcessor,
    DoLaLogitsProcessor,
    SpeculativeContrastiveDecoding,
)
from contralto.decoding.executors.score import score
from contralto.decoding.trace import trace
from contralto.eval.metrics import coherence
from contralto.eval.models.lm import ContraltoLM

PROMPTS = ["Ben went out to the", "Mia saw a fox. She gave it to"]


@pytest.fixture(scope="module", params=["memory", pytest.param("disk", marks=pytest.mark.slow)])
def offloaded(request, tmp_path_factory):
    """The testbed's expert and amateur without a weight in place."""
    models = [copy.deepcopy(testbed.load(name)) for name in ("expert", "amateur")]
    if request.param == "memory":
        return [cpu_offload(model, execution_device="cpu") for model in models]
    return [disk_offload(model, str(tmp_path_factory.mktemp("weights")), execution_device="cpu") for model in models]


def _read(texts=PROMPTS):
    return testbed.tokenizer()(texts, return_tensors="pt", padding=True)


def test_the_device_is_where_accelerate_runs_the_weights(offloaded):
    for model in offloaded:
        assert model.device.type == "meta"
        assert input_device(model) == torch.device("cpu")
    model = testbed.load("expert")
    assert input_device(model) == model.device


def test_several_hooks_on_a_module_are_all_looked_at():
    model = cpu_offload(copy.deepcopy(testbed.load("amateur")), execution_device="cpu")
    for module in list(model.modules()):
        if hasattr(module, "_hf_hook"):
            add_hook_to_module(module, ModelHook(), append=True)
    assert input_device(model) == torch.device("cpu")
    with torch.device("meta"):
        assert input_device(torch.nn.Linear(2, 2)).type == "meta"  # no weights anywhere: nothing to find


def _methods(expert, amateur):
    """Every executor, with offloaded models in every place."""
    prompts = _read()
    mask = prompts["attention_mask"]
    bare = _read(["went out to the", "She gave it to"])
    cd = ContrastiveDecodingLogitsProcessor(amateur, attention_mask=mask)
    return {
        "processor": {"logits_processor": [cd]},
        "loop": {"custom_generate": cd.loop()},
        "prompts": {"custom_generate": ContextAwareDecodingLogitsProcessor(expert, bare).loop()},
        "layers": {"logits_processor": [DoLaLogitsProcessor(expert, attention_mask=mask)]},
        "search": {"custom_generate": ContrastiveSearch()},
        "drafts": {"custom_generate": SpeculativeContrastiveDecoding(amateur)},
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ["processor", "loop", "prompts", "layers", "search", "drafts"])
def test_texts_are_those_of_models_in_place(offloaded, way):
    resident = testbed.load("expert"), testbed.load("amateur")
    found = []
    for expert, amateur in (resident, offloaded):
        how = _methods(expert, amateur)[way]
        found.append(expert.generate(**_read(), **how, max_new_tokens=6, do_sample=False))
    assert torch.equal(*found)


def test_an_offloaded_critic_weighs_the_same_candidates(offloaded):
    def value(model):
        class Critic(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask):
                out = self.model(input_ids=input_ids, attention_mask=attention_mask)
                out.logits = out.logits[..., :1]
                return out

        return CriticGuidedLogitsProcessor(Critic(), k=3, attention_mask=prompt["attention_mask"])

    expert, prompt = testbed.load("expert"), _read()
    texts = [
        expert.generate(**prompt, logits_processor=[value(model)], max_new_tokens=3)
        for model in (testbed.load("amateur"), offloaded[1])
    ]
    assert torch.equal(*texts)


def test_scores_traces_and_coherence(offloaded):
    prompt = _read(PROMPTS[:1])
    options = testbed.tokenizer()(["barn door."], return_tensors="pt", add_special_tokens=False)["input_ids"]
    found = []
    for expert, amateur in ((testbed.load("expert"), testbed.load("amateur")), offloaded):
        method = ContrastiveDecodingLogitsProcessor(amateur)
        likelihood = score(method, expert, prompt, options).total.tolist()
        steps = trace(method, expert, prompt, options[0])
        judged = coherence(expert, testbed.tokenizer(), PROMPTS[:1], ["barn door."])
        found.append((likelihood, steps, judged))
    assert found[0] == found[1]


def test_lm_eval_answers_and_ranks_with_them(offloaded):
    expert, amateur = offloaded
    arguments = (PROMPTS[0], {"until": ["\n"], "max_gen_toks": 6}), (PROMPTS[0], " barn door.")
    asked = [
        Instance(kind, {}, each, 0) for kind, each in zip(("generate_until", "loglikelihood"), arguments, strict=True)
    ]
    found = []
    for model, other in (("testbed:expert", "testbed:amateur"), (expert, amateur)):
        more = {} if isinstance(model, str) else {"tokenizer": testbed.tokenizer(), "device": "cpu"}
        lm = ContraltoLM(model, method="cd", amateur=other, **more)
        found.append((lm.generate_until(asked[:1], True), lm.loglikelihood(asked[1:], True)))
        plain = lm.decoding_by()
        found[-1] += (plain.generate_until(asked[:1], True), plain.loglikelihood(asked[1:], True))
    assert found[0] == found[1]


def test_offloaded_weights_count_in_the_fingerprint(offloaded):
    for model, name in zip(offloaded, ("expert", "amateur"), strict=True):
        assert fingerprint(model) == fingerprint(testbed.load(name))
        assert model.device.type == "meta"  # as it was
    assert fingerprint(offloaded[0]) != fingerprint(offloaded[1])
