"""SID, AVISC, PAI and ONLY, whose branches change the model's attention to its image, against float64 models with the same change.

The methods work on left-padded batches with images of unequal number, with caches, in float32. The reference works on each row alone,
unpadded, without a cache, in float64, and chooses tokens and heads by `oracles.attention` in plain Python, one query at a time.
"""

import functools
import math
import sys
import threading

import pytest
import torch
from oracles import attention as oracle
from oracles import decoding as reference
from oracles import rules as reference_rules
from transformers import AutoModelForImageTextToText
from zoo import vision as zoo

from contralto import decoding, testbed
from contralto.common.head import find_layers
from contralto.decoding.branches import AmplifiedImage, InputBranch, LeastAttended, TextEnhanced, ZeroedTokens
from contralto.decoding.branches.attention import changed_attention
from contralto.decoding.branches.enhanced import text_enhanced_weights
from contralto.decoding.branches.looking import least_attended, not_blind, prompt_attention
from contralto.decoding.executors.score import score

SEED, STEPS, ROWS = 6, 6, 3
KEEP, START, ALPHA = 2, 1, 0.7
"""Tokens that SID keeps, of 4 or more; the layer from which SID hides and PAI amplifies, of 2; PAI's strength."""
LIKE_LLAMA = [name for name in zoo.FAMILIES if name != "gemma3"]
WHOLE = [name if name in zoo.QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LIKE_LLAMA]
"""The families whose layers are those of Llama and see the whole row; the others are slow."""


@functools.cache
def model(family):
    return zoo.build(family, seed=SEED)


@functools.cache
def double(family):
    exact = zoo.build(family, seed=SEED).double()
    exact.set_attn_implementation("eager")
    return exact


@functools.cache
def cases(family):
    return zoo.cases(family, ROWS, seed=3)


def inputs(family, view="original", rows=range(ROWS)):
    return zoo.batch([getattr(cases(family)[row], view) for row in rows])


# ------------------------------------------------------------------------------------------------------- the reference


class Reference:
    """A float64 model, of one row, whose eager attention is replaced by `weights(layer, scores, values, module)`."""

    def __init__(self, family, row):
        self.model, self.prompt = double(family), cases(family)[row].original
        self.length = self.prompt["input_ids"].shape[1]
        self.image = (self.prompt["input_ids"][0] == zoo.IMAGE).tolist()
        self.parts = self.model.get_submodule(find_layers(self.model).name)

    def forward(self, new, weights, **how):
        module = sys.modules[type(self.parts[0].self_attn).__module__]
        plain, layers = module.eager_attention_forward, {id(part.self_attn): i for i, part in enumerate(self.parts)}

        def eager(own, query, key, value, attention_mask, scaling, **kwargs):
            if id(own) not in layers:  # the encoder of images
                return plain(own, query, key, value, attention_mask, scaling, **kwargs)
            groups = query.shape[1] // key.shape[1]
            keys, values = (each.repeat_interleave(groups, 1) for each in (key, value))
            scores = query @ keys.transpose(2, 3) * scaling
            seen = attention_mask[0, 0] == 0
            scores = scores.masked_fill(~seen, -math.inf)
            found = weights(layers[id(own)], scores[0], values[0], own)[None]
            return (found @ values).transpose(1, 2).contiguous(), found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "eager_attention_forward", eager)
            return zoo.forward(self.model, self.prompt, torch.tensor(new, dtype=torch.long), **how)

    def marks(self, count):
        """Which of the tokens are image tokens; what is generated is none."""
        return self.image + [False] * (count - self.length)

    def logits(self, new, weights, **how):
        return self.forward(new, weights, **how).logits[0, -1].tolist()


def sid(family, row, new):
    """Every query from the prompt's last one on chooses what it sees in the later layer; earlier ones see what that one chose."""
    own, hidden = Reference(family, row), {}

    def weights(layer, scores, values, module):
        found, count = scores.softmax(-1), scores.shape[-1]
        if layer == START - 1:
            for i in range(own.length - 1, count):
                attention = found.mean(0)[i].tolist()
                hidden[i] = oracle.sid_hidden(attention, own.marks(count), KEEP)
            return found
        scores = scores.clone()
        for i in range(count):
            places = sorted(hidden[max(i, own.length - 1)])
            changed = scores[:, i].clone()
            changed[:, places] = -math.inf
            if (changed > -math.inf).any():
                scores[:, i] = changed
        return scores.softmax(-1)

    return own.logits(new, weights)


