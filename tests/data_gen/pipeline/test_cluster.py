"""Runs on Ray: shards, their stores, and what becomes of workers that die."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import yaml
from helpers.serving import Server

from contralto import cli
from contralto.data_gen import pipeline
from contralto.data_gen import recipe as recipes
from contralto.data_gen.pipeline import cluster, shards
from contralto.data_gen.rows import read_rows
from contralto.data_gen.store import Store

FUNCTIONS = """
import os
import signal
import time
from contralto.data_gen.types import Ask, Failure, Pair

def refined(row):
    first = yield Ask(role="target", messages=row["prompt"])
    return Pair(prompt=row["prompt"], chosen=first.text + "!", rejected=first.text)

def answer(request):
    with open(__file__ + ".calls", "a") as file:
        file.write(request.messages[-1]["content"] + "\\n")
    return Failure("too hard") if "13" in request.messages[-1]["content"] else f"{request.seed % 1000}"

def deadly(request):
    if "5" in request.messages[-1]["content"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"

def slow(request):
    time.sleep(0.3)
    return answer(request)

def two(row):
    first = yield Ask(role="target", messages=row["prompt"])
    second = yield Ask(role="remote", messages=row["prompt"])
    third = yield Ask(role="function", messages=row["prompt"])
    return Pair(prompt=row["prompt"], chosen=first.text + second.text, rejected=third.text)

def refused(request):
    return Failure("no more money", stops=True)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place for recipes, with functions beside them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cluster_functions.py").write_text(FUNCTIONS)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"question {i}"}) for i in range(40)))
    yield tmp_path
    sys.modules.pop("cluster_functions", None)


def write(folder, use="answer", **more):
    recipe = {
        "rows": "rows.jsonl",
        "strategies": ["cluster_functions:refined"],
        "roles": {"target": {"engine": "function", "use": f"cluster_functions:{use}"}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | more))
    return path


def loaded(path, output):
    recipe = recipes.load_recipe(path, output=output)
    return recipe, read_rows(recipe.rows, folder=path.parent)


def calls(folder):
    file = folder / "cluster_functions.py.calls"
    return file.read_text().splitlines() if file.exists() else []


def work(path, shard):
    """The error of a shard that a worker ran."""
    batch = {"number": [3], "folder": [str(shard.folder)], "rows": [pickle.dumps(shard.rows)]}
    returned = shards.ShardWorker(str(path))(batch)
    assert returned["number"] == [3]
    assert returned["is_finished"] == [not returned["error"][0]]
    return returned["error"][0]


def files(output):
    found = output / "dataset"
    return {str(f.relative_to(found)): f.read_bytes() for f in found.rglob("*") if f.is_file() and f.suffix != ".png"}


@pytest.mark.parametrize(("together", "sizes"), [(1, [3] * 13 + [1]), (8, [8] * 5), (64, [40])])
def test_shards_begin_where_groups_begin(folder, monkeypatch, together, sizes):
    recipe, rows = loaded(write(folder), folder / "out")
    monkeypatch.setattr(recipe.roles["target"].engine, "rows_together", together, raising=False)
    cut = shards.cut(recipe, rows, workers=2)
    assert [len(shard.rows) for shard in cut] == sizes
    assert [row["id"] for shard in cut for row in shard.rows] == [row["id"] for row in rows]


def test_a_worker_asks_only_for_what_is_not_recorded(folder):
    path = write(folder)
    recipe, rows = loaded(path, folder / "out")
    shard = shards.cut(recipe, rows, workers=1)[0]
    with Store(recipe.output / "answers.sqlite") as store:
        pipeline.run(recipe, rows[:2], store, is_shown=False)
        shard.prepare(store)
    assert work(path, shard) == ""
    assert work(path, shard) == "", "as after a worker whose result was lost"
    assert calls(folder) == [row["prompt"][-1]["content"] for row in shard.rows]


def test_what_an_interrupted_run_left_is_taken_over(folder):
    path = write(folder)
    recipe, rows = loaded(path, folder / "out")
    shard = shards.cut(recipe, rows, workers=1)[1]
    with Store(recipe.output / "answers.sqlite") as store:
        shard.prepare(store)
    assert work(path, shard) == ""
    assert cli.main(["data", "run", str(path), "--output", str(folder / "out")]) == 0
    assert sorted(calls(folder)) == sorted(f"question {i}" for i in range(40)), "each once"
    assert not shard.folder.exists()


def test_a_shard_that_kills_its_workers_is_given_up(folder):
    path = write(folder)
    recipe, rows = loaded(path, folder / "out")
    shard = shards.cut(recipe, rows, workers=1)[0]
    with Store(recipe.output / "answers.sqlite") as store:
        shard.prepare(store)
    with Store(shard.store) as store:
        for _ in range(shards.MOST_STARTS - 1):
            shards._note_start(shard, store)
        pipeline.run(recipe, shard.rows[:1], store, is_shown=False)  # a new answer: the deaths count from here
        for _ in range(shards.MOST_STARTS):
            shards._note_start(shard, store)
    assert "workers died 5 times on the rows " in work(path, shard)
    assert len(calls(folder)) == 1


def test_the_sentence_of_an_engine_comes_back(folder):
    path = write(folder, use="refused")
    recipe, rows = loaded(path, folder / "out")
    assert work(path, shards.cut(recipe, rows, workers=1)[0]) == "no more money"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--shard", "1/2"], "leave out --shard"),
        (["--trust-remote-code"], "--trust-remote-code is not passed on to workers"),
    ],
)
def test_what_ray_cannot_do_is_refused(folder, capsys, more, said):
    assert cli.main(["data", "run", str(write(folder)), "--runner", "ray", *more]) == 2
    assert said in capsys.readouterr().err
    assert not calls(folder)


