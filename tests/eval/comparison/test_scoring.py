"""Kept answers of a task whose filters, metrics or functions have changed since: they are scored again, and never answered again."""

import json
import os
from types import SimpleNamespace

import pytest
from helpers.task_index import one_index  # noqa: F401  for every test here

from contralto.eval.comparison import scoring
from contralto.eval.comparison.runs import Runner
from contralto.eval.comparison.tasks import Conditions, load_tasks
from contralto.eval.metrics import METRICS
from contralto.eval.models.lm import ContraltoLM

YAML = """
task: sums
custom_dataset: !function sums.rows
test_split: test
output_type: generate_until
doc_to_text: "<|user|>{{question}}<|assistant|>"
doc_to_target: answer
num_fewshot: 0
generation_kwargs: {until: ["\\n"], max_gen_toks: 3}
process_results: !function sums.judge
metric_list: [{metric: good, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """
from datasets import Dataset, DatasetDict

def rows(**options):
    return DatasetDict(test=Dataset.from_list([{"question": "Mia has 3 nuts.", "answer": "5"}]))

def judge(doc, results):
    return {"good": GOOD}
"""
CONDITIONS = Conditions(seeds=())


@pytest.fixture
def lm():
    return ContraltoLM("testbed:expert", device="cpu", batch_size=2)


def _run(folder, lm, *, good, rule="", reuse=()):
    """Write a task, and return its metric with the runner that answered it."""
    (folder / "sums.yaml").write_text(YAML + rule, encoding="utf-8")
    path = folder / "sums.py"
    path.write_text(FUNCTIONS.replace("GOOD", str(good)), encoding="utf-8")
    _run.time += 10
    os.utime(path, (_run.time, _run.time))  # by which lm-eval knows that a module has changed
    (task,) = load_tasks([str(folder / "sums.yaml")], CONDITIONS, [], None, folder)
    runner = Runner(folder / "out", CONDITIONS, quiet=True, reuse=reuse)
    lm = lm.decoding_by()
    run = runner.run(lm, task, task.identities(task.requests(lm)), title="")
    return run, runner


_run.time = 1_600_000_000


def _messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("contralto")]


def test_changed_functions_score_kept_answers_again(tmp_path, lm, monkeypatch, caplog):
    first, runner = _run(tmp_path, lm, good=1)
    assert (first.samples[0].metrics, runner.reused) == ({"good": 1}, 0)
    monkeypatch.setattr(ContraltoLM, "_generate_batch", lambda *_: pytest.fail("answered twice"))
    same, runner = _run(tmp_path, lm, good=1)
    assert (same.samples[0].metrics, runner.reused, _messages(caplog)) == ({"good": 1}, 1, [])
    changed, runner = _run(tmp_path, lm, good=0)
    assert first.tokens > 0
    assert (changed.samples[0].metrics, runner.reused) == ({"good": 0}, 0)
    assert (changed.tokens, changed.seconds, changed.length) == (first.tokens, first.seconds, first.length)
    (message,) = _messages(caplog)
    assert message.startswith("sums: its filters, metrics or functions have changed since the answers in ")
    assert message.endswith("sums.jsonl were kept, which are scored again")
    assert _run(tmp_path, lm, good=0)[1].reused == 1
    filtered = "filter_list: [{name: first, filter: [{function: take_first}]}]\n"
    assert _run(tmp_path, lm, good=0, rule=filtered)[1].reused == 0
    assert len(_messages(caplog)) == 2


def test_runs_of_an_earlier_version_are_taken_as_they_are(tmp_path, lm, caplog):
    _run(tmp_path, lm, good=1)
    (path,) = (tmp_path / "out" / "runs").rglob("sums.json")
    about = json.loads(path.read_text(encoding="utf-8"))
    del about["scoring"]
    path.write_text(json.dumps(about), encoding="utf-8")
    run, runner = _run(tmp_path, lm, good=0)
    assert (run.samples[0].metrics, runner.reused, _messages(caplog)) == ({"good": 1}, 1, [])


def test_samples_that_lm_eval_logged_by_other_functions_are_left_out():
    config = {"process_results": "def judge(): return 1\n", "metric_list": [{"metric": "good"}]}
    task = SimpleNamespace(dump_config=lambda: config | {"task": "sums"})
    assert scoring.is_scored_alike(task, config | {"description": "another"})
    assert scoring.is_scored_alike(task, None)
    assert not scoring.is_scored_alike(task, config | {"process_results": "def judge(): return 0\n"})
    assert not scoring.is_scored_alike(task, config | {"filter_list": []})


def test_a_registered_metric_is_known_by_its_source(monkeypatch):
    task = SimpleNamespace(config=SimpleNamespace(filter_list=None, metric_list=[{"metric": "distinct_2"}]))
    known = next(name for name in METRICS.names() if METRICS.get(name).document)
    task.config.metric_list[0]["metric"] = known
    before = scoring.scoring_digest(task)
    monkeypatch.setattr(scoring, "source_digest", lambda function: f"another {function.__module__}")
    assert scoring.scoring_digest(task) != before
    task.config.metric_list[0]["metric"] = "exact_match"
    plain = scoring.scoring_digest(task)
    monkeypatch.undo()
    assert scoring.scoring_digest(task) == plain
