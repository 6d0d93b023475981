"""Logits that cannot be contrasted are an error that names the branch and the place, in every executor."""

import re
from functools import partial

import pytest
import torch
import zoo

from contralto import decoding, testbed
from contralto.decoding import rules
from contralto.decoding.branches import InputBranch, ModelBranch
from contralto.decoding.executors.score import score
from contralto.decoding.trace import trace
from contralto.decoding.validity import check_logits

NAN, INF = torch.nan, torch.inf
STEPS = 5


@pytest.fixture
def pair():
    return zoo.build("llama", seed=1), zoo.build("llama", hidden=16, seed=2)


@pytest.fixture
def inputs():
    return zoo.pad(zoo.prompts(2, seed=3))


def spoil(model, value, *, row=1, forward=1, where=slice(7, 8)):
    """Let the model's head write a value into one row, from the n-th forward on."""
    calls = []

    def write(module, arguments, output):
        calls.append(None)
        if len(calls) >= forward:
            output = output.clone()
            output[row, ..., where] = value
        return output

    model.get_output_embeddings().register_forward_hook(write)
    return model


def run(name, pair, inputs, **how):
    expert, amateur = pair
    method = decoding.ContrastiveDecodingLogitsProcessor(amateur)
    if name == "score":
        return score(method, expert, inputs, torch.tensor([[5, 6, 7]] * len(inputs["input_ids"])))
    if name == "trace":
        return trace(method, expert, {n: v[1:] for n, v in inputs.items()}, torch.tensor([5, 6, 7]))
    executor = {
        "processor": {"logits_processor": [method]},
        "loop": {"custom_generate": method.loop()},
        "speculative": {"custom_generate": decoding.SpeculativeContrastiveDecoding(amateur, draft_length=2)},
    }[name]
    how = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None} | how
    return expert.generate(**inputs, **executor, **how)


def test_every_row_of_several_axes_is_checked():
    """`(2, 3, 4)` logits, of which one row has no possible token."""
    broken = torch.zeros(2, 3, 4)
    broken[1, 2] = -INF
    with pytest.raises(ValueError, match=r"the logits of b are all -inf in row 1, token 2"):
        check_logits(
            [torch.zeros(2, 3, 4), broken],
            lambda: ["logits of a", "logits of b"],
            lambda i, j: f"in row {i}, token {j}",
        )


@pytest.mark.parametrize(
    ("name", "row", "forward", "place"),
    [
        ("processor", 1, 3, "in row 1, after 9 tokens"),
        ("loop", 1, 3, "in row 1, at step 3"),
        ("speculative", 1, 3, "in row 1, at step 3"),
        ("score", 1, 1, "in row 1, for token 1 of the continuation"),
        ("trace", 0, 1, "for token 1 of the text"),
    ],
)
@pytest.mark.parametrize("value", [NAN, INF])
def test_the_amateur(pair, inputs, name, row, forward, place, value):
    spoil(pair[1], value, row=row, forward=forward)
    kind = "NaN" if value is NAN else "+inf"
    message = re.escape(f"the logits of the amateur (LlamaForCausalLM) contain {kind} {place}: ")
    with pytest.raises(ValueError, match=message):
        run(name, pair, inputs)


@pytest.mark.parametrize("name", ["processor", "loop", "speculative", "score"])
def test_the_expert(pair, inputs, name):
    spoil(pair[0], NAN)
    with pytest.raises(ValueError, match="the logits of the expert contain NaN in row 1"):
        run(name, pair, inputs)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("name", ["processor", "loop", "speculative"])
def test_processors_that_exclude_every_token(pair, inputs, name, sample):
    with pytest.raises(ValueError, match=r"the logits of the expert are all -inf in row 0, .* exclude every token"):
        run(name, pair, inputs, suppress_tokens=list(range(zoo.VOCAB)), do_sample=sample)


def test_an_amateur_without_any_possible_token(pair, inputs):
    spoil(pair[1], -INF, where=slice(None))
    with pytest.raises(ValueError, match=r"the logits of the amateur .* are all -inf in row 1"):
        run("loop", pair, inputs)


def test_invalid_values_that_are_to_be_removed(pair, inputs):
    """`remove_invalid_values` makes the main logits valid before the rule sees them, as everywhere in transformers."""
    spoil(pair[0], NAN)
    found = [run(name, pair, inputs, remove_invalid_values=True) for name in ("processor", "loop", "speculative")]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_head_that_overflows_in_half_precision(pair, inputs):
    amateur = pair[1].half()
    amateur.lm_head.weight.data *= 20000
    assert amateur(**inputs).logits.isinf().any()
    with pytest.raises(
        ValueError, match=r"the logits of the amateur \(LlamaForCausalLM\) contain (NaN|\+inf) in row \d"
    ):
        run("loop", pair, inputs)


