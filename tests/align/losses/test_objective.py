"""The inputs of the losses as they are derived from log-probabilities, and the checks of combined losses."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from contralto.align.losses import preference as losses
from contralto.align.losses.objective import Completions, Objective, Pairs
from contralto.align.losses.registry import LOSSES

LOGPS, REFERENCE = torch.tensor([-1.0, -2.0, -4.0, -3.0]), torch.tensor([-2.0, -1.5, -1.0, -3.5])


@pytest.mark.parametrize(
    ("derived", "inputs"),
    [
        ("logratios", ("logps", "ref_logps")),
        ("scores", ("logps", "ref_logps")),
        ("token_logratios", ("token_logps", "ref_token_logps")),
        ("kl", ("token_kl", "mask")),
    ],
)
def test_without_one_of_its_inputs_nothing_is_derived(derived, inputs):
    ones = torch.ones(2, 3)
    for name in inputs:
        assert getattr(Completions(**{name: ones}), derived) is None
    assert getattr(Completions(**dict.fromkeys(inputs, ones)), derived) is not None


@pytest.mark.parametrize("name", ["logps", "ref_logps"])
def test_scores_need_both_models(name):
    assert Completions(**{name: torch.ones(2)}, f_divergence="alpha_divergence").scores is None


def test_stacked_pairs_have_the_fields_of_their_halves():
    names = ("margin", "chosen_advantage", "weights")
    given = {name: torch.ones(2) for name in names}
    pairs = Pairs.stacked(logps=LOGPS, ref_logps=REFERENCE, f_divergence="alpha_divergence", f_alpha=0.3, **given)
    for side, rows in ((pairs.chosen, slice(0, 2)), (pairs.rejected, slice(2, 4))):
        r = (LOGPS - REFERENCE)[rows]
        assert_close(side.scores, losses.f_divergence_scores(r, divergence="alpha_divergence", alpha=0.3))
        default = dataclasses.replace(side, f_alpha=Completions.f_alpha)
        assert_close(default.scores, losses.f_divergence_scores(r, divergence="alpha_divergence"))
    assert all(getattr(pairs, name) is value for name, value in given.items())


def test_the_advantage_is_given_or_that_of_the_reference_per_token():
    side = {"ref_logps": torch.tensor([-6.0]), "lengths": torch.tensor([3])}
    other = {"ref_logps": torch.tensor([-8.0]), "lengths": torch.tensor([2])}
    pairs = Pairs(chosen=Completions(**side), rejected=Completions(**other))
    assert pairs.advantage.tolist() == [-4.0 + 2.0]
    assert dataclasses.replace(pairs, chosen_advantage=torch.tensor([9.0])).advantage.tolist() == [9.0]
    for name in side:
        left = {key: value for key, value in side.items() if key != name}
        assert dataclasses.replace(pairs, chosen=Completions(**left)).advantage is None
        assert dataclasses.replace(pairs, rejected=Completions(**left)).advantage is None


def test_combined_losses_are_checked():
    assert Objective(["ipo", "sigmoid"]).length_normalised
    assert not Objective(["sigmoid"]).length_normalised
    alone = next(loss.name for loss in LOSSES.values() if "alone" in loss.requires)
    assert Objective([alone]).loss_types == (alone,)
    with pytest.raises(ValueError, match=f"^{alone} cannot be combined with other losses"):
        Objective(["sigmoid", alone])
    with pytest.raises(ValueError, match="loss_weights must be finite"):
        Objective(["sigmoid", "sft"], [1.0, float("inf")])
