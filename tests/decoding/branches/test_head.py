"""Early layers reach their logits by the model's own path; models without such a path are rejected."""

import threading

import pytest
import torch
import zoo
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    LlamaConfig,
    OpenAIGPTConfig,
)

from contralto.common.head import find_path, read_layers
from contralto.decoding import DoLaLogitsProcessor, rules
from contralto.decoding.branches import LayerBranch
from contralto.decoding.branches.base import Branch

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
BY_NAME = {
    "cohere": (CohereConfig(**SHAPE, logit_scale=0.03), lambda m, h: m.lm_head(m.model.norm(h)) * 0.03),
    "cohere2": (Cohere2Config(**SHAPE, logit_scale=3.0), lambda m, h: m.lm_head(m.model.norm(h)) * 3),
    "gemma2": (
        Gemma2Config(**SHAPE, final_logit_softcapping=2.0),
        lambda m, h: 2 * torch.tanh(m.lm_head(m.model.norm(h)) / 2),
    ),
    "openai-gpt": (
        OpenAIGPTConfig(n_embd=32, n_layer=4, n_head=4, n_positions=64, **zoo.WIDE),
        lambda m, h: m.lm_head(h),
    ),
}
"""Families that do something else between hidden states and logits, and what it is."""
IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 3, 30, 4, 12]])


def _model(config, seed=1):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", BY_NAME)
@torch.no_grad()
def test_what_comes_after_the_final_norm_is_applied_to_earlier_layers(family):
    config, logits = BY_NAME[family]
    model = _model(config)
    states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    expected = torch.stack([logits(model, states[layer][:, -1]) for layer in (1, 3)], dim=1)
    branch = LayerBranch(model, [1, 3])
    torch.testing.assert_close(branch(IDS), expected)
    reader = branch.joint_reader(model)
    final, early = branch.split_joint(reader.prefill(branch.prompts(IDS)))
    torch.testing.assert_close(early[:, -1], expected)
    torch.testing.assert_close(final[:, -1], model(IDS).logits[:, -1])
    torch.testing.assert_close(LayerBranch(model, [1, 3]).score(IDS, 2)[:, -1], _before(model, logits, (1, 3)))


