"""One order in every executor: the processors of `generate()`, the rule, the warpers. Reference: float64, rows alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
import zoo
from oracles import decoding as reference
from transformers import GenerationConfig, LogitsProcessor, TemperatureLogitsWarper, WatermarkingConfig

from contralto.decoding import (
    ContrastiveDecodingLogitsProcessor,
    ContrastiveSearch,
    ContrastiveSearchLogitsProcessor,
    SeededSampling,
    SpeculativeContrastiveDecoding,
)
from contralto.decoding.executors.order import check_arguments, split_processors

STEPS = 7
RULE = {"beta": 0.7, "alpha": 0.05}


class Odd(LogitsProcessor):
    """A caller's processor: even tokens are excluded."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores


BEFORE = {
    "nothing": {},
    "min_new_tokens": {"min_new_tokens": STEPS},
    "min_length": {"min_length": 12},
    "suppress": {"suppress_tokens": list(range(5, 40))},
    "begin_suppress": {"begin_suppress_tokens": list(range(3, 45))},
    "bad_words": {"bad_words_ids": [[t] for t in range(10, 40)] + [[41, 42]]},
    "sequence_bias": {"sequence_bias": [[[t], 8.0] for t in range(20, 30)]},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat": {"no_repeat_ngram_size": 1},
    "decay": {"exponential_decay_length_penalty": (1, 2.0)},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: [7 + row, 11, 13]},
    "forced_eos": {"forced_eos_token_id": 9},
    "encoder_penalty": {"encoder_repetition_penalty": 3.0},
    "invalid": {"remove_invalid_values": True, "suppress_tokens": list(range(5, 40))},
    "guidance": {"guidance_scale": 1.5},
    "own": {"logits_processor": [Odd()]},
    "own_warper": {"logits_processor": [TemperatureLogitsWarper(0.3)]},
}
AFTER = {
    "renormalize": {"renormalize_logits": True},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
}
WARPERS = {
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "typical": {"typical_p": 0.4},
    "epsilon": {"epsilon_cutoff": 0.05},
    "eta": {"eta_cutoff": 0.05},
    "top_h": {"top_h": 0.5},
}


@pytest.fixture(scope="module")
def pair():
    return zoo.build("llama", seed=1), zoo.build("llama", hidden=16, seed=2)


@pytest.fixture(scope="module")
def doubles(pair):
    return [copy.deepcopy(model).double() for model in pair]


def _run(pair, rows, name, **how):
    expert, amateur = pair
    executors = {
        "processor": lambda: {"logits_processor": [ContrastiveDecodingLogitsProcessor(amateur, **RULE)]},
        "loop": lambda: {"custom_generate": ContrastiveDecodingLogitsProcessor(amateur, **RULE).loop()},
        "speculative": lambda: {"custom_generate": SpeculativeContrastiveDecoding(amateur, draft_length=3, **RULE)},
    }
    given, inputs = executors[name](), zoo.pad(rows)
    own = how.pop("logits_processor", [])
    own = [*own, *given.pop("logits_processor", [])]
    how = {"do_sample": False, "max_new_tokens": STEPS, **given, "logits_processor": own, **how}
    return expert.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :].tolist()


def _prepared(model, ids, width, **how):
    """The processors that transformers makes for some features, the caller's among them."""
    others = {name: how.pop(name) for name in ("prefix_allowed_tokens_fn", "logits_processor") if name in how}
    config = GenerationConfig(
        pad_token_id=zoo.PAD,
        eos_token_id=zoo.EOS,
        bos_token_id=zoo.BOS,
        num_beams=1,
        use_cache=True,
        max_length=width + STEPS,
        **how,
    )
    config._eos_token_tensor = torch.tensor([zoo.EOS])
    mask = {"attention_mask": (ids != zoo.PAD).long()}
    return model._get_logits_processor(
        config, input_ids_seq_length=width, encoder_input_ids=ids, device="cpu", model_kwargs=mask, **others
    )


def _reference(doubles, rows, before, after, seed=None):
    """Rows alone in float64 without a cache; the processors on the batch as `generate()` sees it."""
    ids = zoo.pad(rows)["input_ids"]
    width = ids.shape[1]
    first, last = (_prepared(doubles[0], ids, width, **copy.copy(how)) for how in (before, after))
    if seed is not None:
        torch.manual_seed(seed)
    done = torch.zeros(len(rows), dtype=torch.bool)
    for _ in range(STEPS):
        texts = [row[width - len(prompt) :] for row, prompt in zip(ids, rows, strict=True)]
        main, other = (torch.tensor([reference.next_logits(m, text) for text in texts]).double() for m in doubles)
        pairs = zip(first(ids, main).tolist(), other.tolist(), strict=True)
        scores = last(ids, torch.tensor([reference.contrastive_decoding(*pair, **RULE) for pair in pairs]).double())
        drawn = scores.argmax(-1) if seed is None else torch.multinomial(scores.float().softmax(-1), 1)[:, 0]
        ids = torch.cat([ids, torch.where(done, zoo.PAD, drawn)[:, None]], dim=1)
        done |= ids[:, -1] == zoo.EOS
        if done.all():
            break
    return ids[:, width:].tolist()


