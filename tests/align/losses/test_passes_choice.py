"""The kernel is kept where it is right and faster, and one sentence says why where it is not: with kernels that are given, on a CPU."""

import logging
import math
from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from contralto.align.losses import passes_choice
from contralto.align.losses.chunked import Head
from contralto.align.losses.passes_choice import PassesChoice
from contralto.align.losses.sweep import LogitsSource
from contralto.align.losses.target_passes import TargetTile, torch_passes
from contralto.align.losses.workspace import Workspace

VOCABULARY, TOKENS = 4100, 12
WORK = Workspace(torch.zeros(1, 1), (TOKENS, VOCABULARY), tiles=0, in_full=True)


def _tile(*, half=False, statistics=(), gradient=True, tokens=TOKENS, factors=None):
    generator = torch.Generator().manual_seed(0)
    products = 3 * torch.randn(tokens, VOCABULARY, generator=generator)
    memory = torch.empty_like(products, dtype=torch.bfloat16) if half else products
    head = Head(torch.zeros(VOCABULARY, 1), scale=0.5, softcap=20.0)
    targets = torch.arange(tokens) * 300
    return TargetTile(
        products, targets, LogitsSource(head, 0.7), factors, memory if gradient else None, tuple(statistics)
    )


class Kernel:
    """The torch passes with a fault, as a kernel that counts its calls."""

    def __init__(self, fault=None):
        self.fault, self.calls = fault, 0

    def __call__(self, tile):
        self.calls += 1
        result = torch_passes(tile, WORK)
        return result if self.fault is None else self.fault(tile, result) or result


def _choice(kernel, *, faster=True, **options):
    """A choice whose clock calls the work, and says that the kernel, which is timed first, takes less or more time."""
    times = iter([1.0, 2.0] if faster else [2.0, 1.0])

    def milliseconds(call):
        call()
        return next(times)

    return PassesChoice(lambda: kernel, milliseconds, **{"least_tokens": 4} | options)


def _assert_torch(choice, tile, reason, caplog):
    """The result is that of torch, and the sentence has been logged once, however often it runs."""
    copy = passes_choice._copy(tile)
    expected = torch_passes(copy, WORK)
    for _ in range(2):
        again = passes_choice._copy(tile)
        found = choice.run(again, WORK)
        assert torch.equal(found.logps, expected.logps)
        assert again.gradient is None or torch.equal(again.gradient, copy.gradient)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"log-probabilities at the head are computed in torch and not by a kernel: {reason}"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("factors", [None, torch.linspace(-2, 2, TOKENS)], ids=["alone", "weighed"])
def test_a_kernel_that_is_right_and_faster_is_kept(half, factors, caplog):
    kernel = Kernel()
    choice, tile = _choice(kernel), _tile(half=half, statistics=["entropy"], factors=factors)
    before = tile.products.clone()
    assert choice.reason_against(tile, WORK) is None
    assert torch.equal(tile.products, before)  # it was tried on a copy
    tried = kernel.calls
    found = choice.run(tile, WORK)
    assert kernel.calls == tried + 1
    assert_close(found.statistics["entropy"], torch_passes(_tile(statistics=["entropy"]), WORK).statistics["entropy"])
    choice.run(_tile(half=half, statistics=["entropy"], factors=factors), WORK)
    assert kernel.calls == tried + 2  # not tried again
    assert not caplog.records


def _other_logps(tile, result):
    result.logps[3] += 0.01


def _other_entropy(tile, result):
    result.statistics["entropy"].mul_(1.001)


def _no_logps(tile, result):
    result.logps[3] = math.nan


def _other_gradient(columns):
    def change(tile, result):
        tile.gradient[5, columns] = 0

    return change


def _scaled_gradient(tile, result):
    tile.gradient[5] *= 1.01


def _no_gradient(tile, result):
    tile.gradient[5, 7] = math.nan


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (_other_logps, "log-probabilities"),
        (_no_logps, "log-probabilities"),
        (_other_entropy, "entropy"),
        (_other_gradient(1500), "gradients"),  # the target's
        (_other_gradient(slice(4096, None)), "gradients"),  # the end of the vocabulary
        (_scaled_gradient, "gradients"),
        (_no_gradient, "gradients"),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_a_kernel_with_other_results_is_not(fault, name, half, caplog):
    tile = _tile(half=half, statistics=["entropy"])
    tile.products[5, 4096:] = 8.0
    _assert_torch(_choice(Kernel(fault)), tile, f"its {name} are not those of torch", caplog)


def test_a_kernel_that_fails_is_not(caplog):
    def fault(tile, result):
        raise RuntimeError("no such instruction\nline 3 of many")

    kernel = Kernel(fault)
    _assert_torch(_choice(kernel), _tile(), "it failed with RuntimeError: no such instruction", caplog)
    assert kernel.calls == 1


def test_a_kernel_that_is_slower_is_not(caplog):
    _assert_torch(_choice(Kernel(), faster=False), _tile(), "it took 2 ms for 12 tokens, and torch 1 ms", caplog)


def test_without_triton_there_is_none(caplog):
    def load():
        raise ImportError("No module named 'triton'")

    choice = PassesChoice(load, lambda call: 0.0, least_tokens=4)
    _assert_torch(choice, _tile(), "Triton cannot be imported (No module named 'triton')", caplog)


def test_few_tokens_decide_nothing(caplog):
    kernel = Kernel(_other_logps)
    choice = _choice(kernel, least_tokens=128)
    choice.run(_tile(), WORK)
    assert (kernel.calls, caplog.records) == (0, [])


def test_each_kind_of_tile_is_tried(caplog):
    """A kernel that fails for one kind serves the others; one that always fails says so once."""

    def fault(tile, result):
        if tile.gradient is None:
            raise RuntimeError("no")

    kinds = [{}, {"half": True}, {"statistics": ["entropy"]}]
    for options in kinds:
        assert _choice(Kernel(fault)).reason_against(_tile(**options), WORK) is None
    choice = PassesChoice(lambda: Kernel(fault), lambda call: 0.0, least_tokens=4)
    reasons = [choice.reason_against(_tile(gradient=False, statistics=names), WORK) for names in ((), ["entropy"])]
    assert reasons == ["it failed with RuntimeError: no"] * 2
    assert choice.reason_against(_tile(), WORK) == "it took 0 ms for 12 tokens, and torch 0 ms"
    assert len(caplog.records) == 2
    assert choice.reasons == [*reasons, "it took 0 ms for 12 tokens, and torch 0 ms"]


def test_a_block_is_tried_and_the_rest_believed():
    """The trial needs the memory of two blocks, not of two chunks."""
    seen = []
    work = Workspace(torch.zeros(1, 1), (TOKENS, VOCABULARY), tiles=0, in_full=True)
    work.step = 5
    choice = _choice(Kernel(lambda tile, result: seen.append(len(tile.products))))
    choice.run(_tile(), work)
    assert seen == [5, 5, TOKENS]


def test_the_kernel_is_loaded_by_name():
    """It is a module that imports Triton, which not every installation has."""
    if find_spec("triton") is None:
        with pytest.raises(ImportError, match="triton"):
            passes_choice.load_kernel()
    else:
        assert callable(passes_choice.load_kernel())
