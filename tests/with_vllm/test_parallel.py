"""Two ranks that share a model: every rank combines the logits of all branches, and all choose the same tokens."""

import sys
from pathlib import Path

import pytest
from engines import model64, oracle, prompts
from test_amateur import make as make_amateur
from vllm import SamplingParams

from contralto import testbed
from contralto.decoding.vllm import generate_pairs

pytestmark = pytest.mark.runner("v1")  # Triton's interpreter runs in one process
COUNT, LENGTH = 12, 16
RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture
def ranks(engines, monkeypatch):
    """Engines whose ranks are processes that share the cores, and that do not have what makes torchvision importable."""
    engines.close()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(Path(sys.prefix) / "images")])
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    yield lambda **how: engines(**RANKS, **how)
    engines.close()


def test_pairs(ranks, expert):
    llm, some, how = ranks(), prompts(COUNT), {"method": "cad", "alpha": 1.0}
    found = generate_pairs(llm, some, use_tqdm=False, max_tokens=LENGTH, **how)
    for branches, output in zip(some, found, strict=True):
        assert output.tokens == oracle([model64(expert)] * 2, branches, output.tokens, **how)[0]
    drawn = generate_pairs(llm, some[:2], n=4, use_tqdm=False, max_tokens=LENGTH, temperature=1.0, seed=3, **how)
    alone = generate_pairs(llm, some[1:2], use_tqdm=False, max_tokens=LENGTH, temperature=1.0, seed=3 + 4, **how)
    assert drawn[4].tokens == alone[0].tokens
    assert len({tuple(output.tokens) for output in drawn}) > 4
    assert sum(output.desyncs for output in [*found, *drawn]) == 0


def test_an_amateur(ranks, expert):
    """Every rank runs the whole amateur."""
    llm, some = ranks(make=make_amateur), [full for full, _ in prompts(COUNT)]
    params = SamplingParams(
        temperature=0, max_tokens=LENGTH, extra_args={"contrast_method": "cd", "contrast_beta": 1.0}
    )
    models = [model64(expert), model64(str(testbed.path("amateur")))]
    for ids, output in zip(
        some, llm.generate([{"prompt_token_ids": i} for i in some], params, use_tqdm=False), strict=True
    ):
        tokens = list(output.outputs[0].token_ids)
        assert tokens == oracle(models, [ids, ids], tokens, method="cd", marker=None, beta=1.0)[0]
