"""Runs on Ray: shards, their stores, and what becomes of workers that die."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import yaml

from contralto import cli
from contralto.data_gen import pipeline
from contralto.data_gen import recipe as recipes
from contralto.data_gen.pipeline import cluster
from contralto.data_gen.rows import read_rows
from contralto.data_gen.store import Store

FUNCTIONS = """
import os
import signal
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
    returned = cluster.ShardWorker(str(path))(batch)
    assert returned["number"] == [3]
    return returned["error"][0]


def files(output):
    found = output / "dataset"
    return {str(f.relative_to(found)): f.read_bytes() for f in found.rglob("*") if f.is_file() and f.suffix != ".png"}


@pytest.mark.parametrize(("together", "sizes"), [(1, [3] * 13 + [1]), (8, [8] * 5), (64, [40])])
def test_shards_begin_where_groups_begin(folder, monkeypatch, together, sizes):
    recipe, rows = loaded(write(folder), folder / "out")
    monkeypatch.setattr(recipe.roles["target"].engine, "rows_together", together, raising=False)
    shards = cluster.cut(recipe, rows, workers=2)
    assert [len(shard.rows) for shard in shards] == sizes
    assert [row["id"] for shard in shards for row in shard.rows] == [row["id"] for row in rows]


def test_a_worker_asks_only_for_what_is_not_recorded(folder):
    path = write(folder)
    recipe, rows = loaded(path, folder / "out")
    shard = cluster.cut(recipe, rows, workers=1)[0]
    with Store(recipe.output / "answers.sqlite") as store:
        pipeline.run(recipe, rows[:2], store, is_shown=False)
        cluster._prepare(shard, store)
    assert work(path, shard) == ""
    assert work(path, shard) == "", "as after a worker whose result was lost"
    assert calls(folder) == [row["prompt"][-1]["content"] for row in shard.rows]


def test_what_an_interrupted_run_left_is_taken_over(folder):
    path = write(folder)
    recipe, rows = loaded(path, folder / "out")
    shard = cluster.cut(recipe, rows, workers=1)[1]
    with Store(recipe.output / "answers.sqlite") as store:
        cluster._prepare(shard, store)
    assert work(path, shard) == ""
    assert cli.main(["data", "run", str(path), "--output", str(folder / "out")]) == 0
    assert sorted(calls(folder)) == sorted(f"question {i}" for i in range(40)), "each once"
    assert not shard.folder.exists()


def test_a_shard_that_kills_its_workers_is_given_up(folder):
    path = write(folder)
    recipe, rows = loaded(path, folder / "out")
    shard = cluster.cut(recipe, rows, workers=1)[0]
    with Store(recipe.output / "answers.sqlite") as store:
        cluster._prepare(shard, store)
    with Store(shard.store) as store:
        for _ in range(cluster.MOST_STARTS - 1):
            cluster._note_start(shard, store)
        pipeline.run(recipe, shard.rows[:1], store, is_shown=False)  # a new answer: the deaths count from here
        for _ in range(cluster.MOST_STARTS):
            cluster._note_start(shard, store)
    assert "workers died 5 times on the rows " in work(path, shard)
    assert len(calls(folder)) == 1


def test_the_sentence_of_an_engine_comes_back(folder):
    path = write(folder, use="refused")
    recipe, rows = loaded(path, folder / "out")
    assert work(path, cluster.cut(recipe, rows, workers=1)[0]) == "no more money"


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


def run_command(folder, *arguments):
    """Run the command in a process of its own: Ray begins threads, and warns of what it does itself."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "contralto", "data", "run", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)


@pytest.mark.real
def test_a_cluster_makes_the_bytes_of_one_process(folder):
    pytest.importorskip("ray")
    path = write(folder, ray={"concurrency": 2})
    assert run_command(folder, path, "--output", folder / "one" / "pairs").returncode == 0
    assert len(calls(folder)) == 40
    ran = run_command(folder, path, "--output", folder / "two" / "pairs", "--runner", "ray")
    assert ran.returncode == 0, ran.stderr
    assert len(calls(folder)) == 80
    made = files(folder / "one" / "pairs")
    assert len(made) >= 5
    assert files(folder / "two" / "pairs") == made


@pytest.mark.real
def test_a_cluster_gives_up_rows_that_kill_its_workers(folder):
    pytest.importorskip("ray")
    ran = run_command(folder, write(folder, use="deadly"), "--runner", "ray")
    assert ran.returncode == 2, ran.stderr
    assert "workers died 5 times on the rows " in ran.stderr
