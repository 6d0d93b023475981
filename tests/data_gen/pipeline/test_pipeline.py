"""The pipeline and its command: every row ends once, no request is repeated, no answer is lost."""

import importlib.util
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.scripts import run_script
from helpers.serving import Faults, Server, words

from contralto import cli
from contralto.cli.pairs_view import highlighted
from contralto.data_gen import pipeline
from contralto.data_gen import recipe as recipes
from contralto.data_gen.checks import annotate
from contralto.data_gen.pipeline.rows import RowGroup, RowRun, advance_together
from contralto.data_gen.pipeline.workers import EngineWorker
from contralto.data_gen.rows import read_rows
from contralto.data_gen.score_memory import ScoreMemoryError, remembered_scores
from contralto.data_gen.scorers import chrf, score_answers
from contralto.data_gen.store import Store, TrackedRequest
from contralto.data_gen.types import Answer, Ask, Failure, Pair, Rejected, Sampling, digest, make_request

STRATEGIES = '''
from contralto.data_gen.types import Ask, Pair, Rejected, Failure

def refined(row, *, times: int = 1):
    """An answer, and what a reviser makes of it."""
    first = yield Ask(role="target", messages=row["prompt"])
    text = first.text
    for turn in range(times):
        said = [*row["prompt"], {"role": "assistant", "content": text}, {"role": "user", "content": "better!"}]
        answer = yield Ask(role="reviser", messages=said, seed=turn, template="t@1")
        text = answer.text
    if text == first.text:
        return Rejected("nothing changed")
    return Pair(prompt=row["prompt"], chosen=text, rejected=first.text, columns={"length": len(text)})

def two_of_many(row, *, n=3):
    answers = yield [Ask(role="target", messages=row["prompt"], seed=seed) for seed in range(n)]
    texts = sorted({answer.text for answer in answers})
    if len(texts) < 2:
        return Rejected("all answers are the same")
    return [Pair(prompt=row["prompt"], chosen=texts[-1], rejected=texts[0]), Rejected("the others")]

def stumbling(row):
    yield Ask(role="target", messages=row["prompt"])
    if "3" in row["id"]:
        raise KeyError("no such thing")
    return Rejected("as always")

def stranger(row):
    yield Ask(role="nobody", messages=row["prompt"])

def no_strategy(row):
    return 3

def echo(request):
    said = request.messages[-1]["content"] if request.messages else request.prompt
    return f"{said[::-1]} {request.seed % 1000}"

def fail_always(request):
    raise AssertionError("no request is to be sent")

def fail_some(request):
    said = request.messages[0]["content"]
    return Failure("too hard") if said in {"question 2", "question 5"} else said.upper()

def rows(count=4):
    for i in range(count):
        yield {"prompt": f"question {i}", "more": i}
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place for recipes, with strategies beside them."""
    monkeypatch.setitem(sys.modules, "my_strategies", None)
    del sys.modules["my_strategies"]
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_strategies.py").write_text(STRATEGIES)
    lines = [json.dumps({"id": f"row{i}", "prompt": f"question {i}", "more": i}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    yield tmp_path
    sys.modules.pop("my_strategies", None)


ECHO = {"engine": "function", "use": "my_strategies:echo"}
BASE = {
    "output": "out",
    "rows": "rows.jsonl",
    "strategies": [{"use": "my_strategies:refined"}],
    "roles": {"target": ECHO, "reviser": ECHO},
}


def write(folder, **changed):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE | changed))
    return path


def loaded(folder, **changed):
    recipe = recipes.load_recipe(write(folder, **changed))
    return recipe, read_rows(recipe.rows, folder=folder)


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    """Close the stores of a test: Python 3.13 warns of connections that are left to the garbage collector."""
    opened, create = [], Store.__init__

    def remembered(store, *args, **kwargs):
        create(store, *args, **kwargs)
        opened.append(store)

    monkeypatch.setattr(Store, "__init__", remembered)
    yield
    for store in opened:
        store.close()


def ran(folder, **changed):
    """The results of a run, and its store."""
    recipe, rows = loaded(folder, **changed)
    store = Store(recipe.output / "answers.sqlite")
    pipeline.run(recipe, rows, store, is_shown=False)
    return list(pipeline.replay(recipe, rows, store)), store


def endpoint(server, **how):
    return {"engine": "openai", "base_url": server.url, "model": "m", "served_by": "here", "key_env": None, **how}


# ---------------------------------------------------------------------------------------------------------------- the run


def test_a_strategy_gets_its_answers_in_order(folder):
    results, _ = ran(folder, strategies=[{"use": "my_strategies:refined", "times": 3}, "my_strategies:two_of_many"])
    assert [(r.row["id"], r.strategy) for r in results] == [
        (f"row{i}", s) for i in range(8) for s in ("refined", "two_of_many")
    ]
    for result in results:
        first = result.outcomes[0]
        assert isinstance(first, Pair)
        if result.strategy == "refined":
            assert len(result.answered) == 4
            texts = [answer.text for _, answer in result.answered]
            assert first.rejected == texts[0]
            assert first.chosen == texts[-1]
            for (asked, _), before in zip(result.answered[1:], texts, strict=False):
                assert asked.request.messages[-2]["content"] == before
        else:
            assert len({answer.text for _, answer in result.answered}) == 3
            assert result.outcomes[1] == Rejected("the others")


def test_a_strategy_that_asks_nothing_needs_no_role(folder):
    (folder / "my_strategies.py").write_text(
        STRATEGIES
        + "\n\ndef silent(row):\n    return [Pair(prompt=row['prompt'], chosen='a', rejected='b')]\n    yield\n"
    )
    results, _ = ran(folder, strategies=["my_strategies:silent"], roles={})
    assert [result.outcomes[0].chosen for result in results] == ["a"] * 8


def test_equal_asks_of_two_strategies_are_asked_once(folder):
    calls = []
    with Server(reply=lambda body: calls.append(1) or words(body)) as server:
        results, _ = ran(
            folder,
            strategies=["my_strategies:refined", {"use": "my_strategies:two_of_many", "n": 2}],
            roles={"target": endpoint(server), "reviser": ECHO},
        )
    assert len(calls) == 8 * 2, "refined shares its first answer with two_of_many"
    assert len({a.request.key for r in results for a, _ in r.answered if a.role == "target"}) == 16


def test_a_second_run_asks_nothing(folder):
    with Server() as server:
        how = {"roles": {"target": endpoint(server), "reviser": endpoint(server)}}
        first, store = ran(folder, **how)
        count = len(server.seen)
        assert count == 16
        store.close()
        again, _ = ran(folder, **how)
        assert len(server.seen) == count
    assert [result.outcomes for result in again] == [result.outcomes for result in first]


@pytest.mark.slow
def test_failures_are_kept_with_reasons_and_retried_alone(folder, capsys):
    hard = {"engine": "function", "use": "my_strategies:fail_some"}
    path = write(folder, roles={"target": hard, "reviser": ECHO}, rows={"source": "rows.jsonl", "limit": 6})
    assert cli.main(["data", "run", str(path)]) == 0
    out = capsys.readouterr().out
    assert "4 pairs, 0 rejected, 2 failed" in out
    failed = [json.loads(line) for line in (folder / "out/dataset/failed.jsonl").read_text().splitlines()]
    assert failed == [{"id": i, "strategy": "refined", "reason": "target: too hard"} for i in ("row2", "row5")]
    assert cli.main(["data", "run", str(path)]) == 0
    assert "2 failed" in capsys.readouterr().out, "a run does not ask again what has failed"
    sys.modules["my_strategies"].Failure = lambda reason: "now easy"  # the function and its source stay as they are
    assert cli.main(["data", "retry-failed", str(path)]) == 0
    assert "6 pairs, 0 rejected, 0 failed" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "out/dataset/data/train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"row{i}" for i in range(6)]
    assert [row["rejected"][0]["content"][:8] == "now easy" for row in rows] == [i in (2, 5) for i in range(6)]
    assert cli.main(["data", "retry-failed", str(path)]) == 0
    assert capsys.readouterr().out == "no row has failed\n"


def test_a_strategy_that_stumbles_costs_its_row(folder):
    results, _ = ran(folder, strategies=["my_strategies:stumbling"])
    assert [result.failed for result in results if result.failed] == ["stumbling raised KeyError: 'no such thing'"]
    assert sum(result.outcomes == [Rejected("as always")] for result in results) == 7


def test_a_refusing_endpoint_ends_the_run_and_what_came_stays(folder):
    def refuse(body):
        return (401, {"error": {"message": "no"}}) if "question 6" in str(body["messages"]) else None

    with Server(status=refuse, latency=0.02) as server:
        roles = {"target": endpoint(server, concurrency=1), "reviser": ECHO}
        recipe, rows = loaded(folder, roles=roles)
        store = Store(recipe.output / "answers.sqlite")
        with pytest.raises(OSError, match="rejects model 'm': status 401: no"):
            pipeline.run(recipe, rows, store, is_shown=False)
    assert list(store.failures()) == [], "the rows did not fail: they were not asked"
    assert {u.role: u.requests for u in store.usage()}["target"] == 6


def test_an_error_in_an_engine_ends_the_run(folder):
    class Broken:
        identity, rows_together = {"engine": "broken"}, 1

        def answer(self, requests):
            next(iter(requests))
            raise RuntimeError("out of memory")
            yield

    recipe, rows = loaded(folder)
    recipe = dataclasses_replace(recipe, Broken())
    with Store(recipe.output / "answers.sqlite") as store, pytest.raises(RuntimeError, match="out of memory"):
        pipeline.run(recipe, rows, store, is_shown=False)


def test_batches_are_the_same_after_an_interruption(folder):
    """An engine that computes batches sees each round in the same company, and whole batches that are known are left out."""
    seen = []

    class Batching:
        def __init__(self):
            self.identity, self.rows_together = {"engine": "batching"}, 4

        def answer(self, requests):
            requests = sorted(requests, key=lambda request: request.key)
            for batch in (requests[::2], requests[1::2]):
                if not all(request.known for request in batch):
                    seen.append(tuple(request.key for request in batch))
                    company = digest([request.key for request in batch])  # what floating point does, exaggerated
                    yield [(r, Answer(text=company)) for r in batch if not r.known]
                    if len(seen) == self.die_at:
                        raise RuntimeError("killed")

    Batching.die_at = 0
    recipe, rows = loaded(folder)
    engine = Batching()
    recipe = dataclasses_replace(recipe, engine)
    with Store(folder / "whole.sqlite") as store:
        pipeline.run(recipe, rows, store, is_shown=False)
    whole = sorted(seen)
    assert len(whole) == 2 * 2 * 2
    for die_at in (1, 2, 3, 5):
        seen.clear()
        Batching.die_at = die_at
        with Store(folder / f"{die_at}.sqlite") as store:
            with pytest.raises(RuntimeError, match="killed"):
                pipeline.run(recipe, rows, store, is_shown=False)
            Batching.die_at = 0
            pipeline.run(recipe, rows, store, is_shown=False)
        assert sorted(seen) == whole, "the same batches, none of them twice"


def dataclasses_replace(recipe, engine):
    from dataclasses import replace

    return replace(recipe, roles={n: replace(role, engine=engine) for n, role in recipe.roles.items()})


def test_answers_are_on_the_disk_before_a_strategy_sees_them(folder, monkeypatch):
    recipe, rows = loaded(folder)
    store, seen = Store(recipe.output / "answers.sqlite"), []
    send = RowRun.send

    def watched(unit, known, **scores):
        with Store(recipe.output / "answers.sqlite", read_only=True) as other:
            seen.append(set(known) <= set(other.get(list(known))))
        send(unit, known, **scores)

    monkeypatch.setattr(RowRun, "send", watched)
    pipeline.run(recipe, rows, store, is_shown=False)
    assert len(seen) == 16
    assert all(seen)


def test_an_endpoint_may_find_its_concurrency_itself(folder):
    """A recipe takes `auto`, and every row ends although the endpoint refuses a fifth of the requests."""
    with Server(faults=Faults(too_many=0.2, retry_after="0.01")) as server:
        target = endpoint(server, concurrency="auto", attempts=50)
        results, _ = ran(folder, strategies=[{"use": "my_strategies:two_of_many"}], roles={"target": target})
        assert len(server.answered) == 24
    assert len(results) == 8
    assert all(result.failed is None and result.outcomes for result in results)


def test_rows_that_go_on_together_read_the_store_once_a_round(folder):
    """They read what was recorded, all of it with one query, and those that wait for an answer stay where they are."""
    recipe, rows = loaded(folder)
    with Store(recipe.output / "answers.sqlite") as store:
        groups = [RowGroup(recipe, [row]) for row in rows]
        read, get = [], store.get
        store.get = lambda keys: read.append(len(keys)) or get(keys)
        advance_together(groups, store)
        assert read == [8]
        store.record([(tracked, Answer(text="4")) for tracked in groups[0].missing])
        advance_together(groups, store)
        assert read == [8, 8, 1]
        assert [tracked.role for group in groups for tracked in group.missing] == ["reviser"] + 7 * ["target"]


def test_requests_of_rows_that_start_together_reach_the_engine_at_once(folder, monkeypatch):
    sent, put = [], EngineWorker.put
    monkeypatch.setattr(
        EngineWorker, "put", lambda worker, requests: (sent.append(len(requests)), put(worker, requests))
    )
    results, _ = ran(folder, strategies=["my_strategies:two_of_many"])
    assert all(result.outcomes for result in results)
    assert sum(sent) == 3 * len(results)
    assert sent[0] == 3 * 4, "of the rows that are open at the beginning"


def test_ctrl_c_waits_for_the_answers_under_way(folder):
    """The run ends with KeyboardInterrupt; all that the server answered is in the store; the next run asks only the rest."""

    def reply(body):
        if not server.seen:
            os.kill(os.getpid(), signal.SIGINT)
        return words(body)

    before = signal.getsignal(signal.SIGINT)
    with Server(reply=reply, latency=0.1) as server:
        roles = {"target": endpoint(server, concurrency=3), "reviser": ECHO}
        recipe, rows = loaded(folder, roles=roles)
        with Store(recipe.output / "answers.sqlite") as store:
            with pytest.raises(KeyboardInterrupt):
                pipeline.run(recipe, rows, store, is_shown=False)
            answered = len(server.seen)
            assert 1 <= answered < 8
            assert {u.role: u.requests for u in store.usage()}["target"] == answered
            pipeline.run(recipe, rows, store, is_shown=False)
        assert len(server.seen) == 8
    assert signal.getsignal(signal.SIGINT) is before


# --------------------------------------------------------------------------------------------------------------- accidents


def _command(*argv):
    return [sys.executable, "-m", "contralto", "data", *map(str, argv)]


def test_one_process_at_a_time(folder):
    path = write(folder)
    with pipeline.locked(folder / "out"):
        result = subprocess.run(_command("run", path), capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 2
    assert result.stderr.startswith(
        f"contralto data: process {os.getpid()} is working on {folder / 'out'}: wait for it"
    )
    with pipeline.locked(folder / "out"):
        pass


@contextmanager
def full_disk():
    """Let no file of this process grow beyond 4 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_full_disk_holds_the_answers_until_there_is_room(folder):
    """The disk is full for a second: nothing is asked in between beyond what is under way, nothing is lost or asked twice."""
    with Server(reply=lambda body: words(body) * 200) as server:
        roles = {"target": endpoint(server, concurrency=2), "reviser": endpoint(server, concurrency=2)}
        recipe, rows = loaded(folder, roles=roles)
        store = Store(recipe.output / "answers.sqlite")
        record, full = store.record, {"until": None}

        def limited(said):
            if full["until"] is None and len(server.seen) >= 5:
                full["until"] = time.monotonic() + 1.2
            if full["until"] is not None and time.monotonic() < full["until"]:
                with full_disk():
                    return record(said)
            return record(said)

        store.record = limited
        pipeline.run(recipe, rows, store, is_shown=False)
        assert full["until"] is not None
        assert len(server.seen) == 16
        assert all(result.outcomes for result in pipeline.replay(recipe, rows, store))


def test_a_disk_that_stays_full_ends_the_run_with_a_sentence(folder):
    with Server() as server:
        recipe, rows = loaded(folder, roles={"target": endpoint(server), "reviser": endpoint(server)})
        store = Store(recipe.output / "answers.sqlite")
        record, times, before = store.record, [], threading.active_count()

        def limited(said):
            times.append(1)
            if len(times) < 2:  # what a role answers can come in together
                return record(said)
            with full_disk():
                return record(said)

        store.record = limited
        with pytest.raises(OSError, match="answers could not be recorded; free disk space and run again"):
            pipeline.run(recipe, rows, store, is_shown=False, patience=0.5)
        end = time.monotonic() + 10
        while threading.active_count() > before:
            assert time.monotonic() < end, "a thread that waits for requests would keep the process from ending"
            time.sleep(0.02)
        store.record = record
        recorded = sum(usage.requests for usage in store.usage())
        pipeline.run(recipe, rows, store, is_shown=False)
        assert sum(usage.requests for usage in store.usage()) == 16 > recorded


@pytest.mark.full
@pytest.mark.slow
def test_2000_requests_at_a_server_that_fails_a_fifth_of_the_time(folder):
    """No loss, no duplicate, the rate limit kept, the failed rows listed with reasons."""
    count, rpm = 1000, 10000
    lines = [json.dumps({"id": f"row{i}", "prompt": f"question {i}"}) for i in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    faults = Faults(too_many=0.04, broken=0.04, cut=0.04, truncated=0.04, slow=0.04, delay=1.0)

    def refuse(body):  # ten rows are refused for good
        said = body["messages"][0]["content"].split()[-1]
        return (400, {"error": {"message": "too long"}}) if said.endswith("77") else None

    with Server(faults=faults, status=refuse) as server:
        how = endpoint(server, concurrency=32, rpm=rpm, timeout=0.8)
        start = time.monotonic()
        results, store = ran(folder, roles={"target": how, "reviser": how})
        took = time.monotonic() - start
    seen = Counter(seen.fault for seen in server.seen)
    assert seen["refused"] == 10
    assert all(seen[fault] > 40 for fault in ("too_many", "broken", "cut", "truncated", "slow")), seen
    failed = [result for result in results if result.failed]
    assert {result.row["id"] for result in failed} == {f"row{i}" for i in range(77, 1000, 100)}
    assert {result.failed for result in failed} == {"target: status 400: too long"}
    assert [recorded.row for recorded in store.failures()] == sorted(result.row["id"] for result in failed)
    assert sum(isinstance((result.outcomes or [None])[0], Pair) for result in results) == count - 10
    assert {u.role: u.requests for u in store.usage()} == {"target": 990, "reviser": 990}
    good = Counter(json.dumps(s.body, sort_keys=True) for s in server.seen if s.fault == "")
    assert len(good) == 1980
    assert set(good.values()) == {1}, "what was answered is not asked again"
    times = sorted(each.at for each in server.seen)
    windows = [sum(at <= t < at + 5 for t in times[i:]) for i, at in enumerate(times)]  # seconds; jitter evens out
    print(f"{len(times)} requests in {took:.1f} s; at most {max(windows)} in 5 s, {rpm / 12:.0f} allowed")
    assert 0.8 * rpm / 12 < max(windows) <= 1.05 * rpm / 12


@pytest.mark.slow
def test_killed_at_random_instants(tmp_path):
    """See benchmarks/data_kills.py, which does it a hundred times."""
    script = Path(__file__).parents[3] / "benchmarks" / "data_kills.py"
    result = run_script(script, "--kills", "3", "--problems", "12", "--no-write")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("byte-identical after") == 2


# ----------------------------------------------------------------------------------------------------- the data set, shards


def test_the_data_set(folder, capsys):
    path = write(folder, strategies=["my_strategies:refined", "my_strategies:two_of_many"])
    assert cli.main(["data", "run", str(path)]) == 0
    assert "16 pairs, 8 rejected, 0 failed" in capsys.readouterr().out
    dataset = folder / "out" / "dataset"
    rows = [json.loads(line) for line in (dataset / "data" / "train.jsonl").read_text().splitlines()]
    first = rows[0]
    assert first["prompt"] == [{"role": "user", "content": "question 0"}]
    assert [m["role"] for m in first["chosen"] + first["rejected"]] == ["assistant"] * 2
    assert first["strategy"] == "refined"
    assert first["models"] == ["target: my_strategies:echo", "reviser: my_strategies:echo"]
    assert len(first["requests"]) == 2
    assert first["length"] == len(first["chosen"][0]["content"])
    rejected = [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
    assert [{name: line[name] for name in ("id", "strategy", "reason")} for line in rejected] == [
        {"id": f"row{i}", "strategy": "two_of_many", "reason": "the others"} for i in range(8)
    ]
    from datasets import load_dataset

    read = load_dataset(
        "parquet", data_files=str(dataset / "data" / "train.parquet"), split="train", cache_dir=str(folder)
    )
    assert [row["id"] for row in read] == [row["id"] for row in rows]
    assert read[0]["chosen"] == first["chosen"]
    assert read[1]["length"] is None
    assert "\n# out\n" in (dataset / "README.md").read_text()
    files = {file: file.read_bytes() for file in dataset.rglob("*") if file.is_file() and file.suffix != ".png"}
    left = dataset / "data" / f"train.jsonl.{2**22 + 1}.part"  # of a process that was killed: numbers end below
    left.touch()
    assert cli.main(["data", "export", str(path)]) == 0
    assert {file: file.read_bytes() for file in files} == files
    assert not left.exists()


@pytest.mark.slow
def test_the_hub_gets_the_data_set_and_not_the_answers(folder, capsys, monkeypatch):
    import huggingface_hub

    calls = []

    class HfApi:
        def create_repo(self, name, **how):
            calls.append((name, how["private"]))

        def upload_folder(self, *, folder_path, ignore_patterns, **_):
            names = [str(f.relative_to(folder_path)) for f in folder_path.rglob("*") if f.is_file()]
            calls.append(list(huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=ignore_patterns)))

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    path = write(folder)
    assert cli.main(["data", "run", str(path)]) == 0
    for name in ("train.jsonl.earlier", "train.parquet.77.part"):  # of an earlier run, and of one that was killed
        (folder / "out" / "dataset" / "data" / name).touch()
    assert cli.main(["data", "export", str(path), "--push-to-hub", "me/pairs", "--private"]) == 0
    assert capsys.readouterr().out.endswith("https://huggingface.co/datasets/me/pairs\n")
    assert calls[0] == ("me/pairs", True)
    assert {"data/train.jsonl", "data/train.parquet", "failed.jsonl", "rejected.jsonl"} <= set(calls[1])
    assert not [name for name in calls[1] if name.endswith((".earlier", ".part"))]


@pytest.mark.slow
def test_shards_and_merge_give_the_same_data_set(folder, capsys):
    path = write(folder)
    assert cli.main(["data", "run", str(path)]) == 0
    whole = (folder / "out/dataset/data/train.jsonl").read_bytes()
    other = folder / "other"
    for shard in ("1/3", "2/3", "3/3"):
        assert cli.main(["data", "run", str(path), "--output", str(other), "--shard", shard]) == 0
        assert not (other / "dataset").exists()
    _, rows = loaded(folder)
    parts = [pipeline.shard_of(row, 3) for row in rows]
    assert len(set(parts)) > 1
    capsys.readouterr()
    assert cli.main(["data", "merge", str(path), "--output", str(other)]) == 0
    assert "new answers" in capsys.readouterr().out
    assert (other / "dataset/data/train.jsonl").read_bytes() == whole
    assert cli.main(["data", "merge", str(path), "--output", str(folder / "third")]) == 2
    assert "has no shards: name the stores to merge" in capsys.readouterr().err


def test_a_merge_rejects_a_file_of_another_program_before_it_begins(folder, capsys):
    path = write(folder)
    assert cli.main(["data", "run", str(path), "--output", str(folder / "part")]) == 0
    with closing(sqlite3.connect(folder / "browser.db", isolation_level=None)) as db:
        db.execute("CREATE TABLE visits(url)")
    before = (folder / "browser.db").read_bytes()
    stores = [str(folder / "part"), str(folder / "browser.db")]
    capsys.readouterr()
    assert cli.main(["data", "merge", str(path), *stores, "--output", str(folder / "all")]) == 2
    assert "browser.db is not a store of answers: another program wrote it" in capsys.readouterr().err
    assert (folder / "browser.db").read_bytes() == before
    assert not (folder / "all").exists()
    own = ["data", "merge", str(path), str(folder / "part"), "--output", str(folder / "part")]
    assert cli.main(own) == 2
    assert "is the store to merge into" in capsys.readouterr().err


def test_filters_drop_what_checks_found(folder, capsys):
    path = write(folder, checks={"contrast": {}}, filters={"length": [0, 10]})
    status = cli.main(["data", "run", str(path)])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "dropped by filters" in out
    dropped = [json.loads(line) for line in (folder / "out/dataset/rejected.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in (folder / "out/dataset/data/train.jsonl").read_text().splitlines()]
    assert len(dropped) + len(kept) == 8
    assert dropped
    assert all(line["reason"] == "length above 10" for line in dropped)
    assert all(row["length"] <= 10 < 10 + row["levenshtein"] for row in kept)


def test_answers_that_make_no_pair_are_exported_with_their_reasons(folder, capsys):
    """The roles echo their prompts, so the reviser's reply has no heading."""
    path = write(folder, strategies=["clair"])
    assert cli.main(["data", "run", str(path)]) == 2
    rejected = folder / "out" / "dataset" / "rejected.jsonl"
    assert f"the answers and the reasons are in {rejected}" in capsys.readouterr().err
    lines = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"row{i}" for i in range(8)]
    assert {line["reason"] for line in lines} == {
        "the reviser's reply has nothing under {corrected_student_solution} (finish_reason stop)"
    }
    assert [[(a["role"], a["tag"], a["finish_reason"]) for a in line["answers"]] for line in lines] == [
        [("target", "answer", "stop"), ("reviser", "revision", "stop")]
    ] * 8
    assert all(answer["text"] for line in lines for answer in line["answers"])
    assert not (rejected.parent / "data").exists()


def test_pairs_that_filters_drop_are_exported_even_if_all_are(folder, capsys):
    assert cli.main(["data", "run", str(write(folder))]) == 0
    data = folder / "out" / "dataset" / "data"
    before = {f"{path.name}.earlier": path.read_bytes() for path in data.iterdir()}
    path = write(folder, filters={"length": [0, 0]})
    capsys.readouterr()
    assert cli.main(["data", "run", str(path)]) == 2
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before  # nobody trains on them by mistake
    rejected = folder / "out" / "dataset" / "rejected.jsonl"
    err = capsys.readouterr().err
    assert f"the filters drop all 8 pairs (8 of them: length above 0); they are in {rejected}" in err
    assert "train.parquet and train.jsonl of an earlier run got names that end in .earlier" in err
    lines = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["length above 0"] * 8
    assert all(line[name][0]["content"] for line in lines for name in ("chosen", "rejected"))
    assert cli.main(["data", "run", str(write(folder))]) == 0
    assert {path.name for path in data.iterdir()} == {"train.jsonl", "train.parquet"}


def test_files_of_settings_lie_beside_the_recipe(folder, monkeypatch):
    (folder / "mine.txt").write_text("Mend {{ student_solution }}, which answers {{ task }}.")
    (folder / "test.jsonl").write_text('{"text": "question 3"}\n')
    checks = {"contamination": {"against": ["test.jsonl"], "n": 2}}
    recipe, rows = loaded(folder, strategies=[{"use": "clair", "template": "mine.txt"}], checks=checks)
    monkeypatch.chdir("/")
    assert "Mend" in asked_of_the_reviser(recipe, rows)
    found = annotate([{"prompt": row["prompt"], "chosen": [], "rejected": []} for row in rows], recipe.checks)
    assert [row["contamination"] for row in found] == [0, 0, 0, 1, 0, 0, 0, 0]


def asked_of_the_reviser(recipe, rows):
    """What the reviser is asked of the first row."""
    strategy = recipe.strategies[0].start(rows[0])
    next(strategy)
    return str(strategy.send(Answer(text="7")).messages)


def test_batch_files_go_out_and_come_in(folder, capsys):
    with Server() as server:
        roles = {"target": endpoint(server), "reviser": endpoint(server)}
        path, asked, said = write(folder, roles=roles), folder / "asked.jsonl", folder / "said.jsonl"
        assert cli.main(["data", "batch", str(path), "--role", "target", "--write", str(asked)]) == 0
        lines = [json.loads(line) for line in asked.read_text().splitlines()]
        assert len(lines) == 8
        bodies = [{"status_code": 200, "body": server._said(line["url"], line["body"])} for line in lines]
        bodies[3] = {"status_code": 500, "body": {"error": {"message": "oops"}}}
        ids = [line["custom_id"] for line in lines]
        done = [{"custom_id": i, "response": body} for i, body in zip(ids, bodies, strict=True)]
        done.append({"custom_id": "somebody else's", "response": bodies[0]})
        said.write_text("".join(json.dumps(line) + "\n" for line in done))
        capsys.readouterr()
        assert cli.main(["data", "batch", str(path), "--role", "target", "--read", str(said)]) == 0
        assert "7 answers, 1 failed, 1 not asked for" in capsys.readouterr().out
        assert cli.main(["data", "batch", str(path), "--role", "reviser", "--write", str(asked)]) == 0
        assert len(asked.read_text().splitlines()) == 7
        assert server.seen == []
    assert cli.main(["data", "batch", str(path), "--role", "judge", "--write", str(asked)]) == 2
    assert "the recipe has no role 'judge'" in capsys.readouterr().err
    assert cli.main(["data", "batch", str(path), "--role", "target"]) == 2
    assert "give either --write FILE" in capsys.readouterr().err


def test_preview_estimate_and_status(folder, capsys):
    priced = {**ECHO, "price": {"input": 1000, "output": 2000}, "max_new_tokens": 10}
    path = write(folder, roles={"target": priced, "reviser": ECHO})
    assert cli.main(["data", "estimate", str(path)]) == 0
    out = capsys.readouterr().out
    # 8 rows, "question i" is 10 characters: 3 tokens, and 10 more at the most
    assert (
        "total for 8 rows: 0.18 USD, estimated from 8 rows. Every answer is counted with max_new_tokens tokens" in out
    )
    assert cli.main(["data", "preview", str(path), "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert "row1 · refined" in out
    assert "row2" not in out
    assert "{+" in out
    assert "[-" in out
    assert cli.main(["data", "estimate", str(path)]) == 0
    assert "estimated from the means of 2 finished rows." in capsys.readouterr().out
    assert cli.main(["data", "status", str(path)]) == 0
    out = capsys.readouterr().out
    cells = [cell.strip() for cell in next(line for line in out.splitlines() if "refined" in line).split("│")]
    assert cells[1:-1] == ["refined", "8", "2", "2", "0", "0", "6"]


@pytest.mark.parametrize("command", ["run", "status", "estimate", "export"])
def test_a_store_that_another_program_changed_ends_in_a_sentence(folder, capsys, command):
    ran(folder)[1].close()
    with closing(sqlite3.connect(folder / "out" / "answers.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE answers SET text = x'ff00' WHERE role = 'reviser'")
    assert cli.main(["data", command, str(folder / "recipe.yaml")]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "answers.sqlite holds bytes in the column text of its answers, where contralto writes a text" in line


PAID = """
from contralto.data_gen.types import Answer

def answer(request):
    return Answer(text=request.messages[0]["content"].upper() * len(request.messages), prompt_tokens=10, completion_tokens=20)
"""


def test_an_estimate_after_an_interruption_says_what_is_still_to_pay(folder, capsys, monkeypatch):
    """All targets and three revisions are recorded: five revisions are left, at the mean of the recorded ones."""
    (folder / "my_paid.py").write_text(PAID)
    paid = {"engine": "function", "use": "my_paid:answer"}
    roles = {"target": {**paid, "price": {"input": 20}}, "reviser": {**paid, "price": {"output": 50}}}
    ran(folder, strategies=["my_strategies:stumbling"], roles=roles)[1].close()
    path = write(folder, roles=roles)
    recipe, rows = loaded(folder, roles=roles)
    with closing(Store(recipe.output / "answers.sqlite")) as store:
        early, _ = pipeline.estimate(recipe, rows, store)
        assert [(each.role, each.requests, each.recorded) for each in early] == [("reviser", 8, 0), ("target", 8, 8)]
        assert early[1].to_pay == 0
        pipeline.run(recipe, rows[:3], store, is_shown=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["data", "estimate", str(path)]) == 0
    narrow = capsys.readouterr().out
    assert "…" not in narrow
    assert "my_paid" in narrow
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["data", "estimate", str(path)]) == 0
    sys.modules.pop("my_paid")
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "my_paid" in line]
    assert cells == [
        ["reviser", "my_paid:answer", "8", "3", "80", "160", "0.0080 USD", "0.0050 USD"],
        ["target", "my_paid:answer", "8", "8", "80", "160", "0.0016 USD", "0.00 USD"],
    ]
    assert (
        "total for 8 rows: 0.0096 USD, still to pay: 0.0050 USD, estimated from the means of 3 finished rows and the "
        "recorded answers of the others." in out
    )


def test_an_estimate_counts_the_requests_that_rows_wait_for(folder):
    """The finished row needed no judge, the other seven wait for one."""
    (folder / "my_pairs.py").write_text(
        "def answer(request):\n"
        "    same = '0' in request.messages[0]['content']\n"
        "    return 'same' if same else str(request.seed)\n"
    )
    answers = {"engine": "function", "use": "my_pairs:answer"}
    roles = {"target": answers, "judge": {**ECHO, "max_new_tokens": 7}}
    recipe, rows = loaded(folder, strategies=["on_policy_judge"], roles=roles)
    with closing(Store(recipe.output / "answers.sqlite")) as store:
        targets, _ = loaded(folder, strategies=["on_policy_judge"], roles={**roles, "judge": answers})
        pipeline.run(targets, rows, store, is_shown=False)
        judge = next(each for each in pipeline.estimate(recipe, rows, store)[0] if each.role == "judge")
    sys.modules.pop("my_pairs")
    assert (judge.requests, judge.recorded, judge.completion_tokens) == (14, 0, 98)


SCORER = """
CALLS = []


def score(row, answers):
    CALLS.append(row["id"])
    return [len(answer) for answer in answers]
"""


def test_scores_are_computed_once_for_a_code(folder):
    """In a run, and in later ones; other code is other scores."""
    (folder / "many.py").write_text("def answer(request):\n    return 'x' * (1 + request.seed % 7)\n")
    how = {
        "strategies": [{"use": "best_of_n", "n": 4, "scorer": "my_scorer:score"}],
        "roles": {"target": {"engine": "function", "use": "many:answer"}},
    }
    calls, chosen = [], []
    for code in (SCORER, "# a comment\n" + SCORER, SCORER.replace("len(answer)", "-len(answer)")):
        (folder / "my_scorer.py").write_text(code)
        sys.modules.pop("my_scorer", None)
        importlib.invalidate_caches()
        results, store = ran(folder, **how)
        store.close()
        calls.append(len(sys.modules["my_scorer"].CALLS))
        chosen.append([len(pair.chosen) for result in results for pair in result.outcomes if isinstance(pair, Pair)])
    sys.modules.pop("my_scorer")
    assert calls == [8, 0, 8]
    assert chosen[0] == chosen[1]
    assert sum(chosen[0]) > sum(chosen[2])


REVISER = """
CALLS = []

def revise(request):
    CALLS.append(request.key)
    return request.messages[-1]["content"].upper()
"""


def test_a_changed_function_is_asked_again_and_a_line_says_so(folder, capsys):
    """Its old answers stay, and are found again when the change is undone; those of other roles are not asked for again."""
    roles = {"target": ECHO, "reviser": {"engine": "function", "use": "my_reviser:revise"}}
    calls, chosen, lines = [], [], []
    for code in (REVISER, "# a comment\n" + REVISER, REVISER.replace("upper", "title"), REVISER):
        (folder / "my_reviser.py").write_text(code)
        sys.modules.pop("my_reviser", None)
        importlib.invalidate_caches()
        results, store = ran(folder, roles=roles)
        calls.append(len(sys.modules["my_reviser"].CALLS))
        chosen.append([pair.chosen for result in results for pair in result.outcomes if isinstance(pair, Pair)])
        lines.append([line for line in capsys.readouterr().out.splitlines() if "my_reviser" in line])
        assert {use.role: use.requests for use in store.usage()}["target"] == 8
        store.close()
    sys.modules.pop("my_reviser")
    assert calls == [8, 0, 8, 0]
    assert chosen[0] == chosen[1] == chosen[3] != chosen[2]
    assert lines[0] == lines[1] == lines[3] == []
    assert lines[2] == [
        f"my_reviser:revise has changed since 8 of its answers were recorded: they stay in {store.path}, and the new code is asked again"
    ]


def test_the_status_calls_no_scorer_and_a_run_names_a_changed_one(folder, capsys):
    (folder / "many.py").write_text("def answer(request):\n    return 'x' * (1 + request.seed % 7)\n")
    strategies = [{"use": "best_of_n", "n": 4, "scorer": "my_scorer:score"}]
    how = {"strategies": strategies, "roles": {"target": {"engine": "function", "use": "many:answer"}}}
    lines, calls = [], []
    for code in (SCORER, SCORER.replace("len(answer)", "-len(answer)")):
        (folder / "my_scorer.py").write_text(code)
        sys.modules.pop("my_scorer", None)
        importlib.invalidate_caches()
        path = write(folder, **how)
        if calls:
            cli.main(["data", "status", str(path)])
            lines += capsys.readouterr().out.splitlines()
            calls.append(len(sys.modules["my_scorer"].CALLS))
        _, store = ran(folder, **how)
        store.close()
        calls.append(len(sys.modules["my_scorer"].CALLS))
        lines += [line for line in capsys.readouterr().out.splitlines() if "my_scorer" in line]
    sys.modules.pop("my_scorer")
    sys.modules.pop("many")
    assert calls == [8, 0, 8]
    assert lines[-2:] == [
        "8 rows to do with all answers recorded, but not their scores: run computes them",
        "my_scorer:score has changed since its scores were recorded: the answers are scored again",
    ]


@pytest.mark.slow
def test_replies_of_a_judge_without_a_verdict_are_counted(folder, capsys):
    (folder / "my_judge.py").write_text("def judge(request):\n    return 'first'\n")
    judge = {"engine": "function", "use": "my_judge:judge"}
    path = write(
        folder,
        strategies=[{"use": "nparam", "judge": "judge"}],
        roles={"larger": ECHO, "smaller": ECHO, "judge": judge},
    )
    cli.main(["data", "run", str(path)])
    sys.modules.pop("my_judge")
    assert '8 replies of a judge without a verdict: it must have a last line "Verdict: A"' in capsys.readouterr().out


def test_sources_of_functions_move_with_their_store(tmp_path):
    one, two = (Store(tmp_path / f"{name}.sqlite") for name in "ab")
    asked = make_request(Ask(role="r", prompt="x"), engine={}, sampling=Sampling(), seed=0, row="a")
    tracked = TrackedRequest(request=asked, row="a", strategy="s", role="r", model="m:f")
    assert one.note_source("m:f", "1") == 0
    one.record([(tracked, Answer(text="y"))])
    assert [one.note_source("m:f", source) for source in ("1", "2", "2")] == [0, 1, 0]
    one.close()
    two.merge(tmp_path / "a.sqlite")
    assert [two.note_source("m:f", source) for source in ("1", "2", "3")] == [0, 0, 1]
    assert two.note_source("m:g", "1") == 0


@pytest.mark.slow
def test_an_export_takes_the_scores_of_its_run(folder):
    """Also those of checks, and from a store that is only read."""
    (folder / "many.py").write_text("def answer(request):\n    return 'x' * (1 + request.seed % 7)\n")
    many = {"engine": "function", "use": "many:answer"}
    use = {"use": "best_of_n", "n": 4, "scorer": "my_scorer:score"}
    checks = {"reward": {"scorer": "my_scorer:score"}}
    calls = []
    for code in (SCORER, SCORER, "# a comment\n" + SCORER, SCORER.replace("len(answer)", "-len(answer)")):
        (folder / "my_scorer.py").write_text(code)
        sys.modules.pop("my_scorer", None)
        importlib.invalidate_caches()
        path = write(folder, strategies=[use], roles={"target": many}, checks=checks)
        assert cli.main(["data", "run", str(path)]) == 0
        assert cli.main(["data", "export", str(path)]) == 0
        calls.append(len(sys.modules["my_scorer"].CALLS))
        rows = [
            json.loads(line) for line in (folder / "out" / "dataset" / "data" / "train.jsonl").read_text().splitlines()
        ]
        assert all(row["chosen_score"] > row["rejected_score"] for row in rows)
    made = len(rows)
    assert calls[1:3] == [0, 0]
    assert calls[0] == calls[3] == 8 + made  # the answers of every row, and the two of every pair
    sys.modules.pop("my_scorer")


def test_placeholder_answers_are_not_scored(folder):
    """Neither before a run nor in an estimate, which counts equal requests once."""
    (folder / "my_scorer.py").write_text(SCORER)
    use = {"use": "best_of_n", "n": 4, "scorer": "my_scorer:score"}
    recipe, rows = loaded(folder, strategies=[use, use | {"name": "again"}], roles={"target": ECHO})
    pipeline.check(recipe, rows)
    estimates, _ = pipeline.estimate(recipe, rows, None)
    assert estimates[0].requests == 8 * 4
    assert sys.modules.pop("my_scorer").CALLS == []


def test_scores_move_with_their_store(tmp_path):
    one, two, three = (Store(tmp_path / f"{name}.sqlite") for name in "abc")
    one.keep_scores("k", [0.1, 2.0])
    assert one.known_scores("k") == [0.1, 2.0]
    one.close()
    assert Store(tmp_path / "a.sqlite", read_only=True).known_scores("k") == [0.1, 2.0]
    two.merge(tmp_path / "a.sqlite")
    two.merge(tmp_path / "c.sqlite")
    assert two.known_scores("k") == [0.1, 2.0]
    assert three.known_scores("k") is None


@pytest.mark.parametrize("call", ["known_scores", "note_scorer", "keep_scores"])
@pytest.mark.parametrize(
    "error",
    [sqlite3.DatabaseError("disk image is malformed"), ValueError("bytes in a column")],
    ids=["disk", "changed"],
)
def test_scores_that_cannot_be_read_or_kept_end_the_run(folder, monkeypatch, call, error):
    """The store's errors fail no rows: a data set without them would look whole."""
    (folder / "my_scorer.py").write_text(SCORER)
    use = {"use": "best_of_n", "n": 4, "scorer": "my_scorer:score"}
    recipe, rows = loaded(folder, strategies=[use], roles={"target": ECHO})

    def fails(*_):
        raise error

    monkeypatch.setattr(Store, call, fails)
    with Store(folder / "answers.sqlite") as store, pytest.raises(ScoreMemoryError, match=str(error)):
        pipeline.run(recipe, rows, store, is_shown=False)
    sys.modules.pop("my_scorer")


def test_a_function_within_a_function_is_not_remembered():
    kept = {}
    memory = SimpleNamespace(note_scorer=lambda name, source: "", known_scores=kept.get, keep_scores=kept.__setitem__)
    with remembered_scores(memory):
        assert score_answers(lambda row, answers: [1.0], {"id": "a"}, ["x"]) == [1.0]
        assert not kept
        assert score_answers(chrf, {"id": "a", "reference": "x"}, ["x"]) == [100.0]
        assert len(kept) == 1
        assert score_answers(chrf, {"id": "a", "reference": "x"}, ["y"]) == [0.0]
        assert len(kept) == 2
        assert score_answers(chrf, {"id": "a", "reference": "y", "other": object()}, ["x"]) == [0.0]
        assert len(kept) == 2


def test_differences_are_marked():
    chosen, rejected = highlighted("the cat sat there", "the dog sat")
    assert (chosen.plain, rejected.plain) == ("the {+cat+} sat{+ there+}", "the [-dog-] sat")


# ---------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"roles": {"target": {"engine": "oracle"}}},
            "role 'target': there is no engine 'oracle'; there are transformers,",
        ),
        ({"roles": {"target": {"model": "m"}}}, "role 'target' needs an engine"),
        ({"roles": {"target": "m"}}, "role 'target' must be a mapping of names, not 'm'"),
        (
            {"roles": {"target": {**ECHO, "temperture": 1}}},
            "engine 'function' has no 'temperture' (did you mean 'temperature'?); it has use; and of sampling",
        ),
        ({"roles": {"target": {**ECHO, "temperature": "hot"}}}, "temperature must be a number, not 'hot'"),
        ({"roles": {"target": {**ECHO, "temperature": -1}}}, "role 'target': temperature must be at least 0, not -1"),
        ({"roles": {"target": {**ECHO, "max_new_tokens": 1.5}}}, "max_new_tokens must be a whole number, not 1.5"),
        ({"roles": {"target": {**ECHO, "price": {"in": 3}}}}, "price has no 'in'; it may have input, output, currency"),
        (
            {"roles": {"target": {**ECHO, "price": {"input": -3}}}},
            "price input must be an amount of money per million tokens, not -3",
        ),
        ({"roles": {"target": {"engine": "function", "use": "my_strategies:nothing"}}}, "has no function nothing"),
        ({"roles": {"target": {"engine": "openai", "model": "m"}}}, "engine 'openai' needs base_url"),
        (
            {"roles": {"target": {"engine": "openai", "model": 3, "base_url": "http://a/v1"}}},
            "model must be a string, not 3",
        ),
        ({"output": 3}, "output must be a string, not 3"),
        ({"rows": {"source": None}}, "rows: source must be a string, not None"),
        ({"rows": {"source": "p.jsonl", "prompt": ["a"]}}, "rows: prompt must be a string, not ['a']"),
        ({"rows": {"source": "p.jsonl", "image_folder": 3}}, "rows: image_folder must be a string, not 3"),
        ({"roles": {"target": {"engine": "openai", "model": "m", "base_url": "x"}}}, "base_url must be an address"),
        (
            {"roles": {"target": {"engine": "transformers", "model": "m", "method": "magic"}}},
            "there is no method 'magic'",
        ),
        (
            {"roles": {"target": {"engine": "transformers", "model": "m", "method": "search"}}},
            "role 'target': method 'search' is deterministic",
        ),
        ({"strategies": []}, "strategies must be a non-empty list"),
        ({"strategies": ["no_such"]}, "strategy 1: there is no strategy 'no_such'; there are clair,"),
        ({"strategies": ["my_strategies:no_strategy"]}, "is not a strategy: a strategy must be a generator function"),
        (
            {"strategies": [{"use": "my_strategies:refined", "time": 3}]},
            "has no setting 'time' (did you mean 'times'?); it has times",
        ),
        ({"strategies": [{"name": "x"}]}, "strategy 1 needs use"),
        ({"strategies": ["my_strategies:refined"] * 2}, "two strategies have the name 'refined'"),
        (
            {"strategies": ["my_strategies:stranger"]},
            "strategy 'stranger' uses the role 'nobody'; the recipe has reviser",
        ),
        (
            {"strategies": ["clair"], "roles": {"target": {"engine": "function", "use": "my_strategies:fail_always"}}},
            "strategy 'clair' uses the role 'reviser'; the recipe has target",
        ),
        ({"seed": "x"}, "seed must be a whole number, not 'x'"),
        (
            {"rowz": 3},
            "has no 'rowz' (did you mean 'rows'?); it may have rows, strategies, roles, output, seed, checks, filters",
        ),
        ({"rows": {"sauce": "x"}}, "rows has no 'sauce'"),
        (
            {"license": "the MIT License"},
            "license must be an identifier of the hub, such as apache-2.0, cc-by-4.0 or other",
        ),
        ({"language": "English"}, "language must be a code such as en, or a list of codes, not 'English'"),
        ({"language": False}, 'YAML reads no as false: write "no" for Norwegian'),
        ({"date": "yesterday"}, "date must be a day such as 2026-11-29, not 'yesterday'"),
        ({"rows": {"source": "rows.jsonl", "limit": 0}}, "limit must be a whole number of at least 1, not 0"),
        (
            {"rows": {"source": "rows.jsonl", "prompt": "text"}},
            "rows.jsonl, row 1, column 'text' is missing; the row has id,",
        ),
        ({"rows": {"source": "rows.jsonl", "id": "name"}}, "has no id in column 'name'"),
        ({"rows": {"source": "rows.jsonl", "images": "pic"}}, "has no column 'pic'"),
        ({"rows": "nothing.jsonl"}, "nothing.jsonl"),
        ({"rows": "my_strategies:nothing"}, "has no function nothing"),
        ({"checks": {"magic": {}}}, "magic"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence_before_anybody_is_asked(folder, capsys, changed, message):
    assert cli.main(["data", "run", str(write(folder, **changed))]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (folder / "out" / "answers.sqlite").exists() or "uses the role" in message


def test_all_mistakes_in_a_recipe_are_reported_together(folder, capsys):
    changed = {
        "sead": 1,
        "license": "the MIT License",
        "roles": {"target": {**ECHO, "temprature": 1, "max_tokens": 2}, "reviser": {"engine": "oracle"}},
        "rows": {"source": "rows.jsonl", "limit": 0},
        "strategies": ["no_such", {"use": "my_strategies:refined", "time": 3}],
    }
    assert cli.main(["data", "run", str(write(folder, **changed))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [
        message in line
        for message, line in zip(
            (
                "has no 'sead' (did you mean 'seed'?)",
                "license must be an identifier",
                "role 'reviser': there is no engine 'oracle'",
                "has no 'max_tokens' (did you mean 'max_new_tokens'?)",
                "has no 'temprature' (did you mean 'temperature'?)",
                "limit must be a whole number",
                "strategy 1: there is no strategy 'no_such'",
                "has no setting 'time' (did you mean 'times'?)",
            ),
            lines,
            strict=True,
        )
    ] == [True] * 8
    assert all(line.startswith("contralto data: ") for line in lines)
    assert cli.main(["data", "run", str(write(folder, checks={"magic": {}}, filters={"jaccard": [0, 1]}))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert ["magic" in lines[0], "needs the output of the check contrast" in lines[1]] == [True, True]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nonsense"], r"rows.jsonl:1: not JSON"),
        (["3"], r"row 1 is not a mapping of columns: '3'"),
        (['{"prompt": ""}'], r"row 1, column 'prompt' is empty"),
        (['{"prompt": 3}'], r"must be a string or a list of messages, not '3'"),
        (['{"prompt": [{"role": "user"}]}'], r"a message must have a role and a content"),
        (['{"id": 1, "prompt": "a"}', '{"id": 1, "prompt": "b"}'], r"row 2: the id '1' occurs twice"),
        ([""], r"contains no rows"),
    ],
)
def test_a_mistake_in_the_rows_says_where(folder, lines, message):
    (folder / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        loaded(folder)


def test_rows_of_many_kinds(folder):
    import datasets

    made = datasets.Dataset.from_dict({"prompt": ["a", "b"], "n": [1, 2]})
    made.to_parquet(folder / "rows.parquet")
    made.to_csv(folder / "rows.csv")
    made.save_to_disk(str(folder / "saved"))
    (folder / "rows.txt").write_text("a\n\nb\n")
    for source in ("rows.parquet", "rows.csv", "saved", "rows.txt"):
        _, rows = loaded(folder, rows=source)
        assert [row["prompt"] for row in rows] == [[{"role": "user", "content": text}] for text in "ab"]
        assert len({row["id"] for row in rows}) == 2
    _, rows = loaded(folder, rows={"source": "my_strategies:rows", "arguments": {"count": 3}})
    assert [row["more"] for row in rows] == [0, 1, 2]
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n' * 3)
    _, rows = loaded(folder)
    assert [row["id"].partition("-")[2] for row in rows] == ["", "2", "3"], "equal rows are rows of their own"


def test_engines_are_shared_by_equal_roles(folder):
    recipe, _ = loaded(folder, roles={"target": {**ECHO, "temperature": 0.5}, "reviser": ECHO})
    assert len(recipe.engines) == 1
    assert recipe.roles["target"].sampling.temperature == 0.5


def test_the_ray_example_drives_a_strategy_stage_by_stage():
    """The mapping functions, with lists in place of a cluster."""
    path = Path(__file__).parents[3] / "examples" / "ray_data.py"
    spec = importlib.util.spec_from_file_location("ray_data_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    from contralto.data_gen.strategies.clair import clair

    row = {"id": "a", "prompt": "2 + 2?", "answers": None}
    asked = example.before(row, strategy=clair)
    assert asked["messages"] == [{"role": "user", "content": "2 + 2?"}]
    row = example.after({**asked, "generated_text": "It is 5."}, strategy=clair)
    asked = example.before(row, strategy=clair)
    assert "It is 5." in asked["messages"][-1]["content"]
    reply = "{teacher_reasoning}: wrong sum\n\n{corrected_student_solution}: It is 4."
    row = example.after({**asked, "generated_text": reply}, strategy=clair)
    [pair] = example.pairs(row, strategy=clair)
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("It is 4.", "It is 5.")
    assert json.loads(pair["columns"])["rationale"]
    ended = example.after({**example.before(row, strategy=clair), "generated_text": "done."}, strategy=clair)
    assert ended == row, "a row that has ended keeps its answers"
    assert example.pairs({"id": "b", "prompt": "?", "answers": ["x", "no revision"]}, strategy=clair) == []


def test_failures_of_requests_are_failures():
    assert Failure("x") != Failure("x", stops=True)
    with pytest.raises(ValueError, match="exactly one of messages and prompt"):
        Ask(role="r", prompt="a", messages=[{}])
