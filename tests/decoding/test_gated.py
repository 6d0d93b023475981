"""The gate: branches that run only where the main model is not sure, and catch up with several tokens in one forward pass.

Every method on every architecture: tests/decoding/methods/test_methods.py. The breaks that these tests must notice are in
tests/mutants/declared/decoding.yaml.
"""

import copy
import re

import pytest
import torch
import zoo
from oracles import decoding as reference
from oracles import rules as oracle
from zoo import vision

from contralto import decoding, testbed
from contralto.decoding import ContrastiveDecodingLogitsProcessor, GatedLogitsProcessor
from contralto.decoding.branches import InputBranch, ModelBranch
from contralto.decoding.executors.score import score
from contralto.decoding.inputs import DecodingBatch
from contralto.decoding.methods import METHODS, DecodingConfig, cost, generate_kwargs, likelihood_processor
from contralto.decoding.methods.controls import control_processor, has_effect
from contralto.decoding.trace import trace
from contralto.eval.models.decoder import Decoder

STEPS = 12
RULE = {"beta": 0.7, "alpha": 0.05}
MIDDLE = 0.3
"""A gate at which these random models are sure of about half of their tokens."""
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def pair():
    return zoo.build("llama", seed=1), zoo.build("llama", hidden=16, seed=2)


def _method(amateur, **how):
    return ContrastiveDecodingLogitsProcessor(amateur, **RULE, **how)


def _run(model, inputs, method, *, fast, **how):
    executor = {"custom_generate": method.loop()} if fast else {"logits_processor": [method]}
    how = {"do_sample": False, "max_new_tokens": STEPS, **how}
    return model.generate(**inputs, **executor, **how)


def _fed(model):
    """A list that receives the number of columns of every forward pass of a model."""
    fed = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return fed, handle


# ------------------------------------------------------------------------------------------------------- forward passes


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_branches_run_only_where_a_row_needs_them(pair, batch, fast):
    expert, amateur = pair
    inputs = zoo.pad(zoo.prompts(batch))
    method = GatedLogitsProcessor(_method(amateur), gate=MIDDLE)
    fed, handle = _fed(amateur)
    try:
        output = _run(expert, inputs, method, fast=fast, min_new_tokens=STEPS)
    finally:
        handle.remove()
    width, steps = inputs["input_ids"].shape[1], output.shape[1] - inputs["input_ids"].shape[1]
    assert method.statistics.steps == steps
    assert 0 < method.statistics.skipped < steps - 1
    assert len(fed) == steps - method.statistics.skipped
    assert fed[0] == width
    assert max(fed[1:]) > 1  # it caught up
    assert sum(fed) <= width + steps - 1  # and read no token twice


def test_other_prompts_of_the_same_model_stay_rows_of_its_forward_pass(pair):
    """In the loop, where a second row costs less than a second pass; as a processor they have passes of their own."""
    model, _ = pair
    main, contrast = zoo.pad(zoo.prompts(2, seed=3)), zoo.pad(zoo.prompts(3, seed=4)[:0:-1])
    texts, passes = [], []
    for fast in (True, False):
        method = decoding.ContextAwareDecodingLogitsProcessor(model, contrast)
        gated = GatedLogitsProcessor(method, gate=MIDDLE)
        fed, handle = _fed(model)
        try:
            texts.append(_run(model, main, gated, fast=fast, min_new_tokens=STEPS))
        finally:
            handle.remove()
        passes.append(len(fed))
        assert gated.statistics.skipped
    assert torch.equal(*texts)
    assert passes == [STEPS, 2 * STEPS - gated.statistics.skipped]


def test_rows_that_have_ended_need_no_contrast(pair):
    """In the loop a row that has ended cannot keep the branches running; a processor does not know which have ended."""
    expert, amateur = pair
    inputs, skipped = zoo.pad(zoo.prompts(3)), []
    first = _run(expert, inputs, _method(amateur), fast=False)[:, inputs["input_ids"].shape[1]]
    method, texts = GatedLogitsProcessor(_method(amateur), gate=MIDDLE), []
    for fast in (True, False):
        texts.append(_run(expert, inputs, method, fast=fast, eos_token_id=first[:2].tolist()))  # two rows end at once
        skipped.append(method.statistics.skipped)
    assert torch.equal(*texts)
    assert skipped[0] > skipped[1]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mamba"])
