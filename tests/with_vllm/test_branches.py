"""Branches that are adapters, a grammar on the main branch, desyncs, images; and what is refused, while the engine goes on."""

import re
import time

import pytest
from engines import EOS, FEW_BLOCKS, MARKER, has_ended, model64, oracle, prompts, scheduler_of, stock
from models import adapted
from runner import RUNNER
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from contralto import testbed
from contralto.decoding.vllm import generate_pairs, make_llm
from contralto.decoding.vllm.session import RefusedError

COUNT, LENGTH = (12, 16) if RUNNER == "v1" else (3, 6)
QUIET = {"use_tqdm": False, "max_tokens": LENGTH}


@pytest.fixture(scope="module")
def adapters(expert, tmp_path_factory):
    """Two LoRA adapters: their folders, and the models with them merged."""
    folders = [tmp_path_factory.mktemp(f"adapter-{seed}") for seed in (1, 2)]
    return [adapted(expert, folder, seed=seed) for seed, folder in enumerate(folders, 1)]


@pytest.mark.runner("v1")  # LoRA kernels do not run in Triton's interpreter
@pytest.mark.parametrize("which", ["tuned against untuned", "untuned against tuned", "proxy tuning"])
def test_adapters(engines, expert, adapters, which):
    base = model64(expert)
    (tuned, tuned64), (anti, anti64) = adapters
    requests = [LoRARequest("tuned", 1, tuned), LoRARequest("anti", 2, anti)]
    llm = engines(enable_lora=True, max_loras=2, max_lora_rank=8)
    branches, models, how = {
        "tuned against untuned": ([requests[0], None], [tuned64, base], {"method": "cd", "alpha": 0.05}),
        "untuned against tuned": ([None, requests[0]], [base, tuned64], {"method": "cd", "alpha": 0.05}),
        "proxy tuning": ([None, *requests], [base, tuned64, anti64], {"method": "proxy", "alpha": 0.7}),
    }[which]
    some = [[full] * len(branches) for full, _ in prompts(COUNT)]
    found = generate_pairs(llm, some, adapters=branches, **how, **QUIET)
    for texts, output in zip(some, found, strict=True):
        assert output.tokens == oracle(models, texts, output.tokens, **how)[0]
        assert has_ended(output, LENGTH)
        assert output.desyncs == 0
    plain = [
        oracle([base] * len(models), texts, output.tokens, **how)[0] for texts, output in zip(some, found, strict=True)
    ]
    assert plain != [output.tokens for output in found]  # the adapters do something


@pytest.mark.runner("v1")  # nor does the grammars' kernel
def test_a_grammar_on_the_main_branch(engines, expert):
    tokenizer = testbed.tokenizer()
    words = ["barn", "old river", "school yard"]
    choices = [[*tokenizer.encode(word, add_special_tokens=False), EOS] for word in words]

    def allowed(before):
        return {c[len(before)] for c in choices if c[: len(before)] == before and len(c) > len(before)}

    some = prompts(COUNT)
    how = {"method": "cad", "alpha": 1.0}
    grammar = StructuredOutputsParams(
        choice=[f"▁{word}".replace(" ", "▁") for word in words]
    )  # as this tokenizer has them
    found = generate_pairs(engines(), some, main_sampling={"structured_outputs": grammar}, **how, **QUIET)
    for branches, output in zip(some, found, strict=True):
        assert output.tokens == oracle([model64(expert)] * 2, branches, output.tokens, allowed=allowed, **how)[0]
        assert output.text.strip() in words
        assert output.desyncs == 0


def test_stop_texts_and_lengths(engines, expert):
    how = {"method": "cad", "alpha": 1.0}
    some = [texts for i, texts in enumerate(prompts(COUNT + 3)) if i % 5]
    plain = generate_pairs(engines(), some, **how, **QUIET)
    found = generate_pairs(engines(), some, sampling={"stop": ["."], "min_tokens": 2}, **how, **QUIET)
    for one, two in zip(plain, found, strict=True):
        assert "." not in two.text
        assert one.tokens[: len(two.tokens)] == two.tokens
        assert (two.stop_reason == ".") == ("." in one.text)
        assert two.desyncs == 0


def test_desyncs_are_noticed_and_mended(engines, expert):
    """vLLM's own scheduler, an odd number of slots, small steps: branches part, and the texts are right."""
    some, how = prompts(max(COUNT, 9)), {"method": "m3id", "lam": 0.2, "beta": 0.01}  # more than there are slots for
    found = generate_pairs(
        engines(make=stock, max_num_seqs=15, num_gpu_blocks_override=FEW_BLOCKS), some, **how, **QUIET
    )
    for branches, output in zip(some, found, strict=True):
        text, logs = oracle([model64(expert)] * 2, branches, output.tokens, **how)
        assert output.tokens == text
        assert has_ended(output, LENGTH)
        assert [len(log) for log in output.logprobs] == [len(text)] * 2
        for mine, theirs in zip(output.logprobs, logs, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4)
    assert sum(output.desyncs for output in found) > 0


