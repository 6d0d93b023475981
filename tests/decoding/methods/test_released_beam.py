"""The beam search of the code of Li et al.: the expert proposes, the difference ranks, against the algorithm in float64."""

import pytest
import torch
import zoo
from oracles import decoding as reference

from contralto import cli, decoding
from contralto.decoding.rules.models import propose_by_expert

STEPS = 6


def _scorer(seed, hidden):
    model = zoo.build("llama", seed=seed, hidden=hidden).double()
    return lambda ids: torch.as_tensor(reference.next_logits(model, ids))


def _found(prompts, beams, form, **how):
    expert, amateur = zoo.build("llama", seed=1), zoo.build("llama", seed=2, hidden=16)
    inputs = zoo.pad(prompts)
    options = {"beams": beams} if form == "released" else {}
    contrast = decoding.ContrastiveDecodingLogitsProcessor(
        amateur, form=form, min_tokens_to_keep=2, attention_mask=inputs["attention_mask"], **options, **how
    )
    output = expert.generate(
        **inputs, logits_processor=[contrast], num_beams=beams, do_sample=False, max_new_tokens=STEPS, eos_token_id=None
    )
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    ("beams", "st_coef", "tau"), [(3, 1.0, 0.5), pytest.param(5, 0.8, 1.0, marks=pytest.mark.slow)]
)
def test_beams_are_those_of_the_released_code(beams, st_coef, tau):
    prompts, expert, amateur = zoo.prompts(3, seed=11), _scorer(1, 32), _scorer(2, 16)
    how = {"amateur_temperature": tau, "st_coef": st_coef, "alpha": 0.02}
    expected = [
        reference.beam_released(expert, amateur, row, STEPS, beams, tau=tau, st_coef=st_coef, alpha=0.02)
        for row in prompts
    ]
    found = _found(prompts, beams, "released", **how)
    assert found == expected
    assert found != _found(prompts, beams, "li", amateur_temperature=tau, alpha=0.02)


def test_one_beam_chooses_between_the_two_likeliest_tokens():
    prompts, expert, amateur = zoo.prompts(2, seed=11), _scorer(1, 32), _scorer(2, 16)
    found = _found(prompts, 1, "released", alpha=0.02)
    for row, prompt in zip(found, prompts, strict=True):
        assert row == reference.beam_released(expert, amateur, prompt, STEPS, 1, tau=1.0, st_coef=1.0, alpha=0.02)


def test_another_number_of_beams_is_rejected():
    with pytest.raises(ValueError, match="3 rows are no multiple of 2 beams"):
        propose_by_expert(
            torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 1), beams=2, alpha=0.1, min_tokens_to_keep=2
        )
    with pytest.raises(ValueError, match="beams must be at least 1"):
        decoding.ContrastiveDecodingLogitsProcessor(zoo.build("llama"), form="released", beams=0)
    with pytest.raises(
        ValueError, match="form='released' has no beta; its parameters are amateur_temperature and st_coef"
    ):
        decoding.ContrastiveDecodingLogitsProcessor(zoo.build("llama"), form="released", beta=1.0)


@pytest.mark.slow
def test_the_command_decodes_with_the_released_beam(capsys):
    how = ["--amateur", "testbed:amateur", "--form", "released", "--st-coef", "0.8", "--amateur-temperature", "0.5"]
    assert (
        cli.main(["generate", "--model", "testbed:expert", *how, "--beams", "2", "--max-new-tokens", "6", "Mia"]) == 0
    )
    assert capsys.readouterr().out.strip()