def pai(family, row, new):
    own = Reference(family, row)

    def weights(layer, scores, values, module):
        if layer < START:
            return scores.softmax(-1)
        scores = scores.clone()
        for head in scores:
            for i in range(own.length - 1, len(head)):
                head[i] = torch.tensor(oracle.pai_scores(head[i].tolist(), own.marks(len(head)), ALPHA))
        return scores.softmax(-1)

    return own.logits(new, weights)


def avisc(family, row, new):
    """The blind tokens are found at the end of the prompt, once."""
    own, attention = Reference(family, row), {}

    def look(layer, scores, values, module):
        attention[layer] = scores.softmax(-1).mean(0)[-1].tolist()
        return scores.softmax(-1)

    own.forward([], look)
    zeroed = sorted(oracle.avisc_zeroed([attention[i] for i in range(2)], own.image, 0.5, 1.0))

    def blank(_module, args, kwargs):
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        states[:, zeroed] = 0

    handle = own.parts[0].register_forward_pre_hook(blank, with_kwargs=True)
    try:
        return own.logits(new, lambda layer, scores, *_: scores.softmax(-1))
    finally:
        handle.remove()


def only(family, row, new):
    own, kept = Reference(family, row), {}

    def weights(layer, scores, values, module):
        found = scores.softmax(-1)
        if layer == 0:
            image = own.marks(scores.shape[-1])
            text = [not is_image and j > 0 for j, is_image in enumerate(image)]
            rows = torch.tensor(oracle.only_weights(found[:, -1].tolist(), text, image), dtype=torch.float64)
            kept["c"] = module.o_proj((rows[:, None] @ values).flatten())
        return found

    last = own.parts[-1]
    handle = last.register_forward_pre_hook(
        lambda _m, args, kwargs: kept.update(
            x=(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0, -1]
        ),
        with_kwargs=True,
    )
    try:
        output = own.forward(new, weights, output_hidden_states=True)
    finally:
        handle.remove()
    with torch.no_grad():
        states = 0.2 * kept["x"] + last.input_layernorm(kept["c"])
        states = states + last.mlp(last.post_attention_layernorm(states))
        norm = own.model.get_decoder().norm
        final = norm(states) + 0.5 * output.hidden_states[-1][0, -1]
        return own.model.get_output_embeddings()(final).tolist()


def plain(family, row, new, view="original"):
    prompt = getattr(cases(family)[row], view)
    return zoo.next_logits(double(family), prompt, torch.tensor(new, dtype=torch.long))


BRANCH = {"sid": sid, "avisc": avisc, "pai": pai, "only": only}


@functools.cache
def logits(name, family, row, new):
    """The reference's logits of the branch of a method, remembered."""
    return BRANCH[name](family, row, list(new))


def scores(name, family, row, new, **rule):
    main, other = plain(family, row, new), logits(name, family, row, tuple(new))
    if name == "pai":
        return reference_rules.pai(main, other, plain(family, row, new, "text_only"), **rule)
    return (reference_rules.only if name == "only" else reference_rules.vcd)(main, other, **rule)


def expect(name, family, how="greedy"):
    """What the reference writes."""
    found = []
    for row in range(ROWS):
        start = cases(family)[row].original["input_ids"][0]
        score_of = functools.partial(_score, name, family, row)
        search = functools.partial(reference.beam, num_beams=3) if how == "beam" else reference.greedy
        found.append(search(score_of, start, STEPS, zoo.EOS))
    return found


