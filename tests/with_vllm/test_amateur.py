"""A different amateur inside the processor: exact while requests join and leave."""

import psutil
import pytest
from engines import EOS, FORMULAS, SMALL, has_ended, model64, oracle, prompts, scheduler_of
from runner import RUNNER
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from contralto import testbed
from contralto.decoding.vllm import make_llm

COUNT, LENGTH = (24, 24) if RUNNER == "v1" else (4, 16)
AMATEUR = {"model": "testbed:amateur", "dtype": "float32"}


def make(model, **how):
    return make_llm(model, amateur={**AMATEUR, "cache_gib": how.pop("cache_gib", 1)}, **how)


class Output:
    """As `oracle` and `has_ended` read it."""

    def __init__(self, output):
        self.tokens = list(output.outputs[0].token_ids)


ENGINES = {
    "plain": {},
    "small steps, few slots": {"max_num_seqs": 5, "max_num_batched_tokens": 48},
    "tiny cache": {"num_gpu_blocks_override": 9, "max_model_len": 128},
    "tiny cache of the amateur": {"cache_gib": 640 * 256 / 2**30},  # 640 tokens
}


@pytest.mark.parametrize("name", ENGINES if RUNNER == "v1" else ["small steps, few slots"])
@pytest.mark.parametrize(
    "how",
    [
        {"beta": 1.0, "alpha": 0.05},
        {"form": "li", "alpha": 0.2, "amateur_temperature": 0.5},
        {"beta": 1.0, "alpha": 0.05, "gate": 0.6},
    ],
)
def test_texts(engines, expert, name, how):
    llm = engines(make=make, **ENGINES[name])
    some = [full for full, _ in prompts(COUNT)]
    values = {f"contrast_{key}": value for key, value in {"method": "cd", **how}.items()}
    params = SamplingParams(temperature=0, max_tokens=LENGTH, extra_args=values)
    plain = SamplingParams(temperature=0, max_tokens=LENGTH)
    preempted, scheduler = [], scheduler_of(llm)
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(args), preempt(*args, **kwargs))
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in [*some, *some[:3]]], [params] * COUNT + [plain] * 3, use_tqdm=False
    )
    models = [model64(expert), model64(str(testbed.path("amateur")))]
    assert "cd" in FORMULAS
    for ids, output in zip(some, map(Output, outputs[:COUNT]), strict=True):
        assert output.tokens == oracle(models, [ids, ids], output.tokens, method="cd", marker=None, **how)[0]
        assert has_ended(output, LENGTH)
    for ids, output in zip(some, map(Output, outputs[COUNT:]), strict=False):  # without contrast
        assert (
            output.tokens == oracle(models, [ids, ids], output.tokens, method="cd", marker=None, beta=0.0, alpha=0.0)[0]
        )
    if RUNNER == "v1" or "gate" not in how:  # of few texts none may end early
        assert {output.tokens[-1] == EOS for output in map(Output, outputs)} == {True, False}
    assert (name == "tiny cache") == bool(preempted)


@pytest.mark.runner("v1")
def test_vllm_leaves_room_for_the_cache(engines, expert, monkeypatch):
    """vLLM sizes its own cache by the memory that is left; there is room for the amateur's when the first request comes."""
    engines.close()
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    llm = make(expert, **SMALL | {"max_num_seqs": 4096}, gpu_memory_utilization=0.15, cache_gib=0.25)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker

    def left():
        return worker.requested_cpu_memory - psutil.Process().memory_info().rss

    before = left()
    params = SamplingParams(temperature=0, max_tokens=2, extra_args={"contrast_method": "cd"})
    llm.generate(["Ben went"], params, use_tqdm=False)
    assert abs(before) < 2**26  # vLLM's cache takes all that it found
    assert left() - before == pytest.approx(2**28, rel=0.25)
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "the contrast with an amateur cannot be",
        ),
        (
            {"cache_gib": 1e-6},
            r"a request of max_model_len 256 tokens takes 6.1e-05 GiB of the amateur's cache, which has 1e-06",
        ),
        ({"cache_gib": 0}, "cache_gib of contrast_amateur must be a number of GiB above 0, not 0"),
    ],
)
def test_engines_that_cannot_work(engines, how, message):
    engines.close()
    with pytest.raises(ValueError, match=message):
        engines(make=make, **how)


def test_draws_have_streams_of_their_own(engines):
    llm = engines(make=make)
    values = {"contrast_method": "cd", "contrast_temperature": 1.0}
    params = [SamplingParams(temperature=0, max_tokens=8, extra_args={**values, "contrast_seed": s}) for s in (1, 2, 1)]
    one, two, three = [list(o.outputs[0].token_ids) for o in llm.generate(["Ben went"] * 3, params, use_tqdm=False)]
    alone = llm.generate(["Ben went"], params[1:2], use_tqdm=False)[0].outputs[0]
    assert one == three != two
    assert list(alone.token_ids) == two


@pytest.mark.parametrize(
    ("values", "temperature", "message"),
    [
        ({"contrast_method": "cad"}, 0, "contrast_method must be cd with an amateur, not 'cad'"),
        ({"contrast_method": "cd", "contrast_id": 1}, 0, "contrast_id is for completions with several requests"),
        ({"contrast_method": "cd"}, 0.5, "temperature must be 0 with contrast_method, not 0.5"),
        ({"contrast_method": "cd", "contrast_beta": -1.0}, 0, "contrast_method cd: beta must be"),
    ],
)
def test_what_does_not_go_together(engines, values, temperature, message):
    llm = engines(make=make)
    params = SamplingParams(temperature=temperature, max_tokens=2, extra_args=values)
    with pytest.raises((ValueError, VLLMValidationError), match=message):
        llm.generate(["Ben went"], params, use_tqdm=False)


def test_several_completions_of_a_request_are_refused(engines):
    """Their draws would be equal, since vLLM gives all of them the same seed."""
    params = SamplingParams(temperature=1.0, n=2, max_tokens=2, extra_args={"contrast_method": "cd"})
    with pytest.raises(
        (ValueError, VLLMValidationError), match=r"n must be 1 with contrast_method, not 2: .* send 2 requests"
    ):
        engines(make=make).generate(["Ben went"], params, use_tqdm=False)


def test_penalties_of_vllm_are_refused(engines):
    params = SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=2, extra_args={"contrast_method": "cd"})
    with pytest.raises((ValueError, VLLMValidationError), match="repetition_penalty must be 1"):
        engines(make=make).generate(["Ben went"], params, use_tqdm=False)
