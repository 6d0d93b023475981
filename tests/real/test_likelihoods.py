"""Likelihoods of SmolLM2-135M-Instruct are those of lm-eval's own model, and bfloat16 chooses what its weights say."""

import pytest
import torch
from helpers.real_models import CONTRAST, References, prompts_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto.decoding.inputs import batch_of
from contralto.decoding.loading import Models
from contralto.decoding.methods import DecodingConfig, generate_kwargs

pytestmark = pytest.mark.real


def test_likelihoods_are_those_of_lm_eval(smollm2):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from contralto.eval import ContraltoLM

    pairs = [
        ("The capital of France is", " Paris."),
        ("The capital of France is", " a large river in the north."),
        ("", "Water boils at 100 degrees."),
        (f"{CONTRAST} " * 20, "It rains."),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    how = {"device": "cpu", "batch_size": 2, "dtype": "float32"}
    theirs = HFLM(pretrained=str(smollm2), **how).loglikelihood(requests, disable_tqdm=True)
    ours = ContraltoLM(str(smollm2), **how).loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (wanted, is_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(wanted, abs=1e-3)
        assert greedy == is_greedy


@pytest.mark.parametrize("executor", ["loop", "processor"])
def test_bfloat16_chooses_what_its_weights_say(executor, smollm2):
    """Tokens of a bfloat16 model are the float64 reference's with the same weights, but where two are close."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    references = References(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).eval())
    config = DecodingConfig(method="cd", models={"amateur": "first layers"}, executor=executor)
    models = Models(references.model, tuple(references.others[:1]), tokenizer)
    batch = batch_of(prompts_of("chat", tokenizer), models, config, seeds=[0, 0], raw=False)
    output = references.model.generate(**batch.inputs, **generate_kwargs(config, batch), max_new_tokens=4)
    start = batch.inputs["input_ids"].shape[1]
    for ids, mask, text in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], output, strict=True):
        new = text[start:].tolist()
        scores = references.scores(config, tuple(ids[mask.bool()].tolist()), [], new, ())
        gaps = scores.amax(-1) - scores[torch.arange(len(new)), new]
        assert gaps.max() < 0.3, gaps.tolist()
