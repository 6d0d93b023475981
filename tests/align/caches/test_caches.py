"""Caches of blocks: interrupted passes resume, processes share the work, disk space is checked in advance."""

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError

from contralto.align.caches import teacher
from contralto.align.caches.blocks import Processes
from contralto.align.caches.reference import ReferenceCache
from contralto.align.caches.teacher import TeacherStates, load_head, save_head
from contralto.align.losses.chunked import Head
from contralto.align.trainers.collators import TeacherStatesCollator


def test_a_killed_reference_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ReferenceCache, "rows_per_block", 2)
    rows = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2, i], "rejected_ids": [3]} for i in range(6)])
    asked = []

    def compute(block):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(block)
        return [torch.tensor([float(row["chosen_ids"][1])]) for row in block], [torch.zeros(1) for _ in block]

    with pytest.raises(KeyboardInterrupt):
        ReferenceCache(tmp_path, "key", compute).add(rows, "train")
    del asked[:]
    found = ReferenceCache(tmp_path, "key", compute).add(rows, "train")
    assert len(asked) == 1
    assert found["ref_chosen_token_logps"] == [[float(i)] for i in range(6)]


def test_a_killed_pass_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(TeacherStates, "rows_per_block", 2)
    rows = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2] * (i + 1), "rejected_ids": [3]} for i in range(6)])
    asked = []

    def compute(block):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(block)
        texts = [[len(row["chosen_ids"]), 1] for row in block]
        return [(torch.full((sum(each), 3), float(each[0])), each) for each in texts]

    with pytest.raises(KeyboardInterrupt):
        TeacherStates(tmp_path, "key", compute, lambda: 12).add(rows, "train")
    del asked[:]
    found = TeacherStates(tmp_path, "key", compute, lambda: 12).add(rows, "train")
    assert len(asked) == 1
    batch = TeacherStatesCollator(lambda examples: {"size": len(examples)})([dict(found[i]) for i in (5, 0)])
    assert batch["teacher_states"][:, 0].tolist() == [6.0] * 6 + [1.0] + [6.0] + [1.0]
    with pytest.raises(OSError, match=r"take .* GB, and .* left: name another folder \(teacher_cache\)"):
        TeacherStates(tmp_path, "other", compute, lambda: 10**15).add(rows, "train")


def test_processes_share_the_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(TeacherStates, "rows_per_block", 1)
    rows = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2, i], "rejected_ids": [3]} for i in range(5)])
    asked = {0: [], 1: []}

    def of(rank):
        def compute(block):
            asked[rank].append(block[0]["chosen_ids"][1])
            return [(torch.zeros(3, 2), [2, 1]) for _ in block]

        return TeacherStates(tmp_path, "key", compute, lambda: 8, Processes(rank, 2))

    with pytest.raises(FileNotFoundError):  # the other process's blocks are not there yet
        of(1).add(rows, "train")
    of(0).add(rows, "train")
    assert asked == {0: [0, 2, 4], 1: [1, 3]}


@pytest.mark.parametrize(
    "damage", [lambda block: block[: len(block) // 2], lambda _: b"", lambda _: b"no block at all"]
)
@pytest.mark.parametrize("kind", [ReferenceCache, TeacherStates])
def test_damaged_blocks_are_computed_again(tmp_path, caplog, kind, damage):
    rows = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2] * 500, "rejected_ids": [3]} for _ in range(3)])
    asked = []

    def logps_of(block):
        asked.append(len(block))
        return [torch.rand(500) for _ in block], [torch.rand(1) for _ in block]

    def states_of(block):
        asked.append(len(block))
        return [(torch.rand(501, 2), [500, 1]) for _ in block]

    def filled():
        cache = kind(tmp_path, "key", *((logps_of,) if kind is ReferenceCache else (states_of, lambda: 8)))
        return cache.add(rows, "train")

    filled()
    (path,) = (tmp_path / "key").glob(f"*{kind.suffix}")
    whole = path.read_bytes()
    filled()
    assert asked == [3]
    path.write_bytes(damage(whole))
    assert len(filled()) == 3
    assert asked == [3, 3]
    assert f"{path} is damaged and is computed again" in caplog.text
    assert abs(len(path.read_bytes()) - len(whole)) < 1000


def test_errors_of_the_disk_name_the_file(tmp_path, monkeypatch):
    """safetensors gives an error of its own for a write, and torch a RuntimeError for a mapping."""

    def failing(*_):
        raise error

    head = Head(torch.ones(5, 4), None, 1.0, None)
    save_head(head, tmp_path / "a.safetensors")
    for name, error in (("safe_open", RuntimeError("unable to mmap")), ("save_file", SafetensorError("I/O error"))):
        monkeypatch.setattr(teacher, name, failing)
        with pytest.raises(OSError, match=rf"a\.safetensors cannot be .*: {error}"):
            load_head(tmp_path / "a.safetensors", "cpu") if name == "safe_open" else save_head(
                head, tmp_path / "a.safetensors"
            )


def test_a_block_of_fewer_rows_is_computed_again(tmp_path, caplog):
    """As if a hash stood for other rows: what is on disk must fit the data set."""
    rows = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]} for _ in range(3)])
    cache = ReferenceCache(tmp_path, "key", lambda block: ([torch.rand(1) for _ in block],) * 2)
    cache.write(cache.path(list(rows)), ([torch.rand(1)], [torch.rand(1)]))
    assert len(cache.add(rows, "train")) == 3
    assert "another number of rows" in caplog.text


def test_names_of_blocks_stay(tmp_path):
    """A cache that was written before is found again."""
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}]
    rows += [{"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9]}]
    reference, states = ReferenceCache(tmp_path, "k" * 40, None), TeacherStates(tmp_path, "k" * 40, None, None)
    assert reference.path(rows) == tmp_path / ("k" * 32) / "7fa216b7e40972af33cd68ccc32b7c0c.arrow"
    assert states.path(rows) == tmp_path / ("k" * 32) / "1ae0129586185c5e1765243e021b2af5.safetensors"
