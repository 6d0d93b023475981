"""The report of a distillation."""

import json
import re

import pytest
from datasets import Dataset

from contralto import cli, testbed
from contralto.align.monitoring import log_report
from contralto.align.monitoring.log_report import LOG, ONCE, figures_of_log, log_verdict, write_log_report
from contralto.align.monitoring.report import PAGE, PICTURE
from contralto.align.trainers.distillation import DistillationPairTrainer
from contralto.align.trainers.distillation_config import DistillationConfig
from contralto.testbed import worlds

ABOUT = {
    "model": "tiny <student>",
    "teacher": "large",
    "parameters": 2000,
    "trained": 100,
    "adapter": True,
    "device": "cpu",
    "processes": 2,
    "datasets": {"train_dataset": 40, "eval_dataset": None},
    "losses": ["distillm2"],
    "beta": 0.5,
    "batch": 8,
    "learning_rate": 1e-4,
    "settings": {"seed": 3},
    "versions": {"trl": "1"},
    "seconds": 61.2,
    "steps": 16,
    "done": 16,
}
LOGS = [
    {"step": step, "loss": 2.0 / step, "loss/chosen": 1.0 / step, "loss/rejected": 3.0 / step, "alpha/chosen": 0.1}
    for step in range(1, 17)
]
HELD = [{"step": 8, "eval_loss/chosen": 0.75}, {"step": 16, "eval_loss/chosen": 0.5}]


def pairs(count=6):
    problems = [problem for problem, _ in zip(worlds.problems(0, "train"), range(count), strict=False)]
    rows = [
        {
            "prompt": [{"role": "user", "content": problem.question}],
            "chosen": [{"role": "assistant", "content": problem.solution()}],
            "rejected": [{"role": "assistant", "content": problem.solution(stop_after=1)}],
        }
        for problem in problems
    ]
    return Dataset.from_list(rows)


def trainer(folder, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "report": True}
    small = {"per_device_train_batch_size": 3, "max_steps": 4, "logging_steps": 1, "loss_type": "skew_kl"}
    args = DistillationConfig(str(folder), **quiet | small | options)
    student, teacher = testbed.load("amateur"), testbed.load("expert")
    data = {"train_dataset": pairs(), "eval_dataset": pairs(3) if "eval_strategy" in options else None}
    return DistillationPairTrainer(student, teacher, args=args, processing_class=testbed.tokenizer(), **data)


@pytest.mark.slow
def test_a_distillation_writes_a_report(tmp_path, capsys, caplog):
    one = trainer(tmp_path, eval_strategy="steps", eval_steps=2, max_length=44)
    assert "rows prompt and completion are longer than max_length and lose their end" in caplog.text
    one.train()
    kept = json.loads((tmp_path / LOG).read_text(encoding="utf-8"))
    assert kept["logs"] == json.loads(json.dumps(one.state.log_history))
    assert (kept["about"]["done"], kept["about"]["losses"], kept["about"]["batch"]) == (4, ["skew_kl"], 3)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert (tmp_path / PICTURE).stat().st_size > 10_000
    assert log_verdict(kept["about"], kept["logs"]).replace("'", "&#39;") in page
    assert "(held-out)" in page
    assert "are longer than max_length and lose their end" in page
    for title in ("Loss", "Divergence from the teacher on the student", "Log-probability per token", "Gradient norm"):
        assert title in page
    first, last = (line["eval_loss/chosen"] for line in kept["logs"] if "eval_loss/chosen" in line)
    assert f"is {last:.3g}, and was {first:.3g} at the start" in page
    (tmp_path / PAGE).unlink()
    assert cli.main(["align", "report", str(tmp_path)]) == 0
    assert (tmp_path / PAGE).read_text(encoding="utf-8") == page
    assert f"report: {tmp_path / PAGE}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_report_that_fails_costs_no_model(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log_report, "write_picture", lambda *_: 1 / 0)
    trainer(tmp_path, max_steps=1).train()
    assert "the report could not be written: division by zero" in caplog.text
    assert (tmp_path / LOG).is_file()


@pytest.mark.slow
def test_the_page_of_a_run_that_was_killed(tmp_path):
    (tmp_path / LOG).write_text(json.dumps({"about": ABOUT | {"done": 9}, "logs": LOGS[:9]}), encoding="utf-8")
    page = write_log_report(tmp_path).read_text(encoding="utf-8")
    assert "tiny &lt;student&gt;" in page
    assert "9 of 16, 61 seconds" in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=.http", page)


def test_the_verdict_compares_ends_of_equal_kind():
    said = log_verdict(ABOUT, LOGS)
    first, last = sum(1 / step for step in range(1, 6)) / 5, sum(1 / step for step in range(12, 17)) / 5
    assert f"on the teacher's completions is {last:.3g}, and was {first:.3g} at the start" in said
    assert f"on the student's completions is {3 * last:.3g}, and was {3 * first:.3g} at the start (training)." in said
    assert "is 0.5, and was 0.75 at the start (held-out); " in log_verdict(ABOUT, [*LOGS, *HELD])
    assert log_verdict({"done": 3}, [{"step": 3, "loss": 1.0}]) == "After 3 steps."


def test_a_value_that_was_logged_once_has_no_start():
    logs = [{"step": 10, "loss": 0.5, "loss/chosen": 0.25}]
    assert log_verdict({"done": 12}, logs).endswith("on the teacher's completions is 0.25, logged once, in step 10.")
    assert figures_of_log(logs)[1] == ("Loss: training", [ONCE, "0.5", "1"])


@pytest.mark.parametrize(("content", "message"), [(None, f"there is no {LOG}"), ([], "holds no step")])
def test_folders_without_a_log(tmp_path, content, message):
    if content is not None:
        (tmp_path / LOG).write_text(json.dumps({"about": ABOUT, "logs": content}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        write_log_report(tmp_path)


def test_a_script_asks_for_the_report():
    assert DistillationConfig("out", report_to="none").report is None


def test_one_evaluation_is_no_change():
    assert log_verdict(ABOUT, [*LOGS, HELD[1]]) == log_verdict(ABOUT, LOGS)
