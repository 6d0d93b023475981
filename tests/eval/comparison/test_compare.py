"""Comparisons: made-up answers against plain arithmetic; runs on the embedded models, interrupted and resumed."""

import argparse
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import comparisons
from helpers.task_index import one_index  # noqa: F401  for every test here
from PIL import Image

from contralto.cli import compare as command
from contralto.decoding import methods
from contralto.eval import stats
from contralto.eval.comparison import compare
from contralto.eval.comparison.answers import modified_answers
from contralto.eval.comparison.columns import Column, gather
from contralto.eval.comparison.controls import generation_rows, ranking_rows
from contralto.eval.comparison.decoders import parse_decoder
from contralto.eval.comparison.planning import Subject
from contralto.eval.comparison.report.tabulate import tables
from contralto.eval.comparison.rows import ComparisonRow
from contralto.eval.comparison.samples import Identity, check_same_documents, read_samples
from contralto.eval.comparison.significance import adjust, smallest_difference
from contralto.eval.comparison.summary import summarise
from contralto.eval.comparison.tasks import Conditions, load_tasks
from contralto.eval.data import TASKS
from contralto.eval.metrics import chair, measure, openended
from contralto.eval.models.decoder import Decoder
from contralto.eval.models.lm import ContraltoLM

AMATEUR = {"amateur": "testbed:amateur"}
EXPERT = Subject("testbed:expert", AMATEUR)

# ------------------------------------------------------------------------------------------------------------- controls

WAYS = {
    "cd beta=0.7 alpha=0.2": (1, 0),
    "cd form=li alpha=0.2": (1, 0),
    "vcd alpha=2": (1, 0),
    "icd alpha=2 contrast_prompt=x": (1, 0),
    "ritual kappa=2": (1, 1),
    "ritual normalize=true": (1, 1),
    "ritual-vcd kappa=2 alpha=0.5": (1, 1, 0),
    "cid form=log_ratio lam=0.6 contrast_prompt=x": (1, 0),
    "cad alpha=0.4 contrast_prompt=x": (1, 0),
    "cfg guidance_scale=1.7": (1, 0),
    "dola form=jsd final_norm=false": (1, 0),
    "proxy alpha=0.8 expert=x antiexpert=y": (1, 1, 0),
    "sid alpha=2": (1, 0),
    "avisc alpha=2": (1, 0),
    "pai gamma=1.5": (1, 1, 0),
    "only alpha_pos=2": (1, 1),
    "only alpha_pos=0.5 alpha_neg=2": (1, 0),
}
"""Methods, and which of their branches add up: those that do believe the same, the others know nothing."""


