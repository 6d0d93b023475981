"""Blocks on disk: a pass that was killed goes on, processes share the work, room is checked before it is needed."""

import pytest
import torch
from datasets import Dataset

from contralto.align.caches.blocks import Processes
from contralto.align.caches.reference import ReferenceCache
from contralto.align.caches.teacher import TeacherStates
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
