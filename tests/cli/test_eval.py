"""`contralto eval`: lm-eval's flags pass through, several processes agree, and a kill loses nothing."""

import json
import os
import random
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import lm_eval
import pytest
import torch
from helpers.ranks import run_ranks
from helpers.task_index import one_index  # noqa: F401  for every test here
from lm_eval._cli.harness import HarnessCLI
from lm_eval.api.model import hash_args
from lm_eval.tasks import TaskManager
from sqlitedict import SqliteDict

from contralto import cli
from contralto.eval.data import TASKS
from contralto.eval.models.lm import ContraltoLM
from contralto.eval.models.vlm import ContraltoVLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
CD = ["pretrained=testbed:expert", "method=cd", "amateur=testbed:amateur"]
KILLS = int(os.environ.get("CONTRALTO_KILLS", "8"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def evaluate(*argv):
    """The command in process; its status."""
    before = sys.argv
    try:
        return cli.main(["eval", *map(str, argv)])
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before


def samples(folder):
    """Texts by document, of the run under a folder."""
    (file,) = Path(folder).rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["doc_id"]: row["resps"] for row in rows}


def results(folder):
    (file,) = Path(folder).rglob("results_*.json")
    return json.loads(file.read_text())


CALLS = {
    "a plain run": [
        *("--tasks", "testbed_arithmetic", "--model_args", *CD, "--limit", 4, "--batch_size", 4, "--device", "cpu"),
        *("--seed", "1,2,3,4", "--gen_kwargs", "max_gen_toks=80", "--verbosity", "ERROR", "--metadata", '{"n": 8}'),
        *("--write_out", "--show_config", "--num_fewshot", 0),
    ],
    "chosen documents": [
        *(
            "--model",
            "contralto",
            "--tasks",
            "testbed_arithmetic",
            "--model_args",
            ",".join(CD),
            "--batch_size",
            "auto",
        ),
        *(
            "--max_batch_size",
            3,
            "--samples",
            '{"testbed_arithmetic": [1, 3]}',
            "--predict_only",
            "--metadata",
            '{"n": 8}',
        ),
    ],
    "a chat": [
        *("--tasks", "testbed_arithmetic", "--model_args", *CD, "--limit", 2, "--apply_chat_template"),
        *(
            "--fewshot_as_multiturn",
            "true",
            "--trust_remote_code",
            "--metadata",
            '{"n": 4}',
            "--cache_requests",
            "refresh",
        ),
    ],
}
"""Calls that between them use most of lm-eval's flags; --config, --use_cache, --include_path and ls have tests of their own."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_flags_pass_through(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LM_HARNESS_CACHE_PATH", str(tmp_path / "requests"))
    assert evaluate(*CALLS[name], "--output_path", tmp_path / "out", "--log_samples") == 0
    found = results(tmp_path / "out")
    assert found["config"]["decoder"] == {
        "method": "cd",
        "amateur": "testbed:amateur",
        "form": "obrien",
        "beta": 0.5,
        "alpha": 0.1,
    }
    said = samples(tmp_path / "out")
    if name == "chosen documents":
        assert list(said) == [1, 3]
    else:
        assert found["results"]["testbed_arithmetic"]["exact_match,none"] >= 0.5
        assert "testbed_arithmetic" in capsys.readouterr().out


@pytest.mark.slow
def test_a_configuration_file_and_tasks_of_ones_own(tmp_path):
    """--config, --include_path, --use_cache; the second run answers from the cache of the first."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.yaml").write_text(f"include: {TASKS}/testbed/testbed_arithmetic.yaml\ntask: mine\n")
    config = tmp_path / "config.yaml"
    arguments = {"pretrained": "testbed:expert", "method": "cd", "amateur": "testbed:amateur"}
    config.write_text(
        json.dumps({"tasks": ["mine"], "model_args": arguments, "limit": 3, "log_samples": True, "metadata": {"n": 4}})
    )
    common = ["--config", config, "--include_path", tmp_path / "mine", "--use_cache", tmp_path / "cache"]
    assert evaluate(*common, "--output_path", tmp_path / "one") == 0
    (cache,) = tmp_path.glob("cache-cd-*_rank0.db")
    before = len(SqliteDict(str(cache), flag="r"))
    assert before == 4  # three answers, and whose they are
    assert evaluate(*common, "--output_path", tmp_path / "two") == 0
    assert samples(tmp_path / "one") == samples(tmp_path / "two")
    arguments["beta"] = 5
    other = json.dumps(arguments)
    assert (
        evaluate(
            *common,
            "--model_args",
            *[f"{k}={v}" for k, v in json.loads(other).items()],
            "--output_path",
            tmp_path / "one",
        )
        == 0
    )
    assert len(list(tmp_path.glob("cache-cd-*_rank0.db"))) == 2
    assert len(list((tmp_path / "one").iterdir())) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--tasks", "no_such_task", "--model_args", *CD],
            "there is no task 'no_such_task'; contralto eval ls tasks lists them all",
        ),
        (["--tasks", "testbed_arithmetics", "--model_args", *CD], "did you mean 'testbed_arithmetic'?"),
        (["--model_args", *CD], "No tasks specified"),
        (["--tasks", "testbed_arithmetic", "--model_args", *CD, "beta=half"], "beta must be a number, not 'half'"),
        (["--tasks", "testbed_arithmetic", "--model_args", "pretrained=no/such/folder"], "no/such/folder"),
        (["--tasks", "testbed_scenes_random", "--model_args", *CD], "require multimodal input"),
        (["--tasks", "testbed_arithmetic", "--data_dir"], "--data_dir needs a folder"),
        (["--tasks", "hellaswag", "--data_dir", "/nonexistent"], "/nonexistent"),
        (["--config", "/nonexistent.yaml"], "Config file not found"),
        (["--tasks", "testbed_arithmetic", "--model_args", *CD, "--log_samples"], "Specify --output_path"),
        (["--tasks", "testbed_arithmetic", "--model_args", *CD, "--limit", "-4"], "--limit must be above 0, not -4"),
        (["--tasks", "testbed_arithmetic"], "no model: set --model_args pretrained=MODEL"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_sentence_and_status_2(argv, message, capsys):
    assert evaluate(*argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("contralto eval: ")
    assert message in error


@pytest.mark.parametrize("model", [[], ["--model", "contralto-vlm"], ["--model", "hf"]])
def test_the_device_is_one_that_the_machine_has(model, monkeypatch):
    """lm-eval's default is cuda:0 everywhere, which a machine without a GPU would reject."""
    seen = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, args: seen.append(args.device))
    argv = ["--tasks", "testbed_arithmetic", "--model_args", "pretrained=testbed:expert", *model]
    assert evaluate(*argv) == 0
    assert evaluate(*argv, "--device", "cpu") == 0
    own = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert seen == [None if "hf" in model else own, "cpu"]


def _succeed(argv):
    assert evaluate(*argv) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_processes_give_the_numbers_of_one(tmp_path):
    """By gloo: greedy texts, likelihoods and images, and texts sampled by document."""
    runs = [
        (["--model", "contralto", "--model_args", *CD, "temperature=0.8"], "testbed_arithmetic,testbed_stories", 7),
        (
            ["--model", "contralto-vlm", "--model_args", "pretrained=testbed:vision-0", "method=vcd"],
            "testbed_scenes_random",
            9,
        ),
    ]
    for number, (model, tasks, limit) in enumerate(runs):
        common = [*model, "--tasks", tasks, "--limit", str(limit), "--batch_size", "2", "--log_samples"]
        common += ["--metadata", '{"n": 20}', "--use_cache", str(tmp_path / f"cache{number}"), "--output_path"]
        folders = [tmp_path / f"{number}-{processes}" for processes in (1, 2)]
        for processes, folder in zip((1, 2), folders, strict=True):
            if processes == 1:
                assert evaluate(*common, folder) == 0
            else:
                run_ranks(lambda argv=(*common, folder): _succeed(argv))
            caches = list(tmp_path.glob(f"cache{number}-*"))
            assert len(caches) == (1 if folder == folders[0] else 2)  # a file per rank
            for file in caches:
                file.unlink()
        one, two = (results(folder)["results"] for folder in folders)
        assert one == two
        for file in folders[0].rglob("samples_*.jsonl"):
            (other,) = folders[1].rglob(f"{file.name.rsplit('_', 1)[0]}_*.jsonl")
            rows = [
                sorted(
                    (r["doc_id"], json.dumps(r["filtered_resps"])) for r in map(json.loads, f.read_text().splitlines())
                )
                for f in (file, other)
            ]
            assert len(rows[0]) == limit
            assert rows[0] == rows[1]


# --------------------------------------------------------------------------------------------------------------- kills


def run_to_the_end(kind, path, log):
    """An evaluation with a cache; what is finished is noted in a file of its own."""
    keep = ContraltoLM.keep_answers

    def noting(self, jobs, answers):
        keep(self, jobs, answers)
        with open(log, "a") as file:
            file.writelines(hash_args("generate_until", job.arguments) + "\n" for job in jobs)

    ContraltoLM.keep_answers = noting
    if kind == "texts":
        lm, task = (
            ContraltoLM(*[CD[0].split("=")[1]], method="cd", amateur="testbed:amateur", batch_size=2),
            "testbed_arithmetic",
        )
    else:
        lm, task = ContraltoVLM("testbed:vision-0", method="vcd", batch_size=2), "testbed_scenes_random"
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"n": 40})
    found = lm_eval.simple_evaluate(
        lm, tasks=[task], use_cache=path, limit=40, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    texts = {row["doc_id"]: row["resps"] for row in found["samples"][task]}
    Path(f"{path}.json").write_text(json.dumps(texts))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_kill_at_any_time_loses_no_finished_document(kind, tmp_path):
    """CONTRALTO_KILLS kills (8 by default, over both kinds), then a run to the end: the uninterrupted run's texts."""
    context, rng = get_context("fork"), random.Random(kind)
    whole = context.Process(target=run_to_the_end, args=(kind, str(tmp_path / "whole"), tmp_path / "whole.log"))
    start = time.monotonic()
    whole.start()
    whole.join()
    took = time.monotonic() - start
    assert whole.exitcode == 0
    path, log = str(tmp_path / "killed"), tmp_path / "killed.log"
    killed, lost = 0, []
    for _ in range(KILLS // 2):
        process = context.Process(target=run_to_the_end, args=(kind, path, log))
        process.start()
        process.join(rng.uniform(0.1, 0.6) * took)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        if Path(f"{path}_rank0.db").exists() and log.exists():
            with SqliteDict(f"{path}_rank0.db", flag="r") as answers:
                lost += [key for key in log.read_text().split() if key not in answers]
    assert killed
    assert not lost
    last = context.Process(target=run_to_the_end, args=(kind, path, log))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert json.loads(Path(f"{path}.json").read_text()) == json.loads((tmp_path / "whole.json").read_text())
    done = log.read_text().split()
    assert len(set(done)) == len(done)  # nothing was done twice


def test_outside_of_a_repository_git_says_nothing(tmp_path, monkeypatch, capfd):
    from lm_eval import evaluator

    from contralto.cli.eval import _no_git_message

    monkeypatch.chdir(tmp_path)
    ask = evaluator.get_git_commit_hash
    with _no_git_message():
        assert evaluator.get_git_commit_hash() is None
    assert capfd.readouterr().err == ""
    assert evaluator.get_git_commit_hash is ask
    assert ask() is None
    assert "not a git repository" in capfd.readouterr().err