@pytest.mark.parametrize("text", WAYS)
def test_mask_and_weight_are_those_of_the_rule(text):
    """Where branches agree and those subtracted know nothing, the rule is p^weight on the plausible tokens."""
    choice = parse_decoder(text, AMATEUR)
    torch.manual_seed(0)
    sure, flat = torch.randn(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    branches = [sure if added else flat for added in WAYS[text]]
    form = choice.config.declaration.forms[choice.config.form or ""]
    found = form.scores(branches, **choice.config.rule_parameters).softmax(-1)
    p, mask, weight = sure.softmax(-1), choice.config.mask, choice.config.weight
    expected = p**weight if mask is None else torch.where(p >= mask * p.max(), p**weight, 0)
    assert 5 < (expected > 0).sum() < (51 if mask is None else 50)  # else there is nothing to see
    assert torch.allclose(found, expected / expected.sum())


def test_every_row_can_be_decoded():
    choices = [
        parse_decoder(text, AMATEUR)
        for text in ("cd", "cd beta=1", "scd", "search", "dola", "vcd", "cid contrast_prompt=x")
    ]
    for rows in (generation_rows(choices, sampled=True, yes_no=True), ranking_rows(choices)):
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
        for row in rows:
            Decoder.of(**row.options, seed=1)
            assert {*row.against, row.same_as, row.matched_to, None} <= {*names, None}
            assert all(names.index(other) < names.index(row.name) for other in row.against if "yes as" not in row.name)
    assert [row.name for row in generation_rows(choices[3:4], sampled=True)] == ["greedy", "search", "sampling"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with its method"),
        ("beta=1 cd", "begins with its method"),
        ("none", "greedy decoding and sampling are compared anyway"),
        ("cd 0.5", "of the form name=value, not '0.5'"),
        (
            "cd score=raw",
            "decoder 'cd score=raw': leave score out, since every method is scored both renormalised and raw$",
        ),
        ("cd temperature=1", "leave temperature out, since every method is decoded both greedily and by sampling$"),
        ("cd beta=much", "beta must be a number, not 'much'"),
        ("cd kappa=1", "has no kappa"),
        ("voodoo", "there is no method 'voodoo'"),
        ("cad", "method='cad' contrasts prompts: set contrast_prompt"),
        ("proxy", "set expert"),
    ],
)
def test_a_decoder_that_is_none_is_refused(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        parse_decoder(text, AMATEUR)


@pytest.mark.slow
def test_masked_sampling_is_the_method_without_contrast():
    """The controls sample by min_p after the temperature; the method masks before it. The texts must be the same."""
    lm = ContraltoLM("testbed:expert", batch_size=20)
    task = _task("testbed_arithmetic", limit=20)
    requests = task.requests(lm)
    for row in generation_rows([parse_decoder("cd beta=0.5 alpha=0.3", AMATEUR)], sampled=True):
        if row.role == "control" and "mask" in row.name and row.is_sampled:
            whole = {"method": "cd", **AMATEUR, "beta": 0, "alpha": 0.3, "temperature": row.options["temperature"]}
            both = [lm.decoding_by(**how, seed=3).generate_until(requests, True) for how in (row.options, whole)]
            assert both[0] == both[1]
            bare = {"temperature": row.options["temperature"]}
            assert lm.decoding_by(**bare, seed=3).generate_until(requests, True) != both[0]


# ------------------------------------------------------------------------------------------------------------ documents


def _line(number=0, *, doc=None, prompt="Why?", target="because", said="so", name="none", **metrics):
    return {
        "doc_id": number,
        "doc": doc or {"text": "Why?"},
        "target": target,
        "arguments": [(prompt, {"until": ["\n"]})],
        "resps": [[said]],
        "filtered_resps": [said],
        "filter": name,
        "metrics": list(metrics or {"acc": 1.0}),
        "doc_hash": "x",
        "prompt_hash": "x",
        "target_hash": str(hash(target)),
        **(metrics or {"acc": 1.0}),
    }


def test_samples_in_memory_and_in_a_file_are_the_same(tmp_path):
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import hash_dict_images

    pictures = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    lines = [_line(i, doc={"image": picture, "text": "Why?"}) for i, picture in enumerate(pictures)]
    memory = read_samples(lines)
    tracker = EvaluationTracker(output_path=str(tmp_path / "x.json"))
    tracker.date_id = "now"
    tracker.save_results_samples("why", hash_dict_images({"why": lines})["why"])
    file = read_samples(json.loads(line) for line in (tmp_path / "samples_why_now.jsonl").read_text().splitlines())
    assert [sample.identity for sample in file] == [sample.identity for sample in memory]
    assert memory[0].identity.document != memory[1].identity.document
    assert [(s.answer, s.target, s.metrics) for s in file] == [("so", "because", {"acc": 1.0})] * 2


def test_where_an_object_lies_in_memory_is_no_part_of_a_document():
    class Sound: ...

    one, two = (read_samples([_line(doc={"sound": Sound()})])[0].identity for _ in range(2))
    assert one == two


def test_options_are_told_by_their_likelihoods():
    line = _line(acc=0.0)
    line |= {"arguments": [("Why?", " no"), ("Why?", " yes")], "resps": [[["-3.0", "False"]], [["-1.5", "True"]]]}
    (sample,) = read_samples([line])
    assert (sample.answer, sample.chosen) == ("yes", {})


def test_each_metric_has_its_own_answer():
    """As lm-eval: totals, totals per character and per byte of an option, and totals less those without the prompt."""
    options = [" no", " yes indeed", " \u00e9\u00e9\u00e9\u00e9"]
    totals, alone = [-3.0, -8.0, -4.4], [-1.0, -7.5, -0.1]
    asked = [("Why?", option) for option in options] + [("", option) for option in options]
    line = _line(acc=0.0, acc_norm=1.0, acc_bytes=0.0, acc_mutual_info=0.0)
    line |= {"arguments": asked, "resps": [[[total, False]] for total in totals + alone]}
    (sample,) = read_samples([line])
    assert sample.answer == "no"
    assert sample.chosen == {"acc_norm": "yes indeed", "acc_bytes": "\u00e9" * 4, "acc_mutual_info": "yes indeed"}
    line["metrics"] = ["acc", "acc_norm"]
    line |= {"arguments": [("Why?", " a"), ("Why?", " bbbb")], "resps": [[[-1.0, False]], [[-3.2, False]]]}
    found = [read_samples([line], delimiter=delimiter)[0].chosen for delimiter in (" ", "")]
    assert found == [{"acc_norm": "bbbb"}, {"acc_norm": "a"}]  # the space is no part of an option


def test_filters_are_told_apart():
    lines = [_line(0, name="strict", said="[invalid]"), _line(0, name="flexible")]
    assert read_samples(lines)[0].is_invalid
    assert not read_samples(lines, filter_name="flexible")[0].is_invalid
    with pytest.raises(ValueError, match="no filter 'lax': it has strict, flexible"):
        read_samples(lines, filter_name="lax")
    with pytest.raises(ValueError, match="there are no samples"):
        read_samples([])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([_line(0), _line(1, doc={"text": "Who?"})], "1 of 2 differ, the first .number 1. in its document;"),
        ([_line(0, prompt="Why not?"), _line(1)], "the first .number 0. in its prompt;"),
        ([_line(0, target="chance"), _line(1)], "the first .number 0. in its target;"),
        ([_line(0)], "B answers 1 documents of why, and the comparison has 2"),
    ],
)
def test_answers_to_other_questions_are_not_paired(other, message):
    one = [sample.identity for sample in read_samples([_line(0), _line(1)])]
    two = [sample.identity for sample in read_samples(other)]
    check_same_documents(one, one, task="why", source="A")
    with pytest.raises(ValueError, match=message):
        check_same_documents(one, two, task="why", source="B")


# ------------------------------------------------------------------------------------------------------------- measures


def test_measures_of_captions_and_texts_equal_the_pure_functions():
    rng = random.Random(0)
    counts = [[said := rng.randrange(5), rng.randrange(said + 1), rng.randrange(3), 3] for _ in range(30)]
    rates = chair.rates([chair.CaptionCounts(*row) for row in counts])
    for name in ("chair_i", "chair_s", "recall"):
        table, metric, is_binary, _ = measure(name, counts)
        assert float(metric(table.sum(0))) == pytest.approx(getattr(rates, name))
        assert not is_binary
    grams = [[[rng.randrange(1, 9), 9] for _ in range(3)] for _ in range(20)]
    table, metric, *_ = measure("diversity", grams)
    assert float(metric(table.sum(0))) == pytest.approx(openended.diversity(grams))
    table, metric, *_ = measure("rep_2", [row[0] for row in grams])
    assert float(metric(table.sum(0))) == pytest.approx(openended.repetition([row[0] for row in grams]))
    table, metric, *_ = measure("word_perplexity", [(-10.0, 4), (-6.0, 4)])
    assert float(metric(table.sum(0))) == pytest.approx(math.exp(2))
    with pytest.raises(ValueError, match="the metric bleu is kept as"):
        measure("bleu", [["a", "b"]])


# ------------------------------------------------------------------------------------------------------------- summaries


@pytest.fixture(scope="module")
def answered():
    """Yes-or-no questions with all rows, and their summary."""
    docs, rows = comparisons.documents(120), comparisons.rows(yes_no=True)
    column = comparisons.column("one", rows, docs, seeds=2, skill={"cd beta=0.5": 0.95})
    task = comparisons.task(yes_no=True, cluster="image")
    summary = summarise(task, rows, [column], resamples=300)
    return docs, column, summary, {row["name"]: row["cells"]["one"] for row in summary["rows"]}