def _score(name, family, row, ids):
    length = cases(family)[row].original["input_ids"].shape[1]
    return torch.tensor(scores(name, family, row, ids[length:].tolist()), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- what is tested

PARAMETERS = {
    "sid": {"start_layer": START, "keep": KEEP},
    "avisc": {},
    "pai": {"start_layer": START, "alpha": ALPHA},
    "only": {},
}
PROCESSORS = {
    "sid": decoding.SIDLogitsProcessor,
    "avisc": decoding.AVISCLogitsProcessor,
    "pai": decoding.PAILogitsProcessor,
    "only": decoding.ONLYLogitsProcessor,
}


def method(name, family):
    views = [inputs(family)] + ([inputs(family, "text_only")] if name == "pai" else [])
    return PROCESSORS[name](model(family), *views, **PARAMETERS[name])


def branch(name, family, rows):
    given = inputs(family, rows=rows)
    length = given["input_ids"].shape[1]
    own = model(family)
    if name == "avisc":
        image = given["input_ids"] == zoo.IMAGE
        return InputBranch(ZeroedTokens(own, not_blind(prompt_attention(own, given), image, gamma=0.5, lam=1.0)), given)
    made = {"sid": LeastAttended, "pai": AmplifiedImage, "only": TextEnhanced}[name]
    return InputBranch(made(own, prompt_length=length, **PARAMETERS[name]), given)


def write(family, processor, *, executor, how):
    given = inputs(family)
    via = {"logits_processor": [processor]} if executor == "processor" else {"custom_generate": processor.loop()}
    search = {"num_beams": 3} if how == "beam" else {}
    output = model(family).generate(**given, **via, **search, do_sample=False, max_new_tokens=STEPS)
    found = output[:, given["input_ids"].shape[1] :].tolist()
    return [row[: row.index(zoo.EOS) + 1] if zoo.EOS in row else row for row in found]


def grid():
    for name in BRANCH:
        for family in zoo.FAMILIES:
            if family == "gemma3" and name in ("sid", "only"):
                continue  # a sliding window, other layers: rejected
            for executor, how in (("processor", "greedy"), ("loop", "greedy"), ("processor", "beam")):
                is_fast = family in ("llava", "qwen2_5_vl") and how == "greedy"
                yield pytest.param(name, family, executor, how, marks=[] if is_fast else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "family", "executor", "how"), list(grid()))
def test_generate(name, family, executor, how):
    assert write(family, method(name, family), executor=executor, how=how) == expect(name, family, how)


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("name", BRANCH)
def test_a_branch_has_the_logits_of_the_whole_row(name, family):
    """Two beams of two prompts: token by token, reordered, several tokens at once, some taken back, another beginning."""
    rows = branch(name, family, range(2))
    main = inputs(family, rows=range(2))["input_ids"].repeat_interleave(2, dim=0)
    a, b, c, d = torch.randint(3, zoo.IMAGE, (4, 4), generator=torch.Generator().manual_seed(1)).split(1, dim=1)
    ab, swapped = torch.cat([a, b], 1), torch.tensor([1, 0, 2, 2])
    texts = [a[:, :0], a, ab, torch.cat([ab[swapped], c], 1), torch.cat([ab[swapped], c, d, a], 1), ab, d]
    for new in texts:
        wanted = [logits(name, family, row // 2, tuple(text)) for row, text in enumerate(new.tolist())]
        found = rows(torch.cat([main, new], dim=1))
        torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=5e-4, rtol=0)
    assert max(abs(x - y) for x, y in zip(wanted[0], plain(family, 0, texts[-1][0].tolist()), strict=True)) > 0.01


@pytest.mark.parametrize(
    "name", ["sid", *[pytest.param(name, marks=pytest.mark.slow) for name in ("avisc", "pai", "only")]]
)
def test_likelihoods_are_those_without_a_cache(name):
    texts = torch.tensor([[5, 9, 30], [7, 8, 9], [40, 41, 0]])
    given = inputs("llava")
    found = score(method(name, "llava"), model("llava"), given, texts, continuation_mask=(texts > 0).long())
    for row, text in enumerate(texts.tolist()):
        steps = [
            reference.log_softmax(scores(name, "llava", row, text[:i], beta=0))[token]
            for i, token in enumerate(text)
            if token
        ]
        assert float(found.total[row]) == pytest.approx(math.fsum(steps), abs=1e-3)


def test_the_whole_prompt_sees_what_its_last_token_has_chosen():
    """With two layers that hide: what earlier tokens of the prompt see in the first of them reaches the last one."""
    config = zoo.FAMILIES["llava"]()
    config.text_config.num_hidden_layers = 3
    torch.manual_seed(0)
    own = AutoModelForImageTextToText.from_config(config).eval()
    for weight in own.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4)
    given = inputs("llava")
    ids = given["input_ids"]
    hidden = least_attended(prompt_attention(own, given, layers=[0])[0], ids == zoo.IMAGE, keep=KEEP)
    least = InputBranch(LeastAttended(own, prompt_length=ids.shape[1], start_layer=1, keep=KEEP), given)
    other = InputBranch(decoding.HiddenImage(own, layers=[1, 2], tokens=hidden), given)
    torch.testing.assert_close(least(ids), other(ids), atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------- the choices


def _attention(count, *shape):
    draws = torch.Generator().manual_seed(count)
    return torch.rand(count, *shape, generator=draws, dtype=torch.float64).softmax(-1)


def test_least_attended_tokens_are_those_of_the_paper():
    attention, image = _attention(5, 12), torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) > 0.3
    hidden = least_attended(attention, image, keep=3)
    for row, marks, found in zip(attention.tolist(), image.tolist(), hidden, strict=True):
        assert set(found.nonzero().flatten().tolist()) == oracle.sid_hidden(row, marks, 3)


