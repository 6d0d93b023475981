"""Weights that are cast into kept memory: always the weight as it is, whoever else is using the memory."""

import pytest
import torch

from contralto.align.losses import workspace
from contralto.align.losses.chunked import Head, chunked_logps
from contralto.align.losses.workspace import cast_for_now

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(workspace, "_KEPT", {})


def _cast(weight):
    with cast_for_now(weight, HALF) as found:
        assert torch.equal(found, weight.to(HALF))
        return found.data_ptr()


def test_memory_is_kept_and_values_are_not():
    weight = torch.randn(6, 4)
    place = _cast(weight)
    weight.data += 1  # which no version counter sees
    assert _cast(weight) == place
    assert _cast(torch.randn(3, 5)) == place
    assert _cast(torch.randn(3, 4).t()) == place
    _cast(torch.randn(60, 40))


def test_a_weight_in_its_dtype_is_itself():
    weight = torch.randn(6, 4, dtype=HALF)
    with cast_for_now(weight, HALF) as found:
        assert found.data_ptr() == weight.data_ptr()


def test_two_at_a_time_have_memory_of_their_own():
    one, other = torch.randn(6, 4), torch.randn(6, 4)
    _cast(one)  # there is memory to share
    places = set()
    for _ in range(2):
        with cast_for_now(one, HALF) as first, cast_for_now(other, HALF) as second:
            assert torch.equal(first, one.to(HALF))
            assert torch.equal(second, other.to(HALF))
            places |= {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2, "the memory of both is kept"


def test_an_error_gives_the_memory_back():
    with pytest.raises(RuntimeError, match="stop"), cast_for_now(torch.randn(6, 4), HALF):
        raise RuntimeError("stop")
    assert len(workspace._KEPT[HALF]) == 1


def test_training_follows_inference():
    """Memory that was made in inference mode could not be written to later."""
    weight, hidden = torch.randn(9, 4), torch.randn(3, 4)
    with torch.inference_mode(), torch.autocast("cpu", HALF):
        expected = chunked_logps(hidden, Head(weight), torch.arange(3)).logps.clone()
    moving = hidden.clone().requires_grad_()
    with torch.autocast("cpu", HALF):
        found = chunked_logps(moving, Head(weight), torch.arange(3)).logps
    found.sum().backward()
    assert torch.equal(found.detach(), expected)
    assert moving.grad.abs().sum() > 0


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_trained_head_keeps_a_weight_of_its_own_for_the_backward_pass(trained):
    """Another pass between forward and backward uses the kept memory."""
    weight, bias, hidden = torch.randn(9, 4), torch.randn(9), torch.randn(3, 4)
    grads = []
    for between in (False, True):
        leaves = {"weight": weight.clone(), "bias": bias.clone()}
        leaves[trained].requires_grad_()
        moving = hidden.clone().requires_grad_()
        with torch.autocast("cpu", HALF):
            logps = chunked_logps(moving, Head(**leaves), torch.arange(3)).logps
            if between:
                chunked_logps(hidden, Head(torch.randn(9, 4)), torch.arange(3))
        logps.sum().backward()
        grads.append([moving.grad, leaves[trained].grad])
    for mine, theirs in zip(*grads, strict=True):
        assert torch.equal(mine, theirs)
