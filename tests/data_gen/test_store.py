"""The store: answers are recorded completely or not at all, despite kills, full disks and concurrent writers."""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest
from helpers.stored_answers import answer, asked

from contralto.common.errors import is_mistake
from contralto.data_gen.store import Store
from contralto.data_gen.store_file import ANSWERS, APPLICATION, FAILURES
from contralto.data_gen.types import Answer, Failure

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_what_was_recorded_is_read_back(tmp_path):
    path = tmp_path / "deep" / "answers.sqlite"
    with Store(path) as store:
        store.record([(asked(1), answer(1)), (asked(2), Failure("500: oops"))])
    with Store(path, read_only=True) as store:
        one, two, three = (asked(number).request.key for number in (1, 2, 3))
        assert store.get([one, two, three]) == {one: answer(1), two: Failure("500: oops")}


def test_the_first_answer_stands_and_ends_the_failure(tmp_path):
    with Store(tmp_path / "a") as store:
        store.record([(asked(1), Failure("cut"))])
        assert [failed.outcome.reason for failed in store.failures()] == ["cut"]
        store.record([(asked(1), answer(1, "first")), (asked(1), answer(1, "second"))])
        store.record([(asked(1), answer(1, "third")), (asked(1), Failure("late"))])
        assert store.get([asked(1).request.key])[asked(1).request.key].text == "first"
        assert list(store.failures()) == []


def test_failures_can_be_forgotten(tmp_path):
    with Store(tmp_path / "a") as store:
        store.record([(asked(n), Failure("cut")) for n in range(3)] + [(asked(9), answer(9))])
        assert store.forget_failures() == 3
        assert store.get([asked(n).request.key for n in range(3)]) == {}
        assert len(store.get([asked(9).request.key])) == 1


def test_many_keys_at_once(tmp_path):
    with Store(tmp_path / "a") as store:
        store.record([(asked(n), answer(n)) for n in range(1200)])
        assert len(store.get([asked(n).request.key for n in range(1200)])) == 1200


def test_answers_that_come_together_take_few_statements_and_one_transaction(tmp_path):
    """Each statement of SQLite waits for the threads of the engines, and each transaction for the disk."""
    with Store(tmp_path / "a") as store:
        store.record([(asked(0), answer(0))])
        statements = []
        store._db.set_trace_callback(statements.append)
        store.record([(asked(n), answer(n)) for n in range(1, 65)])
        store._db.set_trace_callback(None)
        assert len(store.get([asked(n).request.key for n in range(65)])) == 65
    kinds = [each.split()[0] for each in statements]
    assert kinds == ["BEGIN", "INSERT", "DELETE", "COMMIT"]


def test_usage_by_role(tmp_path):
    with Store(tmp_path / "a") as store:
        store.record([(asked(n), answer(n)) for n in (1, 2)] + [(asked(5, role="judge"), answer(5))])
        assert [tuple(usage) for usage in store.usage()] == [("judge", "m", 1, 3, 5), ("target", "m", 2, 6, 3)]


def test_merge_takes_what_is_new(tmp_path):
    with Store(tmp_path / "a") as one, Store(tmp_path / "b") as other:
        one.record([(asked(1), answer(1, "mine")), (asked(2), Failure("cut"))])
        other.record([(asked(1), answer(1, "theirs")), (asked(2), answer(2)), (asked(3), Failure("500"))])
        assert one.merge(tmp_path / "b") == 1
        found = one.get([asked(n).request.key for n in (1, 2, 3)])
        assert found[asked(1).request.key].text == "mine"
        assert found[asked(2).request.key] == answer(2)
        assert found[asked(3).request.key] == Failure("500")
        assert one.merge(tmp_path / "b") == 0
    with Store(tmp_path / "a") as one, pytest.raises(FileNotFoundError, match="there is no store"):
        one.merge(tmp_path / "nothing")


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello " * 100)
    with pytest.raises(ValueError, match="text is not a store of answers"):
        Store(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="no request was recorded"):
        Store(tmp_path / "none", read_only=True)
    with Store(tmp_path / "later") as store:
        store._db.execute("PRAGMA user_version=99")
    with pytest.raises(ValueError, match="written by a later contralto"):
        Store(tmp_path / "later")


