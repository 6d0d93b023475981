"""The registry of metrics: a metric of another package works in lm-eval and in comparisons from its declaration alone."""

import inspect
import json
import sys
from dataclasses import fields

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from contralto.eval import stats
from contralto.eval.comparison import compare
from contralto.eval.comparison.compare import Subject
from contralto.eval.comparison.runs import Conditions
from contralto.eval.metrics import METRICS, Metric, measure, register, register_in_lm_eval, unregister
from contralto.eval.metrics.base import is_counts, stack

DIGITS = """
from contralto.eval import stats
from contralto.eval.metrics.base import Metric, is_counts, stack

digits = Metric(
    name="digit_share",
    logged_as="digit_share",
    description="share of digits among the characters",
    accepts=lambda value: is_counts(value, 2),
    table=stack,
    value=lambda counts: stats.ratio(counts[..., 0], counts[..., 1]),
    numerators=None,
    higher_is_better=True,
    document=lambda answer, target: [sum(map(str.isdigit, answer)), len(answer)],
)
"""
TASK = """
task: counted
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: '<|user|>{{question}}<|assistant|>'
doc_to_target: answer
num_fewshot: 0
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: digit_share}]
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package with a metric, as far as entry points are concerned."""
    (tmp_path / "digits_package.py").write_text(DIGITS, encoding="utf-8")
    info = tmp_path / "digits_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: digits-package\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[contralto.metrics]\ndigit_share = digits_package:digits\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(METRICS, "_points", None)  # as in a process that starts now
    yield
    unregister("digit_share")
    sys.modules.pop("digits_package", None)


@pytest.fixture
def task(tmp_path):
    """Write a task that names the metric, and its documents."""
    rows = [{"question": f"Mia has {i} nuts. She finds 2 nuts. How many?", "answer": str(i + 2)} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "counted.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")), encoding="utf-8")
    return tmp_path / "counted.yaml"


def test_a_metric_of_another_package_works_in_lm_eval_and_in_a_comparison(installed, task, tmp_path):
    register_in_lm_eval()
    manager = TaskManager(include_path=[str(tmp_path)], include_defaults=False)
    arguments = {"pretrained": "testbed:expert", "device": "cpu"}
    from contralto.eval.models import lm  # noqa: F401  (registers the model)

    found = lm_eval.simple_evaluate("contralto", arguments, ["counted"], task_manager=manager, bootstrap_iters=0)
    answers = [sample["resps"][0][0] for sample in found["samples"]["counted"]]
    expected = sum(map(str.isdigit, "".join(answers))) / len("".join(answers))
    assert 0 < expected < 1
    assert found["results"]["counted"]["digit_share,none"] == pytest.approx(expected)

    compared = compare.compare(
        [Subject("testbed:expert", {})],
        [str(task)],
        ["dola"],
        output=tmp_path / "out",
        conditions=Conditions(seeds=()),
        model_args={"device": "cpu"},
        quiet=True,
    )
    (table,) = compared["tasks"]
    assert table["metric"] == "digit_share"
    cells = {row["name"]: row["cells"]["expert"] for row in table["rows"]}
    assert cells["greedy"]["score"]["value"] == pytest.approx(expected)
    assert cells["dola"]["tests"][0]["test"] == "swap"


@pytest.mark.parametrize("missing", [field.name for field in fields(Metric)])
def test_every_field_of_a_declaration_is_required(missing):
    complete = {field.name: getattr(METRICS["diversity"], field.name) for field in fields(Metric)}
    with pytest.raises(TypeError, match=missing):
        Metric(**{name: value for name, value in complete.items() if name != missing})


def test_a_metric_is_looked_up_by_the_form_of_its_values():
    captions, answers = [(3, 2, 1, 2), (1, 0, 1, 2)], [(True, True), (True, None), (False, True)]
    table, metric, *_ = measure("recall", captions)
    assert float(metric(table.sum(0))) == 2 / 4
    table, metric, *_ = measure("recall", answers)
    assert float(metric(table.sum(0))) == 1 / 2
    table, metric, _, numerators = measure("yes_ratio", answers)
    assert float(table[:, numerators].sum() / len(answers)) == float(metric(table.sum(0))) == 2 / 3


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="already a metric 'diversity'"):
        register(
            Metric(
                **{field.name: getattr(METRICS["rep_2"], field.name) for field in fields(Metric)}
                | {"name": "diversity"}
            )
        )
    with pytest.raises(TypeError, match=r"must be a .*Metric, not function"):
        register(lambda: None, name="anything")
    assert "anything" not in METRICS


def test_counts_are_flat_numbers():
    assert is_counts([1, 2.5], 2)
    assert not any(is_counts(value, 2) for value in ([True, False], [1], 1, "ab", [[1, 2], [3, 4]]))
    assert stack([[[1, 2], [3, 4]]]).tolist() == [[1, 2, 3, 4]]
    assert float(stats.ratio(stack([[0.0]])[0, 0], stack([[0.0]])[0, 0], empty=1.0)) == 1
    assert list(inspect.signature(Metric).parameters) == [field.name for field in fields(Metric)]