def quick(names, *chosen):
    """Names as parameters of a test, slow but for some."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("feature", quick([*BEFORE, *AFTER], "suppress", "repetition_penalty", "watermark"))
def test_greedy_tokens_are_the_references_in_every_executor(pair, doubles, feature):
    rows = zoo.prompts(2, seed=3)
    before, after = BEFORE.get(feature, {}), AFTER.get(feature, {})
    expected = _reference(doubles, rows, before, after)
    assert any(token != zoo.PAD for row in expected for token in row)
    for name in ("processor", "loop", "speculative"):
        assert _run(pair, rows, name, **copy.deepcopy({**before, **after})) == expected, name


@pytest.mark.parametrize(
    "feature", quick(["suppress", "min_new_tokens", "allowed", "repetition_penalty", "own"], "suppress")
)
def test_contrastive_search_has_the_same_order(pair, feature):
    """The loop against the processor, whose tokens test_search.py compares with a reference."""
    rows = zoo.prompts(2, seed=3)
    _same_search(pair[0], zoo.pad(rows), copy.deepcopy(BEFORE[feature]))


@pytest.mark.parametrize("feature", quick(AFTER, "watermark"))
def test_contrastive_search_comes_before_the_watermark(pair, feature):
    _same_search(pair[0], zoo.pad(zoo.prompts(2, seed=3)), copy.deepcopy(AFTER[feature]))


def _same_search(model, inputs, how):
    how |= {"do_sample": False, "max_new_tokens": STEPS}
    loop = model.generate(**inputs, custom_generate=ContrastiveSearch(), **copy.deepcopy(how))
    own = [*how.pop("logits_processor", []), ContrastiveSearchLogitsProcessor(model)]
    assert torch.equal(loop, model.generate(**inputs, logits_processor=own, **how))


@pytest.mark.parametrize("warper", quick(WARPERS, "top_p"))
def test_sampled_tokens_are_the_references(pair, doubles, warper):
    """Penalised and suppressed tokens first, then the rule, then the warper: the draws are those of the reference."""
    rows = zoo.prompts(2, seed=3)
    before = {"repetition_penalty": 1.3, "suppress_tokens": list(range(5, 40)), "min_new_tokens": 4}
    after = {"do_sample": True, "top_k": 0, **WARPERS[warper]}
    expected = _reference(doubles, rows, before, after, seed=7)
    for name in ("processor", "loop"):
        torch.manual_seed(7)
        assert _run(pair, rows, name, **before, **after) == expected, name


@pytest.mark.parametrize("name", ["processor", "loop", "speculative"])
def test_sampling_never_meets_an_empty_row(pair, name):
    """With every plausible token suppressed or penalised, the tokens that are left are contrasted; none is padding."""
    torch.manual_seed(0)
    how = {"suppress_tokens": list(range(45)), "min_new_tokens": STEPS, "repetition_penalty": 5.0}
    rows = [zoo.prompts(3, seed=3)[2]] * 30
    tokens = _run(pair, rows, name, do_sample=True, **how)
    assert {token for row in tokens for token in row} == {45, 46, 47}


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_encoder_decoders_have_the_same_order(fast):
    pair = zoo.build("t5", seed=1), zoo.build("t5", hidden=16, seed=2)
    rows = zoo.prompts(3, seed=5)
    inputs = zoo.pad(rows, side="right")
    method = ContrastiveDecodingLogitsProcessor(pair[1], encoder_inputs=inputs, **RULE)
    how = {"custom_generate": method.loop()} if fast else {"logits_processor": [method]}
    how |= {"forced_bos_token_id": 37, "suppress_tokens": list(range(5, 30)), "min_new_tokens": STEPS}
    found = pair[0].generate(**inputs, do_sample=False, max_new_tokens=STEPS, **how)[:, 1:].tolist()
    doubles = [copy.deepcopy(model).double() for model in pair]
    for row, source in zip(found, rows, strict=True):
        assert row == reference.greedy(_encoder_scorer(doubles, source), torch.tensor([zoo.PAD]), STEPS, -1)


def _encoder_scorer(doubles, source):
    """A forced first token, no end token, no token of 5 to 29; then the contrast."""

    def score(ids):
        main, other = (reference.next_logits(model, ids, source) for model in doubles)
        for token in [zoo.EOS, *range(5, 30)] if len(ids) > 1 else set(range(zoo.VOCAB)) - {37}:
            main[token] = -torch.inf
        return torch.tensor(reference.contrastive_decoding(main, other, **RULE))

    return score


def test_seeded_sampling_acts_after_the_rule(pair):
    rows = zoo.prompts(3, seed=3)
    inputs, seeds = zoo.pad(rows), [1, 2, 3]
    method = ContrastiveDecodingLogitsProcessor(pair[1], **RULE)
    how = {"do_sample": False, "max_new_tokens": STEPS, "repetition_penalty": 1.3}
    drawn = SeededSampling(seeds, temperature=0.8, top_p=0.9)
    fast = pair[0].generate(**inputs, custom_generate=method.loop(), logits_processor=[Odd(), drawn], **how)
    slow = pair[0].generate(**inputs, logits_processor=[Odd(), method, drawn], **how)
    assert torch.equal(fast, slow)


def test_a_processor_of_the_prompts_stays_before_the_rule(pair):
    """`generate()` makes it from the ids of the prompts."""
    lists = []

    def note(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        lists.extend(split_processors(model, logits_processor, generation_config, input_ids))
        return input_ids

    how = {"do_sample": True, "temperature": 0.5, "top_k": 0, "encoder_no_repeat_ngram_size": 2, "max_new_tokens": 1}
    pair[0].generate(torch.tensor([[5, 6]]), logits_processor=[Odd()], custom_generate=note, **how)
    names = [[type(each).__name__ for each in half] for half in lists]
    assert names == [["EncoderNoRepeatNGramLogitsProcessor", "Odd"], ["TemperatureLogitsWarper"]]


def test_a_processor_that_follows_the_contrast_splits_the_callers_list(pair):
    first, second, third = Odd(), Odd(), Odd()
    second.follows_contrast = True
    found = []

    def note(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        found.extend(split_processors(model, logits_processor, generation_config, input_ids))
        return input_ids

    how = {"do_sample": True, "temperature": 0.5, "top_k": 0, "repetition_penalty": 1.3, "max_new_tokens": 1}
    pair[0].generate(torch.tensor([[5, 6]]), logits_processor=[first, second, third], custom_generate=note, **how)
    before, after = found
    assert [type(p).__name__ for p in before] == ["RepetitionPenaltyLogitsProcessor", "Odd"]
    assert before[1] is first
    assert list(after[:2]) == [second, third]
    assert [type(p).__name__ for p in after[2:]] == ["TemperatureLogitsWarper"]


def test_a_method_that_would_act_twice_is_refused(pair):
    method = ContrastiveDecodingLogitsProcessor(pair[1], **RULE)
    with pytest.raises(ValueError, match="the method is passed twice"):
        pair[0].generate(
            torch.tensor([[5, 6]]), custom_generate=method.loop(), logits_processor=[method], max_new_tokens=1
        )


@pytest.mark.parametrize(
    "loop", [SpeculativeContrastiveDecoding, ContrastiveSearch, ContrastiveDecodingLogitsProcessor]
)
@pytest.mark.parametrize(
    "how", [{"prompt_lookup_num_tokens": 3}, {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}]
)
def test_options_of_another_decoding_loop_are_refused(pair, loop, how):
    model, amateur = pair[:2]
    made = loop() if loop is ContrastiveSearch else loop(amateur)
    made = made.loop() if loop is ContrastiveDecodingLogitsProcessor else made
    with pytest.raises(ValueError, match="which custom_generate replaces"):
        model.generate(torch.tensor([[5, 6, 7]]), custom_generate=made, max_new_tokens=2, **how)


@pytest.mark.parametrize(
    "loop", [SpeculativeContrastiveDecoding, ContrastiveSearch, ContrastiveDecodingLogitsProcessor]
)
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("assistant_model", " does not draft with another model: leave assistant_model out, or pass the method as"),
        ("synced_gpus", " does not keep processes in step, so that .*: generate with synced_gpus=False"),
        ("streamer", r" does not receive the streamer of generate\(\): pass it where custom_generate is made, such as"),
    ],
)
def test_arguments_that_generate_does_not_hand_on_are_refused(pair, loop, argument, message):
    model, amateur = pair[:2]
    made = loop() if loop is ContrastiveSearch else loop(amateur)
    made = made.loop() if loop is ContrastiveDecodingLogitsProcessor else made
    value = {"assistant_model": amateur, "synced_gpus": True, "streamer": SimpleNamespace(put=lambda ids: None)}[
        argument
    ]
    how = {"custom_generate": made, "max_new_tokens": 2, "do_sample": False}
    with pytest.raises(ValueError, match=f"^{made.name}{message}") as caught:
        model.generate(torch.tensor([[5, 6, 7]]), **how, **{argument: value})
    assert "\n" not in str(caught.value)
    assert model.generate(torch.tensor([[5, 6, 7]]), **how, **{argument: None}).shape == (1, 5)


def test_arguments_of_another_call_are_not_meant(pair):
    """A loop that is called within a call of `generate()` that has an assistant: that call is not the loop's."""
    model, amateur = pair[:2]
    loop, checked = ContrastiveDecodingLogitsProcessor(amateur, **RULE).loop(), []

    def inner(input_ids, scores):
        check_arguments("the loop", loop)
        checked.append(len(input_ids))
        return scores

    how = {"assistant_model": amateur, "logits_processor": [inner], "max_new_tokens": 2, "do_sample": False}
    assert model.generate(torch.tensor([[5, 6, 7]]), **how).shape == (1, 5)
    assert checked
