"""Texts from a real engine, token by token those of the float64 oracle. The same tests run on both model runners."""

import pytest
from engines import has_ended, model64, oracle, prompts, scheduler_of
from runner import RUNNER

from contralto import testbed
from contralto.decoding.vllm import generate_pairs

COUNT, LENGTH = (100, 24) if RUNNER == "v1" else (20, 12)
FEW = 20 if RUNNER == "v1" else 4


def check(llm, expert, some, **how):
    """The texts are the oracle's, with one round each unless told otherwise."""
    rounds = how.pop("rounds", 1)
    found = generate_pairs(llm, some, use_tqdm=False, max_tokens=LENGTH, **how)
    for branches, output in zip(some, found, strict=True):
        text, logs = oracle([model64(expert)] * 2, branches, output.tokens, **how)
        assert output.tokens == text
        assert has_ended(output, LENGTH)
        for mine, theirs in zip(output.logprobs, logs, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4)
        assert output.rounds <= rounds
    return found


def test_many_texts(engines, expert):
    found = check(engines(), expert, prompts(COUNT), method="cad", alpha=1.0)
    assert {output.finish_reason for output in found} == {"stop", "length"}  # texts end at different places
    assert len({len(output.tokens) for output in found}) > 1
    assert sum(output.desyncs for output in found) == 0


@pytest.mark.parametrize(
    "how",
    [
        {"method": "cd", "beta": 1.0, "alpha": 0.05},
        {"method": "cd", "form": "li", "alpha": 0.2, "amateur_temperature": 0.5},
        {"method": "cfg", "guidance_scale": 3.0},
        {"method": "cid", "lam": 9.0},
        {"method": "cid", "form": "log_ratio", "lam": 3.0, "alpha": 0.01},
        {"method": "icd", "alpha": 2.0, "beta": 0.01},
        {"method": "m3id", "lam": 0.2, "beta": 0.01},
        {"method": "ritual", "kappa": 2.0, "beta": 0.01},
        {"method": "cfg", "guidance_scale": 3.0, "gate": 0.5},
    ],
    ids=lambda how: f"{how['method']} {how.get('form', '')}",
)
def test_every_method_of_prompts(engines, expert, how):
    check(engines(), expert, prompts(FEW), **how)


ENGINES = {
    "odd slots": {"max_num_seqs": 5},
    "small steps": {"max_num_batched_tokens": 64},
    "tiny cache": {"num_gpu_blocks_override": 13},
    "prefix caching": {"enable_prefix_caching": True},
    "all at once": {"max_num_seqs": 5, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 13, "block_size": 32}
    | {"enable_prefix_caching": True},
}


@pytest.mark.parametrize("name", ENGINES)
def test_whatever_the_engine(engines, expert, name):
    llm = engines(**ENGINES[name])
    preempted = []
    scheduler = scheduler_of(llm)
    plain = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **how: (preempted.append(args), plain(*args, **how))
    found = check(llm, expert, prompts(FEW), method="cad", alpha=1.0)
    assert sum(output.desyncs for output in found) == len(preempted) == 0


def test_a_gate_changes_something(engines, expert):
    """And not everything: texts differ from those without a gate, and from those without a contrast."""
    how = {"method": "cfg", "guidance_scale": 3.0}
    some = {gate: check(engines(), expert, prompts(FEW), gate=gate, **how) for gate in (0.01, 0.5, 1.0)}
    texts = [[output.tokens for output in found] for found in some.values()]
    assert texts[0] != texts[1] != texts[2]


def test_one_at_a_time(engines, expert):
    llm = engines()
    for some in prompts(3):
        check(llm, expert, [some], method="cad")


def test_the_marker_is_never_written(engines, expert):
    """Not even where it is the likeliest token: it is masked before the plausible ones are found."""
    dot = testbed.tokenizer().encode("Ben went.", add_special_tokens=False)[-1]
    plain = generate_pairs(engines(), prompts(FEW), use_tqdm=False, max_tokens=LENGTH, method="cd", alpha=0.5)
    assert any(dot in output.tokens for output in plain)
    found = check(engines(), expert, prompts(FEW), method="cd", alpha=0.5, marker=dot)
    assert not any(dot in output.tokens for output in found)