def test_ray_has_to_be_installed(folder, capsys, monkeypatch):
    monkeypatch.setattr("contralto.cli.data.find_spec", lambda name: None)
    assert cli.main(["data", "run", str(write(folder)), "--runner", "ray"]) == 2
    assert "the package ray is not installed: pip install " in capsys.readouterr().err


def test_workers_stop_for_a_file_and_record_what_they_requested(folder):
    path = write(folder, use="slow")
    recipe, rows = loaded(path, folder / "out")
    shard = shards.cut(recipe, rows, workers=1)[0]._replace(rows=rows)
    batch = {"number": [3], "folder": [str(shard.folder)], "rows": [pickle.dumps(shard.rows)]}
    worker = shards.ShardWorker(str(path))
    threading.Timer(1, shard.stop.touch).start()
    stopped = {"number": [3], "is_finished": [False], "error": [""]}
    assert worker(batch) == stopped
    assert 0 < len(calls(folder)) < 40
    following = shard.folder.with_name("ray-1")
    assert worker(batch | {"folder": [str(following)]}) == stopped
    assert not following.exists(), "it does not begin"
    with Store(shard.store) as store:
        assert sum(usage.requests for usage in store.usage()) == len(calls(folder))


def test_a_cluster_has_to_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        cluster.check_address(address)
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at RAY_ADDRESS={address}"):
        cluster.check_address(address)
    cluster.check_address("auto")


def test_standard_error_is_held_back_unless_the_block_raises(capfd):
    def write_and_divide(text, by):
        with cluster.held_back():
            os.write(2, text)
            return 1 / by

    write_and_divide(b"noise", by=1)
    with pytest.raises(ZeroDivisionError):
        write_and_divide(b"cause", by=0)
    os.write(2, b".")
    assert capfd.readouterr().err == "cause."


# ------------------------------------------------------------------------------------------------------ on a real cluster


def started(folder, *arguments):
    """Start the command in a process of its own: Ray begins threads, and warns of what it does itself."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "contralto", "data", "run", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        command, env=environment | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_command(folder, *arguments):
    """Run the command, and return its status and what it wrote to standard error."""
    process = started(folder, *arguments)
    _, error = process.communicate()
    return process.returncode, error


def lines_of(error):
    """Return what is left of standard error without progress bars."""
    lines = [line.split("\r")[-1].strip() for line in error.splitlines()]
    return [line for line in lines if line and not line.startswith(("rows: ", "Creating parquet"))]


@pytest.mark.real
def test_a_cluster_makes_the_bytes_of_one_process(folder):
    """With batches of a model, an endpoint and a function: each request is answered once, and Ray says nothing."""
    pytest.importorskip("ray")
    with Server(latency=0.01) as server:
        roles = {
            "target": {"engine": "transformers", "model": "testbed:expert", "batch_size": 4, "temperature": 1.0},
            "remote": {"engine": "openai", "base_url": server.url, "served_by": "x", "model": "m", "key_env": None},
            "function": {"engine": "function", "use": "cluster_functions:answer"},
        }
        strategies = ["cluster_functions:two"]
        path = write(folder, strategies=strategies, roles=roles, ray={"concurrency": 2})
        assert run_command(folder, path, "--output", folder / "one" / "pairs")[0] == 0
        assert len(server.seen) == len(calls(folder)) == 40
        status, error = run_command(folder, path, "--output", folder / "two" / "pairs", "--runner", "ray")
    assert status == 0, error
    assert lines_of(error) == []
    assert len(server.seen) == len(calls(folder)) == 80
    made = files(folder / "one" / "pairs")
    assert len(made) >= 5
    assert files(folder / "two" / "pairs") == made


@pytest.mark.real
def test_an_interrupted_cluster_records_what_it_requested_and_leaves_no_process(folder):
    pytest.importorskip("ray")
    path = write(folder, use="slow", ray={"concurrency": 2})
    process = started(folder, path, "--output", folder / "pairs", "--runner", "ray")
    while not calls(folder) and process.poll() is None:
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [each for each in children if "ShardWorker" in " ".join(each.cmdline())]
    assert {each.nice() for each in workers} == {psutil.Process().nice()}, "at the priority of the command"
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert not psutil.wait_procs(children, timeout=10)[1]
    asked = calls(folder)
    assert 0 < len(asked) < 40
    with Store(folder / "pairs" / "answers.sqlite", read_only=True) as store:
        assert sum(usage.requests for usage in store.usage()) + len(list(store.failures())) == len(asked)
    assert sorted(each.name for each in (folder / "pairs").iterdir()) == [".lock", "answers.sqlite"]
    assert run_command(folder, path, "--output", folder / "pairs")[0] == 0
    assert sorted(calls(folder)) == sorted(f"question {i}" for i in range(40)), "each once"


@pytest.mark.real
def test_a_cluster_gives_up_rows_that_kill_its_workers(folder):
    pytest.importorskip("ray")
    status, error = run_command(folder, write(folder, use="deadly", ray={"concurrency": 1}), "--runner", "ray")
    assert status == 2, error
    assert "workers died 5 times on the rows " in error
