"""The part of a product that `make test` runs: every pair of values meets in it, and it is no larger than it has to be."""

import doctest
from itertools import combinations

import covering
import pytest


def _pairs(rows):
    return {pair for row in rows for pair in combinations(sorted(row.items()), 2)}


@pytest.mark.parametrize("holes", [0, 7])
def test_every_pair_of_values_meets(holes):
    rows = [{"a": a, "b": b, "c": c, "d": d} for a in range(5) for b in range(4) for c in range(3) for d in range(2)]
    rows = [row for i, row in enumerate(rows) if not holes or i % holes]
    chosen = covering.covering(rows)
    assert _pairs(rows[i] for i in chosen) == _pairs(rows)
    assert 5 * 4 <= len(chosen) < 30


def test_what_is_run_anyway_counts():
    rows = [{"a": a, "b": b} for a in "xy" for b in "pq"]
    assert covering.covering(rows, strength=1, chosen=[3]) == [0, 3]


def test_the_example():
    assert doctest.testmod(covering).failed == 0