# ------------------------------------------------------------------------------------------------ other people's files


def everything(folder):
    """All files of a folder with their contents."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def foreign(path, *, table="t(x)", version=0, application=0, mode="delete"):
    """An SQLite file of another program."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(f"PRAGMA application_id={application}; PRAGMA user_version={version}; CREATE TABLE {table}")
        db.execute(f"PRAGMA journal_mode={mode}")


FOREIGN = [
    {},
    {"mode": "wal"},
    {"version": 1},
    {"version": 99, "mode": "wal"},
    {"version": 1, "application": 0x42B9},
    {"version": 1, "table": "answers(key TEXT PRIMARY KEY, text TEXT)"},
]


@pytest.mark.parametrize("given", FOREIGN)
def test_a_database_of_another_program_is_left_as_it_is(tmp_path, given):
    foreign(tmp_path / "notes.db", **given)
    before = everything(tmp_path)
    for read_only in (False, True):
        with pytest.raises(ValueError, match=r"notes\.db is not a store of answers"):
            Store(tmp_path / "notes.db", read_only=read_only)
    with Store(tmp_path / "own" / "a") as store, pytest.raises(ValueError, match="is not a store of answers"):
        store.merge(tmp_path / "notes.db")
    shutil.rmtree(tmp_path / "own")
    assert everything(tmp_path) == before


HOSTILE = {
    "trigger": "CREATE TRIGGER t AFTER INSERT ON answers BEGIN DELETE FROM answers; END",
    "view": "CREATE VIEW v AS WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n FROM c",
    "index": "CREATE INDEX i ON answers (length(hex(zeroblob(1000))))",
    "table": "CREATE VIRTUAL TABLE f USING fts5(x)",
}
"""SQL that a store of somebody else can hold, which SQLite runs by itself."""


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_store_that_runs_sql_of_its_own_is_refused(tmp_path, kind, read_only):
    with Store(tmp_path / "a") as store:
        store.record([(asked(1), answer(1))])
    with closing(sqlite3.connect(tmp_path / "a")) as db:
        db.execute(HOSTILE[kind])
        db.commit()
    content = (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match=f"is not a store of answers that contralto wrote: it holds the {kind} [tvif]"):
        Store(tmp_path / "a", read_only=read_only)
    assert (tmp_path / "a").read_bytes() == content


def test_a_view_in_the_place_of_a_table_is_not_read(tmp_path):
    """Reading it would never end."""
    with closing(sqlite3.connect(tmp_path / "a")) as db:
        db.execute(f"PRAGMA application_id={APPLICATION}")
        db.execute("PRAGMA user_version=1")
        for table, columns in (("answers", ANSWERS), ("failures", FAILURES)):
            values = ", ".join(f"'x' AS {column}" for column in columns)
            endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"
            db.execute(f"CREATE VIEW {table} AS {endless} SELECT {values} FROM c")
        db.commit()
    with pytest.raises(ValueError, match="it holds the view answers"):
        Store(tmp_path / "a", read_only=True)


@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_no_regular_file_is_refused_unopened(tmp_path, read_only):
    """A pipe is never opened: that would wait for its writer."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for each in (tmp_path / "pipe", tmp_path / "link", Path(os.devnull)):
        with pytest.raises(ValueError, match="is not a store of answers: it is not a regular file"):
            Store(each, read_only=read_only)


def test_an_empty_file_is_no_store_to_read(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="a is not a store of answers: it is empty"):
        Store(tmp_path / "a", read_only=True)
    with Store(tmp_path / "b") as store, pytest.raises(ValueError, match="it is empty"):
        store.merge(tmp_path / "a")
    with Store(tmp_path / "a") as store:
        store.record([(asked(1), answer(1))])
        assert store._count() == 1


@pytest.mark.parametrize("content", [b"x", b"hello " * 100, b"SQLite format 3\0" + b"\0" * 3000, b"\x89PNG" * 512])
def test_what_is_no_database_is_left_as_it_is(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    for read_only in (False, True):
        with pytest.raises(ValueError, match="file is not a store of answers"):
            Store(tmp_path / "file", read_only=read_only)
    with pytest.raises(ValueError, match="it is a folder"):
        Store(tmp_path)
    assert everything(tmp_path) == {"file": content}


def log_mode(path):
    """Leave a store as earlier versions did: in write-ahead mode and without an application id."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(
            "PRAGMA application_id=0; PRAGMA journal_mode=WAL; INSERT OR IGNORE INTO failures SELECT * FROM failures"
        )