def test_catching_up_is_reading_token_by_token(family, window):
    model, inputs = zoo.build(family, seed=1), zoo.pad(zoo.prompts(3))
    mask = inputs["attention_mask"]
    new = torch.randint(3, zoo.VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    slow, fast = (ModelBranch(model, attention_mask=mask, window=window) for _ in range(2))
    rows = inputs["input_ids"]
    torch.testing.assert_close(fast(rows), slow(rows), **CLOSE)
    for start, end in ((0, 1), (1, 4), (4, 5), (5, 9)):
        for length in range(start + 1, end + 1):
            expected = slow(torch.cat([rows, new[:, :length]], 1))
        torch.testing.assert_close(fast.catch_up(torch.cat([rows, new[:, :end]], 1)), expected, **CLOSE)


def test_catching_up_in_half_precision():
    """Rounding differs from pass to pass, and by no more than rounding."""
    model, inputs = zoo.build("llama", seed=1).to(torch.bfloat16), zoo.pad(zoo.prompts(3))
    new = torch.randint(3, zoo.VOCAB, (3, 6), generator=torch.Generator().manual_seed(2))
    slow, fast = (ModelBranch(model, attention_mask=inputs["attention_mask"], window=2) for _ in range(2))
    rows = inputs["input_ids"]
    fast(rows), slow(rows)
    for length in range(1, 7):
        expected = slow(torch.cat([rows, new[:, :length]], 1))
    found = fast.catch_up(torch.cat([rows, new], 1))
    assert found.dtype == torch.bfloat16
    assert (found.float().softmax(-1) - expected.float().softmax(-1)).abs().max() < 0.02


@pytest.mark.parametrize("family", vision.families())
def test_images_are_not_read_again(family):
    """A branch with an image continues from its cache, in the positions of the image."""
    cases = vision.cases(family, 2, seed=3)
    model = vision.build(family, seed=6)
    branch = InputBranch(model, vision.batch([case.noised for case in cases]))
    main = vision.batch([case.original for case in cases])["input_ids"]
    new = torch.randint(3, vision.IMAGE, (2, 6), generator=torch.Generator().manual_seed(1))
    branch(main)
    fed, handle = _fed(model)
    try:
        found = [branch.catch_up(torch.cat([main, new[:, :length]], 1)) for length in (1, 4, 6)][-1]
    finally:
        handle.remove()
    assert fed == [1, 3, 2]
    double = vision.build(family, seed=6).double()
    wanted = [vision.next_logits(double, case.noised, row) for case, row in zip(cases, new, strict=True)]
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=2e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------------- scores


def _scorer(expert, amateur, gate, **rule):
    doubles = copy.deepcopy(expert).double(), copy.deepcopy(amateur).double()
    plain, prompt = reference.scorer(*doubles, **rule), []

    def scores(ids):
        prompt.append(len(ids))
        logits = reference.next_logits(doubles[0], ids)
        return torch.tensor(
            oracle.gated(plain(ids).tolist(), logits, len(ids) - min(prompt), gate=gate), dtype=torch.float64
        )

    return scores


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_beams(pair, window):
    """Beams that are reordered while the amateur lags behind."""
    expert, amateur = pair
    rule = {**RULE, "min_tokens_to_keep": 2}
    for row in zoo.prompts(3):
        expected = reference.beam(_scorer(expert, amateur, 0.2, window=window, **rule), row, 8, zoo.EOS, num_beams=4)
        method = ContrastiveDecodingLogitsProcessor(amateur, amateur_window=window, **rule)
        gated = GatedLogitsProcessor(method, gate=0.2)
        output = _run(expert, zoo.pad([row]), gated, fast=False, num_beams=4, max_new_tokens=8)
        assert output[0, len(row) :].tolist()[: len(expected)] == expected
        assert gated.statistics.steps


@pytest.mark.parametrize("fast", [True, False])
def test_a_window_stays_where_it_is(pair, fast):
    """The amateur sees the prompt's last tokens and all that was generated, also those of steps that it missed."""
    expert, amateur = pair
    rows = zoo.prompts(2)
    inputs, width = zoo.pad(rows), max(map(len, rows))
    method = _method(amateur, amateur_window=2, attention_mask=inputs["attention_mask"])
    gated = GatedLogitsProcessor(method, gate=MIDDLE)
    output = _run(expert, inputs, gated, fast=fast)
    assert gated.statistics.skipped
    for found, row in zip(output[:, width:].tolist(), rows, strict=True):
        expected = reference.greedy(_scorer(expert, amateur, MIDDLE, window=2, **RULE), row, STEPS, zoo.EOS)
        assert found[: len(expected)] == expected


@pytest.mark.parametrize("fast", [True, False])
def test_sampling(pair, fast):
    expert, amateur = pair
    rows = zoo.prompts(2)
    scorers = [_scorer(expert, amateur, MIDDLE, **RULE) for _ in rows]
    expected = reference.sample(scorers, rows, STEPS, zoo.EOS, seed=3)
    torch.manual_seed(3)
    inputs = zoo.pad(rows)
    output = _run(expert, inputs, GatedLogitsProcessor(_method(amateur), gate=MIDDLE), fast=fast, do_sample=True)
    for found, wanted in zip(output[:, inputs["input_ids"].shape[1] :].tolist(), expected, strict=True):
        assert found[: len(wanted)] == wanted


@pytest.mark.parametrize("fast", [True, False])
def test_extreme_gates(pair, fast):
    """The lowest gate leaves the contrast of the first token alone; at 1 a model that leaves two tokens open is contrasted."""
    expert, amateur = pair
    inputs = zoo.pad(zoo.prompts(3))
    how = {"return_dict_in_generate": True, "output_scores": True, "min_new_tokens": STEPS}
    lowest = _run(expert, inputs, GatedLogitsProcessor(_method(amateur), gate=1e-6), fast=fast, **how)
    plain = _run(expert, inputs, _method(amateur), fast=fast, **how)
    torch.testing.assert_close(lowest.scores[0], plain.scores[0])
    begun = {"input_ids": lowest.sequences[:, : inputs["input_ids"].shape[1] + 1]}
    begun["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    greedy = expert.generate(**begun, do_sample=False, max_new_tokens=STEPS - 1, min_new_tokens=STEPS - 1)
    assert torch.equal(lowest.sequences, greedy)
    highest = _run(expert, inputs, GatedLogitsProcessor(_method(amateur), gate=1.0), fast=fast, **how)
    assert torch.equal(highest.sequences, plain.sequences)
    for one, other in zip(highest.scores, plain.scores, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("draft_length", [None, 3])
def test_speculative_decoding_has_the_same_tokens(pair, draft_length):
    expert, amateur = pair
    inputs = zoo.pad(zoo.prompts(3))
    expected = _run(expert, inputs, GatedLogitsProcessor(_method(amateur), gate=MIDDLE), fast=True)
    method = decoding.SpeculativeContrastiveDecoding(amateur, **RULE, draft_length=draft_length, gate=MIDDLE)
    found = expert.generate(**inputs, custom_generate=method, do_sample=False, max_new_tokens=STEPS)
    assert torch.equal(found, expected)
    ungated = decoding.SpeculativeContrastiveDecoding(amateur, **RULE, draft_length=draft_length)
    assert not torch.equal(
        found, expert.generate(**inputs, custom_generate=ungated, do_sample=False, max_new_tokens=STEPS)
    )


def test_assisted_decoding_has_the_same_tokens(pair):
    """Drafts that are taken back, after steps without the amateur."""
    expert, amateur = pair
    inputs = zoo.pad(zoo.prompts(1))
    expected = _run(expert, inputs, GatedLogitsProcessor(_method(amateur), gate=MIDDLE), fast=False)
    gated = GatedLogitsProcessor(_method(amateur), gate=MIDDLE)
    assert torch.equal(_run(expert, inputs, gated, fast=False, assistant_model=copy.deepcopy(amateur)), expected)


@pytest.mark.slow
def test_one_object_serves_many_calls(pair):
    """New prompts, the same ones, and a prompt that continues the last completion: the first token is contrasted each time."""
    expert, amateur = pair
    gated = GatedLogitsProcessor(_method(amateur), gate=MIDDLE)
    first = zoo.pad(zoo.prompts(1))
    batches = [first, zoo.pad(zoo.prompts(3, seed=2)), first, first]
    batches.append({"input_ids": torch.cat([_run(expert, first, gated, fast=False), torch.tensor([[5, 6]])], 1)})
    for inputs in batches:
        fresh = GatedLogitsProcessor(_method(amateur), gate=MIDDLE)
        for fast in (False, True):
            assert torch.equal(_run(expert, inputs, gated, fast=fast), _run(expert, inputs, fresh, fast=fast))
            assert gated.statistics == fresh.statistics


def test_trace_and_likelihoods_agree(pair):
    expert, amateur = pair
    inputs = zoo.pad(zoo.prompts(1))
    gated = GatedLogitsProcessor(_method(amateur), gate=MIDDLE)
    output = _run(expert, inputs, gated, fast=True, min_new_tokens=STEPS)
    tokens = output[0, inputs["input_ids"].shape[1] :]
    steps = trace(gated, expert, inputs, tokens)
    likelihood = score(gated, expert, inputs, tokens[None], masked=True)
    assert likelihood.is_greedy.all()
    torch.testing.assert_close(likelihood.tokens[0], torch.tensor([step.log_p[-1] for step in steps]), **CLOSE)
    plain = [step.main[0].probability >= MIDDLE for step in steps[1:]]
    assert 0 < sum(plain) < len(plain)
    for is_plain, step in zip(plain, steps[1:], strict=True):
        assert is_plain == (step.log_p[0] == pytest.approx(step.log_p[-1], abs=1e-5))
        assert is_plain == (not step.ruled_out.tokens)


# -------------------------------------------------------------------------------------------------------- declarations


def test_every_method_with_branches_has_the_gate():
    """Derived from the declaration, also of a loop that has a gate of its own."""
    for method in METHODS.values():
        assert method.has_gate == (len(method.branches) > 1)
        for form in method.forms:
            assert ("gate" in method.parameters(form)) == method.has_gate
            if method.has_gate:
                assert method.parameters(form)["gate"].is_new
                assert method.parameters(form)["gate"].description.startswith("probability of the likeliest token")


@pytest.mark.parametrize("executor", ["loop", "processor"])
def test_a_configuration_with_a_gate(executor):
    expert, amateur, tokenizer = testbed.load("expert"), testbed.load("amateur"), testbed.tokenizer()
    inputs = tokenizer("Mia went to the", return_tensors="pt")
    config = DecodingConfig(models={"amateur": "testbed:amateur"}, parameters={"gate": 0.9}, executor=executor)
    batch = DecodingBatch(expert, (amateur,), dict(inputs), ())
    found = expert.generate(**inputs, **generate_kwargs(config, batch), max_new_tokens=20, do_sample=False)
    gated = GatedLogitsProcessor(ContrastiveDecodingLogitsProcessor(amateur), gate=0.9)
    assert torch.equal(found, _run(expert, inputs, gated, fast=False, max_new_tokens=20))
    assert likelihood_processor(config, batch).gate == 0.9
    assert "no contrast where the largest probability is at least 0.9" in cost(config, expert, [amateur])
    assert config.describe()["gate"] == 0.9
    assert "gate" not in DecodingConfig(models={"amateur": "testbed:amateur"}).describe()


def test_controls_are_gated():
    """What explains a gain away acts where the contrast does."""
    config = DecodingConfig(models={"amateur": "any"}, parameters={"beta": 1, "alpha": 0.5, "gate": 0.8})
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.06, 0.04]]).log()
    uniform = control_processor(config, "uniform").combine(scores, [], 1).softmax(-1)
    torch.testing.assert_close(uniform, torch.tensor([[0.8, 0.2, 0.0], [0.9, 0.06, 0.04]]))
    mask = control_processor(config, "mask").combine(scores, [], 1).exp()
    torch.testing.assert_close(mask, torch.tensor([[0.6, 0.3, 0.0], [0.9, 0.06, 0.04]]))
    low = DecodingConfig(models={"amateur": "any"}, parameters={"gate": 0.1})
    assert has_effect(low, renormalized=True)


