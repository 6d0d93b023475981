"""Every text method on SmolLM2-135M-Instruct, by processor, loop and likelihoods, against float64 forwards without a cache.

The methods are those that are declared: a new one is tested without a change here. Tokens must be those of the reference, which
reads each row alone and unpadded, but for ties that are closer than float32 can tell.
"""

import pytest
import torch
from helpers.real_models import TEXT_METHODS, References, prompts_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from contralto.decoding import score
from contralto.decoding.inputs import batch_of
from contralto.decoding.loading import Models
from contralto.decoding.methods import METHODS, DecodingConfig, generate_kwargs, likelihood_processor

pytestmark = pytest.mark.real
STEPS = {"chat": 4, "plain": 4, "long": 2}
TIE = 2e-4
"""Scores that differ by less are equal in float32, whose logits have an error of about 1e-5."""
CASES = [
    pytest.param(name, form, kind, id=f"{name}-{form}-{kind}" if form else f"{name}-{kind}", marks=marks)
    for kind, marks in {"chat": (), "plain": (), "long": pytest.mark.xdist_group("long")}.items()
    for name, form in TEXT_METHODS
    if kind == "chat" or form in ("", METHODS[name].default_form)
]
"""Every form on conversations, the default form of every method on the other prompts."""


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2, padding_side="left")


@pytest.fixture(scope="module")
def references(smollm2):
    return References(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval())


def batch_for(name, form, kind, references, tokenizer, executor=None):
    """The configuration of a method and a batch of prompts of a kind."""
    method = METHODS[name]
    config = DecodingConfig(
        method=name, form=form or None, models=dict.fromkeys(method.models, "first layers"), executor=executor
    )
    models = Models(references.model, tuple(references.others[: len(method.models)]), tokenizer)
    prompts = prompts_of(kind, tokenizer)
    return config, batch_of(prompts, models, config, seeds=[0] * len(prompts), raw=kind != "chat")


def rows_of(inputs):
    """The unpadded rows of a batch, as tuples of ids."""
    pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]


def layers_of(config, batch):
    """The candidate layers of a method that contrasts layers."""
    stacked = config.contrasts and config.declaration.forms[config.form or ""].stacked
    return likelihood_processor(config, batch).branches[0]._layers if stacked else ()


def expected(references, config, batch, row, new, *, masked=True):
    """The scores of the new tokens of one row."""
    if config.declaration.contrasts and not (config.declaration.likelihoods or config.declaration.branches):
        return references.search_scores(rows_of(batch.inputs)[row], new, **config.parameters)
    views = [rows_of(view)[row] for view in batch.views]
    ids = rows_of(batch.inputs)[row]
    return references.scores(config, ids, views, new, layers_of(config, batch), masked=masked)


def written(references, config, batch, steps):
    """The new tokens of every row, to the end token."""
    output = references.model.generate(
        **batch.inputs, **generate_kwargs(config, batch), max_new_tokens=steps, do_sample=False
    )
    end, start = references.model.generation_config.eos_token_id, batch.inputs["input_ids"].shape[1]
    rows = [row[start:].tolist() for row in output]
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


@pytest.mark.parametrize(("name", "form", "kind"), CASES)
def test_tokens_and_likelihoods(name, form, kind, references, tokenizer):
    found = []
    for executor in METHODS[name].executors or (None,):
        config, batch = batch_for(name, form, kind, references, tokenizer, executor)
        found.append(written(references, config, batch, STEPS[kind]))
    assert all(each == found[0] for each in found), "the executors write different tokens"
    for row, new in enumerate(found[0]):
        scores = expected(references, config, batch, row, new)
        gaps = scores.amax(-1) - scores[torch.arange(len(new)), new]
        assert gaps.max() <= TIE, f"row {row} has other tokens than the reference: {gaps.tolist()}"
    if METHODS[name].likelihoods:
        _check_likelihoods(references, config, batch, found[0])


def _check_likelihoods(references, config, batch, rows):
    """The log-probabilities of the written tokens, without the constraint, are the reference's."""
    width = max(map(len, rows))
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    method = likelihood_processor(config, batch)
    likelihood = score(method, references.model, batch.inputs, padded, continuation_mask=mask)
    for row, new in enumerate(rows):
        wanted = expected(references, config, batch, row, new, masked=False).log_softmax(-1)
        wanted = wanted[torch.arange(len(new)), new]
        torch.testing.assert_close(likelihood.tokens[row, : len(new)].double(), wanted, atol=1e-3, rtol=1e-4)


def test_a_long_prompt_has_1500_tokens(references, tokenizer):
    _, batch = batch_for("none", "", "long", references, tokenizer)
    assert batch.inputs["input_ids"].shape == (1, 1500)
