"""Contrastive decoding through `generate()` gives the reference's tokens: every family, strategy and batch.

The processor works on a left-padded batch with caches, in float32. The reference works on each row alone, unpadded,
without a cache, in float64.
"""

import pytest
import zoo
from helpers import families


@pytest.fixture(params=zoo.families())
def pair(request):
    return families.build_pair(request.param)


@pytest.mark.parametrize("batch", [1, 4])
def test_greedy(pair, batch):
    found, expected = families.greedy(pair, batch)
    assert found == expected


@pytest.mark.covering
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_sampling(pair, batch):
    found, expected = families.sampled(pair, batch)
    assert found == expected


@pytest.mark.covering
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_beam_search(pair, batch):
    found, expected = families.beams(pair, batch)
    assert found == expected
