"""Sampling inside the processor: the distribution, one stream per text, whatever the batch and wherever it was resumed."""

import math
from collections import Counter

import pytest
from engines import FEW_BLOCKS, model64, oracle, prompts, stock
from oracles import decoding as reference
from runner import RUNNER
from scipy.stats import chisquare

from contralto.decoding.vllm import generate_pairs

COUNT, LENGTH, DRAWS = (20, 16, 1500) if RUNNER == "v1" else (5, 6, 300)
HOW = {"method": "cad", "alpha": 1.0}
MASK = 2**64 - 1


def mixed(z):
    """SplitMix64's finaliser (Steele et al. 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def gumbel(seed, step, token):
    """Standard Gumbel noise of a seed, a step and a token, in integers."""
    golden = 0x9E3779B97F4A7C15
    key = mixed((mixed(seed) + (step + 1) * golden) & MASK)
    u = ((mixed((key + (token + 1) * golden) & MASK) >> 11) + 0.5) / 2**53
    return -math.log(-math.log(u))


def warped(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """log p after temperature, top-k, top-p and min-p, one after the other."""
    logs = reference.log_softmax([score / temperature for score in scores])
    if top_k:
        least = sorted(logs, reverse=True)[top_k - 1]
        logs = reference.log_softmax([x if x >= least else -math.inf for x in logs])
    if top_p < 1:
        order, total, kept = sorted(range(len(logs)), key=lambda v: -logs[v]), 0.0, set()
        for v in order:
            if total >= top_p:
                break
            kept.add(v)
            total += math.exp(logs[v])
        logs = reference.log_softmax([x if v in kept else -math.inf for v, x in enumerate(logs)])
    if min_p:
        least = max(logs) + math.log(min_p)
        logs = reference.log_softmax([x if x >= least else -math.inf for x in logs])
    return logs


def drawing(seed, **how):
    """The oracle's choice."""

    def choose(scores, step):
        noisy = [x + gumbel(seed, step, v) if x > -math.inf else x for v, x in enumerate(warped(scores, **how))]
        return max(range(len(noisy)), key=noisy.__getitem__)

    return choose


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_are_the_oracles(engines, expert, how):
    some = prompts(COUNT)
    found = generate_pairs(engines(), some, use_tqdm=False, max_tokens=LENGTH, seed=50, **HOW, **how)
    for i, (branches, output) in enumerate(zip(some, found, strict=True)):
        text, _ = oracle([model64(expert)] * 2, branches, output.tokens, choose=drawing(50 + i, **how), **HOW)
        assert output.tokens == text
    assert len({tuple(output.tokens) for output in found}) > COUNT // 2


def test_texts_do_not_depend_on_the_batch(engines):
    some, how = prompts(COUNT), {"use_tqdm": False, "max_tokens": LENGTH, "temperature": 1.0, **HOW}
    together = generate_pairs(engines(), some, seed=7, **how)
    last = generate_pairs(engines(), some[-1:], seed=[7 + COUNT - 1], **how)
    assert together[-1].tokens == last[0].tokens


def test_several_completions_of_a_prompt(engines):
    """`n=3`: three for each prompt, one after the other, each as its seed draws it alone."""
    some, how = prompts(3), {"use_tqdm": False, "max_tokens": LENGTH, "temperature": 1.0, **HOW}
    found = [output.tokens for output in generate_pairs(engines(), some, n=3, seed=7, **how)]
    alone = [generate_pairs(engines(), [some[i // 3]], seed=[7 + i], **how)[0].tokens for i in range(9)]
    assert found == alone
    assert len(set(map(tuple, found))) > 6
    seeds = [5, 5, 6] * 3
    given = [output.tokens for output in generate_pairs(engines(), some, n=3, seed=seeds, **how)]
    assert all(given[i] == given[i + 1] for i in (0, 3, 6))
    assert any(given[i] != given[i + 2] for i in (0, 3, 6))


def test_texts_survive_a_resume(engines):
    """vLLM's own scheduler parts the branches; the texts are the same."""
    some, how = prompts(max(COUNT, 9)), {"use_tqdm": False, "max_tokens": LENGTH, "temperature": 1.0, "seed": 7, **HOW}
    whole = generate_pairs(engines(), some, **how)
    parted = generate_pairs(engines(make=stock, max_num_seqs=15, num_gpu_blocks_override=FEW_BLOCKS), some, **how)
    assert sum(output.desyncs for output in whole) == 0
    assert sum(output.desyncs for output in parted) > 0
    assert [output.tokens for output in parted] == [output.tokens for output in whole]
    assert [output.text for output in parted] == [output.text for output in whole]
    for one, two in zip(whole, parted, strict=True):
        for mine, theirs in zip(one.logprobs, two.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4)


def test_the_distribution(engines, expert):
    """Chi-square of the first token over many seeds."""
    how, models = {"temperature": 1.2, "top_k": 12}, [model64(expert)] * 2

    def distribution(branches):
        scores = []
        oracle(models, branches, [5], choose=lambda s, _: scores.append(s) or 0, **HOW)
        return [math.exp(x) for x in warped(scores[0], **how)]

    branches = min(prompts(20), key=lambda some: max(distribution(some)))  # the least certain
    p = distribution(branches)
    found = generate_pairs(engines(), [branches] * DRAWS, use_tqdm=False, max_tokens=1, logprobs=False, **HOW, **how)
    seen = Counter(output.tokens[0] for output in found)
    often = [v for v in range(len(p)) if p[v] * DRAWS >= 5]
    counted = [seen[v] for v in often]
    rest = DRAWS - sum(counted)
    expected = [p[v] * DRAWS for v in often]
    if rest or DRAWS - sum(expected) > 1e-6:
        counted, expected = [*counted, rest], [*expected, DRAWS - sum(expected)]
    assert len(often) > 3
    assert set(seen) <= {v for v in range(len(p)) if p[v] > 0}
    assert chisquare(counted, expected).pvalue > 1e-4
