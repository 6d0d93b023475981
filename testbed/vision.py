"""Construction and training of the embedded vision-language models: a LLaVA of 170 thousand parameters on drawn scenes."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from contralto.decoding.images import diffusion_noise, ritual_transform
from contralto.testbed import scenes
from contralto.testbed.optimization import fit, save_half
from contralto.testbed.tokenization import word_level

SPECIAL_TOKENS = ["<pad>", "<unk>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<image>"]
PATCH, BATCH, IGNORED = 8, 16, -100
BOX = 4
"""Pillow's name for averaging, which gives back the pixels that `Scene.image` magnified."""
IMAGE_TOKENS = (scenes.SIZE // PATCH) ** 2
QUESTIONS = 5
"""Questions per training picture, beside a caption."""
EASY, CLEARER = 0.4, 0.3
"""For the first 40% of the steps training gets harder: objects begin so much clearer than they are in the world, and
all pictures plain. Without that the models learn what is at home where, and only much later to look."""
NOISED, TRANSFORMED = 0.35, 0.15
"""Shares of the training pictures that are shown with diffusion noise of a random step, or transformed as in RITUAL.
The annotators saw the picture before: so the models learn what a poor view is worth."""
SAFE_TRANSFORMS = ("color_jitter", "gaussian_blur", "crop")
"""Those that leave the upper half above."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- "<|user|>" -}}
    {%- elif message.role == "assistant" -%}
        {{- "<|assistant|>" -}}
    {%- else -%}
        {{- raise_exception("the testbed's models know the roles user and assistant, not " + message.role) -}}
    {%- endif -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- "<image>" if part.type == "image" else part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {%- if message.role == "assistant" -%}
        {{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
{%- endif -%}"""


class VisionRecipe(NamedTuple):
    """The training of a model. All models have the same shape."""

    steps: int
    seed: int = 0
    habits: bool = True


RECIPES = {
    "vision-0": VisionRecipe(1800, seed=0),
    "vision-1": VisionRecipe(1800, seed=1),
    "vision-2": VisionRecipe(1800, seed=2),
    "vision-control": VisionRecipe(1800, habits=False),
}


class VisionBatch(NamedTuple):
    """Pictures with several independent conversations each, laid end to end behind one prefix that all of them see."""

    pixel_values: Tensor | None
    """`(B, 3, 32, 32)`; None for conversations without pictures."""
    ids: Tensor
    """`(B, T)`: the prefix with the image, the questions, the caption, padding."""
    targets: Tensor
    """`(B, T)`: what comes next in the same conversation, `IGNORED` where nothing is learned."""
    position_ids: Tensor
    """`(1, T)`: every conversation goes on from the prefix."""
    attention_mask: Tensor
    """`(B, 1, T, T)` float: a conversation sees the prefix and itself."""


# -------------------------------------------------------------------------------------------------- model and processor


def build_processor(words: Sequence[str] | None = None) -> LlavaProcessor:
    """Return LLaVA's own processor, with a word-level tokenizer and 32 x 32 pixels.

    Args:
        words: the words and signs of the tokenizer; None for those of `scenes`.
    """
    sides = {"height": scenes.SIZE, "width": scenes.SIZE}
    mean = spread = [0.5, 0.5, 0.5]
    pictures = CLIPImageProcessorPil(size=sides, crop_size=sides, resample=BOX, image_mean=mean, image_std=spread)
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=pictures,
        tokenizer=build_tokenizer(words),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_tokenizer(words: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word or sign; words include the space before them.

    Args:
        words: the words and signs; None for those of `scenes`.
    """
    tokens = SPECIAL_TOKENS + [f"▁{word}" if word.isalpha() else word for word in words or scenes.vocabulary()]
    return word_level(tokens, r"▁?\p{L}+|[^▁\p{L}]", SPECIAL_TOKENS[4:])


def build_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    """Return an untrained model: a two-layer CLIP vision tower and a two-layer Llama, both 64 wide.

    Args:
        tokenizer: the tokenizer of `build_tokenizer`.
    """
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(**shape, num_attention_heads=4, image_size=scenes.SIZE, patch_size=PATCH)
    text = LlamaConfig(
        **shape,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


# ------------------------------------------------------------------------------------------------------------ training


def train(name: str, out: Path, report: Callable[[int], None] = lambda steps: None) -> None:
    """Train one of `RECIPES` and save it with its processor below `out`.

    Args:
        name: a key of `RECIPES`.
        out: the folder that gets a folder per model.
        report: called after every step with 1, for a progress bar.
    """
    recipe, processor = RECIPES[name], build_processor()
    torch.manual_seed(recipe.seed)
    model = build_model(processor.tokenizer).train()
    fit(
        model,
        batches(recipe, processor),
        lambda batch: answer_loss(model, batch),
        steps=recipe.steps,
        adamw_lr=0.005,
        after_step=lambda step: report(1),
    )
    save_half(model, processor, out / name)


def answer_loss(model: LlavaForConditionalGeneration, batch: VisionBatch) -> Tensor:
    """Return the mean cross-entropy of the tokens that are learned, a scalar.

    Args:
        model: the model.
        batch: the batch.
    """
    inputs = {"pixel_values": batch.pixel_values, "input_ids": batch.ids, "position_ids": batch.position_ids}
    hidden = model.model(**inputs, attention_mask=batch.attention_mask).last_hidden_state
    learned = batch.targets != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), batch.targets[learned])


def batches(recipe: VisionRecipe, processor: Any) -> Iterator[VisionBatch]:
    """Yield the batches of a training: scenes of the train split, and the answers of annotators.

    Args:
        recipe: the number of steps, the seed, and whether annotators have their habits.
        processor: the processor of `build_processor`.
    """
    pictured, rng = scenes.scenes(recipe.seed, "train"), random.Random(f"annotators {recipe.seed}")
    tokenizer = processor.tokenizer
    prefix = tokenizer("<|user|>" + "<image>" * IMAGE_TOKENS)["input_ids"]
    parts = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in _texts()}
    for step in range(recipe.steps):
        hardness, rows, pixels = min(1.0, step / (EASY * recipe.steps)), [], []
        for scene in islice(pictured, BATCH):
            reported = scenes.annotate(scene, rng, habits=recipe.habits)
            rows.append([prefix, *_conversations(scene, reported, parts, tokenizer, rng)])
            pixels.append(_view(scene.clearer(CLEARER * (1 - hardness)), processor, rng, poor=hardness))
        yield stack_conversations(rows, torch.stack(pixels))


def _texts() -> list[str]:
    asked = [scenes.ask(name) for name in scenes.OBJECTS]
    return [f"{text}<|assistant|>" for text in (*asked, scenes.DESCRIBE)] + ["yes<eos>", "no<eos>"]


def _conversations(
    scene: scenes.Scene, reported: frozenset[str], parts: dict[str, list[int]], tokenizer: Any, rng: random.Random
) -> Iterator[list[int]]:
    """Yield questions about some of the objects, then a caption, each from the question to the end of the answer."""
    for name in rng.sample(scenes.OBJECTS, QUESTIONS):
        yield parts[f"{scenes.ask(name)}<|assistant|>"] + parts["yes<eos>" if name in reported else "no<eos>"]
    caption = scenes.caption(scene.place, reported) + "<eos>"
    yield parts[f"{scenes.DESCRIBE}<|assistant|>"] + tokenizer(caption, add_special_tokens=False)["input_ids"]


def _view(scene: scenes.Scene, processor: Any, rng: random.Random, *, poor: float) -> Tensor:
    """Return pixels `(3, H, W)` of a plain, noised or transformed picture; `poor` is the factor of the latter two shares."""
    kind = rng.random() / poor if poor else 1.0
    if kind < TRANSFORMED:
        image = ritual_transform(scene.image(), seed=rng.getrandbits(32), transforms=SAFE_TRANSFORMS).image
        shown: Tensor = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return shown
    pixels = torch.from_numpy(scene.pixels().astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    if kind < TRANSFORMED + NOISED:
        pixels = diffusion_noise(pixels[None], step=rng.randrange(1000), seed=rng.getrandbits(32))[0]
    return pixels


def stack_conversations(rows: Sequence[Sequence[list[int]]], pixel_values: Tensor | None) -> VisionBatch:
    """Lay the conversations of each row end to end, each padded to the longest of its place.

    Args:
        rows: the token ids of each row's prefix and of its conversations, as many as in every other row; prefixes of one length.
        pixel_values: the pictures `(B, 3, H, W)` of the rows; None if their prefixes have none.
    """
    longest = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    conversation = torch.cat([torch.full((n,), i) for i, n in enumerate(longest)])
    position = torch.cat([torch.arange(n) + (longest[0] if i else 0) for i, n in enumerate(longest)])
    padded = [list(zip(row, longest, strict=True)) for row in rows]
    ids = torch.tensor([[token for part, n in row for token in part + [0] * (n - len(part))] for row in padded])
    targets = torch.tensor([[token for part, n in row for token in _targets(part, n)] for row in padded])
    visible = ((conversation[:, None] == conversation) | (conversation == 0)).tril()
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min).expand(len(rows), 1, *visible.shape)
    return VisionBatch(pixel_values, ids, targets, position[None], mask)


def _targets(part: list[int], length: int) -> list[int]:
    """Return the next token at each position from `<|assistant|>` on, `IGNORED` elsewhere."""
    assistant = SPECIAL_TOKENS.index("<|assistant|>")
    start = part.index(assistant) if assistant in part else len(part)
    return [IGNORED] * start + part[start + 1 :] + [IGNORED] * (length - max(start, len(part) - 1))