def test_a_lone_branch_ends_by_the_marker(engines):
    output = engines(make=stock, max_num_seqs=5, enable_prefix_caching=True).generate(
        "Ben went", params({}, {}), use_tqdm=False
    )[0]
    assert list(output.outputs[0].token_ids) == [MARKER]
    assert output.outputs[0].stop_reason == MARKER


# ----------------------------------------------------------------------------------------------------- what is refused

GOOD = {"contrast_id": "x", "contrast_branch": 0, "contrast_marker": MARKER, "contrast_method": "cad"}
WRONG = {
    "no id": ({"contrast_id": None}, {}, "needs contrast_id"),
    "no marker": ({"contrast_marker": None}, {}, "needs contrast_marker"),
    "an unknown branch": ({"contrast_branch": 2}, {}, "contrast_branch must be 0 or 1"),
    "a branch in words": ({"contrast_branch": "main"}, {}, "contrast_branch must be a whole number, not 'main'"),
    "an unknown method": ({"contrast_method": "dola"}, {}, "contrast_method must be one of cad, cd, cfg"),
    "an unknown form": ({"contrast_form": "li"}, {}, "contrast_form of cad must be left out"),
    "another method's parameter": (
        {"contrast_beta": 1.0},
        {},
        "cad has no contrast_beta; its parameters are contrast_alpha",
    ),
    "a negative strength": ({"contrast_alpha": -1.0}, {}, "contrast_method cad: alpha must be"),
    "a strength in words": ({"contrast_alpha": "much"}, {}, "contrast_alpha must be a number, not 'much'"),
    "a top-p above 1": (
        {"contrast_temperature": 1.0, "contrast_top_p": 2.0},
        {},
        r"contrast_top_p must lie in \(0, 1\]",
    ),
    "a top-k without temperature": ({"contrast_top_k": 3}, {}, "set contrast_temperature above 0 too"),
    "a negative temperature": (
        {"contrast_temperature": -1.0},
        {},
        "contrast_temperature must be a finite number of at least 0",
    ),
    "several texts of one request": ({}, {"n": 2, "temperature": 1.0, "seed": 1}, "n must be 1"),
    "vLLM's own sampling": ({}, {"temperature": 0.5}, "temperature must be 0 in a branch of a completion, not 0.5"),
    "a repetition penalty": ({}, {"repetition_penalty": 1.2}, "repetition_penalty must be 1.0"),
    "a presence penalty": ({}, {"presence_penalty": 0.5}, "presence_penalty must be 0.0"),
    "a marker that ends nothing": ({}, {"stop_token_ids": [EOS]}, "stop_token_ids must contain contrast_marker 0"),
}
"""Of one request: its values, its sampling parameters, the sentence."""
APART = {
    "unequal lengths": ({}, {"max_tokens": 3}, r"the branches differ in max_tokens \(4 and 3\)"),
    "the same branch twice": ({"contrast_branch": 0}, {}, "two requests have branch 0"),
    "other parameters": ({"contrast_alpha": 2.0}, {}, r"the branches differ in contrast_alpha \(0.5 and 2.0\)"),
    "other methods": ({"contrast_method": "cfg"}, {}, r"the branches differ in contrast_method \('cad' and 'cfg'\)"),
    "other seeds": ({"contrast_seed": 3}, {}, r"the branches differ in contrast_seed \(0 and 3\)"),
    "other stop texts": ({}, {"stop": ["x"]}, "the branches differ in stop "),
}
"""Of the second of two requests."""


def params(values, how):
    given = {**GOOD, **values}
    base = {"temperature": 0, "max_tokens": 4, "stop_token_ids": [MARKER]}
    return SamplingParams(**{**base, **how}, extra_args={n: v for n, v in given.items() if v is not None})