def _said(column, row, seed=0):
    return [sample.metrics["f1"][1] for sample in column.runs[row][seed].samples]


def test_scores_are_shares_with_clustered_intervals(answered):
    docs, column, summary, cells = answered
    hits = [said is doc["label"] for said, doc in zip(_said(column, "dola"), docs, strict=True)]
    expected = stats.proportion(hits, clusters=[doc["image"] for doc in docs])
    assert tuple(cells["dola"]["score"].values()) == expected[:3]
    assert (summary["kind"], summary["items"], summary["clusters"]) == ("yes_no", 120, 30)
    assert {test["power"]["units"] for test in cells["cd beta=0.5"]["tests"]} == {30}
    each = [
        sum(said is doc["label"] for said, doc in zip(_said(column, "dola, sampling", s), docs, strict=True)) / 120
        for s in range(2)
    ]
    assert cells["dola, sampling"]["per_seed"] == pytest.approx(each)
    assert cells["dola, sampling"]["score"]["value"] == pytest.approx(sum(each) / 2)
    assert cells["greedy, mask 0.1"]["score"] == cells["greedy"]["score"]


def test_two_seeds_of_a_document_are_not_two_documents():
    docs, rows = comparisons.documents(40), comparisons.rows(yes_no=True)
    column = comparisons.column("one", rows, docs, seeds=2)
    column.runs["cd beta=0.5"] = column.runs["greedy"]
    column.runs["dola, sampling"][1] = column.runs["dola, sampling"][0]
    summary = summarise(comparisons.task(yes_no=True), rows, [column], resamples=10)
    cells = {row["name"]: row["cells"]["one"] for row in summary["rows"]}
    hits = [hit for seed in range(2) for hit in _hits(column, "dola, sampling", docs, seed)]
    expected = stats.proportion(hits, clusters=[*range(40)] * 2)[:3]
    assert tuple(cells["dola, sampling"]["score"].values()) == expected != stats.proportion(hits)[:3]
    alone = _hits(column, "greedy", docs)
    assert tuple(cells["greedy"]["score"].values()) == stats.proportion(alone)[:3]
    (test,) = (test for test in cells["cd beta=0.5"]["tests"] if test["against"] == "greedy")
    assert test["power"] == {"units": 40, "apart": 0, "error": 0.0}  # no answer differs
    assert test["detectable"] == stats.detectable(40, 0.0)


def test_where_no_unit_differs_the_smallest_difference_is_that_of_whole_answers():
    nothing = {"units": 60, "apart": 0, "error": 0.0}
    assert smallest_difference(nothing) == stats.detectable(60, 0.0)
    assert smallest_difference(nothing, level=0.2) == stats.detectable(60, 0.0, level=0.2)
    some = {"units": 60, "apart": 20, "error": 0.05}
    assert smallest_difference(some, level=0.2) == stats.detectable_by_error(0.05, units=60, apart=20, level=0.2)
    assert smallest_difference(some, level=0.2) < smallest_difference(some)


@pytest.mark.parametrize(("control", "own"), [(1.0, 0.5), (0.5, 1.0), (0.5, 0.5)])
def test_documents_are_won_only_by_whole_answers(control, own):
    docs = comparisons.documents(20)
    rows = [ComparisonRow(name="greedy", role="baseline"), ComparisonRow(name="cd", role="method", against=("greedy",))]
    column = Column("one")
    for name, value in (("greedy", control), ("cd", own)):
        scores = [{"acc": value * (i % 3 > 0)} for i in range(20)]
        column.runs[name] = [comparisons.run(docs, [None] * 20, metrics=scores)]
    made = summarise(comparisons.task(bucket=None), rows, [column], resamples=100)
    (test,) = made["rows"][1]["cells"]["one"]["tests"]
    assert "won" not in test
    assert (test["power"] is None) is (control == own)  # no document differs, and the power of such a test is not known


def _hits(column, row, docs, seed=0):
    return np.array([float(s is d["label"]) for s, d in zip(_said(column, row, seed), docs, strict=True)])


def test_tests_are_exact_and_of_all_seeds(answered):
    docs, column, _, cells = answered
    tests = {test["against"]: test for test in cells["cd beta=0.5"]["tests"]}
    assert list(tests) == ["greedy", "greedy, OLM", "greedy, yes as cd beta=0.5"]
    one, two = (
        [s is d["label"] for s, d in zip(_said(column, r), docs, strict=True)] for r in ("greedy", "cd beta=0.5")
    )
    won, lost = (
        sum(b and not a for a, b in zip(one, two, strict=True)),
        sum(a and not b for a, b in zip(one, two, strict=True)),
    )
    found = tests["greedy"]
    assert (found["won"], found["lost"], found["test"], found["exact"]) == (won, lost, "sign flip", True)
    clusters = [doc["image"] for doc in docs]
    change = _hits(column, "cd beta=0.5", docs) - _hits(column, "greedy", docs)
    assert found["p"] == stats.sign_flip(change, clusters=clusters).p != stats.sign_flip(change).p
    sums = stats.by_cluster(change[:, None], clusters)
    assert found["power"]["error"] == pytest.approx(math.sqrt((sums**2).sum()) / 120)
    sampled = {test["against"]: test for test in cells["cd beta=0.5, sampling"]["tests"]}
    assert list(sampled) == ["sampling", "sampling, mask 0.1", "sampling, mask, T 0.667"]
    seeds = sampled["sampling"]["per_seed"]
    change = [_hits(column, "cd beta=0.5, sampling", docs, s) - _hits(column, "sampling", docs, s) for s in range(2)]
    assert sampled["sampling"]["p"] == stats.sign_flip(sum(change), clusters=clusters).p
    assert sampled["sampling"]["exact"]
    first = [_hits(column, row, docs) > 0 for row in ("cd beta=0.5, sampling", "sampling")]
    assert (seeds[0]["won"], seeds[0]["lost"]) == ((first[0] & ~first[1]).sum(), (first[1] & ~first[0]).sum())
    assert (sampled["sampling"]["won"], sampled["sampling"]["lost"]) == tuple(
        sum(s[k] for s in seeds) for k in ("won", "lost")
    )