@pytest.mark.parametrize("is_old", [False, True])
def test_reading_changes_nothing_and_leaves_nothing_behind(tmp_path, is_old):
    path = tmp_path / "a"
    with Store(path) as store:
        store.record([(asked(1), answer(1))])
    if is_old:
        log_mode(path)
    before = everything(tmp_path)
    assert list(before) == ["a"]
    with Store(path, read_only=True) as store:
        assert len(store.get([asked(1).request.key])) == 1
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            store.record([(asked(2), answer(2))])
    assert everything(tmp_path) == before
    with Store(path) as store:
        store.record([(asked(2), answer(2))])
        assert len(store.get([asked(n).request.key for n in (1, 2)])) == 2
    assert list(everything(tmp_path)) == ["a"]


@pytest.mark.parametrize("is_old", [False, True])
def test_a_store_in_which_nothing_is_written_keeps_its_bytes(tmp_path, is_old):
    """Also one of an earlier version, whose header is brought up to date when something is written."""
    path = tmp_path / "a"
    with Store(path) as store:
        store.record([(asked(1), answer(1))])
    if is_old:
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA application_id=0")
    before = everything(tmp_path)
    with Store(path) as store:
        assert len(store.get([asked(1).request.key])) == 1
        assert store.forget_failures() == 0
        store.record([])
        assert everything(tmp_path) == before
    assert everything(tmp_path) == before
    with Store(path) as store:
        store.record([(asked(2), Failure("cut"))])
        assert (tmp_path / "a-wal").exists()
    assert list(everything(tmp_path)) == ["a"]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION,)


def test_failures_are_answered_while_they_are_listed(tmp_path):
    """The first answer begins the write-ahead log, which no open cursor allows."""
    with Store(tmp_path / "a") as store:
        store.record([(asked(n), Failure("cut")) for n in range(3)])
    with Store(tmp_path / "a") as store:
        for n, _ in enumerate(store.failures()):
            store.record([(asked(n), answer(n))])
        assert list(store.failures()) == []


def _read_as_a_stranger(path, number):
    if os.getuid() == 0:
        os.setuid(65534)  # nobody: root may write anywhere
    with Store(path, read_only=True) as store:
        assert len(store.get([asked(n).request.key for n in range(number)])) == number


