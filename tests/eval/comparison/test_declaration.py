"""Decoding methods of other packages in evaluations: their declaration alone brings them all rows of a comparison."""

import json
from dataclasses import replace
from functools import partial

import pytest
from helpers.task_index import one_index  # noqa: F401  for every test here

from contralto import cli
from contralto.decoding import ContrastiveLogitsProcessor, rules
from contralto.decoding.branches import ModelBranch
from contralto.decoding.methods import METHODS, Form, Method, Unsupported
from contralto.eval.comparison.compare import compare
from contralto.eval.comparison.controls import generation_rows, ranking_rows
from contralto.eval.comparison.decoders import parse_decoder
from contralto.eval.comparison.planning import Subject
from contralto.eval.comparison.tasks import Conditions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def toy_rule(main, helper, *, gamma: float = 1.0, floor: float = 0.05):
    """Subtract a helper.

    Args:
        gamma: contrast strength.
        floor: plausibility threshold.
    """
    return rules.combine((main, helper), (1 + gamma, -gamma), alpha=floor)


class ToyProcessor(ContrastiveLogitsProcessor):
    def __init__(self, helper, *, gamma=1.0, floor=0.05, attention_mask=None):
        rule = partial(toy_rule, gamma=gamma, floor=floor)
        super().__init__(rule, [ModelBranch(helper, attention_mask=attention_mask)])


FORM = Form(
    rule=toy_rule, internal=(), stacked=False, mask="floor", weight=lambda gamma, **_: 1 + gamma, off={"gamma": 0}
)
TOY = Method(
    name="toy", description="a toy", papers=(), processor=ToyProcessor, loop=None, likelihoods=ToyProcessor,
    forms={"": FORM}, branches=("main", "helper"), models={"helper": "a weaker model"}, views=(),
    contrast_prompt_optional=False, extra={}, beams=Unsupported("has no beams"), sampling=True, row_seeds=True,
    streaming=True, encoder_decoder=Unsupported("is for decoder-only models"), vllm=Unsupported("is a toy"),
    cost={"loop": "{models}", "processor": "{models}"},
)  # fmt: skip
HELPER = {"helper": "testbed:amateur"}


@pytest.mark.slow
@pytest.mark.usefixtures("one_metered")
def test_a_new_method_is_compared_with_all_its_controls(registered, tmp_path):
    registered(TOY)
    result = compare(
        [Subject("testbed:expert", HELPER)],
        ["testbed_arithmetic", "testbed_stories"],
        ["toy"],
        output=tmp_path,
        conditions=Conditions(limit=2, seeds=(0,), metadata={"n": 2}),
        model_args={"device": "cpu", "batch_size": 4},
        quiet=True,
    )
    written, ranked = ({row["name"]: row["cells"]["expert"] for row in task["rows"]} for task in result["tasks"])
    assert list(written) == [
        "greedy",
        "helper alone",
        "greedy, mask 0.05",
        "toy",
        "sampling",
        "sampling, mask 0.05",
        "sampling, mask 0.05, T 0.5",
        "toy, sampling",
    ]
    assert list(ranked) == [
        "plain",
        "helper alone",
        "toy, uniform",
        "toy",
        "toy, uniform, raw",
        "toy, raw",
        "plain, mask 0.05",
        "toy, mask",
    ]
    forwards = {name: cell["cost"]["forwards"] / ranked["plain"]["cost"]["forwards"] for name, cell in ranked.items()}
    assert [name for name, each in forwards.items() if each == 2] == ["toy", "toy, raw", "toy, mask"]
    assert [name for name, each in forwards.items() if each == 1] == [name for name in ranked if forwards[name] != 2]
    assert [test["against"] for test in written["toy, sampling"]["tests"]] == list(written)[4:7]
    assert written["toy"]["cost"]["forwards"] == 2 * written["greedy"]["cost"]["forwards"]


@pytest.mark.slow
def test_a_new_method_is_evaluated_by_the_command(registered, tmp_path):
    registered(TOY)
    arguments = {"pretrained": "testbed:expert", "method": "toy", **HELPER, "gamma": 0.5}
    argv = ["eval", "--model_args", json.dumps(arguments), "--tasks", "testbed_arithmetic", "--limit", "2"]
    assert cli.main([*argv, "--device", "cpu", "--output_path", str(tmp_path), "--log_samples"]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("toy-")
    results = json.loads(next(folder.rglob("results_*.json")).read_text(encoding="utf-8"))
    described = {"method": "toy", "helper": "testbed:amateur", "gamma": 0.5, "floor": 0.05}
    assert results["config"]["decoder"] == described


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.contrasts])
def test_a_copy_under_another_name_has_the_same_rows(registered, name):
    """Nothing in a comparison depends on the name of a method."""
    registered(replace(METHODS[name], name="copy"))
    sources = dict.fromkeys((*METHODS[name].models, "contrast_prompt"), "x")
    choices = [parse_decoder(each, sources) for each in (name, "copy")]
    for make in (partial(generation_rows, sampled=True, yes_no=True, hint=" Yes?"), ranking_rows):
        original, copied = ([_facts(row, choice.name) for row in make([choice])] for choice in choices)
        assert copied == original


def _facts(row, name):
    """Return the fields of a row, the name of the method left out."""
    options = {key: value for key, value in row.options.items() if key != "method"}
    texts = [row.name, row.note, *row.against, row.matched_to or ""]
    return [row.role, row.same_as, row.modified, row.hint, row.alone, options], [
        t.replace("mask only", "mask alone").replace(name, "METHOD")
        for t in texts  # `only` is a method
    ]
