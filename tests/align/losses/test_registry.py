"""The declarations of the losses, and a loss that is registered beside them."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from contralto.align.losses import preference as losses
from contralto.align.losses.loss import Loss
from contralto.align.losses.objective import Objective, Pairs
from contralto.align.losses.registry import BUILT_IN, LOSSES, register
from contralto.align.losses.unpaired import BUILT_IN as UNPAIRED_LOSSES
from contralto.align.trainers.config import LOSS_OPTIONS, OPTIONS_OF_NEEDS, PreferenceConfig
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.common.hub import locate
from contralto.testbed import worlds

DOCS = (Path(__file__).parents[3] / "docs" / "losses.md").read_text(encoding="utf-8")
QUIET = {
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
    "max_steps": 1,
    "logging_steps": 1,
}


def square(chosen_logratios, rejected_logratios, chosen_lengths, *, beta=0.1, kappa=1.0):
    return (beta * (chosen_logratios - rejected_logratios) - kappa * chosen_lengths) ** 2


DECLARATION = {
    "name": "square",
    "description": "a square",
    "function": square,
    "options": {},
    "requires": frozenset(),
    "forbids": {"ld_alpha": "counts tokens itself"},
    "length_normalised": False,
    "lowers_chosen": False,
    "saturates": False,
    "from_trl": False,
}


@pytest.fixture
def toy():
    yield register(Loss(**DECLARATION))
    LOSSES.unregister("square")


def _rows():
    problems = list(itertools.islice(worlds.problems(0, "train"), 3))
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "chosen": [{"role": "assistant", "content": problem.solution()}],
                "rejected": [{"role": "assistant", "content": problem.solution()[:9]}],
            }
            for problem in problems
        ]
    )


def test_the_declaration_is_complete():
    assert DECLARATION.keys() == {field.name for field in dataclasses.fields(Loss)}


@pytest.mark.parametrize("field", DECLARATION)
def test_every_field_of_a_declaration_is_required(field):
    with pytest.raises(TypeError, match=field):
        Loss(**{name: value for name, value in DECLARATION.items() if name != field})


def _without_default(chosen_logps, *, beta):
    return chosen_logps * beta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"function": lambda chosen_smell: chosen_smell}, "unknown input chosen_smell"),
        ({"function": _without_default}, "setting beta of the loss 'square' has no default"),
        ({"options": {"gamma": "simpo_gamma"}}, "names gamma, which is no setting"),
        ({"requires": frozenset({"silence"})}, "unknown requirement 'silence'"),
    ],
)
def test_a_wrong_declaration_is_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        Loss(**DECLARATION | changes)


def test_only_declarations_are_registered():
    with pytest.raises(ValueError, match=r"must be a contralto.align.losses.loss.Loss, not a function"):
        LOSSES.register(square, name="square")
    with pytest.raises(ValueError, match="already a loss 'sigmoid'"):
        register(Loss(**DECLARATION | {"name": "sigmoid"}))


def test_every_option_of_a_loss_is_a_field_of_the_configuration():
    fields = {field.name for field in dataclasses.fields(PreferenceConfig)}
    assert set(LOSS_OPTIONS) <= fields
    assert {option for options, _ in OPTIONS_OF_NEEDS.values() for option in options} <= fields
    assert {option for loss in BUILT_IN for option in loss.forbids} <= fields


def test_a_registered_loss_is_an_objective(toy):
    pairs = Pairs.stacked(
        logps=torch.tensor([-1.0, -5.0]), ref_logps=torch.tensor([-2.0, -1.0]), lengths=torch.tensor([3, 4])
    )
    objective = Objective(["square", "sigmoid"], beta=0.5, kappa=2.0)
    assert objective.needs == {"reference", "lengths"}
    assert objective(pairs).terms["square"].item() == (0.5 * (1 + 4) - 2 * 3) ** 2


def test_a_registered_loss_is_a_loss_type(toy, tmp_path):
    args = PreferenceConfig(str(tmp_path), loss_type="square", loss_settings={"kappa": 0.5}, **QUIET)
    trainer = PreferenceTrainer(locate("testbed:student"), args=args, train_dataset=_rows())
    trainer.train()
    squares = [(0.5 * len(ids)) ** 2 for ids in trainer.train_dataset["chosen_ids"]]  # the policy is its reference
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(squares) / 3, rel=1e-3)
    with pytest.raises(ValueError, match="ld_alpha is set, but square counts tokens itself: leave ld_alpha out"):
        PreferenceConfig(str(tmp_path), loss_type="square", ld_alpha=0.5, **QUIET)
    with pytest.raises(ValueError, match="label_smoothing is set, but square does not use it"):
        PreferenceConfig(str(tmp_path), loss_type="square", label_smoothing=0.1, **QUIET)


# -------------------------------------------------------------------------------------------------- the documentation


def test_the_documentation_lists_every_loss():
    def cells(values):
        return ", ".join(f"`{value}`" for value in values)

    rows = [
        f"| `{loss.name}` | {loss.description} | {cells(sorted(loss.needs))} | {cells(loss.settings)} | {cells(loss.forbids)} |"
        for loss in BUILT_IN
    ]
    pairs, unpaired = DOCS.split("## Completions with labels")
    unpaired = unpaired.split("\n## ")[0]
    assert [line for line in pairs.splitlines() if line.startswith("| `")] == rows
    rows = [
        f"| `{loss.name}` | {loss.description} | {', '.join(str(label).lower() for label in sorted(loss.labels, reverse=True))} "
        f"| {cells(sorted(loss.needs))} | {cells(loss.settings)} |"
        for loss in UNPAIRED_LOSSES
    ]
    assert [line for line in unpaired.splitlines() if line.startswith("| `")] == rows


def test_every_public_loss_is_declared():
    functions = {name for name in losses.__all__ if getattr(losses, name) in {loss.function for loss in BUILT_IN}}
    assert functions == {loss.name for loss in BUILT_IN}


@pytest.mark.parametrize("loss", BUILT_IN, ids=lambda loss: loss.name)
def test_a_length_normalised_loss_does_not_change_when_completions_are_repeated(loss):
    """Sums and lengths that are twice as large leave it unchanged; a loss without lengths is not normalised."""
    sums = {"logps": torch.tensor([-9.0, -14.0]), "ref_logps": torch.tensor([-7.0, -15.0])}
    tokens = {"lengths": torch.tensor([3, 4]), "token_logps": -torch.ones(2, 4), "mask": torch.ones(2, 4).bool()}
    values = []
    if "lengths" in loss.needs:
        for factor in (1, 2):
            scaled = {name: factor * value for name, value in sums.items()}
            pairs = Pairs.stacked(**scaled, **tokens | {"lengths": factor * tokens["lengths"]})
            values.append(Objective([loss.name])(pairs).total.item())
    assert loss.length_normalised == (len(values) == 2 and values[0] == pytest.approx(values[1]))