@pytest.mark.parametrize("state", ["closed", "old", "open", "killed"])
def test_a_store_in_a_folder_that_cannot_be_written_is_read(state):
    """`tmp_path` lies in folders that nobody else may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "theirs"
        store = Store(folder / "a")
        store.record([(asked(n), answer(n)) for n in range(3)])
        if state == "killed":
            folder = Path(shutil.copytree(folder, Path(name) / "copy"))
        elif state != "open":
            store.close()
        if state == "old":
            log_mode(folder / "a")
        before = everything(folder)
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        reader = multiprocessing.get_context("fork").Process(target=_read_as_a_stranger, args=(folder / "a", 3))
        reader.start()
        reader.join()
        folder.chmod(0o755)
        assert reader.exitcode == 0
        after = everything(folder)
        assert after.keys() == before.keys()
        kept = [name for name in ("a", "a-wal") if name in before]  # a-shm holds the locks of readers
        assert all(after[name] == before[name] for name in kept)
        store.close()


def test_a_store_is_not_merged_into_itself(tmp_path):
    with Store(tmp_path / "a") as store:
        store.record([(asked(1), answer(1))])
        (tmp_path / "link").symlink_to(tmp_path / "a")
        (tmp_path / "hard").hardlink_to(tmp_path / "a")
        for name in ("a", "link", "hard"):
            with pytest.raises(ValueError, match="is the store to merge into"):
                store.merge(tmp_path / name)


def test_a_store_that_is_being_written_is_merged(tmp_path):
    with Store(tmp_path / "a") as store, Store(tmp_path / "b") as other:
        other.record([(asked(n), answer(n)) for n in range(3)])
        before = (tmp_path / "b").read_bytes()
        assert store.merge(tmp_path / "b") == 3
        assert (tmp_path / "b").read_bytes() == before
        other.record([(asked(3), answer(3))])
        assert store.merge(tmp_path / "b") == 1


def changed(path, *, table="answers", column, value):
    """A store in which another program wrote a value, without the rules of the table."""
    with Store(path) as store:
        store.record([(asked(1), answer(1)), (asked(2), Failure("cut"))])
        store.note_source("m", "1")
        store.keep_scores("k", [1.0])
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        names = ", ".join(name for (name,) in db.execute("SELECT name FROM pragma_table_info(?)", (table,)))
        db.executescript(f"ALTER TABLE {table} RENAME TO own; CREATE TABLE {table} ({names})")
        db.executescript(
            f"INSERT INTO {table} SELECT * FROM own; DROP TABLE own; UPDATE {table} SET {column} = {value}"
        )


def reads(path, read):
    """Read a store in one of the ways in which commands do."""
    if read == "merge":
        with Store(path.with_name("own")) as own:
            own.merge(path)
        return
    with Store(path, read_only=True) as store:
        if read == "get":
            store.get([asked(1).request.key, asked(2).request.key])
        elif read == "known_scores":
            store.known_scores("k")
        else:
            list(getattr(store, read)())


CHANGED = {
    "get": {
        "answers": {"text": ["x'ff'", "NULL", "5", "CAST(x'ff' AS TEXT)"], "finish_reason": ["NULL", "0.5"]},
        "failures": {"reason": ["x'ff'", "NULL"]},
    },
    "usage": {"answers": {"role": ["NULL"], "model": ["x'ff'"]}},
    "failures": {"failures": {"row": ["NULL"], "tag": ["5"], "reason": ["x'ff'"]}},
    "known_scores": {"scores": {"scores": ["NULL", "5", "'5'", "'[\"a\"]'", "'[1'"]}},
    "merge": {
        "answers": {"key": ["NULL"], "text": ["NULL", "x'ff'"], "request": ["NULL"], "at": ["'noon'"]},
        "failures": {"reason": ["NULL"]},
        "sources": {"source": ["NULL"]},
        "scores": {"at": ["NULL"]},
    },
}
TOKENS = {"prompt_tokens": ["NULL", "'many'", "x'ff'", "0.5"], "completion_tokens": ["NULL", "''"]}
for each in ("get", "usage", "merge"):
    CHANGED[each]["answers"] |= TOKENS
CHANGED["get"]["answers"]["logprobs"] = ["x'ff'", "5", "'5'", "'[true]'", "'[[1]]'", "'['"]
CASES = [
    (read, table, column, value)
    for read, tables in CHANGED.items()
    for table, columns in tables.items()
    for column, values in columns.items()
    for value in values
]


@pytest.mark.parametrize(("read", "table", "column", "value"), CASES)
def test_values_of_other_types_end_in_a_sentence_with_the_file(tmp_path, read, table, column, value):
    """SQLite keeps any type in any column, and a table with the same columns need not have the same rules."""
    path = tmp_path / "theirs"
    changed(path, table=table, column=column, value=value)
    with pytest.raises((ValueError, sqlite3.OperationalError), match=str(path)) as error:
        reads(path, read)
    assert is_mistake(error.value)
    if isinstance(error.value, ValueError):
        assert f"{table}, where contralto writes a" in str(error.value)


def test_tokens_of_another_type_are_not_left_out_of_the_sums(tmp_path):
    """As SQL's sums do with NULL, where other answers of the role have numbers."""
    changed(tmp_path / "theirs", column="prompt_tokens", value="NULL")
    with closing(sqlite3.connect(tmp_path / "theirs", isolation_level=None)) as db:
        db.execute("INSERT INTO answers SELECT 'k', " + ", ".join(ANSWERS[1:]) + " FROM answers")
        db.execute("UPDATE answers SET prompt_tokens = 3 WHERE key = 'k'")
    with pytest.raises(ValueError, match="holds NULL in the column prompt_tokens of its answers"):
        reads(tmp_path / "theirs", "usage")


