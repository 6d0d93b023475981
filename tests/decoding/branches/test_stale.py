"""A branch keeps its cache from call to call, but not what was computed with other weights or adapters."""

import copy
from functools import partial

import pytest
import torch
import zoo

from contralto.decoding import ContrastiveDecodingLogitsProcessor
from contralto.decoding.branches import ModelBranch

RULE = {"beta": 2.0, "alpha": 0.0}
STEPS = 8


def _tokens(model, inputs, processor, executor):
    way = {"custom_generate": processor.loop()} if executor == "loop" else {"logits_processor": [processor]}
    return model.generate(**inputs, **way, max_new_tokens=STEPS, do_sample=False).tolist()


def _train(model):
    """A step of training, as an optimizer makes it."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


@pytest.mark.parametrize("executor", ["processor", "loop"])
@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_an_amateur_that_is_trained_between_calls(family, executor):
    expert, amateur = zoo.build(family, seed=1), zoo.build(family, hidden=16, seed=2)
    inputs = zoo.pad(zoo.prompts(2))
    more = {"encoder_inputs": inputs} if family == "t5" else {}
    make = partial(ContrastiveDecodingLogitsProcessor, amateur, **RULE, **more)
    kept = make()
    before = _tokens(expert, inputs, kept, executor)
    _train(amateur)
    expected = _tokens(expert, inputs, make(), executor)
    assert _tokens(expert, inputs, kept, executor) == expected != before


@pytest.fixture
def tuned():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(zoo.build("llama", hidden=16, seed=2), config, adapter_name="one")
    model.add_adapter("two", copy.deepcopy(config))
    return model.eval()


def test_another_adapter_between_calls(tuned):
    expert, inputs = zoo.build("llama", seed=1), zoo.pad(zoo.prompts(2))
    kept = ContrastiveDecodingLogitsProcessor(tuned, **RULE)
    found = {}
    for name in ("one", "two", "one"):
        tuned.set_adapter(name)
        found[name] = _tokens(expert, inputs, kept, "processor")
        fresh = ContrastiveDecodingLogitsProcessor(tuned, **RULE)
        assert found[name] == _tokens(expert, inputs, fresh, "processor")
    assert found["one"] != found["two"]


def test_the_cache_is_still_reused():
    model = zoo.build("llama", seed=1)
    ids = torch.randint(3, zoo.VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    fed = []
    model.register_forward_pre_hook(
        lambda module, given, named: fed.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    branch = ModelBranch(model)
    for length in (5, 6, 9, 8):
        branch(ids[:, :length])
    assert fed == [5, 1, 3, 1]
