"""Tiny random models of every family, built from their configurations: nothing to download, with peaked distributions.

`initializer_range=0.4` matters: with the default 0.02 all logits are near zero, every greedy path is the same, and a
dropped cache, mask or position goes unseen.
"""

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

PAD, EOS, BOS, VOCAB = 0, 1, 2, 48
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS, "vocab_size": VOCAB}
WIDE = {"initializer_range": 0.4} | SPECIAL


def _llama_like(config: Callable[..., PretrainedConfig], **more: Any) -> Callable[[int], PretrainedConfig]:
    def build(hidden: int) -> PretrainedConfig:
        shape = {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden // 4,
            "max_position_embeddings": 128,
        }
        return config(**shape | WIDE | more)

    return build


FAMILIES: dict[str, Callable[[int], PretrainedConfig]] = {
    "llama": _llama_like(LlamaConfig),
    "qwen2": _llama_like(Qwen2Config),
    "qwen3": _llama_like(Qwen3Config),
    "mistral": _llama_like(MistralConfig, sliding_window=5),
    "gemma3": _llama_like(
        Gemma3TextConfig,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
    ),
    "granite": _llama_like(  # in the shape of trained weights, see GROWTH
        GraniteConfig,
        num_hidden_layers=4,
        embedding_multiplier=6.0,
        residual_multiplier=1.0,
        attention_multiplier=0.05,
        logits_scaling=4.0,
        vocab_size=64,
        pad_token_id=None,
    ),
    "gpt2": lambda h: GPT2Config(n_embd=h, n_layer=2, n_head=4, n_positions=128, **WIDE),
    "opt": lambda h: OPTConfig(
        hidden_size=h,
        ffn_dim=2 * h,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=h,
        init_std=0.4,
        **SPECIAL,
    ),
    "bloom": lambda h: BloomConfig(hidden_size=h, n_layer=2, n_head=4, tie_word_embeddings=False, **WIDE),
    "gpt_neox": lambda h: GPTNeoXConfig(
        hidden_size=h,
        intermediate_size=2 * h,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        **WIDE,
    ),
    "mamba": lambda h: MambaConfig(hidden_size=h, num_hidden_layers=2, state_size=8, **WIDE),
    "t5": lambda h: T5Config(
        d_model=h,
        d_ff=2 * h,
        d_kv=h // 4,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
        decoder_start_token_id=PAD,
        **SPECIAL,
    ),
    "bart": lambda h: BartConfig(
        d_model=h,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * h,
        decoder_ffn_dim=2 * h,
        max_position_embeddings=128,
        init_std=0.4,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
        tie_word_embeddings=False,
        **SPECIAL,
    ),
}
ENCODER_DECODERS = {"t5", "bart"}
QUICK = ("llama", "gpt2", "mistral", "mamba", "t5")
"""One of each kind: rotary and absolute positions, a window, a state, an encoder."""
WITHOUT_PAD = {"granite"}
"""Families without a pad token: a processor must be given the mask."""
GROWTH = {"granite": 6.0}
"""How much more each layer of a family in the shape of trained weights writes than the one before it: the norms of its
hidden states grow from tens to tens of thousands, one channel stands out, rows of its vocabulary belong to no token, it has
no pad token, and its logits are scaled. What is right on small even states only is not right there."""
REDRAWN = {"t5": (0.8, 0.2, 0.2), "bart": (0.2, 1.0, 0.4), "bloom": (0.3, 0.4, 0.4)}
"""Standard deviations of matrices, embeddings and head for the families that otherwise repeat one token for ever."""


def families(*, quick: Collection[str] = QUICK, without: Collection[str] = ()) -> list[Any]:
    """All families as parameters of a test, slow but for some."""
    mark = pytest.mark.slow
    return [name if name in quick else pytest.param(name, marks=mark) for name in FAMILIES if name not in without]


def build(family: str, *, hidden: int = 32, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model of a family, ready to generate."""
    torch.manual_seed(seed)
    config = FAMILIES[family](hidden)
    for name, value in overrides.items():
        setattr(config, name, value)
    auto = AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    if family in REDRAWN:
        matrix, embedding, head = REDRAWN[family]
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                std = embedding if "embed" in name or "shared" in name else head if "lm_head" in name else matrix
                torch.nn.init.normal_(weight, std=std)
    if family in GROWTH:
        _grow(model, GROWTH[family])
    with torch.no_grad():  # the pad token's row is zero when freshly drawn, and padding would hardly be seen
        model.get_input_embeddings().weight[PAD].normal_(std=0.4)
    return model


@torch.no_grad()
def _grow(model: Any, growth: float) -> None:
    for i, layer in enumerate(model.model.layers):
        for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
            matrix.weight *= growth**i
            matrix.weight[3] *= 10
    model.model.norm.weight[3] = 0.1
    model.get_output_embeddings().weight *= 10
    model.get_output_embeddings().weight[VOCAB:] = 0
    model.get_input_embeddings().weight[VOCAB:] = 0


FINAL_NORM = {
    "gpt2": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
    "bloom": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "mamba": "backbone.norm_f",
}
"""Where a family that calls it otherwise keeps its final norm."""


@torch.no_grad()
def layer_logits(model: Any, family: str, ids: torch.Tensor, layers: Collection[int]) -> list[list[float]]:
    """The next-token logits of some layers, by what is known of the family: final norm, head, scale."""
    states = model(input_ids=ids[None], use_cache=False, output_hidden_states=True).hidden_states
    norm = model.get_submodule(FINAL_NORM.get(family, "model.norm"))
    scale = getattr(model.config, "logits_scaling", 1.0)
    first = 1 if family == "mamba" else 0  # its states begin after the first layer
    return [(model.get_output_embeddings()(norm(states[n - first][0, -1])) / scale).tolist() for n in layers]


def prompts(batch: int, seed: int = 0) -> list[torch.Tensor]:
    """Prompts of unequal length, none with a special token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (4 + 3 * i,), generator=generator) for i in range(batch)]


def pad(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """The tokenizer's output for a batch: `input_ids` and `attention_mask`."""
    width = max(map(len, rows))
    inputs: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": []}
    for row in rows:
        padding = torch.full((width - len(row),), PAD)
        parts = (padding, row) if side == "left" else (row, padding)
        inputs["input_ids"].append(torch.cat(parts))
        inputs["attention_mask"].append(torch.cat([torch.full_like(part, part is row) for part in parts]))
    return {name: torch.stack(values) for name, values in inputs.items()}
