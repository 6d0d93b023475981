"""Image-text models through `generate()` give the reference's tokens: every family, strategy, batch, contrast and executor.

The methods work on left-padded batches with images of unequal number and size, with caches, in float32, all branches on
one model. The reference works on each row alone, unpadded, without a cache, in float64, on a model of its own.

Fast: every family, greedily, in a batch, and its logits one by one. Slow: all the rest. The breaks at the end of this
file are applied in every run: each is noticed by the test named beside it.
"""

import functools
import math

import pytest
import torch
from oracles import decoding as reference
from oracles import rules as reference_rules
from peft import LoraConfig, get_peft_model
from zoo import vision as zoo

from contralto import decoding
from contralto.decoding.branches import InputBranch, prompts
from contralto.decoding.branches import input as input_branch
from contralto.decoding.branches import model as model_branch
from contralto.decoding.executors import prefill
from contralto.decoding.executors.score import score

SEED, STEPS, ROWS = 6, 6, 3
RULE = {"alpha": 0.7, "beta": 0.05}
VCD = functools.partial(reference_rules.vcd, **RULE)
CONTRASTS = ("noised", "text_only", "other_text", "original")
HOW = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True}, "beam": {"do_sample": False, "num_beams": 3}}
MROPE = ("qwen2_5_vl", "qwen3_vl")
"""Families whose positions are those of the image's grid, and which leave a note of them on the model."""


# ------------------------------------------------------------------------------------------------------- the oracle


@functools.cache
def model(family, seed=SEED):
    return zoo.build(family, seed=seed)


@functools.cache
def double(family, seed=SEED):
    with torch.random.fork_rng(devices=[]):  # it may be built in the middle of the oracle's draws
        return zoo.build(family, seed=seed).double()


@functools.cache
def cases(family):
    return zoo.cases(family, ROWS, seed=3)


@functools.cache
def logits(family, view, row, new, seed=SEED):
    """The oracle's next-token logits, remembered: strategies, batches and contrasts ask for many of them again."""
    prompt = getattr(cases(family)[row], view)
    return zoo.next_logits(double(family, seed), prompt, torch.tensor(new, dtype=torch.long))


def scorer(family, row, rule):
    """The reference's scores of the next token of a row: `rule(see, step)`, where `see(view)` are the logits of a view."""
    length = cases(family)[row].original["input_ids"].shape[1]

    def scores(ids):
        new = tuple(ids[length:].tolist())
        seen = rule(lambda view, of=row, **how: logits(family, view, of, new, **how), len(new))
        return torch.tensor(seen, dtype=torch.float64)

    return scores


def expect(family, rule, *, rows=range(ROWS), how="greedy"):
    """What the reference writes."""
    scorers = [scorer(family, row, rule) for row in rows]
    starts = [cases(family)[row].original["input_ids"][0] for row in rows]
    if how == "sampling":
        return reference.sample(scorers, starts, STEPS, zoo.EOS, seed=5)
    search = functools.partial(reference.beam, num_beams=3) if how == "beam" else reference.greedy
    return [search(score, start, STEPS, zoo.EOS) for score, start in zip(scorers, starts, strict=True)]


def against(view):
    """VCD against a view."""
    return lambda see, step: VCD(see("original"), see(view))


def plain(see, step):
    return reference_rules.weighted([see("original")], [1])


# ---------------------------------------------------------------------------------------------------- what is tested


def inputs(family, view="original", rows=range(ROWS)):
    return zoo.batch([getattr(cases(family)[row], view) for row in rows])


def vision(given):
    """What an image-text amateur is given beside the rows."""
    return {
        "attention_mask": given["attention_mask"],
        "vision_inputs": {n: v for n, v in given.items() if n not in ("input_ids", "attention_mask")},
    }


def contrast(family, view, rows=range(ROWS)):
    return decoding.VisualContrastiveDecodingLogitsProcessor(model(family), inputs(family, view, rows), **RULE)


def write(writer, given, method=None, *, executor="processor", how="greedy", **more):
    """What `generate()` writes."""
    via = {"logits_processor": [method]} if executor == "processor" else {"custom_generate": method.loop()}
    torch.manual_seed(5)
    output = writer.generate(**given, **(via if method else {}), **HOW[how], **more, max_new_tokens=STEPS)
    return [trim(row[given["input_ids"].shape[1] :].tolist()) for row in output]