def _before(model, logits, layers):
    """What layers say before the last token."""
    states = model(IDS[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([logits(model, states[layer][:, -1]) for layer in layers], dim=1)


@torch.no_grad()
def test_without_the_final_norm():
    model = zoo.build("llama", seed=1, num_hidden_layers=3)
    states = model(IDS, output_hidden_states=True).hidden_states
    expected = model.lm_head(torch.stack([states[1][:, -1], states[2][:, -1]], dim=1))
    torch.testing.assert_close(LayerBranch(model, [1, 2], final_norm=False)(IDS), expected)


@torch.no_grad()
def test_layers_are_counted_alike_where_states_begin_after_the_first():
    model = zoo.build("mamba", seed=1, num_hidden_layers=3)
    assert find_path(model).first == 1
    read = []
    hook = model.backbone.layers[0].register_forward_hook(lambda module, given, output: read.append(output))
    model(IDS)
    hook.remove()
    expected = model.lm_head(model.backbone.norm_f(read[0][:, -1]))
    torch.testing.assert_close(LayerBranch(model, [1])(IDS)[:, 0], expected)
    with pytest.raises(ValueError, match="layers must be some of 1 to 2 of this model's 3 layers"):
        LayerBranch(model, [0])


def test_states_that_do_not_reach_the_head_are_refused():
    """Gemma 3n has four streams of states, and mixes them before its norm."""
    config = Gemma3nTextConfig(
        **SHAPE,
        vocab_size_per_layer_input=zoo.VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=None,
    )
    with pytest.raises(ValueError, match="the layers of Gemma3nForCausalLM have no logits that could be contrasted"):
        DoLaLogitsProcessor(_model(config))


class Doubled(nn.Module):
    """A head that reads the row's place in the batch: not a map of hidden states."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        place = torch.arange(1, len(hidden) + 1, dtype=hidden.dtype)
        return self.head(hidden) * place[:, None, None]


def test_a_head_that_does_not_give_the_models_logits_is_refused():
    model = zoo.build("llama", seed=1)
    model.lm_head = Doubled(model.lm_head)
    with pytest.raises(ValueError, match="its last layer gives other logits than the model"):
        find_path(model)


def test_layers_that_do_nothing_are_no_final_norm():
    """A last layer as LLaMA Pro adds it writes nothing, so what it reads and what it returns are the same."""
    model = zoo.build("llama", seed=1, num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    assert find_path(model).final == ("model.norm",)


def test_other_threads_are_not_affected():
    model = zoo.build("llama", seed=1)
    found = []
    with torch.no_grad(), read_layers(model, [0, 1], keep=1):
        other = threading.Thread(target=lambda: found.append(model(IDS, output_hidden_states=True).logits.shape[0]))
        other.start()
        other.join()
        assert model(IDS, output_hidden_states=True, logits_to_keep=1).logits.shape[0] == 6
    assert found == [2]
    assert model(IDS, output_hidden_states=True).logits.shape[0] == 2


class LayersOnly(Branch):
    """A branch that keeps its layers and reads nothing."""

    def __init__(self, layers):
        self.layers = layers

    __call__ = score = reset = None


@pytest.mark.parametrize(
    ("depth", "low", "high"),
    [(2, [1], [1]), (3, [1], [1]), (4, [2], [2]), (5, [2], [2, 4]), (12, [2, 4], [6, 8, 10]), (42, None, None)],
)
@pytest.mark.parametrize("tied", [True, False])
def test_layers_by_name(monkeypatch, depth, low, high, tied):
    """As in transformers 4.49, but never the embeddings."""
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SHAPE | {"num_hidden_layers": depth, "hidden_size": 8}, tie_word_embeddings=tied)
    )
    monkeypatch.setattr(
        "contralto.decoding.processors.layers.LayerBranch",
        lambda model, layers, **how: LayersOnly(layers),
    )
    low, high = low or list(range(2, 20, 2)), high or list(range(22, 42, 2))
    assert DoLaLogitsProcessor(model, layers="low").branches[0].layers == low
    assert DoLaLogitsProcessor(model, layers="high").branches[0].layers == high


def test_a_model_of_one_layer_has_no_earlier_one():
    model = zoo.build("llama", num_hidden_layers=1)
    with pytest.raises(
        ValueError, match="layers='low' needs a layer before the last, but LlamaForCausalLM has only one"
    ):
        DoLaLogitsProcessor(model, layers="low")
    DoLaLogitsProcessor(model, layers=[0])


@torch.no_grad()
def test_float32_chooses_the_layers_of_float64():
    """States of large norms: with the final norm the choice is no matter of rounding, without it it is."""
    model, double = zoo.build("granite", seed=1), zoo.build("granite", seed=1).double()
    ids = torch.randint(3, zoo.VOCAB, (8, 40), generator=torch.Generator().manual_seed(0))
    states = double(ids, output_hidden_states=True).hidden_states
    assert states[-2].norm(dim=-1).mean() > 100 * states[0].norm(dim=-1).mean()
    for form in (rules.dola, rules.dola_jsd):
        scores = {norm: [_scores(m, ids, form, norm) for m in (model, double)] for norm in (True, False)}
        same = {norm: _alike(*found) for norm, found in scores.items()}
        assert same[True] == 1.0
        assert same[False] < 0.9


def _scores(model, ids, form, norm):
    branch = LayerBranch(model, [1, 2, 3], final_norm=norm)
    layers = branch.score(ids, ids.shape[1] - 1, torch.ones_like(ids))
    return form(model(ids).logits[:, :-1], layers).float()


def _alike(one, other):
    """The share of positions whose scores tell of the same layer."""
    differ = torch.where(other > -torch.inf, one - other, 0.0).abs().amax(-1)
    return (differ < 1e-2).float().mean().item()
