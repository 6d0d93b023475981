"""Variants that hide image tokens or steer hidden states, against float64 models with the same change and no cache."""

import copy

import pytest
import torch
import zoo
from oracles import decoding as reference
from torch import nn
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from contralto import testbed
from contralto.common.head import find_layers
from contralto.decoding import ContrastiveDecodingLogitsProcessor, HiddenImage, Steered, score
from contralto.decoding.branches.steering import mean_difference

STEPS, RULE, MARKED = 7, {"beta": 0.7, "alpha": 0.02}, 9
FAMILIES = {"llama": modeling_llama, "gpt2": modeling_gpt2}


def _prompts():
    """Prompts with marked tokens at several places, of unequal length."""
    rows = zoo.prompts(3, seed=5)
    for row in rows:
        row[row == MARKED] = 10
        row[1:3] = MARKED
    return rows


def _scaled(family, scale, layers, monkeypatch):
    """A float64 model whose attention weights to marked tokens are multiplied and normalised again."""
    model = zoo.build(family, seed=3).double()
    model.set_attn_implementation("eager")
    places = {}
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: places.update(now=kwargs["input_ids"] == MARKED), with_kwargs=True
    )
    plain = FAMILIES[family].eager_attention_forward

    def eager(module, query, key, value, mask, *args, **kwargs):
        groups = getattr(module, "num_key_value_groups", 1)
        _, weights = plain(module, query, key, value, mask, *args, **kwargs)
        if module.layer_idx in layers:
            weights = torch.where(places["now"][:, None, None], scale * weights, weights)
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), weights

    def scorer(ids):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(FAMILIES[family], "eager_attention_forward", eager)
            return model(input_ids=ids[None], use_cache=False).logits[0, -1].tolist()

    return scorer


def _tokens(model, rows, variant, executor):
    inputs = zoo.pad(rows)
    contrast = ContrastiveDecodingLogitsProcessor(variant, attention_mask=inputs["attention_mask"], **RULE)
    way = {"logits_processor": [contrast]} if executor == "processor" else {"custom_generate": contrast.loop()}
    how = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [MARKED]}
    output = model.generate(**inputs, **way, **how)
    found = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(zoo.EOS) + 1] if zoo.EOS in row else row for row in found]


def _expected(family, rows, amateur):
    expert = zoo.build(family, seed=3).double()

    def scores(ids):
        main = [x if i != MARKED else -torch.inf for i, x in enumerate(reference.next_logits(expert, ids))]
        return torch.tensor(reference.contrastive_decoding(main, amateur(ids), **RULE))

    return [reference.greedy(scores, row, STEPS, zoo.EOS) for row in rows]


@pytest.mark.parametrize(
    ("family", "scale", "layers", "attention"),
    [
        ("llama", 0.0, None, "sdpa"),
        pytest.param("llama", 4.0, [1], "eager", marks=pytest.mark.slow),
        pytest.param("gpt2", 0.0, [0], "sdpa", marks=pytest.mark.slow),
        pytest.param("gpt2", 0.25, None, "sdpa", marks=pytest.mark.slow),
    ],
)
def test_scaled_attention_equals_scaled_weights(family, scale, layers, attention, monkeypatch):
    model, rows = zoo.build(family, seed=3), _prompts()
    model.set_attn_implementation(attention)
    chosen = range(2) if layers is None else layers
    expected = _expected(family, rows, _scaled(family, scale, chosen, monkeypatch))
    made = {"scale": scale, "layers": layers}
    assert _tokens(model, rows, HiddenImage(model, token_id=MARKED, **made), "processor") == expected
    marks = zoo.pad(rows)["input_ids"] == MARKED
    assert _tokens(model, rows, HiddenImage(model, token_id=0, tokens=marks, **made), "loop") == expected
    if scale or family != "llama":
        return
    plain = ContrastiveDecodingLogitsProcessor(copy.deepcopy(model), **RULE)
    inputs = zoo.pad(rows[:1])
    unchanged = model.generate(**inputs, logits_processor=[plain], max_new_tokens=STEPS, do_sample=False)
    assert unchanged[0, inputs["input_ids"].shape[1] :].tolist()[: len(expected[0])] != expected[0]