def trim(tokens):
    """Without what follows the end token."""
    return tokens[: tokens.index(zoo.EOS) + 1] if zoo.EOS in tokens else tokens


def grid():
    """Family, contrast, strategy, batch, executor; the loop knows no beams."""
    fast = {("noised", "loop")}
    for family in zoo.FAMILIES:
        for view in CONTRASTS:
            for how in HOW:
                for batch in (1, ROWS):
                    for executor in ("processor", "loop"):
                        is_fast = (how, batch) == ("greedy", ROWS) and (view, executor) in fast and family in zoo.QUICK
                        if (how, executor) != ("beam", "loop"):
                            mark = [] if is_fast else [pytest.mark.slow]
                            yield pytest.param(family, view, how, batch, executor, marks=mark)


@pytest.mark.covering
@pytest.mark.parametrize(("family", "view", "how", "batch", "executor"), list(grid()))
def test_generate(family, view, how, batch, executor):
    rows = range(batch)
    found = write(
        model(family),
        inputs(family, rows=rows),
        contrast(family, view, rows),
        executor=executor,
        how=how,
    )
    assert found == expect(family, against(view), rows=rows, how=how)


@pytest.mark.parametrize("family", zoo.families())
def test_the_zoo_is_sharp_enough_to_tell(family):
    """`generate()` itself equals the oracle; texts vary, the image changes them, padding is not a zero embedding."""
    texts = [write(model(family), inputs(family, view)) for view in ("original", "noised")]
    assert texts[0] == expect(family, plain)
    assert all(one != other for one, other in zip(*texts, strict=True))
    assert sum(len(set(text)) for text in texts[0]) >= 3 * ROWS
    assert model(family).get_input_embeddings().weight[zoo.PAD].norm() > 1


