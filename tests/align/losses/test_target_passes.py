"""The passes over logits, in torch and in the Triton kernel, against a float64 reference; and the kernel in the place that it has.

The kernel runs on a GPU, or in Triton's interpreter: `make test-kernels`.
"""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from oracles import align as reference
from torch.testing import assert_close

from contralto.align.losses import sweep
from contralto.align.losses.chunked import Head, chunked_logps
from contralto.align.losses.formulas import STATISTICS
from contralto.align.losses.sweep import LogitsSource
from contralto.align.losses.target_passes import TargetTile, torch_passes
from contralto.align.losses.workspace import Workspace

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TOKENS, TILE = 6, 16
VOCABULARIES = (13, 32, 50)
"""Less than a tile of the kernel, whole tiles, and tiles with a rest."""
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": -0.3, "temperature": 0.7},
    "capped": {"bias": True, "scale": 1.7, "softcap": 3.0, "temperature": 1.3},
    "capped downwards": {"scale": -1.7, "softcap": 3.0},
}
kernel = pytest.mark.kernel
no_numbers = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # of numpy, in the interpreter
BOTH = ["torch", pytest.param("kernel", marks=kernel)]


@pytest.fixture
def passes(request, monkeypatch):
    """Return the passes by name; tiles of the kernel are small, so that a row has several."""
    if request.param == "torch":
        return lambda tile: torch_passes(tile, Workspace(tile.products, tile.products.shape, tiles=0, in_full=True))
    from contralto.align.losses import target_kernel

    monkeypatch.setattr(target_kernel, "TILE", TILE)
    return target_kernel.kernel_passes


def _random(*shape, seed=0):
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def _tile(vocabulary=50, kind="plain", *, factors=None, gradient="in place", statistics=STATISTICS, seed=0):
    """A tile of random products; the targets are the first and the last token, the likeliest one, and others."""
    options = dict(HEADS[kind])
    temperature = options.pop("temperature", 1.0)
    bias = _random(vocabulary, seed=seed + 1) if options.pop("bias", False) else None
    head = Head(torch.zeros(vocabulary, 1, device=DEVICE), bias, **options)
    products = _random(TOKENS, vocabulary, seed=seed)
    targets = torch.arange(TOKENS, device=DEVICE) * 5 % vocabulary
    targets[1], targets[2] = vocabulary - 1, (head.scale * (products if bias is None else products + bias))[2].argmax()
    memory = {"in place": products, None: None}.get(gradient, gradient)
    if isinstance(memory, torch.dtype):
        memory = torch.full_like(products, math.nan, dtype=memory)
    return TargetTile(products, targets, LogitsSource(head, temperature), factors, memory, tuple(statistics))


def _expected(tile):
    head, products = tile.source.head, tile.products.double()
    if head.bias is not None:
        products = products + head.bias
    factors = [1.0] * len(products) if tile.factors is None else tile.factors.tolist()
    return [
        reference.target_passes(
            row, y, scale=head.scale, softcap=head.softcap, temperature=tile.source.temperature, factor=factor
        )
        for row, y, factor in zip(products.tolist(), tile.targets.tolist(), factors, strict=True)
    ]


