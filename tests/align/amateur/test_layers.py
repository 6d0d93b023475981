"""Layers are removed from models of any family, exactly, or the model is rejected; the heuristics choose what they say."""

import copy

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, Cohere2Config, Gemma2Config, Gemma3nTextConfig, Gemma3TextConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from contralto.align.amateur.choice import choose_layers
from contralto.align.amateur.influence import block_influence
from contralto.align.amateur.layers import cut_config, cut_model

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **zoo.WIDE,
}
KINDS = ["sliding_attention", "full_attention"] * 2
DECODERS = [family for family in zoo.FAMILIES if family not in zoo.ENCODER_DECODERS]


def _random(config, seed=1):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def _without(model, layer):
    """The logits of a copy in which a layer's result is replaced by its input."""
    model = copy.deepcopy(model)
    parts = next(p for p in model.modules() if isinstance(p, torch.nn.ModuleList) and len(p) > layer)

    def identity(_module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    parts[layer].register_forward_hook(identity, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    "family", [f if f in ("llama", "gpt2") else pytest.param(f, marks=pytest.mark.slow) for f in DECODERS]
)
@torch.no_grad()
def test_a_cut_model_computes_the_other_layers_alone_also_when_saved(family, tmp_path):
    model = zoo.build(family, seed=2)
    smaller = cut_model(model, range(1, model.config.num_hidden_layers))
    ids = torch.stack(zoo.prompts(1, seed=3))
    expected = _without(model, 0)(ids).logits
    torch.testing.assert_close(smaller(ids).logits, expected, atol=1e-4, rtol=1e-4)
    smaller.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, smaller(ids).logits)
    text = smaller.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    again = torch.cat([ids, *[ids[:, :0]] * 0], dim=1)
    for _ in range(3):  # the cached tokens are those of uncached forwards
        logits = smaller(again, use_cache=False).logits[:, -1]
        logits[:, zoo.EOS] = -torch.inf
        again = torch.cat([again, logits.argmax(-1)[:, None]], dim=1)
    assert torch.equal(text, again)


@torch.no_grad()
def test_a_loaded_bfloat16_model_keeps_the_precision_of_its_rotary_frequencies(tmp_path):
    zoo.build("llama", seed=2).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    smaller = cut_model(model, [1])
    ids = torch.stack(zoo.prompts(1, seed=3))
    assert smaller.dtype == torch.bfloat16
    assert smaller.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(smaller(ids).logits, _without(model, 0)(ids).logits)


@pytest.mark.parametrize("config", [Gemma3TextConfig, Gemma2Config, Cohere2Config], ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_kinds_of_attention_stay_with_their_layers_past_the_window(config):
    model = _random(config(**SHAPE, sliding_window=6, layer_types=KINDS))
    smaller = cut_model(model, [1, 2])
    assert smaller.config.layer_types == ["full_attention", "sliding_attention"]
    ids = torch.arange(20)[None] * 7 % zoo.VOCAB
    expected = _without(_without(model, 0), 3)(ids).logits
    torch.testing.assert_close(smaller(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_cannot_have_these_layers_is_rejected():
    shape = SHAPE | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": zoo.VOCAB, "laurel_rank": 4}
    config = Gemma3nTextConfig(
        **shape, num_kv_shared_layers=2, layer_types=KINDS, activation_sparsity_pattern=[0.0] * 4
    )
    with pytest.raises(ValueError, match="Gemma3nForCausalLM cannot be built with layers 0, 1: "):
        cut_model(_random(config), [0, 1])


def test_layers_that_depend_on_their_number_are_rejected(monkeypatch):
    def numbered(self, config, layer_idx, own=LlamaAttention.__init__):
        own(self, config, layer_idx)
        self.scaling *= 1 + layer_idx

    monkeypatch.setattr(LlamaAttention, "__init__", numbered)
    model = zoo.build("llama")
    with pytest.raises(ValueError, match="a layer depends on its number: keep other layers"):
        cut_model(model, [1])
    assert cut_model(model, [0]).config.num_hidden_layers == 1


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 2], [-1, 0]])
def test_invalid_layers(kept):
    with pytest.raises(ValueError, match="increasing numbers from 0 to 1"):
        cut_model(zoo.build("llama"), kept)


def test_an_encoder_decoder_is_rejected():
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        cut_model(zoo.build("t5"), [0])


def test_lists_by_layer_are_cut_and_others_are_not():
    config = Gemma3TextConfig(**SHAPE, layer_types=KINDS)
    smaller = cut_config(config, [0, 3])
    assert (smaller.num_hidden_layers, smaller.layer_types) == (2, ["sliding_attention", "full_attention"])
    assert config.layer_types == KINDS


@pytest.mark.parametrize(
    ("keep", "count", "expected"),
    [
        ("spread", 10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]),
        ("spread", 1, [0]),
        ("first", 3, [0, 1, 2]),
        ("influence", 3, [1, 4, 7]),
        ("29, 3", None, [3, 29]),
    ],
)
def test_choices(keep, count, expected):
    influences = [0.9 if layer in (1, 4, 7) else layer / 100 for layer in range(30)]
    assert choose_layers(keep, 30, count, influences) == expected


@pytest.mark.parametrize(
    ("keep", "count", "message"),
    [
        ("spread", 30, "from 1 to 29, of the model's 30 layers, not 30"),
        ("spread", None, "not None"),
        ("1,30", None, "layers 0 to 29, and keep names 30"),
        ("1,3", 3, "names 2 layers, and layers is 3"),
        ("last", 3, "must be one of spread, first, influence"),
    ],
)
def test_invalid_choices(keep, count, message):
    with pytest.raises(ValueError, match=message):
        choose_layers(keep, 30, count)


@torch.no_grad()
def test_influence_is_one_minus_the_mean_cosine_over_tokens_without_padding():
    model = zoo.build("llama", seed=5)
    rows = zoo.prompts(2, seed=5)
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    expected = [[], []]
    for row in rows:
        inner = []
        hook = model.model.layers[1].register_forward_hook(lambda _m, _i, output, inner=inner: inner.append(output))
        states = model(row[None], output_hidden_states=True).hidden_states
        hook.remove()
        for layer, (before, after) in enumerate(((states[0], states[1]), (states[1], inner[0]))):
            for x, y in zip(before[0].double(), after[0].double(), strict=True):
                expected[layer].append(1 - float(x @ y / (x.norm() * y.norm())))
    found = block_influence(model, [(ids, mask)])
    assert found == pytest.approx([sum(values) / len(values) for values in expected], abs=1e-5)
