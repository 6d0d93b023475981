"""Attention of grouped heads under a mask: no key is repeated, and nothing else changes."""

import threading

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config
from transformers.integrations import sdpa_attention

from contralto.decoding.branches.attention import grouped_attention, grouped_modules
from contralto.decoding.executors.search import ContrastiveSearch

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}
SIZES = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}


def _model(name="llama", **options):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    config = CONFIGS[name](**SIZES | heads | options)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_the_attention_of_transformers(name, kind):
    """Two rows with masks of their own, one of them for every head's queries; and no mask at all."""
    model, ids = _model(name), torch.arange(14).view(2, 7) + 3
    seen = torch.ones(7, 7).tril().bool().repeat(2, 1, 1, 1)
    seen[1, :, 2:, 1] = False
    mask = seen if kind == torch.bool else torch.zeros(seen.shape).double().masked_fill(~seen, torch.finfo(kind).min)
    modules = grouped_modules(model)
    assert len(modules) == 2
    for given in (mask, mask[:1], None):
        with grouped_attention(modules):
            grouped = model(ids, attention_mask=given).logits
        assert_close(grouped, model(ids, attention_mask=given).logits, rtol=0, atol=1e-12)
    assert {type(module.config).__name__ for module in modules} == {CONFIGS[name].__name__}


def test_models_without_groups_and_with_eager_attention_are_left_alone():
    assert grouped_modules(_model(num_key_value_heads=6)) == []
    assert grouped_modules(_model(attn_implementation="eager")) == []


def test_contrastive_search_repeats_no_key(monkeypatch):
    """Nor does it in another thread, which keeps the attention that the model had."""
    model, ids, repeated = _model(), torch.arange(9)[None] + 3, []
    repeat = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *args: repeated.append(1) or repeat(*args))
    how = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    search = {path: ContrastiveSearch(k=3, path=path) for path in ("tree", "replicate")}
    texts = {path: model.generate(ids, custom_generate=each, **how) for path, each in search.items()}
    assert torch.equal(*texts.values())
    assert not repeated
    mask = torch.ones(1, 1, 9, 9).bool().tril()
    with grouped_attention(grouped_modules(model)):
        other = threading.Thread(target=lambda: model(ids, attention_mask=mask))
        other.start()
        other.join()
    assert len(repeated) == 4, "keys and values of two layers"