def test_a_gated_control_has_a_key_of_its_own():
    """Cached results of the control must not be those without the gate."""
    how = {"amateur": "testbed:amateur", "control": "mask"}
    gated, plain = Decoder.of(**how, gate=0.9).describe(), Decoder.of(**how).describe()
    assert gated == {**plain, "gate": 0.9}


@pytest.mark.parametrize(
    ("gate", "message"),
    [(0.0, "gate must lie in (0, 1]"), (1.5, "not 1.5: leave it out"), (-1, "gate must lie in (0, 1]")],
)
def test_gates_out_of_range(pair, gate, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GatedLogitsProcessor(_method(pair[1]), gate=gate)
    with pytest.raises(ValueError, match=re.escape(message)):
        DecodingConfig(models={"amateur": "any"}, parameters={"gate": gate})
    with pytest.raises(ValueError, match=re.escape(message)):
        decoding.SpeculativeContrastiveDecoding(pair[1], gate=gate)


def test_what_has_no_branches_to_skip(pair):
    with pytest.raises(TypeError, match=r"method must be a logits processor such as .* not LlamaForCausalLM"):
        GatedLogitsProcessor(pair[1], gate=0.5)
    with pytest.raises(
        ValueError, match="a gate skips the branches of a method, and ContrastiveLogitsProcessor has none"
    ):
        GatedLogitsProcessor(decoding.ContrastiveLogitsProcessor(lambda main: main, []), gate=0.5)
    with pytest.raises(ValueError, match="method='search' has no gate"):
        DecodingConfig(method="search", parameters={"gate": 0.5})