def test_f1_and_yes_ratio_are_of_the_answers(answered):
    docs, column, _, cells = answered
    said, labels = _said(column, "cd beta=0.5"), [doc["label"] for doc in docs]
    counts = stats.yes_no_table(labels, said).sum(0)
    metrics = cells["cd beta=0.5"]["metrics"]
    assert metrics["f1"]["value"] == pytest.approx(float(stats.f1(counts)))
    assert metrics["yes_ratio"]["value"] == pytest.approx(sum(s is True for s in said) / 120)
    assert cells["cd beta=0.5"]["unparsed"] == pytest.approx(sum(s is None for s in said) / 120)
    greedy = stats.yes_no_table(labels, _said(column, "greedy"))
    clusters = [doc["image"] for doc in docs]
    both = stats.Bootstrap({0: greedy, 1: stats.yes_no_table(labels, said)}, clusters=clusters, resamples=300)
    found = next(t for t in cells["cd beta=0.5"]["tests"] if t["against"] == "greedy")
    for name, metric in (("f1", stats.f1), ("yes_ratio", stats.yes_ratio)):
        expected = both.difference(0, 1, metric)
        assert [found[name][k] for k in ("value", "low", "high")] == pytest.approx(expected[:3])
        two = stats.yes_no_table(labels, said)
        assert found[name]["p"] == pytest.approx(
            stats.swap(greedy, two, metric, clusters=clusters, resamples=300).p, abs=0.1
        )
    assert found["f1"]["p"] == stats.swap(greedy, two, stats.f1, clusters=clusters, resamples=300).p
    assert found["yes_ratio"]["exact"]


def test_the_bias_matched_row_says_yes_as_often(answered):
    docs, column, _, cells = answered
    yes = sum(said is True for said in _said(column, "dola"))
    lean = column.margins["greedy"]
    chosen = set(sorted(range(120), key=lambda i: -lean[i])[:yes])
    right = sum((i in chosen) == doc["label"] for i, doc in enumerate(docs))
    matched = cells["greedy, yes as dola"]
    assert matched["metrics"]["yes_ratio"]["value"] == pytest.approx(yes / 120)
    assert matched["score"]["value"] == pytest.approx(right / 120)


def test_auroc_is_compared_with_greedy(answered):
    docs, column, _, cells = answered
    labels, clusters = [doc["label"] for doc in docs], [doc["image"] for doc in docs]
    assert cells["dola"]["auroc"]["value"] == stats.auroc(column.margins["dola"], labels)
    expected = stats.auroc_difference(column.margins["greedy"], column.margins["dola"], labels, clusters=clusters)
    assert cells["dola"]["auroc"]["difference"] == expected._asdict()
    assert "difference" not in cells["greedy"]["auroc"]


def test_buckets_are_in_their_order_and_add_up(answered):
    docs, column, summary, cells = answered
    assert summary["buckets"] == ["2", "10"]
    for bucket in summary["buckets"]:
        inside = [i for i, doc in enumerate(docs) if doc["steps"] == bucket]
        rates = [sum(_said(column, r)[i] is docs[i]["label"] for i in inside) / len(inside) for r in ("greedy", "dola")]
        found = cells["dola"]["buckets"][bucket]
        assert found["items"] == len(inside)
        assert (found["value"], found["gain"]) == (pytest.approx(rates[1]), pytest.approx(rates[1] - rates[0]))
        assert found["low"] <= found["gain"] <= found["high"]


def test_disagreements_are_shown_in_both_directions(answered):
    shown = answered[2]["documents"]["one"]
    assert 0 < len(shown) <= 24
    for document in shown:
        scores = [said["score"] for said in document["said"]]
        assert len(set(scores)) > 1
        assert document["said"][0]["row"] == "greedy"
    assert {document["said"][0]["score"] for document in shown} == {0.0, 1.0}


@pytest.mark.slow
def test_holm_is_over_splits_and_models_of_one_line():
    tasks = comparisons.comparison()["tasks"]
    family = [
        test
        for row in tasks[0]["rows"]
        if row["name"] == "dola"
        for cell in row["cells"].values()
        for test in cell["tests"]
        if test["against"] == "greedy"
    ]
    assert len(family) == 2
    assert [t["holm"] for t in family] == pytest.approx(stats.holm([t["p"] for t in family]).tolist())
    assert [t["f1"]["holm"] for t in family] == pytest.approx(stats.holm([t["f1"]["p"] for t in family]).tolist())


def test_holm_is_over_tasks_of_a_kind():
    def task(kind, *ps):
        cells = {
            str(i): {
                "tests": [{"against": "greedy", "p": p, "f1": {"p": p / 2}}],
                "auroc": {"difference": {"p": p / 4}},
            }
            for i, p in enumerate(ps)
        }
        return {
            "kind": kind,
            "rows": [
                {"name": "cd", "cells": cells},
                {"name": "vcd", "cells": {"0": {"tests": [{"against": "greedy", "p": 0.05}]}}},
            ],
        }

    tasks = [task("generation", 0.01, 0.04), task("generation", 0.03), task("ranking", 0.02)]
    adjust(tasks)
    cells = [list(task["rows"][0]["cells"].values()) for task in tasks]
    tests = [[cell["tests"][0] for cell in some] for some in cells]
    expected = stats.holm([0.01, 0.04, 0.03])
    assert [test["holm"] for test in tests[0] + tests[1]] == pytest.approx(expected.tolist())
    assert [test["f1"]["holm"] for test in tests[0] + tests[1]] == pytest.approx(
        stats.holm([0.005, 0.02, 0.015]).tolist()
    )
    differences = [cell["auroc"]["difference"]["holm"] for cell in cells[0] + cells[1]]
    assert differences == pytest.approx(stats.holm([0.0025, 0.01, 0.0075]).tolist())
    assert [test["holm"] for test in tests[2]] == [0.02]
    others = [task["rows"][1]["cells"]["0"]["tests"][0]["holm"] for task in tasks]
    assert others == pytest.approx([0.1, 0.1, 0.05])


