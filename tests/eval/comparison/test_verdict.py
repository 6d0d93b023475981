"""The sentence of a comparison: which decoder wins, by how much, at what cost, how sure."""

import re

import pytest

from contralto.eval import stats
from contralto.eval.comparison.verdict import conclude

SMALL = 1e-4


def _test(against, value, p=SMALL):
    power = {"units": 1000, "apart": 100, "error": 0.01}
    return {
        "against": against,
        "value": value,
        "low": value - 0.02,
        "high": value + 0.02,
        "p": p,
        "holm": p,
        "power": power,
    }


def _cell(score, *tests, rival=None, flops=1.0):
    return {
        "score": {"value": score, "low": 0, "high": 1},
        "tests": list(tests),
        "rival": rival,
        "cost": {"flops": flops},
    }


def _row(name, role, *cells):
    return {"name": name, "role": role, "cells": dict(zip(("one", "two"), cells, strict=False))}


def _task(*rows, name="quiz", higher=True, kind="text"):
    return {"name": name, "kind": kind, "metric": "acc", "higher_is_better": higher, "rows": list(rows)}


def _basic(*, p=SMALL, control_p=SMALL, control_value=0.1, rival=None, value=0.2, methods=1):
    """A method with a baseline, a control and perhaps a rival, and further methods that change nothing."""
    cell = _cell(0.7, _test("greedy", value, p), _test("mask", control_value, control_p), rival=rival, flops=1.5)
    rows = [
        _row("greedy", "baseline", _cell(0.5)),
        _row("mask", "control", _cell(0.6)),
        _row("amateur alone", "control", _cell(0.65)),
        _row("cd", "method", cell),
        *(_row(f"other {i}", "method", _cell(0.5, _test("greedy", 0.0, 1.0))) for i in range(methods - 1)),
    ]
    comparison = {"tasks": [_task(*rows)]}
    conclude(comparison)
    return comparison


def test_a_win_says_by_how_much_at_what_cost_and_how_sure():
    comparison = _basic(rival=_test("amateur alone", 0.05, 2e-3))
    verdict = comparison["tasks"][0]["verdict"]
    assert (
        verdict["sentence"]
        == comparison["verdict"]["sentence"]
        == (
            "cd wins on quiz: it raises acc from 0.500 (greedy) to 0.700 (by +0.200, 95% interval +0.180 to +0.220), at 1.50 times the "
            "FLOPs per token, and no control explains that (p 0.002 after adjustment for all comparisons)."
        )
    )
    assert (verdict["kind"], verdict["cost"]) == ("win", 1.5)
    assert verdict["p"] == 2e-3  # that of the least certain test
    assert [(each["name"], each["beaten"]) for each in verdict["controls"]] == [
        ("greedy", 1),
        ("mask", 1),
        ("amateur alone", 1),
    ]


@pytest.mark.parametrize(
    ("how", "kind", "against"),
    [
        ({"control_p": 0.06}, "explained", "mask"),
        ({"control_value": -0.1}, "explained", "mask"),  # significant, but the control is the better one
        ({"rival": _test("amateur alone", 0.05, 0.3)}, "explained", "amateur alone"),
        ({"rival": _test("amateur alone", -0.05, SMALL)}, "explained", "amateur alone"),
        ({"p": 0.06}, "none", "greedy"),
        ({"value": -0.2}, "none", "greedy"),
        ({"p": 0.02, "methods": 2}, "win", "greedy"),
        ({"p": 0.02, "methods": 3}, "none", "greedy"),  # 3 * 0.02 > 0.05
        ({"control_p": 0.02, "methods": 3}, "explained", "mask"),
    ],
)
def test_no_win_is_claimed_that_a_control_or_chance_explains(how, kind, against):
    verdict = _basic(**how)["tasks"][0]["verdict"]
    assert (verdict["kind"], verdict["against"]) == (kind, against)
    assert ("cd wins" in verdict["sentence"]) == (kind == "win")
    if kind != "win":
        assert verdict["sentence"].startswith("Nothing wins on quiz: ")
        level = 0.05 / how.get("methods", 1)
        smallest = stats.detectable_by_error(0.01, units=1000, apart=100, level=level)
        assert verdict["detectable"] == smallest
        assert f"a difference below {smallest:.3f} may have been missed" in verdict["sentence"]
    if kind == "explained":
        assert f"but {against}, which contrasts nothing, explains that" in verdict["sentence"]


def test_holm_and_the_number_of_models_lower_the_level_of_what_may_have_been_missed():
    cells = [_cell(0.5, _test("greedy", 0.01, 0.5)) for _ in range(2)]
    comparison = {"tasks": [_task(_row("greedy", "baseline", _cell(0.5), _cell(0.5)), _row("cd", "method", *cells))]}
    conclude(comparison)
    smallest = stats.detectable_by_error(0.01, units=1000, apart=100, level=0.05 / 2)
    assert comparison["tasks"][0]["verdict"]["detectable"] == smallest


def test_where_less_is_better_a_fall_wins():
    rows = _row("greedy", "baseline", _cell(0.5)), _row("cd", "method", _cell(0.4, _test("greedy", -0.1)))
    for higher, kind in ((True, "none"), (False, "win")):
        comparison = {"tasks": [_task(*rows, higher=higher)]}
        conclude(comparison)
        assert comparison["tasks"][0]["verdict"]["kind"] == kind
        assert "lowers acc from 0.500 (greedy) to 0.400" in comparison["verdict"]["sentence"]


def test_a_win_with_some_models_names_their_number():
    cells = [_cell(0.7, _test("greedy", 0.2)), _cell(0.5, _test("greedy", 0.0, 1.0))]
    comparison = {"tasks": [_task(_row("greedy", "baseline", _cell(0.5), _cell(0.5)), _row("cd", "method", *cells))]}
    conclude(comparison)
    assert "cd wins on quiz with 1 of 2 models: " in comparison["verdict"]["sentence"]
    assert "in the mean of 2 models (by +0.000 to +0.200)" in comparison["verdict"]["sentence"]
    assert comparison["tasks"][0]["verdict"]["p"] == SMALL


def test_several_tasks_are_one_sentence():
    won, lost = _basic()["tasks"][0], _basic(p=0.5)["tasks"][0] | {"name": "exam"}
    comparison = {"tasks": [won, lost]}
    conclude(comparison)
    assert comparison["verdict"]["sentence"] == (
        "cd wins on quiz (acc +0.200 over greedy, at 1.50 times the FLOPs per token, p 0.0001); nothing wins on exam."
    )
    comparison = {"tasks": [lost, lost | {"name": "essay"}]}
    conclude(comparison)
    assert re.fullmatch(
        r"Nothing wins on any of the 2 tasks: what the methods gain chance explains; differences below 0\.0\d\d to 0\.0\d\d "
        r"\(by task\) may have been missed\.",
        comparison["verdict"]["sentence"],
    )


def test_a_cost_that_was_not_counted_is_not_invented():
    rows = _row("greedy", "baseline", _cell(0.5)), _row("mine", "method", _cell(0.7, _test("greedy", 0.2), flops=None))
    comparison = {"tasks": [_task(*rows)]}
    conclude(comparison)
    assert comparison["tasks"][0]["verdict"]["cost"] is None
    assert "at a cost that was not counted" in comparison["verdict"]["sentence"]