@pytest.mark.parametrize(("gamma", "lam"), [(0.5, 1.0), (0.2, 0.0), (1.0, 0.99), (0.9, -0.5)])
def test_blind_tokens_are_those_of_the_paper(gamma, lam):
    attention = _attention(4, 6, 12) * torch.tensor([0.1, 1.0, 0.4, 0.7]).double()[:, None, None]
    image = torch.rand(6, 12, generator=torch.Generator().manual_seed(2)) > 0.3
    found = not_blind(attention, image, gamma=gamma, lam=lam)
    for row in range(6):
        expected = oracle.avisc_zeroed(attention[:, row].tolist(), image[row].tolist(), gamma, lam)
        assert set(found[row].nonzero().flatten().tolist()) == expected


def test_text_enhanced_weights_are_those_of_the_paper():
    weights = _attention(2, 4, 3, 14)
    text = torch.zeros(2, 1, 3, 14, dtype=torch.bool)
    image = text.clone()
    text[..., 1:5], text[..., 11:], image[..., 5:11] = True, True, True
    found = text_enhanced_weights(weights, text, image)
    for row in range(2):
        for query in range(3):
            marks = text[row, 0, query].tolist(), image[row, 0, query].tolist()
            expected = oracle.only_weights(weights[row, :, query].tolist(), *marks)
            torch.testing.assert_close(found[row, :, query], torch.tensor(expected, dtype=torch.float64))
    assert (found.sum(-1) == 0).any()


def test_the_attention_of_a_prompt_is_that_of_the_model_alone():
    """In a padded batch, of the model that runs sdpa, against the eager model without padding."""
    found = prompt_attention(model("llava"), inputs("llava"))
    for row in range(ROWS):
        own, seen = Reference("llava", row), {}

        def look(layer, scores, values, module, seen=seen):
            seen[layer] = scores.softmax(-1).mean(0)[-1]
            return scores.softmax(-1)

        own.forward([], look)
        for layer in range(2):
            width = len(seen[layer])
            torch.testing.assert_close(found[layer, row, -width:].double(), seen[layer], atol=1e-5, rtol=0)
            assert found[layer, row, :-width].sum() == 0
    assert torch.allclose(prompt_attention(model("llava"), inputs("llava"), layers=[1]), found[1:], atol=1e-5)