def test_other_metrics_are_compared_by_swapping_their_counts():
    docs = comparisons.documents(40)
    rows = [ComparisonRow(name="greedy", role="baseline"), ComparisonRow(name="cd", role="method", against=("greedy",))]
    rng, column = random.Random(1), Column("one")
    grams = {name: [[[rng.randrange(low, 9), 9]] * 3 for _ in docs] for name, low in (("greedy", 1), ("cd", 5))}
    for name, values in grams.items():
        column.runs[name] = [comparisons.run(docs, [None] * 40, metrics=[{"diversity": v} for v in values])]
    made = summarise(comparisons.task(metric="diversity", bucket=None), rows, [column], resamples=200)
    test = made["rows"][1]["cells"]["one"]["tests"][0]
    difference = openended.diversity(grams["cd"]) - openended.diversity(grams["greedy"])
    assert test["value"] == pytest.approx(difference)
    assert test["test"] == "swap"
    assert "won" not in test
    tables = [measure("diversity", grams[name]).table for name in ("greedy", "cd")]
    expected = stats.swap(*tables, measure("diversity", grams["cd"]).metric, resamples=200)
    assert test["p"] == expected.p


def test_one_run_against_several_seeds_of_its_control():
    docs = comparisons.documents(12)
    rows = [ComparisonRow(name="greedy", role="baseline"), ComparisonRow(name="cd", role="method", against=("greedy",))]
    column = Column("one")
    column.runs["cd"] = [comparisons.run(docs, [None] * 12, metrics=[{"acc": float(i < 8)} for i in range(12)])]
    column.runs["greedy"] = [
        comparisons.run(docs, [None] * 12, metrics=[{"acc": float(i < k)} for i in range(12)]) for k in (4, 6)
    ]
    made = summarise(comparisons.task(bucket=None), rows, [column], resamples=50)
    (test,) = made["rows"][1]["cells"]["one"]["tests"]
    assert test["value"] == pytest.approx(8 / 12 - 5 / 12)
    assert test["p"] == stats.sign_flip([2] * 2 + [1] * 2 + [0] * 8).p
    assert [(each["won"], each["lost"]) for each in test["per_seed"]] == [(4, 0), (2, 0)]


def test_what_is_said_of_a_task_and_its_runs():
    docs, column = comparisons.documents(6), Column("one")
    right = [{"acc": 1.0}] * 6
    column.runs["greedy"] = [comparisons.run(docs, [None] * 6, metrics=right)]
    column.runs["logged"] = [
        comparisons.run(docs, [None] * 6, metrics=right, tokens=tokens, seconds=seconds, length=length)
        for tokens, seconds, length in ((10, 0.5, 3.0), (30, 1.5, 5.0))
    ]
    baseline = [ComparisonRow(name="greedy", role="baseline")]
    for kind, options in (("text", {}), ("ranking", {"ranking": True})):
        made = summarise(comparisons.task(bucket=None, **options), baseline, [column], resamples=10, shown=0)
        assert (made["kind"], made["bucket"], made["buckets"]) == (kind, None, [])
    greedy, logged = made["rows"]
    assert (logged["role"], logged["note"]) == ("method", "from logged samples")
    assert [test["against"] for test in logged["cells"]["one"]["tests"]] == ["greedy"]
    cost = logged["cells"]["one"]["cost"]
    assert (cost["ms"], cost["tokens"]) == (50.0, 4.0)
    assert greedy["cells"]["one"]["cost"] == {"forwards": None, "flops": None, "ms": None, "tokens": None}
    for doc, steps in zip(docs, ["a10", "a9", "10", "9", "b", "9 c"], strict=True):
        doc["steps"] = steps
    made = summarise(comparisons.task(), baseline, [column], resamples=10)
    assert (made["bucket"], made["buckets"]) == ("steps", ["9", "9 c", "10", "a9", "a10", "b"])


@pytest.mark.parametrize("higher", [True, False])
def test_the_rival_is_the_best_row_that_is_no_control(higher):
    docs, column, shares = comparisons.documents(20), Column("one"), {"greedy": 9, "low": 3, "high": 6, "cd": 5}
    rows = [
        ComparisonRow(name="greedy", role="baseline"),
        ComparisonRow(name="low", role="control", against=("greedy",)),
        ComparisonRow(name="high", role="control", against=("greedy",)),
        ComparisonRow(name="cd", role="method", against=("greedy",)),
    ]
    for name, right in shares.items():
        column.runs[name] = [comparisons.run(docs, [None] * 20, metrics=[{"acc": float(i < right)} for i in range(20)])]
    made = summarise(comparisons.task(bucket=None, higher=higher), rows, [column], resamples=50)
    found = {row["name"]: row["cells"]["one"]["rival"] for row in made["rows"]}
    assert found["cd"]["against"] == ("high" if higher else "low")
    assert [found[name] for name in ("greedy", "low", "high")] == [None] * 3


def test_one_answer_per_document_is_mcnemars_test():
    """The same four documents: one p, whether the row has one seed or the metric is a mean."""
    docs = comparisons.documents(30)
    rows = [ComparisonRow(name="greedy", role="baseline"), ComparisonRow(name="cd", role="method", against=("greedy",))]
    wrong = [not doc["label"] if i < 4 else doc["label"] for i, doc in enumerate(docs)]
    for half in (1.0, 0.5):  # of another metric, the same differences halved
        column = Column("one")
        for name, said in (("greedy", wrong), ("cd", [doc["label"] for doc in docs])):
            scores = [{"acc": half * (answer is doc["label"])} for answer, doc in zip(said, docs, strict=True)]
            column.runs[name] = [comparisons.run(docs, said, metrics=scores)]
        made = summarise(comparisons.task(bucket=None), rows, [column], resamples=200)
        (test,) = made["rows"][1]["cells"]["one"]["tests"]
        assert (test["p"], test["exact"], test["units"]) == (0.125, True, 4)
        assert ("won" in test) is (half == 1)
        assert test["detectable"] == pytest.approx(half * stats.detectable(30, 4 / 30))