def _assert_reference(found, gradient, expected, *, rtol=1e-5, statistics=STATISTICS):
    double = {"dtype": torch.float64, "device": DEVICE}
    assert_close(found.logps.double(), torch.tensor([e.logp for e in expected], **double), rtol=rtol, atol=2e-5)
    for name in statistics:
        values = torch.tensor([getattr(e, name) for e in expected], **double)
        assert_close(found.statistics[name].double(), values, rtol=rtol, atol=2e-5)
    if gradient is not None:
        assert_close(gradient.double(), torch.tensor([e.gradient for e in expected], **double), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("passes", BOTH, indirect=True)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", HEADS)
def test_equal_the_reference(passes, kind, vocabulary):
    for factors in (None, _random(TOKENS, seed=7)):
        tile = _tile(vocabulary, kind, factors=factors)
        expected = _expected(tile)
        _assert_reference(passes(tile), tile.gradient, expected)
        assert 0 < sum(e.is_top1 for e in expected) < TOKENS


@pytest.mark.parametrize("passes", BOTH, indirect=True)
def test_only_what_is_asked_for(passes):
    """Without a gradient, with each statistic alone, and with none."""
    for statistics in (*([name] for name in STATISTICS), ()):
        tile = _tile(kind="capped", gradient=None, statistics=statistics)
        expected = _expected(tile)
        found = passes(tile)
        assert set(found.statistics) == set(statistics)
        _assert_reference(found, None, expected, statistics=statistics)


@pytest.mark.parametrize("passes", BOTH, indirect=True)
@pytest.mark.parametrize("statistics", [(), STATISTICS], ids=["alone", "statistics"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_in_half_precision_is_rounded_once(passes, dtype, statistics):
    tile = _tile(kind="bias", gradient=dtype, statistics=statistics)
    expected = torch.tensor([e.gradient for e in _expected(tile)], dtype=torch.float64, device=DEVICE)
    passes(tile)
    assert tile.gradient.dtype == dtype
    is_cut = INTERPRETED and passes.__name__ == "kernel_passes" and dtype == torch.bfloat16  # as the interpreter does
    eps = torch.finfo(dtype).eps * (1 if is_cut else 0.5)
    assert_close(tile.gradient.double(), expected, rtol=1.01 * eps, atol=1e-7)


@pytest.mark.parametrize("passes", BOTH, indirect=True)
def test_large_logits_lose_no_digits(passes):
    """Logits of 1e4 and -1e4, a constant beside them, and a row whose largest logit comes last or first."""
    tile = _tile(32)
    tile.products[0] += 1e4
    tile.products[1] -= 1e4
    tile.products[2] = torch.linspace(-1e4, 1e4, 32)
    tile.products[3] = torch.linspace(1e4, -1e4, 32)
    expected = _expected(tile)
    found = passes(tile)
    names = ["entropy", "log_sum_sq_probs", "is_top1"]
    _assert_reference(found, tile.gradient, expected, rtol=1e-6, statistics=names)
    assert found.logps[2] < -9e3


@pytest.mark.parametrize("passes", BOTH, indirect=True)
@pytest.mark.parametrize("columns", [slice(0, 20), slice(40, 50)], ids=["first", "last"])
def test_columns_of_minus_infinity_have_no_share(passes, columns):
    """A padded vocabulary, whose columns fill whole tiles; a target there has a log-probability of -inf."""
    tile = _tile(statistics=())
    tile.products[:, columns] = -math.inf
    targets = torch.full_like(tile.targets, 30)
    targets[0] = columns.start
    tile = tile._replace(targets=targets)
    rest = torch.ones(50, dtype=torch.bool, device=DEVICE)
    rest[columns] = False
    kept = tile.products[1:, rest].double().log_softmax(-1)
    found = passes(tile)
    assert found.logps[0] == -math.inf
    assert_close(found.logps[1:].double(), kept[:, int(rest[:30].sum())], rtol=1e-5, atol=1e-5)
    assert tile.gradient[1:, columns].eq(0).all()
    assert_close(-tile.gradient[1:, 31:40].double(), kept.exp()[:, int(rest[:31].sum()) :][:, :9], rtol=1e-5, atol=1e-6)


@kernel
@pytest.mark.parametrize("passes", ["kernel"], indirect=True)
def test_the_kernels_entropy_is_finite_beside_minus_infinity(passes):
    tile = _tile(statistics=["entropy"])
    tile.products[:, :20] = -math.inf
    expected = torch.distributions.Categorical(logits=tile.products[:, 20:].double()).entropy()
    assert_close(passes(tile).statistics["entropy"].double(), expected, rtol=1e-5, atol=1e-5)


@no_numbers
@pytest.mark.parametrize("passes", BOTH, indirect=True)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_stays_none(passes, wrong):
    for statistics in ((), ("entropy",)):
        tile = _tile(statistics=statistics)
        tile.products[:, 33] = wrong
        assert passes(tile).logps.isnan().all()
        assert tile.gradient.isnan().any(-1).all()


@kernel
@no_numbers
@pytest.mark.parametrize("passes", ["kernel"], indirect=True)
@pytest.mark.parametrize("target", [-100, -1, 50, 2**40])
def test_a_target_outside_the_vocabulary_is_no_number(passes, target):
    """And the memory around the products is not read for it."""
    tile = _tile()
    found = passes(tile._replace(targets=torch.full_like(tile.targets, target)))
    assert found.logps.isnan().all()


@pytest.mark.parametrize("passes", BOTH, indirect=True)
def test_the_first_of_equals_is_the_likeliest(passes):
    tile = _tile(statistics=["is_top1"], gradient=None)
    tile.products[:, [3, 20, 49]] = 20.0
    tile = tile._replace(targets=torch.tensor([3, 20, 49, 4, 3, 0], device=DEVICE))
    assert passes(tile).statistics["is_top1"].tolist() == [True, False, False, False, True, False]


@kernel
@pytest.mark.parametrize("passes", ["kernel"], indirect=True)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_the_head_with_the_kernel(passes, kind, trained, monkeypatch):
    """Values, statistics and gradients of hidden states, weight and bias are those with the torch passes, in chunks that do not divide the tokens."""
    options = {"bias": None} | HEADS[kind]
    temperature = options.pop("temperature", 1.0)
    targets, weighs = torch.arange(7, device=DEVICE), _random(7, seed=4)
    runs = []
    for run in (lambda tile, work: torch_passes(tile, work), lambda tile, work: passes(tile)):
        monkeypatch.setattr(sweep, "run_passes", run)
        for loss in (lambda logps: logps.sum(), lambda logps: weighs @ logps):
            hidden, weight = _random(7, 5, seed=1).requires_grad_(), _random(50, 5, seed=2).requires_grad_(trained)
            bias = _random(50, seed=3).requires_grad_(trained) if options["bias"] else None
            moving = [each for each in (hidden, weight, bias) if each is not None and each.requires_grad]
            head = Head(weight, **options | {"bias": bias})
            found = chunked_logps(hidden, head, targets, temperature=temperature, also=STATISTICS, chunk_size=3)
            loss(found.logps).backward()
            runs.append([*(each.detach() for each in found), *(each.grad for each in moving)])
    assert_close(runs[2:], runs[:2], rtol=1e-4, atol=1e-5)


COMPILE = """
import itertools, subprocess
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from contralto.align.losses import target_kernel

kernel = target_kernel._passes
flags = [name for name in kernel.arg_names if name.startswith("HAS_")]
types = dict.fromkeys(("inner", "outer", "slope"), "fp32") | {"vocabulary": "i32", "targets": "*i64", "bias": "*bf16"}
kinds = (("*fp32", ()), ("*bf16", ("HAS_GRADIENT",)), ("*bf16", flags))
for capability, (gradient, on) in itertools.product((80, 90), kinds):
    constants = {name: name in on for name in flags} | {"TILE": target_kernel.TILE}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    signature["gradient"] = gradient
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(kernel, signature, constants, attributes)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": target_kernel.WARPS})
    Path("code.cubin").write_bytes(code.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    print(subprocess.run([tool, "-res-usage", "code.cubin"], check=True, capture_output=True, text=True).stdout)
"""


@kernel
def test_the_kernel_rejects_rows_with_gaps():
    from contralto.align.losses.target_kernel import kernel_passes

    tile = _tile()
    with pytest.raises(ValueError, match="without gaps between their rows"):
        kernel_passes(tile._replace(products=tile.products[:, ::2]))


@kernel
def test_the_kernel_compiles_for_gpus(tmp_path):
    """For compute capabilities 8.0 and 9.0, without a GPU: registers for four programs at a time, for two with all statistics; none spilled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    result = subprocess.run([sys.executable, "-c", COMPILE], check=False, **options)
    assert result.returncode == 0, result.stderr
    usage = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", result.stdout)
    most = [65536 // (programs * 16 * 32) for programs in (4, 4, 2)] * 2
    assert [int(found[0]) <= limit for found, limit in zip(usage, most, strict=True)] == [True] * 6, usage
    assert {(stack, local) for _, stack, local in usage} == {("0", "0")}


@kernel
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_first_use_tries_the_kernel(dtype, caplog):
    """Whichever is faster, it is not rejected for what it computes; and the head's numbers are those of a CPU in float64."""
    from contralto.align.losses.passes_choice import KERNEL

    hidden, weight = _random(256, 64, seed=1).to(dtype), _random(32_000, 64, seed=2).to(dtype) / 16
    targets = torch.arange(256, device=DEVICE)
    runs = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        leaf = hidden.to(device, kind).requires_grad_()
        logps = chunked_logps(leaf, Head(weight.to(device, kind)), targets.to(device)).logps
        logps.sum().backward()
        runs.append([each.detach().cpu().double() for each in (logps, leaf.grad)])
    assert [reason for reason in KERNEL.reasons if reason is not None and not reason.startswith("it took")] == []
    loose = 1e-4 if dtype == torch.float32 else 3e-2
    for mine, theirs in zip(*runs, strict=True):
        assert_close(mine, theirs, rtol=loose, atol=loose * theirs.abs().max().item())