# ----------------------------------------------------------------------------------------------------- what stays as it is


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_and_other_threads_are_not_changed(implementation):
    own, ids = zoo.build("llava", seed=SEED), torch.tensor([[2, 7, 8, 9]])
    own.set_attn_implementation(implementation)
    parts, found = own.get_submodule(find_layers(own).name), []
    with torch.no_grad():
        before = own(input_ids=ids).logits
        with changed_attention(own, dict.fromkeys(range(2), lambda each: each.weights(each.scores * 0))):
            changed = own(input_ids=ids).logits
            other = threading.Thread(target=lambda: found.append(_logits(own, ids)))
            other.start()
            other.join()
            with changed_attention(own, {0: lambda each: each.weights()}):
                inner = own(input_ids=ids).logits
            assert torch.equal(own(input_ids=ids).logits, changed)
        assert torch.equal(own(input_ids=ids).logits, before)
    assert torch.equal(found[0], before)
    assert not torch.allclose(changed, before, atol=1e-2)
    assert not torch.allclose(inner, changed, atol=1e-2)
    assert {part.self_attn.config._attn_implementation for part in parts} == {implementation}


def _logits(own, ids):
    with torch.no_grad():
        return own(input_ids=ids).logits


# ------------------------------------------------------------------------------------------------------------ rejections


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m, x: decoding.SIDLogitsProcessor(m, x),
            "start_layer must be a number from 1 to 1 in this model of 2 layers",
        ),
        (lambda m, x: decoding.SIDLogitsProcessor(m, x, start_layer=0), "start_layer must be a number from 1 to 1"),
        (
            lambda m, x: decoding.SIDLogitsProcessor(m, x, start_layer=1, keep=0),
            "keep must be a whole number of at least 1",
        ),
        (lambda m, x: decoding.SIDLogitsProcessor(m, x, start_layer=1, alpha=-1), "alpha must be a finite number"),
        (lambda m, x: decoding.AVISCLogitsProcessor(m, x, layer_gamma=0), r"gamma must lie in \(0, 1\], not 0"),
        (
            lambda m, x: decoding.PAILogitsProcessor(m, x, x, start_layer=1, alpha=-1),
            "alpha must be a finite number of at",
        ),
        (
            lambda m, x: decoding.PAILogitsProcessor(m, x, x, start_layer=1, gamma=0.9),
            "gamma must be a finite number of at",
        ),
        (lambda m, x: decoding.PAILogitsProcessor(m, x, x), "start_layer must be a number from 0 to 1"),
        (lambda m, x: decoding.ONLYLogitsProcessor(m, x, layer=2), r"layers must be numbers from 0 to 1, not \[2\]"),
        (lambda m, x: LeastAttended(m, prompt_length=0), "prompt_length must be at least 1, not 0"),
        (lambda m, x: decoding.SIDLogitsProcessor(testbed.load("expert"), x), "names no image token"),
    ],
)
def test_what_cannot_be_right_is_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make(model("llava"), inputs("llava"))


def test_a_prompt_of_too_few_image_tokens_is_rejected():
    least = decoding.SIDLogitsProcessor(model("llava"), inputs("llava"), start_layer=1, keep=4)
    with pytest.raises(ValueError, match="keep=4 image tokens would stay, and a prompt has 4: nothing would be hidden"):
        write("llava", least, executor="processor", how="greedy")
    with pytest.raises(ValueError, match="a prompt has 0 image tokens, and blind tokens are those of several"):
        decoding.AVISCLogitsProcessor(model("llava"), inputs("llava", "text_only"))


def test_layers_of_another_structure_are_rejected():
    with pytest.raises(ValueError, match="the layers of Gemma3ForConditionalGeneration are not those of Llama"):
        decoding.ONLYLogitsProcessor(model("gemma3"), inputs("gemma3"))
    least = decoding.SIDLogitsProcessor(model("gemma3"), inputs("gemma3"), **PARAMETERS["sid"])
    with pytest.raises(ValueError, match="layer 0 has a sliding window that does not reach the image"):
        write("gemma3", least, executor="processor", how="greedy")
    own = zoo.build("llava")
    own.config.get_text_config(decoder=True)._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="the attention of the model is 'flex_attention', and only eager and sdpa"):
        decoding.SIDLogitsProcessor(own, inputs("llava"), start_layer=1)
