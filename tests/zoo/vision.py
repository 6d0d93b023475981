"""Tiny random image-text-to-text models of every family, and their inputs as tensors: nothing to download, no processor.

A prompt is a `dict` of what the family's processor would return for one conversation, unpadded. `batch` collates several
of them as the processor would: left-padded, images one after the other. `next_logits` is the float64 oracle for one
prompt: the whole row, no padding, no cache.

As in zoo.py, wide initialisation matters. Here also the zero-initialised parts are filled (Gemma3's projector, InternVL's
positions), without which the image would not reach the text.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

PAD, EOS, BOS, IMAGE, START, END, VIDEO, VOCAB = 0, 1, 2, 60, 61, 62, 63, 64
SPECIAL = [PAD, BOS, IMAGE, START, END, VIDEO]
"""Tokens that these models do not write: a placeholder without an image has no meaning."""

Prompt = dict[str, Tensor]

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}


def _llava(config: Callable[..., PretrainedConfig], **more: Any) -> PretrainedConfig:
    return config(
        vision_config=CLIPVisionConfig(image_size=8, **VISION).to_dict(),
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        image_seq_length=4,
        **more,
    )


def _idefics(config: Callable[..., PretrainedConfig]) -> PretrainedConfig:
    vision = {"image_size": 16, **VISION}
    return config(vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE)


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llava": lambda: _llava(LlavaConfig),
    "llava_next": lambda: _llava(LlavaNextConfig, image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]]),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        vision_config={"window_size": 16, "fullatt_block_indexes": [1], **QWEN_VISION},
        text_config={**TEXT, **MROPE},
        **QWEN_TOKENS,
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        vision_config={"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1], **QWEN_VISION},
        text_config={"head_dim": 8, **TEXT, **MROPE},
        **QWEN_TOKENS,
    ),
    "idefics3": lambda: _idefics(Idefics3Config),
    "smolvlm": lambda: _idefics(SmolVLMConfig),
    "internvl": lambda: InternVLConfig(
        vision_config={"image_size": [16, 16], **VISION, "patch_size": [4, 4]},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, **VISION},
        text_config={
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            **TEXT,
        },
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
    ),
}
QUICK = ("llava", "qwen2_5_vl", "gemma3")
"""Plain positions, positions in three dimensions, a sliding window with token types."""
TOKEN_TYPES = {"qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}
"""What marks the placeholders in the families that want them marked."""


def families() -> list[Any]:
    """All families as parameters of a test, slow but for some."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def build(family: str, *, seed: int = 0) -> Any:
    """A random float32 model of a family, ready to generate, that writes no special token but the end token."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(FAMILIES[family]()).eval()
    for weight in model.parameters():
        if weight.ndim > 1:  # norms and biases keep their values
            torch.nn.init.normal_(weight, std=0.4)
    with torch.no_grad():
        model.lm_head.weight[SPECIAL] = 0  # far below the largest logit, so never written
    return model


class Picture(NamedTuple):
    """What a processor makes of the images of one conversation."""

    inputs: Prompt
    tokens: list[int]
    """How many placeholders each image stands for."""


def picture(family: str, index: int, generator: torch.Generator) -> Picture:
    """Random images, which differ in number or size from one index to the next, as far as the family knows of either."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count = 1 + index % 2
    if family == "llava":
        return Picture({"pixel_values": noise(count, 3, 8, 8)}, [4] * count)
    if family == "llava_next":
        size, patches, tokens = [((8, 16), 3, 14), ((16, 8), 3, 16), ((16, 16), 5, 24)][index % 3]
        return Picture({"pixel_values": noise(1, patches, 3, 8, 8), "image_sizes": torch.tensor([size])}, [tokens])
    if family in ("qwen2_5_vl", "qwen3_vl"):
        height, width = [(4, 4), (4, 6), (6, 4)][index % 3]
        pixels = noise(height * width, 3 * 2 * 4 * 4)
        return Picture(
            {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}, [height * width // 4]
        )
    if family in ("idefics3", "smolvlm"):
        seen = torch.ones(1, count, 16, 16, dtype=torch.long)
        seen[..., 12 - 4 * count :] = 0  # the right of the frame is padding
        return Picture({"pixel_values": noise(1, count, 3, 16, 16), "pixel_attention_mask": seen}, [4] * count)
    return Picture({"pixel_values": noise(count, 3, 16, 16)}, [4] * count)  # tiles of InternVL, images of Gemma3


def prompt(family: str, before: Tensor, shown: Picture | None, after: Tensor) -> Prompt:
    """Words, the images' placeholders, words, as the inputs of `generate()` for one row."""
    images = [] if shown is None else [[START, *[IMAGE] * n, END] for n in shown.tokens]
    placeholders = torch.tensor([token for image in images for token in image], dtype=torch.long)
    ids = torch.cat([before, placeholders, after])[None]
    inputs = {"input_ids": ids}
    if family in TOKEN_TYPES:
        inputs[TOKEN_TYPES[family]] = (ids == IMAGE).long()
    return inputs | ({} if shown is None else shown.inputs)


class Case(NamedTuple):
    """One conversation and the contrasts of it, each unpadded and of one row."""

    original: Prompt
    noised: Prompt
    """The same text, other pixels."""
    text_only: Prompt
    """The same words, no image."""
    other_text: Prompt
    """The same image, other words, more or fewer."""


def cases(family: str, batch: int, *, seed: int = 0) -> list[Case]:
    """Conversations of unequal length with their contrasts; the image is not always at the same place."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> Tensor:
        return torch.randint(3, IMAGE, (count,), generator=generator)

    found = []
    for i in range(batch):
        before, after, shown = words(1 + i), words(3 + 2 * i), picture(family, i, generator)
        again = shown._replace(
            inputs=shown.inputs | {"pixel_values": picture(family, i, generator).inputs["pixel_values"]}
        )
        contrasts = (
            prompt(family, before, again, after),
            prompt(family, before, None, after),
            prompt(family, words(4 - i % 4), shown, words(2 + 3 * ((i + 1) % 3))),
        )
        found.append(Case(prompt(family, before, shown, after), *contrasts))
    return found


def batch(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts as one left-padded batch with its attention mask; images one after the other, in the order of the rows."""
    ids = [one["input_ids"][0] for one in prompts]
    text = {"input_ids": _pad_left(ids, PAD), "attention_mask": _pad_left([torch.ones_like(row) for row in ids], 0)}
    for name in dict.fromkeys(name for one in prompts for name in one):
        parts = [one[name] for one in prompts if name in one]
        if name in TOKEN_TYPES.values():
            text[name] = _pad_left([part[0] for part in parts], 0)
        elif name not in text:
            text[name] = _stack(parts)
    return text


def _pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.stack([pad(row, (width - len(row), 0), value=value) for row in rows])


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """One after the other; where rows hold unequally many images or patches, zeros fill up the second dimension."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, 0) * (part.ndim - 2) + (0, width - part.shape[1])) for part in parts])


@torch.no_grad()
def forward(model: Any, inputs: Prompt, new: Tensor, **how: Any) -> Any:
    """A float64 model's outputs for one unpadded prompt followed by `new` tokens, without a cache or a mask."""
    row = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    row["input_ids"] = torch.cat([row["input_ids"], new[None]], dim=1)
    for name in row.keys() & set(TOKEN_TYPES.values()):
        row[name] = pad(row[name], (0, len(new)))
    return model(**row, use_cache=False, **how)


def next_logits(model: Any, inputs: Prompt, new: Tensor) -> list[float]:
    """The logits of the token after that."""
    return list(forward(model, inputs, new).logits[0, -1].double().tolist())