def test_the_scores_of_a_text_are_those_without_a_cache(monkeypatch):
    model, rows = zoo.build("llama", seed=3), _prompts()
    amateur, expert = _scaled("llama", 0.0, range(2), monkeypatch), zoo.build("llama", seed=3).double()
    contrast = ContrastiveDecodingLogitsProcessor(HiddenImage(model, token_id=MARKED), **RULE)
    prompt, text = rows[2], torch.tensor([4, 11, 6])
    found = score(
        contrast, model, {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])}, text[None]
    )
    total = 0.0
    for t, token in enumerate(text):
        ids = torch.cat([prompt, text[:t]])
        scores = reference.contrastive_decoding(reference.next_logits(expert, ids), amateur(ids), beta=0.7, alpha=0)
        total += reference.log_softmax(scores)[int(token)]
    assert found.total[0].item() == pytest.approx(total, abs=5e-3)


def test_an_image_is_hidden():
    """The logits are the same for every image of one size, if no layer may see it."""
    model = testbed.load("vision-0")
    token = model.config.image_token_id
    size = model.config.vision_config.image_size
    count = (size // model.config.vision_config.patch_size) ** 2
    ids = torch.tensor([[1, *[token] * count, 7, 8, 9]])
    draws = torch.Generator().manual_seed(0)
    pictures = [torch.randn(1, 3, size, size, generator=draws) for _ in range(2)]
    variant, logits = HiddenImage(model), []
    for picture in pictures:
        with torch.no_grad(), variant.context():
            logits.append(model(input_ids=ids, pixel_values=picture).logits[0, -1])
    with torch.no_grad():
        seen = [model(input_ids=ids, pixel_values=picture).logits[0, -1] for picture in pictures]
    assert torch.allclose(*logits, atol=1e-4)
    assert not torch.allclose(*seen, atol=1e-2)


def _steered(model, vectors, scale):
    """A float64 copy whose layers add the vectors."""
    model = copy.deepcopy(model).double()
    for layer, part in enumerate(model.get_submodule(find_layers(model).name)):
        if layer in vectors:
            own = nn.Parameter(scale * vectors[layer].double())
            part.register_forward_hook(
                lambda _m, _a, output, own=own: (
                    (output[0] + own, *output[1:]) if isinstance(output, tuple) else output + own
                )
            )
    return model


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_steered_states_equal_the_reference(family):
    model, rows = zoo.build(family, seed=3), _prompts()
    vectors = {0: torch.linspace(-1, 1, 32), 1: torch.ones(32)}
    double = _steered(model, vectors, -0.6)
    expected = _expected(family, rows, lambda ids: reference.next_logits(double, ids))
    for executor in ("processor", "loop"):
        assert _tokens(model, rows, Steered(model, vectors, scale=-0.6), executor) == expected
    assert model(input_ids=rows[0][None]).logits.equal(zoo.build(family, seed=3)(input_ids=rows[0][None]).logits)


def test_the_mean_difference_is_that_of_last_tokens():
    model = zoo.build("llama", seed=3)
    double, (one, two, three) = copy.deepcopy(model).double(), zoo.prompts(3)

    def state(row):
        with torch.no_grad():
            return double(input_ids=row[None], output_hidden_states=True).hidden_states[1][0, -1]

    found = mean_difference(model, zoo.pad([one, two]), zoo.pad([three]), layers=[0])[0]
    assert torch.allclose(found, (state(one) + state(two)) / 2 - state(three), atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: HiddenImage(m), "names no image token: pass token_id="),
        (lambda m: HiddenImage(m, token_id=9, scale=-1), "scale must be a finite number of at least 0, not -1"),
        (lambda m: HiddenImage(m, token_id=9, layers=[2]), r"layers must be numbers from 0 to 1, not \[2\]"),
        (lambda m: Steered(m, {}), "vectors is empty"),
        (lambda m: Steered(m, {5: torch.ones(32)}), "layers must be numbers from 0 to 1"),
        (lambda m: Steered(m, {0: torch.ones(3)}), "must hold 32 finite numbers"),
        (lambda m: Steered(m, {0: torch.full((32,), torch.nan)}), "must hold 32 finite numbers"),
    ],
)
def test_what_cannot_be_right_is_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make(zoo.build("llama"))


def test_marked_tokens_of_other_prompts_are_rejected():
    model = zoo.build("llama")
    variant = HiddenImage(model, token_id=9, tokens=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="they belong to one batch of prompts"), variant.context():
        model(input_ids=torch.tensor([[4, 5, 6]]))
    own = HiddenImage(model, token_id=9)
    filled = model(input_ids=torch.tensor([[4, 5, 6]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache was filled without this variant"), own.context():
        model(input_ids=torch.tensor([[4]]), past_key_values=filled)