def test_a_layer_and_another_input(pair, inputs):
    model = pair[0]
    layers = decoding.DoLaLogitsProcessor(model, layers=[0, 1])
    rows = len(inputs["input_ids"])

    def write(module, arguments, output):
        output[rows:, ..., 7] = NAN  # the rows of earlier layers, which come after the model's own

    hook = model.get_output_embeddings().register_forward_hook(write)
    with pytest.raises(
        ValueError, match=r"the logits of the layers \(LlamaForCausalLM\) contain NaN in row 0, at step 1"
    ):
        model.generate(**inputs, custom_generate=layers.loop(), max_new_tokens=2)
    hook.remove()
    contrast = decoding.ContextAwareDecodingLogitsProcessor(model, inputs)
    spoil(model, INF, row=3, forward=2)  # of the stacked batch, the second contrast row
    with pytest.raises(ValueError, match=r"the logits of the without context .* in row 1, at step 2"):
        model.generate(**inputs, custom_generate=contrast.loop(), max_new_tokens=2, eos_token_id=None)


def test_contrastive_search(pair, inputs):
    model = pair[0]
    executors = (
        lambda: {"custom_generate": decoding.ContrastiveSearch()},
        lambda: {"logits_processor": [decoding.ContrastiveSearchLogitsProcessor(model)]},
    )
    how = {"max_new_tokens": 4, "do_sample": False}
    for executor in executors:
        with pytest.raises(ValueError, match="the logits of the main branch are all -inf in row 0, after 7 tokens"):
            model.generate(**inputs, suppress_tokens=list(range(zoo.VOCAB)), **executor(), **how)
    norm = model.model.norm.register_forward_hook(lambda m, a, output: torch.where(torch.arange(32) == 3, INF, output))
    head = model.lm_head.register_forward_hook(lambda m, a, output: output.nan_to_num(0.0, 0.0, 0.0))
    for executor in executors:
        with pytest.raises(ValueError, match="the cosines of the candidates' hidden states contain NaN in row 0"):
            model.generate(**inputs, **executor(), **how)
    norm.remove()
    head.remove()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (NAN, "the values of the critic contain NaN in row 1, after 7 tokens"),
        (-INF, "the scores of the candidates are all -inf in row 1"),
        (INF, None),
    ],
)
def test_a_critic(pair, inputs, value, message):
    """A value of -inf means never, one of +inf means that the critic has no objection."""

    def critic(ids, mask):
        return torch.where(torch.arange(len(ids)) < len(ids) // 2, 0.0, value)

    method = decoding.CriticGuidedLogitsProcessor(critic, k=4, attention_mask=inputs["attention_mask"])
    how = {"logits_processor": [method], "max_new_tokens": 2, "do_sample": False}
    if message is None:
        pair[0].generate(**inputs, **how)
        return
    with pytest.raises(ValueError, match=message):
        pair[0].generate(**inputs, **how)


def test_a_rule_that_leaves_no_number(pair, inputs):
    """Tokens that both branches exclude: their difference is NaN, which `argmax` would choose."""
    amateur = zoo.build("llama", hidden=16, seed=2, vocab_size=zoo.VOCAB - 1)
    method = decoding.ContrastiveLogitsProcessor(lambda main, other: main - other, [ModelBranch(amateur)])
    how = {"suppress_tokens": [zoo.VOCAB - 1], "max_new_tokens": 2}
    with pytest.raises(ValueError, match=r"the scores of the rule contain (NaN|\+inf) in row 0"):
        pair[0].generate(**{n: v.clamp(max=30) for n, v in inputs.items()}, custom_generate=method.loop(), **how)


def test_what_an_amateur_rules_out_is_no_error(pair):
    """`-inf` of single tokens is legitimate: embeddings padded to another size, tokens that the model excludes."""
    logits = torch.tensor([[-INF, 0.0, 1.0], [2.0, -INF, -INF]])
    check_logits([logits, rules.contrastive_decoding(logits, logits.flip(0))], list, str)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (lambda main, other: (main - other)[..., 0], ValueError, "the rule returned scores of shape "),
        (lambda main, other: (main - other).mean(0), ValueError, "the rule returned scores of shape "),
        (lambda main, other: (main - other)[None], ValueError, "the rule returned scores of shape "),
        (lambda main, other: None, TypeError, "must return a tensor of scores, not NoneType"),
    ],
)
@pytest.mark.parametrize(
    "how", ["processor", *(pytest.param(how, marks=pytest.mark.slow) for how in ("loop", "score"))]
)
def test_scores_of_another_shape_are_rejected(rule, error, message, how):
    model, tokenizer = testbed.load("expert"), testbed.tokenizer()
    inputs = tokenizer(["Ben went out"] * 2, return_tensors="pt")
    method = decoding.ContrastiveLogitsProcessor(rule, [ModelBranch(testbed.load("amateur"))])
    generate = partial(model.generate, **inputs, max_new_tokens=2)
    runs = {
        "processor": lambda: generate(logits_processor=[method]),
        "loop": lambda: generate(custom_generate=method.loop()),
        "score": lambda: score(method, model, inputs, inputs["input_ids"][:, 1:]),
    }
    with pytest.raises(error, match=message):
        runs[how]()


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: [model], lambda model: ModelBranch(model), lambda _: "x"]
)
def test_models_in_place_of_branches_are_rejected(wrap):
    with pytest.raises(TypeError, match=r"branches must be a list of branches, such as \[ModelBranch\(amateur\)\]"):
        decoding.ContrastiveLogitsProcessor(lambda main, other: main - other, wrap(testbed.load("amateur")))


