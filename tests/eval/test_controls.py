"""The rows of a comparison, field by field, and what their options do to a distribution."""

import pytest
import torch

from contralto.decoding.rules import plausible
from contralto.eval.comparison.controls import OLM_DISTANCE, OLM_MASS, generation_rows, ranking_rows
from contralto.eval.comparison.decoders import parse_decoder

AMATEUR = {"amateur": "testbed:amateur"}
HOT = {"temperature": 1.0}


def _rows(make, *texts, **settings):
    """Return the fields of each row that differ from their defaults, without the notes, by name."""
    rows = make([parse_decoder(text, AMATEUR) for text in texts], **settings)
    fields = ("against", "same_as", "matched_to", "modified", "hint", "alone")
    found = {row.name: (row.role, dict(row.options), {f: v for f in fields if (v := getattr(row, f))}) for row in rows}
    assert len(found) == len(rows)
    assert all(row.note for row in rows if row.role == "control")
    return found


def test_rows_of_answers_to_yes_no_questions():
    hint = " Say yes."
    assert _rows(generation_rows, "cd alpha=0.3 beta=1", sampled=False, yes_no=True, hint=hint) == {
        "greedy": ("baseline", {}, {}),
        "amateur alone": ("control", {}, {"alone": "amateur"}),
        "greedy, OLM": ("control", {}, {"against": ("greedy",), "modified": True}),
        "greedy, PBA": ("control", {}, {"against": ("greedy",), "hint": hint}),
        "greedy, mask 0.3": ("control", {}, {"same_as": "greedy"}),
        "greedy, yes as cd alpha=0.3 beta=1": (
            "control",
            {},
            {"against": ("greedy",), "matched_to": "cd alpha=0.3 beta=1"},
        ),
        "cd alpha=0.3 beta=1": (
            "method",
            {"method": "cd", **AMATEUR, "alpha": 0.3, "beta": 1},
            {"against": ("greedy", "greedy, OLM", "greedy, PBA", "greedy, yes as cd alpha=0.3 beta=1")},
        ),
    }
    without = _rows(generation_rows, "vcd", sampled=False, yes_no=True)
    assert "greedy, OLM" in without
    assert "greedy, PBA" not in without
    assert list(_rows(generation_rows, "vcd", sampled=False, hint=hint)) == ["greedy", "greedy, mask 0.1", "vcd"]
    assert (OLM_MASS, OLM_DISTANCE) == (0.2, 0.5)


def test_sampled_rows():
    options = {"method": "cd", **AMATEUR, "beta": 1, "alpha": 0.5}
    found = _rows(generation_rows, "cd beta=1 alpha=0.5", "search", sampled=True)
    sampled = dict(list(found.items())[list(found).index("sampling") :])
    assert sampled == {
        "sampling": ("baseline", HOT, {}),
        "sampling, mask 0.5": ("control", {**HOT, "min_p": 0.5}, {"against": ("sampling",)}),
        "sampling, mask 0.5, T 0.5": ("control", {"temperature": 0.5, "min_p": 0.25}, {"against": ("sampling",)}),
        "cd beta=1 alpha=0.5, sampling": (
            "method",
            {**options, **HOT},
            {"against": ("sampling", "sampling, mask 0.5", "sampling, mask 0.5, T 0.5")},
        ),
    }
    assert "sampling, mask, T 0.5" in _rows(generation_rows, "cd beta=1", sampled=True)
    bare = _rows(generation_rows, "cad alpha=3 contrast_prompt=x", sampled=True)  # has no mask
    assert bare["sampling, T 0.25"] == ("control", {"temperature": 0.25}, {"against": ("sampling",)})
    assert not any("mask" in name for name in bare)


def test_rows_of_ranked_options():
    options, name = {"method": "cd", **AMATEUR, "beta": 1, "alpha": 0.3}, "cd beta=1 alpha=0.3"
    raw = {**options, "score": "raw"}
    assert _rows(ranking_rows, "cd beta=1 alpha=0.3", "search") == {
        "plain": ("baseline", {}, {}),
        "amateur alone": ("control", {}, {"alone": "amateur"}),
        f"{name}, uniform": ("control", {**options, "control": "uniform"}, {"against": ("plain",)}),
        name: ("method", options, {"against": ("plain", f"{name}, uniform")}),
        f"{name}, uniform, raw": ("control", {**raw, "control": "uniform"}, {"against": ("plain",)}),
        f"{name}, raw": ("method", raw, {"against": ("plain", f"{name}, uniform, raw")}),
        "plain, mask 0.3": ("control", {**options, "masked": True, "control": "mask"}, {"against": ("plain",)}),
        "cd beta=1 alpha=0.3, mask": (
            "method",
            {**options, "masked": True},
            {"against": ("plain", "plain, mask 0.3")},
        ),
    }
    assert list(_rows(ranking_rows, "cad contrast_prompt=x"))[1:] == [
        "cad, uniform",
        "cad",
        "cad, uniform, raw",
        "cad, raw",
    ]
    assert list(_rows(ranking_rows, "dola"))[1:] == ["dola", "dola, uniform, raw", "dola, raw", "dola, mask"]


def test_what_rows_of_ranked_options_say_of_themselves():
    notes = {row.name: row.note for row in ranking_rows([parse_decoder("cd", {"amateur": "testbed:amateur"})])}
    uniform = "the formula of cd with equal probabilities for amateur: sharpening alone"
    assert notes["cd, uniform"] == uniform
    assert (
        notes["cd, uniform, raw"] == f"{uniform}, and a constant for each token, which prefers options of many tokens"
    )
    assert notes["cd"] == "renormalised, no mask"
    assert notes["cd, raw"] == "the weighted sum itself, no mask"
    assert notes["plain, mask 0.1"] == "mask only"
    assert notes["cd, mask"] == "an implausible token counts for -1000"


def test_two_other_models_are_no_row():
    assert list(_rows(ranking_rows, "proxy expert=x antiexpert=y")) == ["plain", "proxy", "proxy, raw"]
    assert "amateur alone" not in _rows(generation_rows, "cd adapters_off=true amateur=", sampled=False)


@pytest.mark.parametrize(("beta", "alpha"), [(0.5, 0.1), (1, 0.3), (2, 0.6)])
def test_the_matched_temperature_samples_from_the_methods_mask(beta, alpha):
    """After the temperature, min_p keeps the tokens that the method's mask keeps before it."""
    text = f"cd beta={beta} alpha={alpha}"
    rows = _rows(generation_rows, text, sampled=True)
    logits = 3 * torch.randn(7, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = plausible(logits, alpha=alpha)
    for name, options, fields in [(name, *row[1:]) for name, row in rows.items() if "min_p" in row[1]]:
        p = (logits / options["temperature"]).softmax(-1)
        assert torch.equal(p >= options["min_p"] * p.amax(-1, keepdim=True), kept)
        assert fields == {"against": ("sampling",)}, name
    assert kept.sum(-1).amin() >= 1
    assert 7 < kept.sum() < 700
