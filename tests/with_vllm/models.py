"""The embedded models in a shape that vLLM's CPU kernels take, and LoRA adapters for them."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from contralto import testbed

WIDTH = 64


def widen(name, folder):
    """An embedded model with heads of 64 dimensions instead of 16, which computes the same.

    Rotary pair i of 16 dimensions turns as fast as pair 4i of 64; the other dimensions are zero. Scores are divided by
    sqrt(64) instead of sqrt(16), so queries are doubled.
    """
    old = testbed.load(name)
    config = AutoConfig.from_pretrained(testbed.path(name))
    text = config.get_text_config()
    heads, width = text.num_attention_heads, text.head_dim
    at = torch.arange(width // 2) * (WIDTH // width)
    at = torch.cat([at, at + WIDTH // 2])
    text.head_dim = WIDTH
    kind = AutoModelForCausalLM if text is config else AutoModelForImageTextToText
    new = kind.from_config(config).eval()
    weights = old.state_dict()
    for key, value in weights.items():
        part = "" if "vision" in key else key.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj"):
            wide = torch.zeros(heads, WIDTH, value.shape[1])
            wide[:, at] = value.view(heads, width, -1)
            weights[key] = wide.flatten(0, 1) * ((WIDTH / width) ** 0.5 if part == "q_proj" else 1)
        elif part == "o_proj":
            wide = torch.zeros(value.shape[0], heads, WIDTH)
            wide[:, :, at] = value.view(-1, heads, width)
            weights[key] = wide.flatten(1)
    new.load_state_dict(weights)
    shutil.copytree(testbed.path(name), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    new.save_pretrained(folder)
    return folder


def widen_vision(name, folder):
    """An embedded vision-language model for vLLM, which knows the names that LLaVA's weights had before transformers 5."""
    widen(name, folder)
    file = Path(folder) / "model.safetensors"
    weights = {
        key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
    return folder


def adapted(base, folder, seed):
    """A LoRA adapter with random weights: its folder, and the model with it merged, in float64."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.15)
    tuned.save_pretrained(folder)
    return str(folder), tuned.merge_and_unload().double().eval()