@pytest.mark.parametrize("name", ["self:layers=10", "gpt2"])
def test_names_in_place_of_models_are_rejected(name):
    for make in (
        lambda: decoding.ContrastiveDecodingLogitsProcessor(name),
        lambda: decoding.SpeculativeContrastiveDecoding(name),
        lambda: decoding.ClassifierFreeGuidanceLogitsProcessor(name),
        lambda: InputBranch(name, {"input_ids": torch.ones(1, 1)}),
    ):
        with pytest.raises(TypeError, match=f"not its name '{name}': load it .* is EarlyExit"):
            make()


@pytest.mark.parametrize("other", ["Ben", ["Ben"], torch.ones(1, 2), {"input_ids": [[1, 2]]}])
def test_contrast_prompts_that_are_not_encoded_are_rejected(other):
    for kind in (decoding.ClassifierFreeGuidanceLogitsProcessor, decoding.ContextAwareDecodingLogitsProcessor):
        with pytest.raises(TypeError, match=r"contrast inputs must be .*, not \w+: pass tokenizer\(texts"):
            kind(testbed.load("expert"), other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: decoding.EarlyExit("gpt2", 8),
        lambda: decoding.Dropout("gpt2", 0.3),
        lambda: decoding.quantized_copy("gpt2", 4),
        lambda: decoding.DoLaLogitsProcessor("gpt2"),
        lambda: decoding.DoLaLogitsProcessor("gpt2", layers=[1]),
    ],
)
def test_names_in_place_of_models_are_rejected_by_variants(make):
    with pytest.raises(TypeError, match="not its name 'gpt2': load it"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a: decoding.DoLaLogitsProcessor(a, layers=1), r"layers must be a list .* pass layers=\[1\]"),
        (
            lambda a: decoding.ContrastiveDecodingLogitsProcessor(a, attention_mask=[[1]]),
            "must be a tensor .*, not list",
        ),
        (lambda a: decoding.ContrastiveDecodingLogitsProcessor(a, tokenizer="x"), "not its name 'x'"),
        (lambda a: decoding.CriticGuidedLogitsProcessor("x"), "must be a model or a function .*, not 'x'"),
        (lambda a: decoding.ContrastiveLogitsProcessor("cd", [ModelBranch(a)]), "logits of 2 branches, not 'cd'"),
        (
            lambda a: decoding.ContrastiveLogitsProcessor(lambda x: x, [ModelBranch(a)]),
            "of 1 branches, and there are 2",
        ),
        (
            lambda a: decoding.ContrastiveLogitsProcessor(lambda x, y, z: x, [ModelBranch(a)]),
            "of 3 branches, and there are 2",
        ),
        (lambda a: decoding.SeededSampling(1), "seeds must be a list"),
        (lambda a: decoding.SeededSampling([1.5]), "integer"),
    ],
)
def test_arguments_of_another_type_are_rejected(make, message):
    with pytest.raises(TypeError, match=message):
        make(testbed.load("amateur"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda a: decoding.ContrastiveDecodingLogitsProcessor(a, beta="0.5"),
            "beta must be a finite number .*, not '0.5'",
        ),
        (lambda a: decoding.ContrastiveDecodingLogitsProcessor(a, alpha="0.5"), "alpha must lie in .*, not '0.5'"),
        (lambda a: decoding.ContrastiveDecodingLogitsProcessor(a, amateur_window=1.5), "window must be .*, not 1.5"),
        (lambda a: decoding.EarlyExit(a, 1.5), "layers must be a number from 1 to .*, not 1.5"),
        (lambda a: decoding.ContrastiveSearch(k=2.5), "k must be at least 1 .*, not 2.5"),
    ],
)
def test_numbers_of_another_kind_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make(testbed.load("expert"))


def test_rules_may_take_any_number_of_branches_or_have_defaults():
    branches = [ModelBranch(testbed.load("amateur"))]
    for rule in (
        lambda *logits: logits[0],
        lambda main, other, weight=1.0: main,
        torch.sub,
        partial(torch.add, alpha=-1),
    ):
        decoding.ContrastiveLogitsProcessor(rule, branches)