def test_seeds_count_once():
    """A row of several seeds against one of a single seed: its answers weigh as often."""
    docs = comparisons.documents(12)
    rows = [ComparisonRow(name="greedy", role="baseline"), ComparisonRow(name="cd", role="method", against=("greedy",))]
    column = Column("one")
    column.runs["greedy"] = [
        comparisons.run(docs, [doc["label"] if i > 7 else not doc["label"] for i, doc in enumerate(docs)])
    ]
    column.runs["cd"] = [
        comparisons.run(docs, [doc["label"] if i < k or i > 7 else not doc["label"] for i, doc in enumerate(docs)])
        for k in (4, 6)
    ]
    made = summarise(comparisons.task(bucket=None), rows, [column], resamples=200)
    (test,) = made["rows"][1]["cells"]["one"]["tests"]
    assert test["p"] == stats.sign_flip([2] * 4 + [1] * 2 + [0] * 6).p == 2 / 2**6


# ----------------------------------------------------------------------------------------------------- spurious baselines


def test_output_layer_modification_says_yes_where_yes_and_no_are_close(answered):
    docs, column, _, cells = answered
    said = []
    for answer, (yes, no) in zip(_said(column, "greedy"), column.likelihoods["greedy"], strict=True):
        p, q = math.exp(yes), math.exp(no)
        said.append(True if p + q > 0.2 and abs(p - q) < 0.5 else answer)
    assert said != _said(column, "greedy")
    counts = stats.yes_no_table([doc["label"] for doc in docs], said).sum(0)
    found = cells["greedy, OLM"]
    assert (
        found["metrics"]["yes_ratio"]["value"]
        == float(stats.yes_ratio(counts))
        > cells["greedy"]["metrics"]["yes_ratio"]["value"]
    )
    assert found["score"]["value"] == pytest.approx(sum(s is d["label"] for s, d in zip(said, docs, strict=True)) / 120)
    assert [test["against"] for test in found["tests"]] == ["greedy"]


def test_unlikely_words_leave_an_answer_as_it_is():
    pairs = [(True, None), (True, False), (False, False), (True, False)]
    words = [(math.log(yes), math.log(no)) for yes, no in ((0.05, 0.1), (0.2, 0.65), (0.1, 0.7), (0.3, 0.3))]
    assert modified_answers(pairs, words) == [None, True, False, True]


def test_prompt_based_adjustment_asks_for_yes_after_the_question():
    task = _task("testbed_arithmetic", limit=2)
    lm = ContraltoLM("testbed:expert", device="cpu")
    plain, hinted = task.requests(lm), task.hinted(" Answer yes.").requests(lm)
    texts = [[request.args[0] for request in asked] for asked in (plain, hinted)]
    assert texts[1] == [text + " Answer yes." for text in texts[0]]
    assert texts[0] == [request.args[0] for request in task.requests(lm)]  # the task itself is as it was


def test_under_a_chat_template_the_sentence_is_inside_the_turn(tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"question": "Is it red?", "answer": "yes"}\n', encoding="utf-8")
    (tmp_path / "asked.yaml").write_text(
        f"task: asked\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/asked.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\nnum_fewshot: 0\n"
        "generation_kwargs: {until: ['x']}\nmetric_list: [{metric: exact_match}]\n",
        encoding="utf-8",
    )
    lm = ContraltoLM("testbed:expert", device="cpu")
    (asked,) = _task(str(tmp_path / "asked.yaml"), chat=True).hinted(" Answer yes.").requests(lm)
    assert asked.args[0] == lm.apply_chat_template([{"role": "user", "content": "Is it red? Answer yes."}])


def test_pope_names_the_sentence_and_its_rows():
    text = (TASKS / "pope/_pope").read_text(encoding="utf-8")
    assert 'yes_hint: " Answer yes whenever possible."' in text
    rows = {row.name: row for row in generation_rows([parse_decoder("vcd")], sampled=False, yes_no=True, hint=" Yes!")}
    assert rows["greedy, PBA"].hint == " Yes!"
    assert rows["greedy, PBA"].is_run
    assert not rows["greedy, OLM"].is_run
    assert rows["vcd"].against == ("greedy", "greedy, OLM", "greedy, PBA", "greedy, yes as vcd")
    assert "greedy, OLM" not in {row.name for row in generation_rows([parse_decoder("vcd")], sampled=False)}


# ---------------------------------------------------------------------------------------------------- every method is known


def test_a_copy_of_a_method_has_all_its_controls(registered):
    """A copy of VCD under another name has the controls of VCD."""
    registered(replace(methods.METHODS["vcd"], name="vcd-again"))
    again, vcd = parse_decoder("vcd-again"), parse_decoder("vcd")
    for rows in (
        lambda choice: generation_rows([choice], sampled=True, yes_no=True),
        lambda choice: ranking_rows([choice]),
    ):
        own = [
            (row.name.replace("vcd-again", "vcd"), row.role, row.note.replace("vcd-again", "vcd"))
            for row in rows(again)
        ]
        assert own == [(row.name, row.role, row.note) for row in rows(vcd)]
        assert len(own) > 4


@pytest.mark.parametrize(
    ("name", "form"),
    [(m.name, name) for m in methods.METHODS.values() for name, form in m.forms.items() if form.off],
)
def test_what_turns_the_contrast_off_leaves_the_mask(name, form):
    """Then the rule is p on the plausible tokens, whatever the other branches say."""
    method = methods.METHODS[name].forms[form]
    torch.manual_seed(1)
    branches = [torch.randn(1, 40, dtype=torch.float64) for _ in methods.METHODS[name].branches]
    given = {method.mask: 0.3, **method.off}
    found, p = method.scores(branches, **given).softmax(-1), branches[0].softmax(-1)
    expected = torch.where(p >= 0.3 * p.max(), p, 0)
    assert torch.allclose(found, expected / expected.sum())


