"""The loss of ranked candidates against a float64 reference in plain Python."""

import random

import pytest
import torch
from oracles import ranking as reference
from torch.testing import assert_close

from contralto.align.losses.ranking import length_penalised, ranking_loss


def _rows(seed, sizes=(5, 5, 5), decimals=6):
    rng = random.Random(seed)
    return [[(rng.uniform(-3, 0), round(rng.uniform(0, 1), decimals)) for _ in range(size)] for size in sizes]


def _tensors(rows, *, grad=False):
    """Scores, quality and mask of rows, padded with values that must not count."""
    width = max(map(len, rows))
    padded = [[*row, *[(9.0, 0.5)] * (width - len(row))] for row in rows]
    values = torch.tensor(padded, dtype=torch.float64)
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    return values[..., 0].clone().requires_grad_(grad), values[..., 1], mask


@pytest.mark.parametrize("tolerance", [0.0, 0.2])
@pytest.mark.parametrize("decimals", [6, 1])
@pytest.mark.parametrize("sizes", [(5, 5, 5), (2, 6, 3)])
def test_equals_the_reference(sizes, decimals, tolerance):
    """With one decimal some candidates have one quality."""
    for seed in range(5):
        rows = _rows(seed, sizes, decimals)
        scores, quality, mask = _tensors(rows)
        loss = ranking_loss(scores, quality, margin=0.3, tolerance=tolerance, mask=mask)
        assert loss.item() == pytest.approx(reference.ranking(rows, 0.3, tolerance), rel=1e-12)


def test_gradients_equal_finite_differences():
    scores, quality, mask = _tensors(_rows(1, (4, 3)), grad=True)
    assert torch.autograd.gradcheck(lambda f: ranking_loss(f, quality, margin=0.3, mask=mask), scores)


def test_a_perfect_order_with_its_margins_costs_nothing_and_the_reverse_costs_most():
    quality = torch.tensor([[3.0, 2.0, 1.0]])
    assert ranking_loss(torch.tensor([[0.0, -1.0, -2.0]]), quality, margin=1.0) == 0
    assert ranking_loss(torch.tensor([[-2.0, -1.0, 0.0]]), quality, margin=1.0) == 2 + 4


def test_absent_candidates_have_no_gradient():
    scores, quality, mask = _tensors(_rows(2, (2, 4)), grad=True)
    ranking_loss(scores, quality, margin=1.0, mask=mask).backward()
    assert (scores.grad[~mask] == 0).all()
    assert (scores.grad[mask] != 0).any()


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_likelihoods_equal_the_reference(alpha):
    rng = random.Random(0)
    tokens = [[rng.uniform(-4, 0) for _ in range(n)] for n in (1, 4, 9)]
    logps = torch.tensor([sum(each) for each in tokens], dtype=torch.float64)
    found = length_penalised(logps, torch.tensor([1, 4, 9]), alpha=alpha)
    assert_close(found, torch.tensor([reference.likelihood(each, alpha) for each in tokens], dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: ranking_loss(f, f, margin=-1.0), "margin must be at least 0, not -1.0"),
        (lambda f: ranking_loss(f, f, margin=0.1, tolerance=-0.1), "tolerance must be at least 0, not -0.1"),
        (lambda f: ranking_loss(f, f[:, :1], margin=0.1), r"one shape \(B, n\), not \(2, 3\), \(2, 1\)"),
        (lambda f: length_penalised(f, f, alpha=-1), "alpha must be at least 0"),
    ],
)
def test_wrong_arguments_are_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