def test_a_store_that_nobody_changed_reads_in_all_ways(tmp_path):
    changed(tmp_path / "theirs", column="text", value="text")
    for read in CHANGED:
        reads(tmp_path / "theirs", read)


# ------------------------------------------------------------------------------------------------------------------ size


def steps(store, act):
    """Steps of SQLite's virtual machine that `act` takes."""
    count = 0

    def step():
        nonlocal count
        count += 1

    store._db.set_progress_handler(step, 1)
    act()
    store._db.set_progress_handler(None, 1)
    return count


def test_an_answer_costs_the_same_in_a_large_store(tmp_path):
    """Failures must not be compared with all answers at every commit."""
    with Store(tmp_path / "a") as store:
        found = []
        for size in (10, 4000):
            store.record([(asked(size + n), answer(1)) for n in range(size)])
            new = [[(asked(-size - n), answer(1))] for n in range(3)]
            failed = [(asked(-2 * size), Failure("cut"))]
            costs = [steps(store, lambda said=said: store.record(said)) for said in (*new, failed, *new)]
            key = asked(-size).request.key
            found.append([*costs, steps(store, lambda key=key: store.get([key]))])
        assert all(large <= small + 20 for small, large in zip(*found, strict=True)), found


def test_texts_of_any_kind(tmp_path):
    texts = ["", "\x00", "é ☃ 😀", "a" * 10**6, "'; DROP TABLE answers; --"]
    with Store(tmp_path / "a") as store:
        store.record([(asked(n), Answer(text=text)) for n, text in enumerate(texts)])
        found = store.get([asked(n).request.key for n in range(len(texts))])
        assert [found[asked(n).request.key].text for n in range(len(texts))] == texts


# ------------------------------------------------------------------------------------------------------------- accidents


def test_a_full_disk_records_nothing_of_a_list_and_breaks_nothing(tmp_path):
    """In a process of its own, whose files may not grow beyond 256 KiB."""
    code = f"""
import resource, sqlite3, sys
from pathlib import Path
from helpers.stored_answers import answer, asked
from contralto.common.errors import is_mistake
from contralto.data_gen.store import Store
store = Store(Path({str(tmp_path / "a")!r}))
store.record([(asked(0), answer(0))])
resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, resource.RLIM_INFINITY))
try:
    store.record([(asked(n), answer(n, "long " * 2000)) for n in range(1, 200)])
except sqlite3.OperationalError as error:
    print("full:", error)
print(len(store.get([asked(n).request.key for n in range(200)])))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.record([(asked(n), answer(n, "long " * 2000)) for n in range(1, 200)])
print(len(store.get([asked(n).request.key for n in range(200)])))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    full, before, after = result.stdout.splitlines()
    assert full.startswith(f"full: {tmp_path / 'a'}: "), result.stdout
    assert (before, after) == ("1", "200")
    assert sqlite3.connect(tmp_path / "a").execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_source_that_cannot_be_noted_ends_the_run(tmp_path):
    """Or else the next run would call the function changed."""
    with Store(tmp_path / "a") as store:
        store.record([(asked(1), answer(1))])
        store._db.execute("PRAGMA query_only=ON")
        with pytest.raises(sqlite3.OperationalError, match=f"{tmp_path / 'a'}: attempt to write a readonly database"):
            store.note_source("m", "1")


def _interrupt_a_write(path):
    """Leave a journal, as a process does that is killed while it creates the tables or ends the write-ahead log."""
    code = f"""