def test_a_metric_that_is_not_there_is_refused():
    docs, rows = comparisons.documents(8), comparisons.rows(sampled=False)
    with pytest.raises(ValueError, match="invented has no metric 'bleu': its samples have acc, f1"):
        summarise(comparisons.task(metric="bleu"), rows, [comparisons.column("one", rows, docs)])


def test_words_that_a_tokenizer_does_not_distinguish_are_refused():
    """A word-level tokenizer that does not know "Yes" and "No" reads both as the unknown token: every margin would be zero."""
    lm = SimpleNamespace(tok_encode=lambda word, **_: [{"yes": 5, "no": 6}.get(word, 1)])
    task = SimpleNamespace(name="pope", yes_no=["Yes", "No"], has_images=False, requests=lambda lm: [])
    with pytest.raises(ValueError, match="'Yes' and 'No' of pope are the same tokens"):
        gather(lm, "one", task, [], None)
    task.yes_no = ["yes", "no"]
    assert gather(lm, "one", task, [], None).runs == {}


def test_images_of_pope_may_lie_outside_the_data_folder(tmp_path):
    """The option `coco_images` reaches the checks of the data folder, as in `contralto eval`."""
    (tmp_path / "pope").mkdir()
    row = {"question_id": 1, "image": "1.png", "text": "Is there a dog in the image?", "label": "yes"}
    (tmp_path / "pope" / "coco_pope_random.json").write_text(json.dumps(row))
    images = tmp_path / "elsewhere"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "1.png")
    conditions = Conditions(metadata={"coco_images": str(images)})
    (task,) = load_tasks(["pope_coco_random"], conditions, [], tmp_path, tmp_path / "out")
    assert task.task.test_docs()[0]["image"] == "1.png"


# ------------------------------------------------------------------------------------------------------------ real runs


def _task(name, **conditions):
    (task,) = load_tasks([name], Conditions(**conditions), [], None, None)
    return task


def _compare(output, *, tasks=("testbed_arithmetic",), decoders=("cd",), limit=8, seeds=(0,), batch=4, **how):
    conditions = Conditions(limit=limit, seeds=seeds, metadata={"n": 40})
    return compare.compare(
        [EXPERT], list(tasks), list(decoders), output=output, conditions=conditions,
        model_args={"batch_size": batch}, quiet=True, **how,
    )  # fmt: skip


def _figures(comparison):
    """All but what is measured in time."""
    told = json.loads(json.dumps(comparison["tasks"]))
    for task in told:
        for row in task["rows"]:
            for cell in row["cells"].values():
                cell["cost"].pop("ms")
    return told


