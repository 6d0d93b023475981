"""Write tiny Llama models as GGUF files, as llama.cpp's own converter does."""

import torch
import zoo
from tokenizers.pre_tokenizers import ByteLevel

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def tiny(hidden=32):
    """Return a random Llama whose vocabulary is that of the file, and whose rows of 32 weights can be quantised."""
    config = zoo.FAMILIES["llama"](hidden)
    config.vocab_size, config.tie_word_embeddings = len(tokens()), False
    torch.manual_seed(0)
    return zoo.AutoModelForCausalLM.from_config(config).eval()


def tokens():
    """Return the tokens of the file: three special ones, the bytes, and a merged pair."""
    return ["<pad>", "<end>", "<begin>", *sorted(ByteLevel.alphabet()), "ab"]


def write(path, model, *, quantised=(), architecture="llama", **values):
    """Write a model.

    Args:
        path: the file.
        model: a Llama.
        quantised: the names of the tensors that are written in 8 bits.
        architecture: the name in the file.
        values: further numbers of the file, by name with `_` for `.`.
    """
    import gguf

    writer, config = gguf.GGUFWriter(path, architecture), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_license("apache-2.0")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens())
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens()) - 3))
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(zoo.PAD)
    writer.add_eos_token_id(zoo.EOS)
    writer.add_bos_token_id(zoo.BOS)
    writer.add_chat_template(TEMPLATE)
    for name, value in values.items():
        writer.add_uint32(name.replace("__", "."), value)
    for name, tensor in tensors(model).items():
        kind = gguf.GGMLQuantizationType.Q8_0
        raw = gguf.quants.quantize(tensor, kind) if name in quantised else tensor
        writer.add_tensor(name, raw, raw_dtype=kind if name in quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model):
    """Return the tensors of a file by their names: rotary positions of queries and keys are interleaved there."""
    state, config = model.state_dict(), model.config
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for i in range(config.num_hidden_layers):
        for name, source in LAYER.items():
            weight = state[f"model.layers.{i}.{source}.weight"]
            if name in heads:
                weight = weight.unflatten(0, (heads[name], 2, -1)).transpose(1, 2).reshape(weight.shape)
            found[f"blk.{i}.{name}.weight"] = weight
    return {name: weight.detach().contiguous().numpy() for name, weight in found.items()}
