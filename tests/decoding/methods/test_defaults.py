"""Every method, in every form, changes greedy completions at its defaults, as far as the embedded models have the layers for them."""

import functools

import pytest
import torch

from contralto.decoding import methods
from contralto.decoding.inputs import Prompt, batch_of
from contralto.decoding.loading import load_models
from contralto.decoding.methods import DecodingConfig
from contralto.decoding.methods.reference import signature_of
from contralto.testbed import scenes

NAMES = {"amateur": "testbed:amateur", "expert": "testbed:student", "antiexpert": "testbed:early"}
"""Models of other branches."""
SIZES = {"sid": {"start_layer": 1, "keep": 4}, "pai": {"start_layer": 1}}
"""Parameters for a model of 2 layers and 16 image tokens, of methods whose defaults are those of models of 32 layers and 576."""
PAIRS = [
    ("Ben went to the barn.", "Ben went to the river."),
    ("Mia has a red ball.", "Mia has a blue ball."),
    ("Tom has 9 coins. He finds 4.", "Tom has 2 coins. He finds 4."),
    ("Ann is in the garden.", "Ann is in the kitchen."),
]
CASES = [(name, form) for name, method in methods.METHODS.items() for form in method.forms]
WITH_MODELS = [(name, form) for name, form in CASES if set(methods.METHODS[name].models) <= set(NAMES)]
"""Without critics, which have to be trained: tests/decoding/methods/test_critic_method.py."""


@functools.cache
def _prompts(sees):
    if not sees:
        return [Prompt(text, contrast=other) for text, other in PAIRS]
    pictured = scenes.scenes(3, "test")
    return [
        Prompt(scenes.DESCRIBE, images=(next(pictured).image(),), contrast="Is there a cup in the image?")
        for _ in range(12)
    ]


@functools.cache
def _load(sees, method):
    config = DecodingConfig(method=method, models={model: NAMES[model] for model in methods.METHODS[method].models})
    name = f"testbed:{'vision-0' if sees else 'expert'}"
    return load_models(name, config, with_images=sees, dtype="float32", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), WITH_MODELS)
def test_a_default_changes_texts(name, form):
    method = methods.METHODS[name]
    names = {model: NAMES[model] for model in method.models}
    config = DecodingConfig(method=name, form=form or None, models=names, parameters=SIZES.get(name, {}))
    sees = method.reads_images
    models, prompts = _load(sees, name if method.models else "none"), _prompts(sees)
    batch = batch_of(prompts, models, config, seeds=range(len(prompts)), raw=not sees)
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    greedy = models.main.generate(**batch.inputs, **how)
    found = models.main.generate(**batch.inputs, **how, **methods.generate_kwargs(config, batch))
    length = batch.inputs["input_ids"].shape[1]
    assert torch.equal(greedy[:, :length], found[:, :length])
    assert not torch.equal(greedy, found)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_method_and_its_formula_have_the_same_defaults(name, form):
    """None in a class is the default of the form."""
    method = methods.METHODS[name]
    for parameter in method.forms[form].parameters.values():
        for target in filter(None, (method.processor, method.loop)):
            assert signature_of(target).parameters[parameter.name].default in (parameter.default, None)