@pytest.mark.slow
@pytest.mark.usefixtures("one_metered")
def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = _compare(tmp_path / "whole", tasks=("testbed_arithmetic", "testbed_stories"))
    assert whole["reused"] == 0
    written, write = [], ContraltoLM._generate_batch

    def counted(self, jobs):
        if len(jobs) > 1:  # costs are counted one by one
            if len(written) == 3:
                raise KeyboardInterrupt
            written.append(len(jobs))
        return write(self, jobs)

    monkeypatch.setattr(ContraltoLM, "_generate_batch", counted)
    with pytest.raises(KeyboardInterrupt):  # in the second run, after one of its two batches
        _compare(tmp_path / "parts", tasks=("testbed_arithmetic", "testbed_stories"))
    rest = []
    monkeypatch.setattr(ContraltoLM, "_generate_batch", lambda self, jobs: rest.append(len(jobs)) or write(self, jobs))
    again = _compare(tmp_path / "parts", tasks=("testbed_arithmetic", "testbed_stories"))
    assert _figures(again) == _figures(whole)
    assert again["reused"] == 1
    answers = 7 * 8  # greedy, amateur, cd, sampling, two controls, cd sampled
    metered = [count for count in rest if count == 1]
    assert sum(rest) - len(metered) == answers - 3 * 4

    monkeypatch.setattr(ContraltoLM, "_generate_batch", lambda *_: pytest.fail("answered twice"))
    assert _compare(tmp_path / "parts", tasks=("testbed_arithmetic", "testbed_stories"))["reused"] == 7 + 8

    path = next((tmp_path / "parts" / "runs").rglob("testbed_arithmetic.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["doc"]["question"] = "another"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        ValueError,
        match="testbed_arithmetic: 1 of 8 differ, the first",
    ):
        _compare(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.usefixtures("one_metered")
def test_runs_that_lm_eval_logged_are_taken(tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    tracker = EvaluationTracker(output_path=str(tmp_path / "logged"))
    manager = TaskManager(include_path=[str(TASKS)], include_defaults=False, metadata={"n": 40})
    arguments = {"pretrained": "testbed:expert", "method": "cd", **AMATEUR, "batch_size": 4}
    results = lm_eval.simple_evaluate(
        "contralto",
        arguments,
        ["testbed_arithmetic"],
        limit=12,
        task_manager=manager,
        evaluation_tracker=tracker,
        bootstrap_iters=0,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    tracker.save_results_samples("testbed_arithmetic", samples["testbed_arithmetic"])
    found = _compare(tmp_path / "out", seeds=(), reuse=[tmp_path / "logged"], logged={"earlier": tmp_path / "logged"})
    assert found["reused"] == 1  # twelve documents, of which eight are compared
    cells = {row["name"]: row["cells"]["expert"] for row in found["tasks"][0]["rows"]}
    assert cells["earlier"]["score"] == cells["cd"]["score"]
    assert cells["earlier"]["tests"][0]["against"] == "greedy"
    with pytest.raises(ValueError, match="answers 12 documents of testbed_arithmetic, and the comparison has 20"):
        _compare(tmp_path / "out", limit=20, seeds=(), logged={"earlier": tmp_path / "logged"})
    with pytest.raises(ValueError, match="has no samples_testbed_stories_"):
        _compare(tmp_path / "out", tasks=("testbed_stories",), logged={"earlier": tmp_path / "logged"})


@pytest.mark.slow
def test_images_and_texts_in_one_comparison(tmp_path):
    seeing = Subject("testbed:vision-0", AMATEUR)  # which only the texts need
    conditions = Conditions(limit=12, seeds=(0,), metadata={"n": 4})
    found = compare.compare(
        [EXPERT, seeing], ["testbed_stories", "testbed_scenes_random"], ["cd", "vcd"],
        output=tmp_path, conditions=conditions, model_args={"batch_size": 6}, quiet=True,
    )  # fmt: skip
    stories, scenes = found["tasks"]
    assert (stories["columns"], scenes["columns"]) == (["expert"], ["vision-0"])
    assert [row["name"] for row in stories["rows"]] == [
        "plain",
        "amateur alone",
        "cd, uniform",
        "cd",
        "cd, uniform, raw",
        "cd, raw",
        "plain, mask 0.1",
        "cd, mask",
    ]
    cells = {row["name"]: row["cells"]["vision-0"] for row in scenes["rows"]}
    assert "greedy, yes as vcd" in cells
    assert not any(name.startswith("cd") for name in cells)
    assert cells["vcd"]["cost"]["forwards"] == 2 * cells["greedy"]["cost"]["forwards"]
    assert cells["vcd"]["cost"]["flops"] == pytest.approx(2 * cells["greedy"]["cost"]["flops"], rel=0.1)
    assert 0.5 < cells["greedy"]["auroc"]["value"] <= 1
    attention = scenes["attention"]["vision-0"]
    assert attention["documents"] == 8
    assert attention["late"]["aei_text"] > 0 < attention["late"]["mdi"]
    assert "attention" not in stories or not stories["attention"]
    (table,) = [each for each in tables(scenes) if each.title == "Attention to text and image"]
    assert table.rows[-1][2][0].main == f"{attention['all']['mdi']:.2f}"
    ranked = {row["name"]: row["cells"]["expert"] for row in stories["rows"]}
    assert ranked["cd, mask"]["ruled_out"] == ranked["plain, mask 0.1"]["ruled_out"] > 0
    assert ranked["plain, mask 0.1"]["cost"]["forwards"] == ranked["plain"]["cost"]["forwards"]
    assert all(
        picture.startswith("data:image/png;base64,")
        for d in scenes["documents"]["vision-0"]
        for picture in d["pictures"]
    )


# ------------------------------------------------------------------------------------------------------------ bad input


def _run(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(each) for each in argv]))


PLAIN = ["--model", "testbed:expert", "--tasks", "testbed_arithmetic", "--output"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "there is nothing to compare: name methods"),
        (["--methods", "cd"], "set amateur"),
        (["--methods", "voodoo"], "there is no method 'voodoo'"),
        (["--decoder", "dola relative_top=2"], "must lie in .0, 1."),
        (["--methods", "dola", "--decoder", "dola"], "the decoder 'dola' is given twice"),
        (["--methods", "vcd"], "none of the tasks is for the decoder 'vcd': it contrasts images"),
        (["--methods", "dola", "--seeds", "-1"], "--seeds must be at least 0, not -1"),
        (["--methods", "dola", "--limit", "0"], "--limit must be above 0, not 0"),
        (["--methods", "dola", "--samples", "x"], "--samples must be of the form NAME=DIR, not 'x'"),
        (["--methods", "dola", "--samples", "x=/nowhere"], "there is no folder /nowhere"),
        (["--methods", "dola", "--reuse", "/nowhere"], "there is no folder /nowhere"),
        (["--methods", "dola", "--model", "testbed:expert", "testbed:expert"], "testbed:expert is given twice"),
        (["--methods", "dola", "--model", "testbed:nobody"], "the testbed has no model 'nobody'"),
        (["--methods", "dola", "--tasks", "testbed_scenes_random"], "asks about images, and none of the models sees"),
        (
            ["--methods", "dola", "--model", "testbed:expert", "testbed:vision-0"],
            "none of the tasks is for testbed:vision-0",
        ),
        (["--methods", "cd", "--amateur", "./nothere"], "there is no folder ./nothere"),
        (["--methods", "cd", "--amateur", "testbed:vision-0"], "have different tokenizers"),
        (["--methods", "dola", "--batch-size", "0"], "batch_size must be a whole number of at least 1"),
        (["--methods", "dola", "--dtype", "float12"], "--dtype must be auto or a torch dtype"),
        (["--methods", "cd", "--amateur", "a", "b"], "--amateur takes one model for all or one for each of 1, not 2"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, more, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        _run(*PLAIN, tmp_path, *more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_unknown_metric_ends_the_first_run(tmp_path):
    how = ["--methods", "dola", "--metric", "bleu", "--limit", 2, "--metadata", '{"n": 2}']
    with pytest.raises(ValueError, match="testbed_arithmetic has no metric 'bleu'"):
        _run(*PLAIN, tmp_path, *how)
    assert len(list((tmp_path / "runs").rglob("*.jsonl"))) == 1


@pytest.mark.slow
def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no task 'testbed_arithmetics'"):
        _run("--model", "testbed:expert", "--tasks", "testbed_arithmetics", "--methods", "dola", "--output", tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_metered")
def test_the_command_writes_page_and_figures(tmp_path, capsys):
    how = ["--amateur", "testbed:amateur", "--methods", "cd", "--limit", 6, "--seeds", 1, "--metadata", '{"n": 20}']
    _run("--model", "testbed:expert", "--tasks", "testbed_arithmetic", "--output", tmp_path, *how)
    out = capsys.readouterr().out
    assert "cd over greedy" in out
    figures = json.loads((tmp_path / "compare.json").read_text())
    assert figures["tasks"][0]["items"] == 6
    assert "testbed_arithmetic" in (tmp_path / "compare.html").read_text()
    assert isinstance(figures["tasks"][0]["rows"][0]["cells"]["expert"]["score"]["value"], float)
    assert np.isfinite(figures["tasks"][0]["rows"][0]["cells"]["expert"]["cost"]["flops"])
    assert Identity._fields == ("document", "prompt", "target")