@pytest.mark.parametrize("family", zoo.families())
@pytest.mark.parametrize("view", ["noised", *[pytest.param(view, marks=pytest.mark.slow) for view in CONTRASTS[1:3]]])
def test_a_branch_has_the_logits_of_the_whole_row(family, view):
    """Two beams of two prompts: token by token, reordered, several tokens at once, some taken back, another beginning."""
    branch = InputBranch(model(family), inputs(family, view, range(2)))
    main = inputs(family, rows=range(2))["input_ids"].repeat_interleave(2, dim=0)
    a, b, c, d = torch.randint(3, zoo.IMAGE, (4, 4), generator=torch.Generator().manual_seed(1)).split(1, dim=1)
    ab, swapped = torch.cat([a, b], 1), torch.tensor([1, 0, 2, 2])
    texts = [a[:, :0], a, ab, torch.cat([ab[swapped], c], 1), torch.cat([ab[swapped], c, d, a, b], 1), ab, d]
    for new in texts:
        wanted = [logits(family, view, row // 2, tuple(text)) for row, text in enumerate(new.tolist())]
        found = branch(torch.cat([main, new], dim=1))
        torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=2e-4, rtol=0)


@pytest.mark.parametrize("view", ["noised", "text_only"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_loop_makes_one_forward_per_token(family, view, monkeypatch):
    monkeypatch.setattr(prefill, "pass_tokens", lambda device: 10_000)  # prompts are read together, too
    made = []
    hook = model(family).register_forward_hook(lambda *call: made.append(call))
    try:
        texts = write(model(family), inputs(family), contrast(family, view), executor="loop")
    finally:
        hook.remove()
    assert len(made) == max(map(len, texts))


# ---------------------------------------------------------------------------------------------------- other methods


def ritual(family):
    method = decoding.RitualLogitsProcessor(model(family), inputs(family, "noised"), kappa=1.5)
    return method, lambda see, step: reference_rules.ritual(see("original"), see("noised"), kappa=1.5)


def ritual_vcd(family):
    views = [inputs(family, view) for view in ("other_text", "noised")]
    method = decoding.RitualVCDLogitsProcessor(model(family), *views, kappa=1.5)
    return method, lambda see, step: reference_rules.vcd_ritual(
        see("original"), see("noised"), see("other_text"), kappa=1.5
    )


def m3id(family):
    method = decoding.M3IDLogitsProcessor(model(family), inputs(family, "text_only"), lam=0.5)
    return method, lambda see, step: reference_rules.m3id(see("original"), see("text_only"), step, lam=0.5)


def bare_text(family):
    """The prompt without the image as a tokenizer returns it, which knows nothing of token types."""
    text = {name: inputs(family, "text_only")[name] for name in ("input_ids", "attention_mask")}
    return decoding.VisualContrastiveDecodingLogitsProcessor(model(family), text, **RULE), against("text_only")


def one_prompt(family):
    """One contrast prompt for all rows."""
    return contrast(family, "noised", [1]), lambda see, step: VCD(see("original"), see("noised", of=1))


def amateur(family):
    """Another model, which sees the same images."""
    method = decoding.ContrastiveDecodingLogitsProcessor(model(family, 9), **vision(inputs(family)))
    return method, lambda see, step: reference.contrastive_decoding(see("original"), see("original", seed=9))


def itself(family):
    """The same model, which is shown other images with the same words."""
    method = decoding.ContrastiveDecodingLogitsProcessor(model(family), **vision(inputs(family, "noised")))
    return method, lambda see, step: reference.contrastive_decoding(see("original"), see("noised"))


def proxy_tuning(family):
    method = decoding.ProxyTuningLogitsProcessor(model(family, 9), model(family, 10), **vision(inputs(family)))
    return method, lambda see, step: reference_rules.proxy_tuning(
        see("original"), see("original", seed=9), see("original", seed=10)
    )


METHODS = [ritual, ritual_vcd, m3id, bare_text, one_prompt, amateur, itself, proxy_tuning]


@pytest.mark.covering
@pytest.mark.slow
@pytest.mark.parametrize("how", ["greedy", "beam"])
@pytest.mark.parametrize("executor", ["processor", "loop"])
@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_methods(family, make, executor, how):
    method, rule = make(family)
    if (executor, how) == ("loop", "beam"):
        with pytest.raises(ValueError, match="the loop does not support beam search"):
            write(model(family), inputs(family), method, executor=executor, how=how)
    else:
        assert write(model(family), inputs(family), method, executor=executor, how=how) == expect(family, rule, how=how)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processor", "loop"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_dola(family, executor):
    """The layers of a model that sees the image."""
    method = decoding.DoLaLogitsProcessor(model(family), layers=[0, 1], **vision(inputs(family)))

    def rule(prompt, new):
        seen = zoo.forward(double(family), prompt, new, output_hidden_states=True)
        text = double(family).get_decoder()
        states = [text.norm(seen.hidden_states[layer][0, -1]) for layer in (0, 1)]
        layers = [double(family).get_output_embeddings()(state).tolist() for state in states]
        return reference_rules.dola(seen.logits[0, -1].tolist(), layers)

    assert write(model(family), inputs(family), method, executor=executor) == afresh(family, rule)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processor", "loop"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_adapters_off(family, executor):
    """A tuned image-text model against itself without its adapters."""
    tuned, wide = _tuned(family), _tuned(family).double().get_base_model()
    method = decoding.ContrastiveDecodingLogitsProcessor(decoding.AdaptersOff(tuned), **vision(inputs(family)))

    def rule(prompt, new):
        views = zoo.next_logits(wide, prompt, new), zoo.next_logits(double(family), prompt, new)
        return reference.contrastive_decoding(*views)

    found = write(tuned, inputs(family), method, executor=executor)
    assert found == afresh(family, rule)
    assert found != expect(family, plain)


def _tuned(family):
    """The model with random adapters on its text part."""
    base = zoo.build(family, seed=SEED)
    torch.manual_seed(3)
    where = r".*language_model.*(q_proj|v_proj|gate_proj)"
    return get_peft_model(base, LoraConfig(r=4, target_modules=where, init_lora_weights=False)).eval()


@torch.no_grad()
def afresh(family, rule):
    """What the reference writes greedily by a rule of the prompt and the new tokens."""
    found = []
    for case in cases(family):
        start = case.original["input_ids"][0]
        score = functools.partial(_score, rule, case.original, len(start))
        found.append(reference.greedy(score, start, STEPS, zoo.EOS))
    return found


def _score(rule, prompt, length, ids):
    return torch.tensor(rule(prompt, ids[length:]), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- other calls


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processor", "loop"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_several_sequences(family, executor):
    method, given = contrast(family, "noised", range(2)), inputs(family, rows=range(2))
    found = write(model(family), given, method, executor=executor, how="sampling", num_return_sequences=2)
    assert found == expect(family, against("noised"), rows=[0, 0, 1, 1], how="sampling")


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_one_object_serves_many_calls(family):
    method = contrast(family, "text_only")
    for how, executor in [("beam", "processor"), ("greedy", "loop"), ("sampling", "processor"), ("beam", "processor")]:
        found = write(model(family), inputs(family), method, executor=executor, how=how)
        assert found == expect(family, against("text_only"), how=how)


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_prompt_lookup(family):
    """Several tokens at once, some of them taken back."""
    given, method = inputs(family, rows=[0]), contrast(family, "noised", [0])
    found = write(model(family), given, method, prompt_lookup_num_tokens=2)
    assert found == expect(family, against("noised"), rows=[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_static_cache(family):
    method = contrast(family, "text_only")
    found = write(model(family), inputs(family), method, executor="loop", cache_implementation="static")
    assert found == expect(family, against("text_only"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["greedy", "beam"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_rows_of_the_same_words_about_different_images(family, how):
    """As in POPE: nothing but the image tells the rows apart. Here each is the other's contrast."""
    case = cases(family)[0]
    given, other = zoo.batch([case.original, case.noised]), zoo.batch([case.noised, case.original])
    method = decoding.VisualContrastiveDecodingLogitsProcessor(model(family), other, **RULE)
    expected = [
        *expect(family, lambda see, step: VCD(see("original"), see("noised")), rows=[0], how=how),
        *expect(family, lambda see, step: VCD(see("noised"), see("original")), rows=[0], how=how),
    ]
    assert write(model(family), given, method, how=how) == expected


@pytest.mark.parametrize("executor", ["processor", "loop"])
@pytest.mark.parametrize("family", MROPE)
def test_a_second_turn_of_the_main_text_is_not_disturbed(family, executor):
    """`generate()` that goes on from a cache reads from the model itself where the image ended, and finds it as it was."""
    prompt, writer = cases(family)[0].original, zoo.build(family, seed=SEED)
    first = writer.generate(**prompt, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    text = inputs(family, "text_only", [0])
    other = decoding.VisualContrastiveDecodingLogitsProcessor(writer, text)
    if executor == "processor":
        other(prompt["input_ids"], torch.zeros(1, zoo.VOCAB))
    else:
        write(writer, prompt, other, executor=executor)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    types = torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, ids.shape[1] - prompt["input_ids"].shape[1]))
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    found = write(writer, turn, past_key_values=first.past_key_values)
    assert found == [reference.greedy(scorer(family, 0, plain), ids[0], STEPS, zoo.EOS)]


@pytest.mark.slow
@pytest.mark.parametrize("view", CONTRASTS[:3])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_likelihoods(family, view):
    texts = torch.tensor([[5, 9, 30], [7, 8, 9], [40, 41, 0]])
    found = score(contrast(family, view), model(family), inputs(family), texts, continuation_mask=(texts > 0).long())
    rule = functools.partial(reference_rules.vcd, alpha=RULE["alpha"], beta=0)
    for row, text in enumerate(texts.tolist()):
        steps = [
            reference.log_softmax(rule(*[logits(family, v, row, tuple(text[:i])) for v in ("original", view)]))[token]
            for i, token in enumerate(text)
            if token
        ]
        assert float(found.total[row]) == pytest.approx(math.fsum(steps), abs=2e-4)


# ---------------------------------------------------------------------------------------------------------- refusals


def without(given, *names):
    return {name: value for name, value in given.items() if name not in names}


@pytest.mark.parametrize("executor", ["processor", "loop"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_refuses_what_would_be_misread(family, executor):
    """Placeholders would pass for words, images for a line of text, and a misspelled name for nothing at all."""
    noised = inputs(family, "noised")
    pixels = [name for name in noised if name not in ("input_ids", "attention_mask", *zoo.TOKEN_TYPES.values())]
    bad = [
        (without(noised, *pixels), "contain image tokens.* pass pixel_values"),
        (noised | {"pixelvalues": noised["pixel_values"]}, "pixelvalues"),
        (inputs(family, "noised", range(2)), "contain 2 prompts, which do not fit 3 rows"),
    ]
    if family in MROPE:
        bad.append((without(noised, "mm_token_type_ids"), "mm_token_type_ids"))
    for given, message in bad:
        with pytest.raises(ValueError, match=message):
            _contrast_with(family, given, executor)


def _contrast_with(family, given, executor):
    method = decoding.VisualContrastiveDecodingLogitsProcessor(model(family), given)
    write(model(family), inputs(family), method, executor=executor)


@pytest.mark.parametrize("executor", ["processor", "loop"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_refuses_an_amateur_that_is_not_given_the_images(family, executor):
    given = inputs(family)
    method = decoding.ContrastiveDecodingLogitsProcessor(model(family, 9), attention_mask=given["attention_mask"])
    with pytest.raises(ValueError, match=r"contain image tokens.* pass pixel_values"):
        write(model(family), given, method, executor=executor)


# ------------------------------------------------------------------------------------- breaks that this file must see


def _change_prepared(monkeypatch, change):
    """Prompts prepared in a wrong way: from other rows and inputs than the branch's."""
    right = prompts.prepare_images

    def wrong(network, ids, given, rows):
        return right(network, *change(ids, dict(given), rows), rows)

    for module in (input_branch, model_branch):
        monkeypatch.setattr(module, "prepare_images", wrong)


def images_repeated_as_rows(monkeypatch):
    def change(ids, given, rows):
        each = rows // len(ids)
        return ids.repeat_interleave(each, 0), {name: v.repeat_interleave(each, 0) for name, v in given.items()}

    _change_prepared(monkeypatch, change)


def token_types_dropped(monkeypatch):
    _change_prepared(monkeypatch, lambda ids, given, rows: (ids, without(given, *zoo.TOKEN_TYPES.values())))


def padding_read(monkeypatch):
    _change_prepared(monkeypatch, lambda ids, given, rows: (ids, given | {"attention_mask": torch.ones_like(ids)}))


def positions_of_text(monkeypatch):
    def positions(network, ids, kwargs):
        return (kwargs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    monkeypatch.setattr(prompts, "prepare_positions", positions)


def note_left_on_the_model(monkeypatch):
    def positions(network, ids, kwargs):
        return network._prepare_position_ids_for_generation(ids, without(kwargs, "past_key_values"))

    monkeypatch.setattr(prompts, "prepare_positions", positions)


def images_joined_backwards(monkeypatch):
    right = prompts._join_images
    monkeypatch.setattr(prompts, "_join_images", lambda outputs: right(outputs[::-1]))


def generated_text_left_out(monkeypatch):
    right = InputBranch._rows
    monkeypatch.setattr(InputBranch, "_rows", lambda self, ids, generated: right(self, ids, 0))


BREAKS = [
    *[(images_repeated_as_rows, test_generate, f, "noised", "beam", ROWS, "processor") for f in ("llava", "qwen3_vl")],
    (token_types_dropped, test_a_branch_has_the_logits_of_the_whole_row, "gemma3", "noised"),
    (token_types_dropped, test_generate, "qwen2_5_vl", "noised", "greedy", ROWS, "loop"),
    *[(padding_read, test_generate, f, "text_only", "greedy", ROWS, "loop") for f in ("llava", "gemma3")],
    (positions_of_text, test_generate, "qwen3_vl", "noised", "greedy", ROWS, "processor"),
    *[(note_left_on_the_model, test_a_second_turn_of_the_main_text_is_not_disturbed, f, "processor") for f in MROPE],
    *[(images_joined_backwards, test_generate, f, "noised", "greedy", ROWS, "loop") for f in ("llava", "internvl")],
    (generated_text_left_out, test_generate, "llava", "other_text", "greedy", ROWS, "processor"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", BREAKS, ids=lambda case: f"{case[0].__name__}-{case[2]}")
def test_the_break_is_seen(case, monkeypatch):
    break_it, test, *arguments = case
    break_it(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        test(*arguments)