def goes_on(llm):
    """The engine serves texts, and plain requests."""
    found = generate_pairs(llm, prompts(1), use_tqdm=False, max_tokens=3, method="cad")
    assert len(found[0].tokens) == 3
    plain = llm.generate("Ben went", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert len(plain[0].outputs[0].token_ids) == 3


def short(engines):
    return engines(timeout=1.0, max_num_batched_tokens=64, num_gpu_blocks_override=13)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request(engines, name):
    values, how, message = WRONG[name]
    llm = short(engines)
    with pytest.raises((ValueError, VLLMValidationError), match=message):
        llm.generate("Ben went", params(values, how), use_tqdm=False)
    goes_on(llm)


@pytest.mark.parametrize("name", APART)
def test_requests_that_do_not_fit(engines, name):
    values, how, message = APART[name]
    llm = short(engines)
    two = [params({}, {}), params({"contrast_branch": 1, **values}, how)]
    outputs = llm.generate(["Ben went", "went"], two, use_tqdm=False)
    for output in outputs:
        assert output.outputs[0].finish_reason == "abort"
        assert output.outputs[0].stop_reason.startswith("contralto: ")
        assert re.search(message, output.outputs[0].stop_reason)
    goes_on(llm)


def test_a_missing_partner(engines):
    llm = short(engines)
    start = time.monotonic()
    output = llm.generate("Ben went", params({}, {}), use_tqdm=False)[0].outputs[0]
    assert 1.0 <= time.monotonic() - start < 60
    assert output.stop_reason.startswith("contralto: contrast_id 'x': branch 1 did not arrive within 1 seconds")
    goes_on(llm)


def test_texts_that_can_never_start(engines):
    llm = short(engines)
    long = [2, *[20] * 39]
    for some, how, message in (
        (
            [long, long],
            {"max_tokens": 4},
            "its prompts have 80 tokens, but a step processes at most 64: raise max_num_batched_tokens",
        ),
        ([long[:20]] * 2, {"max_tokens": 200}, "need 14 blocks of the KV cache, which has 12"),
    ):
        with pytest.raises(RefusedError, match=message) as error:
            generate_pairs(llm, [some, *prompts(1)], use_tqdm=False, method="cad", **how)
        assert error.value.outputs[0] is None
        assert (error.value.outputs[1] is not None) == (how["max_tokens"] == 4)  # what could be done is done
    goes_on(llm)


def test_an_abort_frees_the_partner(engines):
    """A client that goes away leaves nothing behind: neither a half, nor a running branch, nor a queue."""
    llm = short(engines)
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    for branch, name in enumerate(("one", "two")):
        engine.add_request(name, "Ben went", params({"contrast_branch": branch}, {"max_tokens": 50}))
    engine.step()
    engine.step()
    engine.abort_request(["one"])
    while engine.has_unfinished_requests():
        engine.step()
    engine.add_request("three", "Ben went", params({}, {}))
    engine.step()
    engine.abort_request(["three"])
    assert not engine.has_unfinished_requests()
    engine.step()
    assert scheduler.get_num_unfinished_requests() == 0
    assert not scheduler._incomplete
    assert not scheduler._queue
    goes_on(llm)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "cannot be combined with speculative",
        ),
        ({"data_parallel_size": 2}, "data_parallel_size must be 1, not 2"),
        ({"enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling separates the branches"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls must be 'contralto"),
        ({"scheduling_policy": "priority"}, "scheduling_policy must be 'fcfs'"),
        ({"long_prefill_token_threshold": 32}, "long_prefill_token_threshold must be 0"),
        ({"kv_transfer_config": {"kv_connector": "x"}}, "kv_transfer_config separates the branches"),
        ({"max_num_seqs": 1}, "max_num_seqs must be at least 2"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0, not 0"),
    ],
    ids=lambda how: next(iter(how)) if isinstance(how, dict) else "",
)
def test_engines_that_cannot_work(how, message):
    with pytest.raises(ValueError, match=message):
        make_llm("nowhere", **how)


@pytest.mark.parametrize(
    ("some", "how", "message"),
    [
        (["one"], {"method": "cad"}, "completion 0 has one prompts, and cad needs 2: with context, without context"),
        ([["one", "two", "three"]], {"method": "cad"}, "completion 0 has 3 prompts, and cad needs 2"),
        (
            [["one", "two"]],
            {"method": "cad", "seed": [1, 2]},
            "seed must be a number, or one number for each of the 1 completions, not 2",
        ),
        ([["one", "two"]], {"method": "cad", "adapters": [None]}, "adapters must have one entry per branch"),
        ([["one", "two"]], {"method": "cad", "max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ([["one", "two"]], {"method": "cad", "lam": 1.0}, "cad has no contrast_lam"),
        ([["one", "two"]], {"method": "cad", "n": 0}, "n must be a whole number of at least 1, not 0"),
        (
            [["one", "two"]],
            {"method": "cad", "n": 3},
            "n=3 needs a temperature above 0: greedy decoding writes the same",
        ),
        (
            [["one", "two"]],
            {"method": "cad", "sampling": {"n": 2}},
            "n is an argument of its own: take it out of sampling",
        ),
        (
            [["one", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]]],
            {"method": "vcd"},
            "a part of type 'image_url' is not read here: write text, or an image as",
        ),
    ],
)
def test_wrong_arguments(engines, some, how, message):
    with pytest.raises(ValueError, match=message):
        generate_pairs(short(engines), some, use_tqdm=False, **how)
