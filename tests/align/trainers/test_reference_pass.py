"""The reference's forward passes in batches that fit: halved where memory runs out, with the same numbers and nothing computed twice."""

import logging
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.ranks import run_ranks
from helpers.trl_warnings import RENAMED_OPTIONS
from peft import LoraConfig
from torch.testing import assert_close

from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.preference import PreferenceTrainer
from contralto.align.trainers.reference_pass import MULTIPLE, ReferencePass, starting_size
from contralto.testbed import worlds

pytestmark = RENAMED_OPTIONS

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _pairs(size=7):
    rows = [
        {"prompt": each.question, "chosen": f" {each.solution()}", "rejected": f" {each.solution()[: 8 + 3 * i]}"}
        for i, each in enumerate(islice(worlds.problems(0, "train"), size))
    ]
    return Dataset.from_list(rows)


def _trainer(folder, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    kept = {"precompute_ref_log_probs": True, "reference_cache": str(folder / "kept"), "max_steps": 1}
    args = PreferenceConfig(str(folder), **quiet, **kept, **({"per_device_train_batch_size": 4} | options))
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return PreferenceTrainer("testbed:expert", args=args, train_dataset=_pairs(), peft_config=adapter)


def _logps(one):
    return [row[f"ref_{side}_token_logps"] for row in one.train_dataset for side in ("chosen", "rejected")]


@pytest.fixture
def watched(monkeypatch):
    """Sizes of the batches that were tried; `watched.fails` says which of them run out of memory, or raises."""
    real, tried = PreferenceTrainer.score_tokens, SimpleNamespace(sizes=[], fails=lambda sizes: False)

    def score_tokens(self, model, batch, scoring=None):
        tried.sizes.append(len(batch.labels) // 2)
        if tried.fails(tried.sizes):
            raise FULL
        return real(self, model, batch, scoring)

    monkeypatch.setattr(PreferenceTrainer, "score_tokens", score_tokens)
    return tried


@pytest.mark.parametrize(
    ("fails", "sizes"),
    [
        (lambda sizes: False, [4, 3]),
        (lambda sizes: sizes[-1] > 2, [4, 2, 2, 2, 1]),
        (lambda sizes: sizes == [4, 3], [4, 3, 2, 1]),
        (lambda sizes: sizes[-1] > 1, [4, 2, *[1] * 7]),
    ],
)
def test_only_what_ran_out_of_memory_is_computed_again(tmp_path, watched, fails, sizes):
    plain = _logps(_trainer(tmp_path / "plain"))
    watched.sizes, watched.fails = [], fails
    assert_close(
        [torch.tensor(row) for row in _logps(_trainer(tmp_path / "full"))],
        [torch.tensor(row) for row in plain],
        rtol=0,
        atol=1e-5,
    )
    assert watched.sizes == sizes


def test_the_size_that_fits_is_kept_for_further_rows(tmp_path, watched, caplog):
    one = _trainer(tmp_path)
    rows, run = list(one.train_dataset), ReferencePass(one, 4)
    watched.sizes, watched.fails = [], lambda sizes: sizes[-1] > 2
    with caplog.at_level(logging.INFO, "contralto.align.trainers.reference_pass"):
        first, second = run(rows), run(rows)
    assert watched.sizes == [4, 2, 2, 2, 1, 2, 2, 2, 1]
    assert run.batch_size == 2
    assert "going on with 2 pairs" in caplog.text
    assert_close(first, second)
    assert one.model.training


def test_what_cannot_be_halved_is_raised(tmp_path, watched):
    watched.fails = lambda sizes: True
    with pytest.raises(RuntimeError, match="of one pair runs out of memory: set a smaller max_length") as caught:
        _trainer(tmp_path / "full")
    assert caught.value.__cause__ is FULL or caught.value.__context__ is FULL
    assert watched.sizes == [4, 2, 1]

    def other(sizes):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    watched.sizes, watched.fails = [], other
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        _trainer(tmp_path / "other")
    assert watched.sizes == [4]


def test_a_sharded_model_keeps_its_size(tmp_path, watched):
    """Its other processes wait within the forward pass that failed."""
    one = _trainer(tmp_path)
    rows, one.is_fsdp_enabled = list(one.train_dataset), True
    watched.sizes, watched.fails = [], lambda sizes: sizes[-1] > 2
    with pytest.raises(torch.OutOfMemoryError):
        ReferencePass(one, 4)(rows)
    assert watched.sizes == [4]


def test_a_layout_is_checked_before_a_batch_may_fail(tmp_path, watched):
    """Two forward passes in either layout and two of halves, on a batch of training's size; nothing passes unchecked."""
    one = _trainer(tmp_path, prefix_sharing=True, per_device_train_batch_size=2)
    rows, one._layout_is_checked = list(one.train_dataset), False
    watched.sizes, watched.fails = [], lambda sizes: sizes[-1] > 3
    shared = ReferencePass(one, 6)(rows)
    assert watched.sizes == [2, 2, 1, 1, 6, 3, 3, 1]
    assert one.arrange is not None
    one.arrange, watched.fails = None, lambda sizes: False
    assert_close(shared, ReferencePass(one, 6)(rows), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "device", "size"),
    [
        ({}, "cuda", 4 * MULTIPLE),
        ({}, "cpu", 4),
        ({"precompute_ref_batch_size": 4}, "cuda", 4),
        ({"padding_free": True}, "cuda", 4),
    ],
)
def test_the_first_size_is_the_given_one_or_a_multiple_of_training(options, device, size):
    args = SimpleNamespace(**{"precompute_ref_batch_size": None, "padding_free": False} | options)
    assert starting_size(args, 4, device) == size


@pytest.mark.slow
def test_processes_halve_together(tmp_path, watched):
    """One of two runs out of memory; both go on with half, and have the rows of one process alone."""
    alone = _trainer(tmp_path / "alone")
    rows = list(alone.train_dataset)
    expected = [side for both in ReferencePass(alone, 4)(rows) for side in both]

    def run():
        one = _trainer(tmp_path / "both", precompute_ref_batch_size=2)
        rank = one.accelerator.process_index
        watched.sizes, watched.fails = [], lambda sizes: rank == 1 and sizes == [2]
        found = [side for both in ReferencePass(one, 2)(rows) for side in both]
        assert watched.sizes == [2, 1, 1, 1, 1]
        assert_close(found, expected, rtol=0, atol=1e-5)

    run_ranks(run)