import os, signal, sqlite3
db = sqlite3.connect({str(path)!r}, isolation_level=None)
db.executescript("PRAGMA cache_size=1; BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS failures(x, y, a, b, c, d, e)")
for n in range(100):
    db.execute("INSERT INTO failures VALUES (?, ?, '', '', '', '', 1)", (str(n), "x" * 1000))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert path.with_name(f"{path.name}-journal").stat().st_size


@pytest.mark.parametrize("read_only", [False, True])
def test_a_write_that_a_kill_interrupted_is_undone(tmp_path, read_only):
    """A connection that only reads cannot undo it: the store could not be opened any more."""
    path = tmp_path / "a"
    with Store(path) as store:
        store.record([(asked(1), answer(1))])
    _interrupt_a_write(path)
    with Store(path, read_only=read_only) as store:
        assert len(store.get([asked(1).request.key])) == 1
        assert list(store.failures()) == []
    assert list(everything(tmp_path)) == ["a"]


def test_a_store_whose_tables_were_half_created_is_begun_again(tmp_path):
    _interrupt_a_write(tmp_path / "a")
    with Store(tmp_path / "a") as store:
        store.record([(asked(1), answer(1))])
        assert len(store.get([asked(1).request.key])) == 1


def _open_as_a_stranger(path):
    if os.getuid() == 0:
        os.setuid(65534)  # nobody: root may write anywhere
    with pytest.raises(
        OSError, match=r"its last write was interrupted.*copy a and a-journal into a folder of your own"
    ):
        Store(path, read_only=True)


def test_an_interrupted_write_in_a_folder_that_cannot_be_written_is_named():
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "theirs" / "a"
        with Store(path) as store:
            store.record([(asked(1), answer(1))])
        _interrupt_a_write(path)
        Path(name).chmod(0o755)
        path.parent.chmod(0o555)
        reader = multiprocessing.get_context("fork").Process(target=_open_as_a_stranger, args=(path,))
        reader.start()
        reader.join()
        path.parent.chmod(0o755)
        assert reader.exitcode == 0


def _write_many(path, start, first):
    with Store(path) as store:
        for n in range(start, start + 60):
            store.record([(asked(n), answer(n, f"{first} {n}"))])


def test_two_writers_at_once(tmp_path):
    """Each number is there once, and whoever came first stands."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path / "a", 30 * i, f"writer {i}")) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    with Store(tmp_path / "a") as store:
        found = store.get([asked(n).request.key for n in range(90)])
    assert len(found) == 90
    assert {said.text.split()[1] for said in found.values()} == {"0", "1"}


@pytest.mark.slow
def test_killed_at_any_instant_a_writer_leaves_whole_lists(tmp_path):
    """A child records lists of five and says so on a pipe; what it said is there, and nothing is there in part."""
    code = f"""
import sys
from pathlib import Path
from helpers.stored_answers import answer, asked
from contralto.common.errors import is_mistake
from contralto.data_gen.store import Store
store = Store(Path({str(tmp_path / "a")!r}))
start = int(sys.argv[1])
for n in range(start, start + 10000, 5):
    store.record([(asked(k), answer(k)) for k in range(n, n + 5)])
    print(n + 5, flush=True)
"""
    said = 0
    for pause in (0.02, 0.11, 0.07, 0.05):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(said)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert child.stdout.readline()
        time.sleep(pause)
        os.kill(child.pid, signal.SIGKILL)
        said = max([said, *(int(line) for line in child.stdout if line.endswith("\n"))])
        child.wait()
        child.stdout.close()
        with Store(tmp_path / "a") as store:
            known = store.get([asked(n).request.key for n in range(said + 5)])
            assert len(known) in (said, said + 5)
            assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        said = len(known)
    assert said > 20
