"""The cached reader against plain forward passes of whole rows: read, crop, reorder, replicate, peek.

The breaks that these tests must notice are in tests/mutants/declared/branches.yaml.
"""

import pytest
import torch
import zoo

from contralto.decoding.branches import CachedReader, ModelBranch
from contralto.decoding.branches.context import ContextLimit
from contralto.decoding.branches.prompts import prepare_images

FAMILIES = ["llama", "gpt2", "gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mistral", "bloom", "opt"))]
SLIDING = {"gemma3", "mistral"}
"""Families whose windows are shorter than the rows: they go back only over what they recorded."""
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def started(family, **limit):
    """A reader after three left-padded prompts, and the rows without padding."""
    model = zoo.build(family, seed=1)
    reader = CachedReader(model, **limit)
    inputs = zoo.pad(zoo.prompts(3))
    prompts = prepare_images(model, inputs["input_ids"], {"attention_mask": inputs["attention_mask"]}, 3)
    return reader, [list(map(int, row)) for row in zoo.prompts(3)], reader.prefill(prompts)


@torch.no_grad()
def plain(model, rows, count=1):
    """The logits of the last positions of each row, each row read alone and without a cache."""
    return torch.stack([model(torch.tensor([row]), use_cache=False).logits[0, -count:] for row in rows])


def follow(rows, tokens):
    return [row + new for row, new in zip(rows, torch.as_tensor(tokens).tolist(), strict=True)]


def assert_aligned(reader):
    """Mask and positions have the column of the next token, and no more."""
    for name in (reader.mask_name, reader.positions_name):
        if reader.kwargs.get(name) is not None:
            assert reader.kwargs[name].shape[-1] == reader.length + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_one_by_one_several_at_once_and_taken_back(family):
    reader, rows, logits = started(family)
    if family in SLIDING:
        reader.record_past()
    torch.testing.assert_close(logits, plain(reader.model, rows), **CLOSE)
    first, more, other = torch.randint(3, zoo.VOCAB, (3, 3, 3), generator=torch.Generator().manual_seed(2))
    for column in first.split(1, dim=1):
        rows = follow(rows, column)
        torch.testing.assert_close(reader.read(column), plain(reader.model, rows), **CLOSE)
    longer = follow(rows, more)
    torch.testing.assert_close(reader.read(more, new=3), plain(reader.model, longer, 3), **CLOSE)
    assert_aligned(reader)
    assert reader.crop(reader.length - 4, new=3)  # into the tokens that came one by one
    assert_aligned(reader)
    rows = follow([row[:-1] for row in rows], other)
    torch.testing.assert_close(reader.read(other, new=3, keep=1), plain(reader.model, rows), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_in_another_order(family):
    reader, rows, _ = started(family)
    order = torch.tensor([2, 0, 0])
    reader.reorder(order)
    rows = follow([rows[i] for i in order.tolist()], [[5], [6], [7]])
    torch.testing.assert_close(reader.read(torch.tensor([[5], [6], [7]])), plain(reader.model, rows), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_with_other_tokens_and_one_of_each_row_taken(family):
    reader, rows, _ = started(family)
    candidates = torch.tensor([[5, 6], [7, 8], [9, 10]])
    copies = reader.replicate(2)
    outputs = copies.peek(candidates.reshape(-1, 1))
    expected = plain(reader.model, follow([row for row in rows for _ in range(2)], candidates.reshape(-1, 1)))
    torch.testing.assert_close(outputs.logits, expected, **CLOSE)
    beside = reader.fork()
    torch.testing.assert_close(  # the rows themselves have not read the candidates
        beside.read(candidates[:, :1]), plain(reader.model, follow(rows, candidates[:, :1])), **CLOSE
    )
    reader.take(copies, torch.tensor([1, 2, 5]))
    assert_aligned(reader)
    rows = follow(rows, [[6, 3], [7, 3], [10, 3]])
    torch.testing.assert_close(reader.read(torch.full((3, 1), 3)), plain(reader.model, rows), **CLOSE)


def test_a_window_that_has_moved_on_cannot_go_back():
    reader, _, _ = started("mistral")
    reader.read(torch.full((3, 9), 5), new=9)
    assert not reader.crop(reader.length - 9)


def test_a_recurrent_state_cannot_go_back():
    reader, _, _ = started("mamba")
    reader.read(torch.full((3, 1), 5))
    assert not reader.crop(reader.length - 1)
    assert reader.crop(reader.length)


def test_the_limit_counts_tokens_of_rows_that_go_on():
    _, rows, _ = started("llama")
    longest = max(map(len, rows))
    reader, _, _ = started("llama", limit=ContextLimit("Amateur", longest, ends=(zoo.EOS,)))
    ended = [zoo.EOS if len(row) == longest else 5 for row in rows]
    reader.read(torch.tensor(ended)[:, None])  # the others are shorter
    with pytest.raises(ValueError, match=f"more than the context of {longest} tokens of Amateur"):
        reader.read(torch.full((3, 1), 5))


def test_the_first_rows_may_be_exempt():
    limit = ContextLimit("Amateur", 8, exempt=1)
    limit.check(torch.tensor([9, 8]))
    with pytest.raises(ValueError, match="the context of 8 tokens"):
        limit.check(torch.tensor([8, 9]))


def test_generated_tokens_of_a_small_vocabulary_are_not_looked_at(monkeypatch):
    branch, ids = ModelBranch(zoo.build("llama", seed=1)), torch.tensor([[5, 6, 7]])
    looks, largest = [], torch.Tensor.max
    monkeypatch.setattr(torch.Tensor, "max", lambda self, *args: looks.append(1) or largest(self, *args))
    for size, expected in ((None, 1), (zoo.VOCAB, 0), (zoo.VOCAB + 1, 1)):
        if size is not None:
            branch.limit_tokens(size)
        branch.reset()
        branch(ids)
        looks.clear()
        branch(torch.cat([ids, ids[:, :1]], dim=1))
        assert len(looks) == expected
